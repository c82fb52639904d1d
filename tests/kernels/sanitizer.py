"""A memory checker for Triton's interpreter: what ``compute-sanitizer`` tells on a GPU, told on a CPU.

Every load and store of a launch is held to the elements of the tensors that it was given, strides included: memory between
the rows of a view is not the kernel's. The programs of a launch run in any order, so none may touch what another writes.
The threads of a program meet at barriers only, so between two of them none may touch what another has written or read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

NOBODY, SEVERAL = -1, -2


def elements(tensors: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of all elements of the tensors, ascending and each once, and the size of each in bytes: uint64, int64."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        size = tensor.element_size()
        places = np.array(tensor.data_ptr(), np.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            places = places[..., None] + np.arange(length) * stride * size
        sizes.update(dict.fromkeys(places.ravel().tolist(), size))
    addresses = np.array(sorted(sizes), np.uint64)
    return addresses, np.array([sizes[int(address)] for address in addresses], np.int64)


class Access(NamedTuple):
    found: np.ndarray  # int64: which elements of a launch
    lanes: np.ndarray  # int64: which pointer of the load or store goes there


class Launch:
    """What the programs of one launch have read and written so far."""

    def __init__(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        self.name = name
        self.addresses, self.sizes = elements(tensors)
        self.reader = np.full(len(self.addresses), NOBODY)
        self.writer = np.full(len(self.addresses), NOBODY)
        self.barriers = 0
        self.written_after = np.full(len(self.addresses), NOBODY)  # how many barriers the writer had passed
        self.read_after = np.full(len(self.addresses), NOBODY)
        self.lane = np.full(len(self.addresses), NOBODY)  # of the tensor of pointers that read it last

    def places(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> Access:
        """Where among ``addresses`` an access goes; raises AssertionError if it goes anywhere else."""
        mask = np.broadcast_to(mask, pointers.shape)
        wanted, lanes = pointers[mask], np.flatnonzero(mask)
        found = np.searchsorted(self.addresses, wanted)
        inside = found < len(self.addresses)
        inside[inside] = self.addresses[found[inside]] == wanted[inside]
        assert inside.all(), f"{self.name}: {(~inside).sum()} of {wanted.size} elements {kind} lie in none of its tensors"
        assert (self.sizes[found] == size).all(), f"{self.name}: elements of another size than {size} bytes {kind}"
        return Access(found, lanes)

    def load(self, program: int, access: Access) -> None:
        found = access.found
        writer = self.writer[found]
        assert np.isin(writer, (NOBODY, program)).all(), f"{self.name}: one program reads what another writes"
        fresh = (writer == program) & (self.written_after[found] == self.barriers)
        assert not fresh.any(), f"{self.name}: a program reads what it wrote, with no barrier in between"
        self.reader[found] = np.where(np.isin(self.reader[found], (NOBODY, program)), program, SEVERAL)
        self.read_after[found], self.lane[found] = self.barriers, access.lanes

    def store(self, program: int, access: Access) -> None:
        found = access.found
        assert len(np.unique(found)) == len(found), f"{self.name}: two threads write the same element"
        others = np.isin(self.writer[found], (NOBODY, program)) & np.isin(self.reader[found], (NOBODY, program))
        assert others.all(), f"{self.name}: one program writes what another reads or writes"
        fresh = (self.reader[found] == program) & (self.read_after[found] == self.barriers)
        late = fresh & (self.lane[found] != access.lanes)
        assert not late.any(), f"{self.name}: a thread writes what another of its program read, with no barrier in between"
        self.writer[found], self.written_after[found] = program, self.barriers


@contextmanager
def watched() -> Iterator[None]:
    """Within it a kernel that touches what it should not ends in triton's InterpreterError, which names kernel and fault."""
    from triton.runtime import interpreter

    current: list[Launch] = []
    builder = interpreter.InterpreterBuilder
    launch, load, store, barrier = (
        interpreter.GridExecutor.__call__,
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_barrier,
    )

    def program(self: Any) -> int:
        x, y, z = self.grid_idx
        return (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def watched_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        current.append(Launch(self.fn.__name__, tensors))
        try:
            launch(self, *args, **kwargs)
        finally:
            current.pop()

    def watched_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        found = current[-1].places("read", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        current[-1].load(program(self), found)
        return load(self, ptrs, mask, *others)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        found = current[-1].places("written", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        current[-1].store(program(self), found)
        return store(self, ptrs, value, mask, *others)

    def watched_barrier(self: Any) -> Any:
        current[-1].barriers += 1
        return barrier(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", watched_launch)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "create_barrier", watched_barrier)
        yield
