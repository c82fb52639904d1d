"""The hold drafts in plain torch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from free_kernels.philox import NOISE_STREAM
from free_kernels.philox.reference import normal
from free_kernels.posterior.reference import at_step, compute_dtype, effective_output, guided, step_mean, x0_estimate
from free_kernels.table import StepTable

if TYPE_CHECKING:
    from free_kernels.propose import Proposal

_CACHED = 2**18
"""Numbers of each of some ten tensors."""


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
    batch, numel = state.shape
    states = state.new_empty(batch, window, numel, dtype=dtype)
    states[:, 0] = state
    held = torch.empty_like(states[:, 1:])
    if window == 1:
        return Proposal(states, held)
    steps = (step[:, None] + torch.arange(window - 1, device=step.device)).clamp_(max=table.num_steps - 1)  # [B, W-1]
    if noise is None:
        noise = normal(seed[:, None], steps, numel, NOISE_STREAM, dtype)
    column = anchor_index(steps, anchor_step, anchor_length)
    anchor = torch.arange(batch, device=step.device)[:, None], column
    anchor_steps = anchor_step[:, None] + column

    # every element goes its own way: as many at a time as a processor's cache holds
    size = max(_CACHED // (batch * window), 1) if state.device.type == "cpu" else numel
    for first in range(0, numel, size):
        part = slice(first, first + size)

        def of_part(values: torch.Tensor, part: slice = part) -> torch.Tensor:
            return values[..., part]

        unconditional = None if unconditional_anchor_outputs is None else of_part(unconditional_anchor_outputs)[anchor]
        _fill(
            of_part(states),
            of_part(held),
            steps,
            guided(of_part(anchor_outputs)[anchor], unconditional, guidance_scale, dtype),
            of_part(anchor_states)[anchor].to(dtype),
            anchor_steps,
            table,
            draft,
            of_part(noise)[:, : window - 1].to(dtype),
            None if correction is None else of_part(correction)[:, : window - 1].to(dtype),
            None if previous_x0 is None else of_part(previous_x0),
        )
    return Proposal(states, held)


def _fill(
    states: torch.Tensor,
    draft_output: torch.Tensor,
    steps: torch.Tensor,
    held: torch.Tensor,
    anchor_states: torch.Tensor,
    anchor_steps: torch.Tensor,
    table: StepTable,
    draft: str,
    noise: torch.Tensor,
    correction: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> None:
    """Draft the states [B, W, D] after the first, and the outputs [B, W-1, D] that they are drafted with; all else is by
    drafted step, [B, W-1, D] and [B, W-1].
    """
    dtype = states.dtype
    path = states.unbind(1)
    if correction is not None and draft == "hold-output":
        held = held + correction
    scaled_noise = at_step(table.std, steps, dtype) * noise
    if draft == "hold-output" and (table.clip_range is not None or previous_x0 is not None):
        for j, (current, following) in enumerate(pairwise(path)):
            if previous_x0 is not None:
                held[:, j], previous_x0 = effective_output(current, held[:, j], previous_x0, steps[:, j], table)
            torch.add(step_mean(current, held[:, j], steps[:, j], table), scaled_noise[:, j], out=following)
        draft_output.copy_(held)
        return

    # the rest is linear in the state: s[j+1] = slope[j] * s[j] + drive[j]
    if draft == "hold-output":
        slope, gain = at_step(table.state_coef, steps, dtype), at_step(table.model_coef, steps, dtype)
        drive = gain * held
    else:
        x0 = x0_estimate(anchor_states, held, anchor_steps, table)  # [B, W-1, D]
        x0_state_coef, x0_model_coef = at_step(table.x0_state_coef, steps, dtype), at_step(table.x0_model_coef, steps, dtype)
        if correction is not None:
            x0 = x0 + x0_model_coef * correction  # the x0 estimate that the corrected output stands for
        if table.memory_gain is not None and previous_x0 is not None:
            before = torch.cat((previous_x0[:, None].to(dtype), x0[:, :-1]), 1)
            x0 = x0 + at_step(table.memory_gain, steps, dtype) * x0_model_coef * (x0 - before)
        if table.clip_range is None:
            gain = at_step(table.model_coef, steps, dtype) / x0_model_coef
            slope = at_step(table.state_coef, steps, dtype) - gain * x0_state_coef
            drive = gain * x0
        else:
            slope, gain = at_step(table.clip_state_coef, steps, dtype), at_step(table.clip_x0_coef, steps, dtype)
            drive = gain * x0.clamp(-table.clip_range, table.clip_range)
    drive += scaled_noise
    for current, following, a, b in zip(path, path[1:], slope.unbind(1), drive.unbind(1), strict=False):
        torch.addcmul(b, a, current, out=following)
    if draft == "hold-x0":
        torch.mul(x0_state_coef, states[:, :-1], out=drive)
        torch.sub(x0, drive, out=drive)
        torch.div(drive, x0_model_coef, out=draft_output)
    else:
        draft_output.copy_(held)
