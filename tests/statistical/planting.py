"""How a bug is planted: the package's own functions are others within a ``with``."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@contextmanager
def replaced(module: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Puts ``make(original)`` wherever the package has bound ``module.name``, under whatever name and in whatever module."""
    original = getattr(importlib.import_module(module), name)
    planted = functools.wraps(original)(make(original))
    with ExitStack() as patches:
        for loaded in list(sys.modules.values()):
            if getattr(loaded, "__name__", "").split(".")[0] not in ("free", "free_kernels"):
                continue
            for bound, value in list(vars(loaded).items()):
                if value is original:
                    patches.enter_context(mock.patch.object(loaded, bound, planted))
        yield


@dataclass(frozen=True)
class Mutation:
    """A bug that the checks must see."""

    plant: Callable[[], Any]
    """Makes a context manager within which the bug is in the package."""
    checks: tuple[str, ...]
    """Of ``tests.statistical.checks.CHECKS``; one has to reject at the budget, all of them are run."""


def method(where: str, name: str, planted: Callable[..., Any]) -> Callable[[], Any]:
    """Puts ``planted`` in the place of a method of the class at ``where`` ("module:class")."""
    module, _, owner = where.partition(":")
    return lambda: mock.patch.object(getattr(importlib.import_module(module), owner), name, planted)


@contextmanager
def within(module: str, owner: str, method: str, **changed: Any) -> Iterator[None]:
    """While ``owner.method`` runs, methods of tensors are others."""
    cls = getattr(importlib.import_module(module), owner)
    original = getattr(cls, method)

    @functools.wraps(original)
    def planted(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as patches:
            for name, change in changed.items():
                patches.enter_context(mock.patch.object(torch.Tensor, name, change))
            return original(*args, **kwargs)

    with mock.patch.object(cls, method, planted):
        yield
