"""What a round would launch on a GPU, counted without one: on meta tensors, as a graph would record it."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import free_kernels

_MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "set_", "resize_")


class Operations(TorchDispatchMode):
    """Within this context: what is launched, kernels and copies, by name.

    A view costs nothing, nor does memory that is not filled. An operation of torch is one launch, as nearly all that a round
    uses are; a copy of many tensors is one if they are what torch's own launcher takes at once, else one for each. The
    kernels of :mod:`free_kernels` are noted where they are launched, with whatever their launchers do before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _MEMORY:
            self.count(name, _copies(*args[:2]) if name == "_foreach_copy_" else 1)
        return func(*args, **(kwargs or {}))

    def count(self, name: str, launches: int = 1) -> None:
        if not self._paused:
            self.counts[name] += launches

    def total(self) -> int:
        return self.counts.total()

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, of which nothing is counted."""

        def called(*args: Any, **kwargs: Any) -> Any:
            before, self._paused = self._paused, True
            try:
                return function(*args, **kwargs)
            finally:
                self._paused = before

        return called

    def __enter__(self) -> Operations:
        self._patches = ExitStack()
        # the kernels are asked for, and the device is one that has none
        self._patches.enter_context(mock.patch("free_kernels.dispatch._require_triton"))
        for module in _kernel_modules():
            for name, value in vars(module).items():
                if isinstance(value, _kernel_class()):
                    self._patches.enter_context(mock.patch.object(module, name, _Noted(name, self)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()


class _Noted:
    """In place of a kernel: a launch is noted."""

    def __init__(self, name: str, operations: Operations) -> None:
        self._name, self._operations = name, operations

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: Any, **__: Any) -> None:
        self._operations.count(self._name)


def _kernel_class() -> type:
    from triton.runtime import KernelInterface

    return KernelInterface


def _kernel_modules() -> list[Any]:
    packages = [info.name for info in pkgutil.iter_modules(free_kernels.__path__) if info.ispkg]
    # where there is no GPU they are the interpreter's from their import on, as the tests of the kernels need them
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        return [importlib.import_module(f"free_kernels.{name}.kernel") for name in packages]


def _copies(into: list[torch.Tensor], source: list[torch.Tensor]) -> int:
    """Launches of ``torch._foreach_copy_``: one for tensors of one dtype that lie in memory as what is copied does."""
    pairs = list(zip(into, source, strict=True))
    together = len({(a.dtype, b.dtype) for a, b in pairs}) == 1 and all(
        a.stride() == b.stride() and a.is_contiguous() for a, b in pairs
    )
    return 1 if together else len(pairs)
