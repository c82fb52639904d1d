"""The hold drafts in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from free_kernels.philox import NOISE_STREAM
from free_kernels.philox.reference import normal
from free_kernels.posterior.reference import at_step, compute_dtype, effective_output, guided, step_mean, x0_estimate
from free_kernels.table import StepTable

if TYPE_CHECKING:
    from free_kernels.propose import Proposal


def anchor_index(steps: torch.Tensor, anchor_step: torch.Tensor, anchor_length: torch.Tensor) -> torch.Tensor:
    """Column of the last window that a draft for each of ``steps`` [B, N] may lean on: the latest at a step <= its own."""
    return torch.minimum(steps - anchor_step[:, None], anchor_length[:, None] - 1).clamp_(min=0)


def propose(
    state: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    window: int,
    anchor_states: torch.Tensor,
    anchor_outputs: torch.Tensor,
    anchor_step: torch.Tensor,
    anchor_length: torch.Tensor,
    table: StepTable,
    draft: str,
    unconditional_anchor_outputs: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    correction: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> Proposal:
    from free_kernels.propose import Proposal

    dtype = compute_dtype(state)
    numel = state.shape[-1]
    states = state.new_empty(state.shape[0], window, numel, dtype=dtype)
    states[:, 0] = state
    if window == 1:
        return Proposal(states, states[:, 1:])
    last = table.num_steps - 1
    steps = (step[:, None] + torch.arange(window - 1, device=step.device)).clamp_(max=last)  # [B, W-1]
    if noise is None:
        noise = normal(seed[:, None], steps, numel, NOISE_STREAM, dtype)

    column = anchor_index(steps, anchor_step, anchor_length)
    anchor_steps = anchor_step[:, None] + column
    row = torch.arange(len(step), device=step.device)[:, None]
    if unconditional_anchor_outputs is not None:
        unconditional_anchor_outputs = unconditional_anchor_outputs[row, column]
    held = guided(anchor_outputs[row, column], unconditional_anchor_outputs, guidance_scale, dtype)
    if correction is not None:
        correction = correction[:, : window - 1].to(dtype)
        if draft == "hold-output":
            held = held + correction
    scaled_noise = at_step(table.std, steps, dtype) * noise[:, : window - 1].to(dtype)
    if draft == "hold-output" and (table.clip_range is not None or previous_x0 is not None):
        for j in range(window - 1):
            if previous_x0 is not None:
                held[:, j], previous_x0 = effective_output(states[:, j], held[:, j], previous_x0, steps[:, j], table)
            states[:, j + 1] = step_mean(states[:, j], held[:, j], steps[:, j], table) + scaled_noise[:, j]
        return Proposal(states, held)

    # the rest is linear in the state: s[j+1] = slope[j] * s[j] + drive[j]
    if draft == "hold-output":
        slope, gain = at_step(table.state_coef, steps, dtype), at_step(table.model_coef, steps, dtype)
        drive = gain * held + scaled_noise
    else:
        x0 = x0_estimate(anchor_states[row, column].to(dtype), held, anchor_steps, table)  # [B, W-1, D]
        x0_state_coef, x0_model_coef = at_step(table.x0_state_coef, steps, dtype), at_step(table.x0_model_coef, steps, dtype)
        if correction is not None:
            x0 = x0 + x0_model_coef * correction  # the x0 estimate that the corrected output stands for
        if table.memory_gain is not None and previous_x0 is not None:
            before = torch.cat((previous_x0[:, None].to(dtype), x0[:, :-1]), 1)
            x0 = x0 + at_step(table.memory_gain, steps, dtype) * x0_model_coef * (x0 - before)
        if table.clip_range is None:
            gain = at_step(table.model_coef, steps, dtype) / x0_model_coef
            slope = at_step(table.state_coef, steps, dtype) - gain * x0_state_coef
            drive = gain * x0 + scaled_noise
        else:
            slope, gain = at_step(table.clip_state_coef, steps, dtype), at_step(table.clip_x0_coef, steps, dtype)
            drive = gain * x0.clamp(-table.clip_range, table.clip_range) + scaled_noise
    path = states.unbind(1)
    for current, following, a, b in zip(path, path[1:], slope.unbind(1), drive.unbind(1), strict=False):
        torch.addcmul(b, a, current, out=following)
    if draft == "hold-x0":
        held = (x0 - x0_state_coef * states[:, :-1]) / x0_model_coef
    return Proposal(states, held)
