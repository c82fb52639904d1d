"""What is known of a model from one call to the next: kept with the model, weakly, and gone when it is gone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch.utils.weak import WeakIdKeyDictionary

from free.targets import Target

T = TypeVar("T")

_KNOWN = WeakIdKeyDictionary()
"""By model. What is kept here must not refer to its model, which would then never go."""


def memory_of(target: Target) -> dict[Hashable, Any]:
    """What is known of the target's model; all targets of one model share it.

    A model that cannot be referred to weakly has none of its own: then it is the target's.
    """
    model = target.model if target.module is None else target.module
    try:
        return _KNOWN.setdefault(model, {})
    except TypeError:
        return _KNOWN.setdefault(target, {})


def remember(target: Target, key: Hashable, make: Callable[[], T]) -> T:
    """What is known of the target's model under ``key``; made if it is not there."""
    memory = memory_of(target)
    if key not in memory:
        memory[key] = make()
    return memory[key]
