"""Which samples of an engine the load may not choose for."""

from __future__ import annotations

from collections.abc import Sequence

from free.parallel.engine.handle import Handle
from free.windows.automatic import MOST_KEYS


class Keys:
    """Of whom the load may not choose the windows.

    Load tells of noise: how many are under way follows from when others were finished, so from their noise, and from that of
    those before them in their slots. It is no noise of a sample's own if its key is met for the first time; else it may be,
    also of an earlier sample that has left. So a key that was met before has the window of a full engine throughout its
    rounds, and so has, from there on, whoever has the same key. What is remembered has a bound: with :data:`MOST_KEYS` keys
    all others count as met, until the engine is empty, which no noise is left in.
    """

    def __init__(self) -> None:
        self._met: set[int] = set()

    def emptied(self) -> None:
        """Nothing is waiting or under way."""
        if len(self._met) >= MOST_KEYS:
            self._met.clear()

    def meet(self, joining: Sequence[Handle], under_way: Sequence[Handle]) -> None:
        """Requests take slots beside those that are ``under_way``."""
        for i, handle in enumerate(joining):
            if handle.seed in self._met or len(self._met) >= MOST_KEYS:
                handle.of_all = True
                for other in (*under_way, *joining[:i]):
                    other.of_all |= other.seed == handle.seed
            else:
                self._met.add(handle.seed)
