"""What a round takes by its window, measured on the device at hand."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from free.targets.ranks import ALONE, Ranks
from free.windows.schedule import WINDOWS

DEAR = 1.8  # doubling the states is too dear if it takes this many times the seconds
_REPEATS = 2  # of a measurement, after the first one; the least counts, as a busy machine only adds
_ROUNDS_ON_CUDA = 3  # rounds a measurement, so that the final synchronize is a small part
_MEASUREMENTS = 3  # that are remembered
_PATIENCE = 50.0  # times what a measurement took pass before the next one
_SOON = (1.0, 5.0)  # seconds before the second and the third: one alone may have met a busy machine


@dataclass
class RoundSeconds:
    """Seconds of a round by the number of states in it."""

    states: np.ndarray
    """float64 [N], ascending."""
    seconds: np.ndarray
    """float64 [N], never falling: a wider window that took less shows what a narrower one takes at most."""

    def __post_init__(self) -> None:
        self.seconds = np.minimum.accumulate(self.seconds[::-1])[::-1]

    def least(self, other: RoundSeconds) -> RoundSeconds:
        """The lesser of two measurements of one thing, of which one may have gone further: a busy machine only adds."""
        longer, shorter = sorted((self, other), key=lambda one: len(one.states), reverse=True)
        seconds = longer.seconds.copy()
        common = len(shorter.states)
        seconds[:common] = np.minimum(seconds[:common], shorter.seconds)
        return RoundSeconds(longer.states, seconds)

    def at(self, states: np.ndarray) -> np.ndarray:
        """Interpolated; beyond what was measured, on the line of the last two."""
        inside = np.interp(states, self.states, self.seconds)
        if len(self.states) == 1:
            return self.seconds[0] * np.maximum(1.0, states / self.states[0])
        slopes = np.diff(self.seconds) / np.diff(self.states)
        below, above = np.minimum(states - self.states[0], 0.0), np.maximum(states - self.states[-1], 0.0)
        return np.maximum(inside + slopes[0] * below + slopes[-1] * above, 0.1 * self.seconds[0])

    def windows(self, batch: int) -> np.ndarray:
        """int64 [M]: those worth weighing; the measurement ended where wider ones are no cheaper a state."""
        return np.array([window for window in WINDOWS if window * batch <= max(self.states[-1], batch)])


class Measurements:
    """Of one kind of round, the last few: made again from time to time, so that a machine that was busy once does not decide
    for good.
    """

    def __init__(self) -> None:
        self._made: deque[RoundSeconds] = deque(maxlen=_MEASUREMENTS)
        self._again = -float("inf")
        self._soon = list(_SOON)

    def latest(self, measure: Callable[[], RoundSeconds], ranks: Ranks = ALONE) -> RoundSeconds:
        """What the last ones say together, after another one if it is time for some of ``ranks``, who measure together."""
        begin = time.perf_counter()
        if ranks.any(begin >= self._again):
            self._made.append(measure())
            end = time.perf_counter()
            self._again = end + (self._soon.pop(0) if self._soon else max(_PATIENCE * (end - begin), _SOON[-1]))
        return functools.reduce(RoundSeconds.least, self._made)


def by_window(run: Callable[[int], Any], device: torch.device, widest: int, ranks: Ranks = ALONE) -> dict[int, float]:
    """Seconds of ``run(window)`` for wider and wider windows, until wider ones are no cheaper a state.

    That takes two doublings in a row: a small network on a CPU may take twice the time for the second state, because it
    leaves the code path for a single row, and hardly more for the next thirty. Processes that run together go by what the
    first of them measured.
    """
    taken: dict[int, float] = {}
    dear = 0
    for window in (window for window in WINDOWS if window <= widest):
        run(window)  # shapes that are met for the first time are slow
        taken[window] = _timed(run, window, device, ranks)
        # the narrower one takes turns with it: of a machine that is busy at times, neither sees more
        pair = (window, window // 2) if window > 1 else (window,)
        for _ in range(_REPEATS):
            for one in pair:
                taken[one] = min(taken[one], _timed(run, one, device, ranks))
        # twice as wide goes less than twice as far
        dear = dear + 1 if window > 1 and taken[window] > DEAR * taken[window // 2] else 0
        if dear == 2:
            break
    return taken


def seconds_now(device: torch.device) -> float:
    """A clock for what the host does or waits for; two looks at it say how long something took."""
    # a single thread's own time is not stretched by what else the machine does
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time() if alone else time.perf_counter()


def _timed(run: Callable[[int], Any], window: int, device: torch.device, ranks: Ranks) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_ROUNDS_ON_CUDA):
            run(window)
        torch.cuda.synchronize(device)
        return ranks.first((time.perf_counter() - begin) / _ROUNDS_ON_CUDA)
    # a thread's own time does not tell of a wait for other processes
    clock = time.perf_counter if ranks.size > 1 else functools.partial(seconds_now, device)
    begin = clock()
    run(window)
    return ranks.first(clock() - begin)
