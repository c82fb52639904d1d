"""What is finite, in two Triton launches: marks of every part of every row, then one program a sample that reads them."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import block_size, check_programs, chunks_of, eager, on_device, rows_of

MAX_MARKS = 4096
"""Marks that a program holds at a time."""


@triton.jit
def marked(row_ptr, offsets, left):
    """1 where one of the ``left`` first values of a block is not finite."""
    value = tl.load(row_ptr + offsets, mask=offsets < left, other=0.0).to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), 0, 1)  # NaN compares false


@triton.jit
def mark_kernel(
    output_ptr,  # float [B, W, D], strides output_batch, output_column
    unconditional_ptr,  # float [B, W, D], strides unconditional_batch, unconditional_column; not read unless GUIDED
    state_ptr,  # float [B, D], rows state_row apart
    marks_ptr,  # uint8 [B, W + 1, CHUNKS]; the last column is the state's
    output_batch,
    output_column,
    unconditional_batch,
    unconditional_column,
    state_row,
    window,
    numel,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = (tl.program_id(0) % CHUNKS).to(tl.int64)
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    sample = row // (window + 1)
    column = row % (window + 1)
    output_row = output_ptr + sample * output_batch + column * output_column
    unconditional_row = unconditional_ptr + sample * unconditional_batch + column * unconditional_column
    offsets = tl.arange(0, BLOCK)
    marks = tl.full((BLOCK,), 0, tl.int32)
    for tile in range(TILES):
        start = (chunk * TILES + tile) * BLOCK
        left = tl.maximum(tl.minimum(numel - start, BLOCK), 0).to(tl.int32)
        of_output = tl.where(column < window, left, 0)
        marks |= marked(output_row + start, offsets, of_output)
        if GUIDED:
            marks |= marked(unconditional_row + start, offsets, of_output)
        marks |= marked(state_ptr + sample * state_row + start, offsets, left - of_output)
    tl.store(marks_ptr + row * CHUNKS + chunk, tl.max(marks, axis=0).to(tl.uint8))


@triton.jit
def finite_kernel(
    marks_ptr,  # uint8 [B, W + 1, CHUNKS]
    length_ptr,  # int64 [B]
    usable_ptr,  # int64 [B]
    state_finite_ptr,  # uint8 [B]
    window,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PADDED)
    leading = window
    state_marked = tl.full((), 0, tl.int32)
    for tile in range(ROW_TILES):
        column = tile * ROWS + tl.arange(0, ROWS)
        at = (sample * (window + 1) + column)[:, None] * CHUNKS + chunk[None, :]
        mask = (column[:, None] <= window) & (chunk[None, :] < CHUNKS)
        marks = tl.max(tl.load(marks_ptr + at, mask=mask, other=0).to(tl.int32), axis=1)  # [ROWS]
        leading = tl.minimum(leading, tl.min(tl.where(marks > 0, column, window), axis=0))
        state_marked = tl.maximum(state_marked, tl.max(tl.where(column == window, marks, 0), axis=0))
    usable = tl.maximum(tl.minimum(tl.load(length_ptr + sample), leading), 1)
    tl.store(usable_ptr + sample, usable)
    tl.store(state_finite_ptr + sample, (1 - state_marked).to(tl.uint8))


def finite(
    target_output: torch.Tensor, length: torch.Tensor, state: torch.Tensor, unconditional_output: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B] and bool [B]."""
    call = _finite if eager(target_output, length, state) else _finite_op
    return call(target_output, length, state, unconditional_output)


def _finite(
    target_output: torch.Tensor, length: torch.Tensor, state: torch.Tensor, unconditional_output: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, window, numel = target_output.shape
    output, state = rows_of(target_output), rows_of(state)
    unconditional = output if unconditional_output is None else rows_of(unconditional_output)
    chunks, tiles = chunks_of(numel)
    chunks_padded = triton.next_power_of_2(chunks)
    rows = min(triton.next_power_of_2(window + 1), MAX_MARKS // chunks_padded)
    marks = torch.empty(batch, window + 1, chunks, dtype=torch.uint8, device=state.device)
    usable = torch.empty(batch, dtype=torch.int64, device=state.device)
    state_finite = torch.empty(batch, dtype=torch.uint8, device=state.device)
    grid = check_programs("target_output", batch * (window + 1) * chunks)
    with on_device(state):
        mark_kernel[(grid,)](
            output,
            unconditional,
            state,
            marks,
            *output.stride()[:2],
            *unconditional.stride()[:2],
            state.stride(0),
            window,
            numel,
            CHUNKS=chunks,
            TILES=tiles,
            GUIDED=unconditional_output is not None,
            BLOCK=block_size(numel),
        )
        finite_kernel[(batch,)](
            marks,
            length.contiguous(),
            usable,
            state_finite,
            window,
            CHUNKS=chunks,
            CHUNKS_PADDED=chunks_padded,
            ROWS=rows,
            ROW_TILES=triton.cdiv(window + 1, rows),
        )
    return usable, state_finite.view(torch.bool)


_finite_op = torch.library.custom_op(
    "free_kernels::finite",
    _finite,
    mutates_args=(),
    schema="(Tensor target_output, Tensor length, Tensor state, Tensor? unconditional_output) -> (Tensor, Tensor)",
)


@_finite_op.register_fake
def _(target_output: torch.Tensor, length: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return length.new_empty(length.shape), length.new_empty(length.shape, dtype=torch.bool)
