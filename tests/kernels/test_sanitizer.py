"""The memory checker of the interpreter finds each fault that it is there for, and nothing in a kernel without one."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def copy(source_ptr, target_ptr, shift, source_stride, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offsets < size) if MASKED else (offsets >= 0)
    values = tl.load(source_ptr + (offsets + shift) * source_stride, mask=mask)
    tl.store(target_ptr + offsets, values, mask=mask)


def run(kernel: object, grid: int, *args: object, **constants: object) -> None:
    triton.jit(kernel)[(grid,)](*args, **constants)


def test_a_sound_kernel_passes() -> None:
    source, target = torch.arange(20.0).view(10, 2)[:, 0], torch.empty(10)
    run(copy, 3, source, target, 0, 2, 10, MASKED=True, BLOCK=4)
    assert torch.equal(source, target)


@pytest.mark.parametrize(
    ("shift", "source_stride", "masked", "kind"),
    [(1, 1, True, "read"), (-1, 1, True, "read"), (0, 1, False, "read"), (0, 2, True, "read")],
    ids=["one past the end", "one before the start", "no mask", "another stride"],
)
def test_memory_that_is_not_the_launchs(shift: int, source_stride: int, masked: bool, kind: str) -> None:
    whole = torch.zeros(40)  # the memory exists: what is wrong is that the kernel was not given it
    with pytest.raises(Exception, match=f"copy: .* elements {kind} lie in none of its tensors"):
        run(copy, 3, whole[8:18], torch.empty(10), shift, source_stride, 10, MASKED=masked, BLOCK=4)


def test_a_store_past_the_end() -> None:
    whole = torch.zeros(40)
    with pytest.raises(Exception, match="copy: 2 of 4 elements written lie in none of its tensors"):
        run(copy, 3, torch.zeros(12), whole[:10], 0, 1, 10, MASKED=False, BLOCK=4)


def test_the_memory_between_the_rows_of_a_view() -> None:
    with pytest.raises(Exception, match="elements read lie in none of its tensors"):
        run(copy, 1, torch.zeros(4, 4)[:, :2], torch.empty(8), 0, 1, 8, MASKED=True, BLOCK=8)


def test_programs_that_meet() -> None:
    values = torch.zeros(12)
    with pytest.raises(Exception, match="one program writes what another reads or writes"):
        run(copy, 2, values[4:], values[:8], 0, 1, 8, MASKED=True, BLOCK=4)
    with pytest.raises(Exception, match="one program reads what another writes"):
        run(copy, 2, values[:8], values[4:], 0, 1, 8, MASKED=True, BLOCK=4)


def reverse(values_ptr, again_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(values_ptr + offsets, offsets.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(again_ptr + offsets, tl.load(values_ptr + BLOCK - 1 - offsets))


def turn(values_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + BLOCK - 1 - offsets)
    if BARRIER:
        tl.debug_barrier()
    tl.store(values_ptr + offsets, values)


def test_threads_that_meet_without_a_barrier() -> None:
    again = torch.empty(8)
    run(reverse, 1, torch.empty(8), again, BARRIER=True, BLOCK=8)
    assert again.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    run(turn, 1, again, BARRIER=True, BLOCK=8)
    assert again.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(Exception, match="a program reads what it wrote, with no barrier"):
        run(reverse, 1, torch.empty(8), again, BARRIER=False, BLOCK=8)
    with pytest.raises(Exception, match="a thread writes what another of its program read, with no barrier"):
        run(turn, 1, again, BARRIER=False, BLOCK=8)


def crowd(values_ptr, BLOCK: tl.constexpr):
    tl.store(values_ptr + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


def test_threads_that_write_the_same_element() -> None:
    with pytest.raises(Exception, match="crowd: two threads write the same element"):
        run(crowd, 1, torch.empty(8), BLOCK=8)
