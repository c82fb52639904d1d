"""Whose noise has been heard: keys kept once, however many statistics of however many calls speak of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set
from itertools import islice


class KeyLog(Collection[int]):
    """Keys in the order in which they were first heard."""

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self.add(keys)

    def add(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._place.setdefault(key, len(self._place))

    def isdisjoint(self, keys: Iterable[int]) -> bool:
        return self._place.keys().isdisjoint(keys)

    def heard(self) -> HeardKeys:
        """Those so far, whatever is added later."""
        return HeardKeys(self._place)

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def __iter__(self) -> Iterator[int]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def together(keys: Set[int], *others: Collection[int]) -> Set[int]:
    """All of them; ``keys`` itself, and no memory, if the others are among them."""
    return keys if all(key in keys for other in others for key in other) else frozenset(keys).union(*others)


class HeardKeys(Set[int]):
    """The keys of a :class:`KeyLog` as of a moment; they are the log's, so that this takes no memory of its own."""

    def __init__(self, place: dict[int, int]) -> None:
        self._place, self._count = place, len(place)

    def __contains__(self, key: object) -> bool:
        return self._place.get(key, self._count) < self._count  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[int]:
        return islice(self._place, self._count)

    def __len__(self) -> int:
        return self._count

    def __reduce__(self) -> tuple[type[frozenset[int]], tuple[list[int]]]:
        return frozenset, (list(self),)

    @classmethod
    def _from_iterable(cls, keys: Iterable[int]) -> Set[int]:  # type: ignore[override]
        return frozenset(keys)
