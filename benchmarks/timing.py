"""Medians of device time (of wall time without a device), with inputs that are not in the cache if not said otherwise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from free.sampling.recording import Recording

REPEATS = 50
_FLUSH_BYTES = 2**28  # several times the last-level cache of any device at hand
_AHEAD = 20_000_000  # clock cycles, some 10 ms, in which a host launches what is timed
_AWAKE = 0.1  # seconds of work until a device that idled is at its clock


def median_microseconds(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS, flush: bool = True) -> float:
    """The median over ``repeats`` calls, after one that is not counted; without ``flush`` one follows on the other."""
    run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - begin))
        return statistics.median(times)
    wake(device)
    # read, not written: what is written stays in the cache, and the kernel that is timed would have to evict it
    scratch = torch.zeros(_FLUSH_BYTES // 4 if flush else 0, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    if not flush:
        # the host is ahead of the device for all of them, lest its own launches be timed
        torch.cuda._sleep(_AHEAD)
    for begin_event, end_event in events:
        if flush:
            scratch.sum()
        begin_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * begin.elapsed_time(end) for begin, end in events)


def wake(device: torch.device) -> None:
    """Bring a CUDA device to its clock, which falls while the host compiles or records."""
    square = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + _AWAKE
    while time.perf_counter() < end:
        square @ square
        torch.cuda.synchronize(device)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one CUDA graph."""
    return Recording(run, torch.cuda.graph_pool_handle())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written ones counted, of a copy too large for any cache."""
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * median_microseconds(lambda: target.copy_(source), device, 20))
