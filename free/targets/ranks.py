"""The processes that evaluate a target together, and what they must agree on; most targets have a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])


class Ranks:
    """One process: all is as it is. Several of them are :class:`free.parallel.group.Group`.

    Whoever samples asks here for whatever must not differ between processes that go through the same rounds.
    """

    size = 1
    """How many processes there are."""

    @contextmanager
    def call(self, request: Any, drafter: Any, **settings: Any) -> Iterator[None]:
        """The context of one call of a sampler; several processes must be asked for the same, and end together.

        Args:
            request: the :class:`free.sampling.request.Request`.
            drafter: of the call, or None.
            settings: what else was asked for.
        """
        yield

    def first(self, number: float) -> float:
        """The number as the first process has it."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return flag

    def settled(self, settle: Callable[[], T]) -> T:
        """What ``settle`` returns, a (named) tuple of tensors and Nones, as the first process has it; all call it."""
        return settle()


ALONE = Ranks()
