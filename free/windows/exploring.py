"""Windows chosen by the seconds of the rounds that a run takes anyway, where no round can be taken for its time alone.

Whoever is called by someone else's loop cannot time rounds before it begins. It widens its windows on the way: the next
wider one is tried as long as it would pay if its rounds took no longer than those of the last one. Such rounds are not
lost, they settle what any round of their width settles. What they took is kept for the next run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from free.processes import ReverseProcess
from free.windows.automatic import WORTHWHILE, AutoWindow, Experience, expected_advance
from free.windows.schedule import WINDOWS
from free.windows.timing import DEAR, RoundSeconds

_ROUNDS = 2  # of a window: shapes that are met for the first time are slow
_TRIES = 3  # of a window in one run, if its rounds have fewer states than they might
_LATEST = 8  # rounds of as many states that count; the least of them does, as a busy machine only adds


@dataclass
class TimedExperience(Experience):
    """And what whole rounds took. Which of them were taken follows from samples: it is known of the same keys."""

    rounds: Counter[int] = field(default_factory=Counter)
    """By window."""
    latest: dict[int, deque[float]] = field(default_factory=dict)
    """Seconds of the latest, by states."""

    def time(self, window: int, states: int, seconds: float) -> None:
        """A round of ``window`` states a sample, ``states`` in all."""
        self.rounds[window] += 1
        self.latest.setdefault(states, deque(maxlen=_LATEST)).append(seconds)

    def seconds(self, batch: int) -> RoundSeconds:
        """By states; of rounds of ``batch`` states, with nothing to compare them with, where none was seen."""
        states = sorted(self.latest) or [batch]
        taken = [min(self.latest.get(one, [1.0])) for one in states]
        return RoundSeconds(np.array(states, dtype=float), np.array(taken))


class ExploringWindow(AutoWindow):
    """As :class:`AutoWindow`, of rounds whose seconds are told as they pass.

    Args:
        experience: of earlier runs, and of this one from here on.
        process, batch: as there.
    """

    experience: TimedExperience

    def __init__(self, experience: TimedExperience, process: ReverseProcess, batch: int) -> None:
        super().__init__(experience.seconds(batch), experience, process, batch)
        self._batch, self._num_steps = batch, process.num_steps
        self._tries: Counter[int] = Counter()
        self._tried_again = False

    def time(self, window: int, states: int, seconds: float) -> None:
        self.experience.time(window, states, seconds)
        self.seconds = self.experience.seconds(self._batch)
        self._windows = self.seconds.windows(self._batch)

    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        chosen = self._untried(step, rows)
        if chosen is None:
            chosen = self._again(super().window(step, under_way, rows), step, rows)
        return chosen

    def _untried(self, step: np.ndarray, rows: int) -> int | None:
        """The narrowest window that was hardly seen, if it might pay and its rounds can be whole."""
        for window in WINDOWS:
            # the first round of a run is of one state a sample, and is not timed
            if self.experience.rounds[window] >= (1 if window == 1 else _ROUNDS):
                continue
            whole = window <= min(self.widest, self._num_steps - int(step.max())) and self._tries[window] < _TRIES
            if whole and (window == 1 or self._may_pay(window, step, rows)):
                self._tries[window] += 1
                return window
            return None
        return None

    def _again(self, chosen: int, step: np.ndarray, rows: int) -> int:
        """Once a run the next wider one: that its rounds took long may have been for a busy machine."""
        wider = 2 * chosen
        whole = wider <= self._num_steps - int(step.max()) and self.experience.rounds[wider] >= _ROUNDS
        if self._tried_again or not whole or not self._may_pay(wider, step, rows):
            return chosen
        self._tried_again = True
        return wider

    def _may_pay(self, window: int, step: np.ndarray, rows: int) -> bool:
        """Whether ``window`` would be the best one if its rounds took no longer than those of half of it, and the two before
        it say that they might.
        """
        seconds = self.seconds.at(rows * window * np.array([1 / 8, 1 / 4, 1 / 2]))
        if window >= 8 and (seconds[1:] > DEAR * seconds[:-1]).all():
            return False
        wide = np.array([window])
        settled = expected_advance(self.acceptance, step, wide) * self.experience.correction(wide)  # [N, 1]
        return bool(settled.sum() / seconds[-1] > WORTHWHILE * self.rate(step, rows).sum(0).max())
