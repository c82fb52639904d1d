"""Threads that share a model take turns, a whole run long.

A run leaves things in what it runs: a hook and what it captured, a compiled forward, graphs and the memory they work in,
what a drafter prepared, a buffer that a model reuses. Two runs at a time would read each other's, and draw other samples.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from free.drafters import Drafter
from free.targets import Target

COMPILER = "torch.compile"
"""While one thread traces, another one's compiled code refuses to run, whatever model it is of."""


class _Turn:
    """A lock that its thread may take again, and its place in the order in which every thread takes those it needs."""

    _places = itertools.count()

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.place = next(self._places)


_TURNS: WeakKeyDictionary[Any, _Turn] = WeakKeyDictionary()
_NAMED: dict[str, _Turn] = {}
_LOOKUP = threading.Lock()


@contextmanager
def exclusively(*shared: Any) -> Iterator[None]:
    """Within this context no other thread is in one with any of the same objects, or of the same names (strings).

    All are waited for in one order, so that two threads never wait for each other. A thread may enter again.
    """
    with _LOOKUP:
        turns = {turn.place: turn for turn in map(_turn_of, shared)}
    with ExitStack() as during:
        for place in sorted(turns):
            during.enter_context(turns[place].lock)
        yield


def shared_by(target: Target, drafter: Drafter | None) -> Iterator[Any]:
    """What a run of ``target`` and ``drafter`` may share with another one: models, and drafters that hold anything."""
    yield _model_of(target)
    if drafter is None or not vars(drafter):
        return
    yield drafter
    for held in vars(drafter).values():
        if isinstance(held, Drafter):
            yield from shared_by(target, held)
        elif isinstance(held, Target) or callable(held):
            yield _model_of(held)


def _model_of(model: Any) -> Any:
    """The object that a target, a compiled module, a bound method or a ``functools.partial`` runs."""
    if isinstance(model, Target):
        model = model.model
    while isinstance(model, functools.partial):
        model = model.func
    model = getattr(model, "__self__", model)
    return getattr(model, "_orig_mod", model)


def _turn_of(shared: Any) -> _Turn:
    """The lock of an object or a name; objects without weak references share one."""
    if not isinstance(shared, str):
        try:
            return _TURNS.setdefault(shared, _Turn())
        except TypeError:
            shared = "the rest"
    return _NAMED.setdefault(shared, _Turn())
