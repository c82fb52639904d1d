"""The transform of a patch in Triton, which the kernels of learned gains share."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def patch_offsets(P: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where each number of a patch P by Q is in it, int32 [ROWS, COLUMNS], and which of these are in it at all."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return row * Q + column, (row < P) & (column < Q)


@triton.jit
def load_square(matrix_ptr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """A matrix [SIZE, SIZE] as float32 [PADDED, PADDED], zero beyond."""
    row, column = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
    mask = (row < SIZE) & (column < SIZE)
    return tl.load(matrix_ptr + row * SIZE + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def to_frequencies(patch, rows, columns):
    """rows @ patch @ columns.T in float32 throughout."""
    return tl.dot(tl.dot(rows, patch, input_precision="ieee"), tl.trans(columns), input_precision="ieee")


@triton.jit
def to_numbers(frequencies, rows, columns):
    """The inverse: rows.T @ frequencies @ columns."""
    return tl.dot(tl.dot(tl.trans(rows), frequencies, input_precision="ieee"), columns, input_precision="ieee")


def padded(size: int) -> int:
    """A side as the matrix product takes it."""
    return max(16, triton.next_power_of_2(size))
