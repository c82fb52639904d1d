"""What a round takes by its window, measured on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from free.windows.schedule import WINDOWS

_REPEATS = 2  # of a measurement, after the first one; the least counts, as a busy machine only adds
_ROUNDS_ON_CUDA = 3  # timed at once, so that the wait for the last one is a small part


def by_window(run: Callable[[int], Any], device: torch.device, widest: int) -> dict[int, float]:
    """Seconds of ``run(window)`` for wider and wider windows, until wider ones are no cheaper a state."""
    taken: dict[int, float] = {}
    for window in (window for window in WINDOWS if window <= widest):
        run(window)  # shapes that are met for the first time are slow
        taken[window] = _timed(run, window, device)
        # the narrower one takes turns with it: of a machine that is busy at times, neither sees more
        pair = (window, window // 2) if window > 1 else (window,)
        for _ in range(_REPEATS):
            for one in pair:
                taken[one] = min(taken[one], _timed(run, one, device))
        # twice as wide goes less than twice as far
        if window > 1 and taken[window] > 1.8 * taken[window // 2]:
            break
    return taken


def _timed(run: Callable[[int], Any], window: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_ROUNDS_ON_CUDA):
            run(window)
        torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / _ROUNDS_ON_CUDA
    # a single thread's own time is not stretched by what else the machine does
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run(window)
    return clock() - begin
