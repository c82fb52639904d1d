"""Householder reflection in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import block_size, check_programs, eager, on_device, rows_of


@triton.jit
def can_reflect(inner, squared_norm):
    """Whether |delta|² is positive and both sums are finite; else the noise stays as it is."""
    return (squared_norm > 0) & (squared_norm < float("inf")) & (tl.abs(inner) < float("inf"))


@triton.jit
def householder_kernel(
    noise_ptr,  # float [N, D], rows noise_row apart
    delta_ptr,  # float [N, D], rows delta_row apart
    inner_ptr,  # float [N]
    squared_norm_ptr,  # float [N]
    out_ptr,  # float32 [N, D]
    noise_row,
    delta_row,
    numel,
    BLOCK: tl.constexpr,
):
    chunks = (numel + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    inner = tl.load(inner_ptr + row).to(tl.float32)
    squared_norm = tl.load(squared_norm_ptr + row).to(tl.float32)
    reflects = can_reflect(inner, squared_norm)
    noise = tl.load(noise_ptr + row * noise_row + start + offsets, mask=offsets < left, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + row * delta_row + start + offsets, mask=offsets < tl.where(reflects, left, 0), other=0.0).to(
        tl.float32
    )
    reflected = noise - 2.0 * inner / squared_norm * delta
    tl.store(out_ptr + row * numel + start + offsets, tl.where(reflects, reflected, noise), mask=offsets < left)


def householder(noise: torch.Tensor, delta: torch.Tensor, inner: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """float32 [N, D]."""
    return (_householder if eager(noise, delta) else _householder_op)(noise, delta, inner, squared_norm)


def _householder(noise: torch.Tensor, delta: torch.Tensor, inner: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    rows, numel = noise.shape
    noise, delta = rows_of(noise), rows_of(delta)
    out = torch.empty(rows, numel, dtype=torch.float32, device=noise.device)
    block = block_size(numel)
    grid = check_programs("noise", rows * triton.cdiv(numel, block))
    with on_device(noise):
        householder_kernel[(grid,)](
            noise,
            delta,
            inner.contiguous(),
            squared_norm.contiguous(),
            out,
            noise.stride(0),
            delta.stride(0),
            numel,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return out


_householder_op = torch.library.custom_op(
    "free_kernels::householder",
    _householder,
    mutates_args=(),
    schema="(Tensor noise, Tensor delta, Tensor inner, Tensor squared_norm) -> Tensor",
)


@_householder_op.register_fake
def _(noise: torch.Tensor, *_: object) -> torch.Tensor:
    return noise.new_empty(noise.shape, dtype=torch.float32)
