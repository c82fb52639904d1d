"""A CUDA graph's stand-in on a CPU: it replays operations on the memory that they were recorded on, whoever owns it now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import free.sampling.capture
from free.drafters import as_drafter, feature
from free.sampling.capture import Graphs
from free.sampling.loop import Run, Turn
from free.sampling.request import Options, Request, check_request
from free.sampling.statistics import SamplingStatistics
from free.sampling.window import Setup
from free.windows import FixedWindow
from free_kernels.philox import reference as philox


def request_for(model: Any, **given: Any) -> Request:
    return check_request(model, Options(**{"seed": 0, "impl": "reference", **given}))


def static_setup(model: Any, drafter: Any, window: int, **given: Any) -> Setup:
    setup = Setup.of(request_for(model, **given), as_drafter(drafter), window, "reference")
    return dataclasses.replace(setup, static_shapes=True)


def run_loop(
    setup: Setup, lag: int = 0, graphs: Graphs | None = None
) -> tuple[list[Turn], torch.Tensor, SamplingStatistics]:
    """The rounds, the samples and the statistics."""
    run = Run(setup, graphs)
    seen = list(run.turns(FixedWindow(setup.widest), lag))
    return seen, run.state, run.finish()


def rehearse(patch: pytest.MonkeyPatch) -> None:
    """Captured rounds and steps without a device, for as long as ``patch`` lasts."""
    patch.setattr(free.sampling.capture, "Recording", Rehearsal)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    patch.setattr(Rehearsal, "made", 0)
    patch.setattr(philox, "philox_pairs", _philox_pairs)
    patch.setattr(feature, "_rows", lambda chosen: torch.arange(len(chosen)))


def _philox_pairs(
    seed: torch.Tensor, step: torch.Tensor, num_counters: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As on a device: on a CPU numpy makes the same words, which a recording does not see."""
    return philox._pairs_on_device(*torch.broadcast_tensors(seed, step), num_counters, stream)


class Rehearsal:
    """In place of :class:`free.sampling.recording.Recording`.

    As a graph it keeps the memory that its operations made, and none that they found: to read what was freed is an error, as
    is to ask the device.
    """

    made = 0

    def __init__(self, function: Callable[[], Any], pool: Any) -> None:
        Rehearsal.made += 1
        for _ in range(2):
            function()
        self._tape = _Tape()
        with self._tape:
            self._result = function()

    def __call__(self) -> Any:
        self._tape.replay()
        return self._result


class _Found:
    """A tensor that was there before the recording: its memory is not held."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.dtype = tensor.dtype

    def get(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "the graph reads memory that was freed"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class _Tape(TorchDispatchMode):
    _ASKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor | None]]] = []
        self._own: dict[int, torch.Tensor] = {}
        """A tensor for each memory that was made on the way, by its address in torch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self._ASKS, f"{func} asks the device, which a graph cannot"
        found = {_memory(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        noted = tree_map(self._note, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        made: list[torch.Tensor | None] = []
        for value in tree_leaves(out):
            new = isinstance(value, torch.Tensor) and _memory(value) not in found
            if new:
                self._own[_memory(value)] = value
            made.append(value if new else None)
        self._calls.append((func, *noted, made))
        return out

    def _note(self, value: Any) -> Any:
        return _Found(value) if isinstance(value, torch.Tensor) and _memory(value) not in self._own else value

    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            args, kwargs = tree_map(lambda value: value.get() if isinstance(value, _Found) else value, (args, kwargs))
            for into, value in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                if into is not None:
                    into.copy_(value)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
