"""How wide a window to take: what a round costs on this device against how far it is expected to go.

A window of W states at step k settles ``sum over j < W of q[k] … q[k+j-1]`` steps if each draft k is accepted with
probability q[k]. With noise reuse q depends on W, so that what rounds of each W really settle corrects the sum. The window
taken is the one that settles most steps a second, W = 1 included. It may depend on settled steps only, never on noise past a
rejection: each choice is exact, whatever it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from free.processes import ReverseProcess
from free.targets.ranks import ALONE, Ranks
from free.windows.heard import HeardKeys, KeyLog
from free.windows.schedule import WINDOWS, FixedWindow, Known, Schedule, WindowPlan
from free.windows.timing import RoundSeconds

if TYPE_CHECKING:
    from typing_extensions import Self

WORTHWHILE = 1.02  # another window must be this much better, lest noise decides
_AS_GOOD = 0.99  # a narrower window with this share of the best rate is preferred
_HOPE = 0.9  # prior acceptance rate
_DOUBT = 0.1  # weight of the prior, in tests
_SMOOTHING = 0.04  # steps to either side that a step's acceptance is averaged with, of all steps
_TRUST = 40.0  # weight of the predicted advance beside the observed, in steps
_MEMORY = 0.95  # decay of the sums a round, so that a window that once did badly is tried again
MOST_KEYS = 2**17
"""Keys that an experience remembers before another one begins."""


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
    keys: KeyLog = field(default_factory=KeyLog)
    """Of all samples that it has seen, and of those that their windows were chosen by."""

    @classmethod
    def none(cls, num_steps: int) -> Self:
        """Before any run."""
        return cls(np.zeros(num_steps), np.zeros(num_steps))

    def admit(self, keys: Collection[int]) -> bool:
        """Whether this may choose for samples of ``keys`` and see them from now on: if it has seen none of them."""
        if not self.keys.isdisjoint(keys):
            return False
        self.keys.add(keys)
        return True

    def is_full(self, keys: Collection[int]) -> bool:
        """Whether it would remember more than :data:`MOST_KEYS` with ``keys``: then another one begins in its place. It is
        not emptied, as a run that is under way may still tell it of samples.
        """
        return len(self.keys) + len(keys) > MOST_KEYS

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
        ranks: of the target: processes that go through the same rounds take the same windows, the first one's.
    """

    name = "auto"
    adaptive = True

    def __init__(
        self,
        seconds: RoundSeconds,
        experience: Experience,
        process: ReverseProcess,
        batch: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.widest = min(WINDOWS[-1], process.num_steps)
        self._ranks = ranks
        self.seconds, self.experience = seconds, experience
        exact = process.exact_step.cpu().numpy()
        self._drafted = exact != np.arange(len(exact))
        self._windows = seconds.windows(batch)
        self._last: int | None = None
        self._known: tuple[float, np.ndarray] = (-1.0, np.zeros(0))

    @property
    def keys(self) -> HeardKeys:  # type: ignore[override]
        return self.experience.keys.heard()

    @property
    def acceptance(self) -> np.ndarray:
        """float64 [S]: of a draft, as far as is known."""
        tests = self.experience.tested.sum()
        if self._known[0] != tests:
            self._known = tests, self.experience.acceptance(self._drafted)
        return self._known[1]

    def rate(self, step: np.ndarray, rows: int) -> np.ndarray:
        """float64 [N, M]: steps a second that each sample is expected to settle, by window."""
        return np.maximum(self._advance(step), 1.0) / self.seconds.at(rows * self._windows.astype(float))

    def _advance(self, step: np.ndarray) -> np.ndarray:
        """float64 [N, M]: steps that a round is expected to settle."""
        return expected_advance(self.acceptance, step, self._windows) * self.experience.correction(self._windows)

    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        rate = self.rate(step, rows).sum(0)
        best = _best(rate)
        if self._last is not None and rate[best] < WORTHWHILE * rate[self._last]:
            best = self._last
        self._last = best
        return int(self._ranks.first(int(self._windows[best])))

    def learn(self, window: int, before: Known, after: Known) -> None:
        # the first window has no anchors: it says little of those to come
        typical = (after.rounds > before.rounds) & (before.step > 0)
        if typical.any():
            predicted = expected_advance(self.acceptance, before.step[typical], np.array([window])).mean()
            self.experience.note(window, float((after.step - before.step)[typical].mean()), float(predicted))
        self.experience.tested += after.tested - before.tested
        self.experience.accepted += after.accepted - before.accepted

    def fixed(self, batch: int) -> ChosenWindow:
        """The one window that it would take for all steps, whatever becomes of the samples."""
        step = np.arange(len(self._drafted))
        rounds = (1 / np.maximum(self._advance(step), 1.0)).sum(0)  # [M]
        rate = 1 / (rounds * self.seconds.at(batch * self._windows.astype(float)))
        return ChosenWindow(int(self._ranks.first(int(self._windows[_best(rate)]))), self)

    def plan(self, batch: int) -> WindowPlan:
        """The windows that it would take now, step by step."""
        step = np.arange(len(self._drafted))
        rate = self.rate(step, batch)
        chosen = np.full(len(step), _best(rate[0]))
        for k in step[1:]:
            best = _best(rate[k])
            chosen[k] = best if rate[k, best] > WORTHWHILE * rate[k, chosen[k - 1]] else chosen[k - 1]
        seconds = self.seconds.at(batch * self._windows.astype(float))
        by_window = dict(zip(self._windows.tolist(), seconds.tolist(), strict=True))
        windows = np.minimum(self._windows[chosen], len(step) - step)
        return WindowPlan(windows, self.acceptance, by_window, self.keys)


class ChosenWindow(FixedWindow):
    """One window for a whole run, chosen before it by what the chooser has seen; its rounds teach the chooser's next run."""

    def __init__(self, window: int, chooser: AutoWindow) -> None:
        super().__init__(window, chooser.name)
        self._chooser = chooser

    @property
    def keys(self) -> HeardKeys:  # type: ignore[override]
        return self._chooser.keys

    def learn(self, window: int, before: Known, after: Known) -> None:
        self._chooser.learn(window, before, after)

    def time(self, window: int, states: int, seconds: float) -> None:
        self._chooser.time(window, states, seconds)
