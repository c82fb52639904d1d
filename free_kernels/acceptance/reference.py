"""Acceptance ratios in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from free_kernels.philox import NOISE_STREAM
from free_kernels.philox.reference import normal
from free_kernels.posterior.reference import at_step, compute_dtype, effective_window, guided, x0_estimate
from free_kernels.table import StepTable

if TYPE_CHECKING:
    from free_kernels.acceptance import Acceptance


def mean_difference(
    state: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
) -> torch.Tensor:
    """delta = (draft_mean - target_mean) / std, from guided outputs; [*step.shape, D]."""
    dtype = state.dtype
    std = at_step(table.std, step, dtype)
    if table.clip_range is None:
        return (draft_output - target_output).mul_(at_step(table.model_coef, step, dtype) / std)
    limit = table.clip_range
    draft_x0 = x0_estimate(state, draft_output, step, table).clamp(-limit, limit)
    target_x0 = x0_estimate(state, target_output, step, table).clamp(-limit, limit)
    return (at_step(table.clip_x0_coef, step, dtype) / std) * (draft_x0 - target_x0)


def log_acceptance(noise: torch.Tensor, delta: torch.Tensor) -> Acceptance:
    """log N(z + delta; 0, I) - log N(z; 0, I), reduced over the last axis."""
    from free_kernels.acceptance import Acceptance

    inner = (noise * delta).sum(-1)
    squared_norm = delta.square().sum(-1)
    return Acceptance(-inner - squared_norm / 2, inner, squared_norm)


def acceptance(
    state: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> Acceptance:
    dtype = compute_dtype(state)
    steps = (step[:, None] + torch.arange(state.shape[1], device=step.device)).clamp(max=table.num_steps - 1)  # [B, N]
    if noise is None:
        noise = normal(seed[:, None], steps, state.shape[-1], NOISE_STREAM, dtype)
    target_output = guided(target_output, unconditional_output, guidance_scale, dtype)
    if previous_x0 is not None:
        target_output, _ = effective_window(state.to(dtype), target_output, previous_x0, steps, table)
    delta = mean_difference(state.to(dtype), target_output, draft_output.to(dtype), steps, table)
    return log_acceptance(noise.to(dtype), delta)


def acceptance_from_means(
    proposal: torch.Tensor, target_mean: torch.Tensor, draft_mean: torch.Tensor, std: torch.Tensor
) -> Acceptance:
    dtype = compute_dtype(proposal)
    scale = std.to(dtype).unsqueeze(-1)
    draft_mean = draft_mean.to(dtype)
    noise = (proposal.to(dtype) - draft_mean) / scale
    return log_acceptance(noise, (draft_mean - target_mean.to(dtype)) / scale)
