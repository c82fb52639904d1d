"""Windows by load: how wide a round's are follows from how many samples are under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from free.checks import is_int
from free.windows.schedule import Schedule


class LoadWindow(Schedule):
    """Wide windows for a few samples, narrow ones for many: a forward that is full gains nothing by more states.

    Args:
        windows: W by the most samples under way that it is taken for; of more than the last one, the last one's.
            ``{1: 16, 4: 8, 16: 4}`` takes 16 states of a lone sample, 8 each of two to four, and 4 each beyond.
        most: samples under way at a time.
    """

    name = "by load"
    adaptive = True

    def __init__(self, windows: Mapping[int, int], most: int) -> None:
        self.windows = dict(sorted(windows.items()))
        self.of_all = self.of(most)
        """W of ``most`` samples: what a sample is given for which the load may not choose."""
        self.widest = max(map(self.of, range(1, most + 1)))

    def of(self, samples: int) -> int:
        """W of so many samples under way."""
        return next((window for most, window in self.windows.items() if samples <= most), [*self.windows.values()][-1])

    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        return self.of(len(step))


def check_load(windows: Mapping[Any, Any]) -> None:
    """Raise a ValueError unless ``windows`` is what a :class:`LoadWindow` takes."""
    if not windows or not all(is_int(number) and number >= 1 for pair in windows.items() for number in pair):
        raise ValueError(f"window is {windows!r}; allowed by load are ints, 1 or more, such as {{1: 16, 4: 8, 16: 4}}")
