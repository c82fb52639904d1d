"""The steps of a window in Triton: one launch of one program a sample."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import check_programs, eager, on_device


@triton.jit
def span_kernel(
    step_ptr,  # int64 [B]
    reach_ptr,  # int64 [S]
    first_ptr,  # int64 [B]
    length_ptr,  # int64 [B]
    steps_ptr,  # int64 [B, W]
    sample_ptr,  # int64 [B, W]
    num_steps,
    window,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr + sample)
    first = tl.minimum(step, num_steps - 1)
    length = tl.minimum(tl.load(reach_ptr + first) - step + 1, window)
    tl.store(first_ptr + sample, first)
    tl.store(length_ptr + sample, length)
    column = tl.arange(0, COLUMNS)
    at = sample * window + column
    tl.store(steps_ptr + at, tl.minimum(first + column, num_steps - 1), mask=column < window)
    tl.store(sample_ptr + at, sample + column * 0, mask=column < window)


def span(
    step: torch.Tensor, reach: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """step and length [B], steps and sample [B, W], int64."""
    return (_span if eager(step, reach) else _span_op)(step, reach, window)


def _span(
    step: torch.Tensor, reach: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    step, reach = step.contiguous(), reach.contiguous()
    first, length = torch.empty_like(step), torch.empty_like(step)
    steps, sample = (step.new_empty(len(step), window) for _ in range(2))
    with on_device(step):
        span_kernel[(check_programs("step", len(step)),)](
            step,
            reach,
            first,
            length,
            steps,
            sample,
            len(reach),
            window,
            COLUMNS=triton.next_power_of_2(window),
        )
    return first, length, steps, sample


_span_op = torch.library.custom_op(
    "free_kernels::span",
    _span,
    mutates_args=(),
    schema="(Tensor step, Tensor reach, int window) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_span_op.register_fake
def _(step: torch.Tensor, reach: torch.Tensor, window: int) -> tuple[torch.Tensor, ...]:
    batch = step.shape[0]
    return step.new_empty(batch), step.new_empty(batch), step.new_empty(batch, window), step.new_empty(batch, window)
