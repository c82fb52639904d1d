"""How wide a window to take: what a round costs on this device against how far it is expected to go.

A window of W states at step k settles ``sum over j < W of q[k] … q[k+j-1]`` steps if each draft k is accepted with
probability q[k]. With noise reuse q depends on W, so that what rounds of each W really settle corrects the sum. The window
taken is the one that settles most steps a second, W = 1 included. It may depend on settled steps only, never on noise past a
rejection: each choice is exact, whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from free.processes import ReverseProcess
from free.windows.schedule import WINDOWS, Known, Schedule, WindowPlan

_WORTHWHILE = 1.02  # another window must be this much better, lest noise decides
_AS_GOOD = 0.99  # of the best rate is as good
_HOPE = 0.9  # acceptance where nothing is known
_DOUBT = 0.1  # tests that a guess counts for
_SMOOTHING = 0.04  # steps to either side that a step's acceptance is averaged with, of all steps
_TRUST = 40.0  # steps that the sum's own prediction counts for, beside those of the rounds seen
_MEMORY = 0.95  # of those, from round to round: a window that once did badly is tried again


@dataclass
class RoundSeconds:
    """Seconds of a round by the number of states in it."""

    states: np.ndarray
    """float64 [N], ascending."""
    seconds: np.ndarray
    """float64 [N], never falling."""

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


@dataclass
class Experience:
    """How drafts fared by step, and rounds by window, in all runs of one model, drafter and process so far."""

    tested: np.ndarray
    """float64 [S]."""
    accepted: np.ndarray
    """float64 [S]."""
    settled: dict[int, float] = field(default_factory=dict)
    """Steps that rounds of each window settled, later ones counting for more."""
    predicted: dict[int, float] = field(default_factory=dict)
    """Steps that they were predicted to."""

    def acceptance(self, drafted: np.ndarray) -> np.ndarray:
        """float64 [S]: of a draft at each step, averaged over its neighbours; 0 where ``drafted`` (bool [S]) is not."""
        reach = max(1, round(_SMOOTHING * len(self.tested)))
        weight = np.bartlett(2 * reach + 3)[1:-1]
        tests, accepted = (np.convolve(values, weight)[reach:-reach] for values in (self.tested, self.accepted))
        known = np.flatnonzero(self.tested)
        # where nothing was tested yet: as it was at the last step that was
        at = int(known[-1]) if len(known) else 0
        nearest = (accepted[at] + _DOUBT * _HOPE) / (tests[at] + _DOUBT)
        return np.where(drafted, (accepted + _DOUBT * nearest) / (tests + _DOUBT), 0.0)

    def note(self, window: int, settled: float, predicted: float) -> None:
        """What a round settled, and was predicted to, mean over its samples."""
        for sums, value in ((self.settled, settled), (self.predicted, predicted)):
            for other in sums:
                sums[other] *= _MEMORY
            sums[window] = sums.get(window, 0.0) + value

    def correction(self, windows: np.ndarray) -> np.ndarray:
        """float64 [M]: what rounds of each window settled over what was predicted; of an untried one, the nearest's."""
        tried = np.array(sorted(self.predicted)) if self.predicted else np.array([1])
        ratio = np.array([
            (self.settled.get(window, 0.0) + _TRUST) / (self.predicted.get(window, 0.0) + _TRUST)
            for window in tried.tolist()
        ])  # fmt: skip
        return ratio[np.abs(np.log2(windows)[:, None] - np.log2(tried)).argmin(1)]


def expected_advance(acceptance: np.ndarray, step: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """float64 [N, M]: steps that a round at each of ``step`` [N] settles with each of ``windows`` [M]."""
    widest = int(windows.max())
    padded = np.concatenate((acceptance, np.zeros(widest)))
    path = padded[step[:, None] + np.arange(widest - 1)].cumprod(1)  # [N, widest - 1]
    reached = np.concatenate((np.ones((len(step), 1)), path), 1).cumsum(1)
    return reached[:, windows - 1]


def _best(rate: np.ndarray) -> int:
    """The narrowest of those that are as good as the best: memory and energy are not free."""
    return int((rate >= _AS_GOOD * rate.max()).argmax())


class AutoWindow(Schedule):
    """The window that is expected to settle most steps a second, anew in each round.

    Args:
        seconds: of rounds, measured.
        experience: of earlier runs, and of this one from here on.
        process: of the samples.
        batch: samples that the run begins with.
    """

    name = "auto"

    def __init__(self, seconds: RoundSeconds, experience: Experience, process: ReverseProcess, batch: int) -> None:
        self.widest = min(WINDOWS[-1], process.num_steps)
        self.seconds, self.experience = seconds, experience
        exact = process.exact_step.cpu().numpy()
        self._drafted = exact != np.arange(len(exact))
        self._windows = seconds.windows(batch)
        self._last: int | None = None
        self._known: tuple[float, np.ndarray] = (-1.0, np.zeros(0))

    @property
    def acceptance(self) -> np.ndarray:
        """float64 [S]: of a draft, as far as is known."""
        tests = self.experience.tested.sum()
        if self._known[0] != tests:
            self._known = tests, self.experience.acceptance(self._drafted)
        return self._known[1]

    def rate(self, step: np.ndarray, rows: int) -> np.ndarray:
        """float64 [N, M]: steps a second that each sample is expected to settle, by window."""
        advance = expected_advance(self.acceptance, step, self._windows) * self.experience.correction(self._windows)
        return np.maximum(advance, 1.0) / self.seconds.at(rows * self._windows.astype(float))

    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        rate = self.rate(step, rows).sum(0)
        best = _best(rate)
        if self._last is not None and rate[best] < _WORTHWHILE * rate[self._last]:
            best = self._last
        self._last = best
        return int(self._windows[best])

    def learn(self, window: int, before: Known, after: Known) -> None:
        # the first window has no anchors: it says little of those to come
        typical = (after.rounds > before.rounds) & (before.step > 0)
        if typical.any():
            predicted = expected_advance(self.acceptance, before.step[typical], np.array([window])).mean()
            self.experience.note(window, float((after.step - before.step)[typical].mean()), float(predicted))
        self.experience.tested += after.tested - before.tested
        self.experience.accepted += after.accepted - before.accepted

    def plan(self, batch: int) -> WindowPlan:
        """The windows that it would take now, step by step."""
        step = np.arange(len(self._drafted))
        rate = self.rate(step, batch)
        chosen = np.full(len(step), _best(rate[0]))
        for k in step[1:]:
            best = _best(rate[k])
            chosen[k] = best if rate[k, best] > _WORTHWHILE * rate[k, chosen[k - 1]] else chosen[k - 1]
        seconds = self.seconds.at(batch * self._windows.astype(float))
        by_window = dict(zip(self._windows.tolist(), seconds.tolist(), strict=True))
        return WindowPlan(np.minimum(self._windows[chosen], len(step) - step), self.acceptance, by_window)
