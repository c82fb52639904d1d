"""Verification in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from free_kernels.acceptance.reference import log_acceptance, mean_difference
from free_kernels.householder.reference import householder
from free_kernels.philox import NOISE_STREAM, TEST_STREAM
from free_kernels.philox.reference import normal, uniform
from free_kernels.posterior.reference import at_step, compute_dtype, effective_window, guided, step_mean
from free_kernels.table import StepTable

if TYPE_CHECKING:
    from free_kernels.verify import Verification


def verify(
    states: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    tau: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> Verification:
    from free_kernels.verify import Verification

    dtype = compute_dtype(states)
    batch, window, numel = states.shape
    column = torch.arange(window, device=step.device)
    steps = (step[:, None] + column).clamp_(max=table.num_steps - 1)  # [B, W]
    states = states.to(dtype)
    output = guided(target_output, unconditional_output, guidance_scale, dtype)
    if previous_x0 is not None:
        # up to the first rejection the states are settled ones, and so is what the target said of x0 there
        output, estimate = effective_window(states, output, previous_x0, steps, table)
    noise = normal(seed[:, None], steps, numel, NOISE_STREAM, dtype) if noise is None else noise.to(dtype)

    # one test a drafted step; u is looked at up to the first rejection only
    drafts = window - 1
    delta = mean_difference(states[:, :drafts], output[:, :drafts], draft_output.to(dtype), steps[:, :drafts], table)
    log_ratio, inner, squared_norm = log_acceptance(noise[:, :drafts], delta)  # [B, W-1] each

    # the settled window ends at the first rejection, or at its exact last step
    row, last = torch.arange(batch, device=step.device), (length - 1).clamp_(min=0)
    rejected = torch.zeros_like(length, dtype=torch.bool)
    if drafts:
        if uniforms is None:
            uniforms = uniform(seed[:, None], steps[:, :drafts], TEST_STREAM, dtype)
        log_u = uniforms[:, :drafts].to(dtype).log()
        tempered = log_ratio if tau is None else tau[:, :drafts].to(dtype) * log_ratio
        rejections = ~(log_u <= tempered) & (column[:drafts] < last[:, None])  # NaN compares false, so it rejects
        rejected, first = rejections.any(-1), rejections.int().argmax(-1)
        last = torch.where(rejected, first, last)  # [B]
    final_noise, final_step = noise[row, last], steps[row, last]
    if drafts:
        drafted = last.clamp(max=drafts - 1)
        reflected = householder(final_noise, delta[row, drafted], inner[row, drafted], squared_norm[row, drafted])
        final_noise = torch.where(rejected[:, None], reflected, final_noise)
    mean = step_mean(states[row, last], output[row, last], final_step, table)
    next_state = mean + at_step(table.std, final_step, dtype) * final_noise
    next_state = torch.where(length[:, None] > 0, next_state, states[:, 0])
    advance = torch.where(length > 0, last + 1, 0)
    x0 = next_state.new_empty(batch, 0)
    if previous_x0 is not None:
        x0 = torch.where(length[:, None] > 0, estimate[row, last], previous_x0.to(dtype))
    return Verification(next_state, advance, rejected, log_ratio, squared_norm, x0)
