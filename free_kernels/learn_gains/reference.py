"""What a window teaches of the gains, in plain torch."""

from __future__ import annotations

import torch

from free_kernels.gains import Scales
from free_kernels.patches import Patches
from free_kernels.posterior.reference import at_step, compute_dtype, guided, x0_estimate
from free_kernels.table import StepTable


def learn_gains(
    states: torch.Tensor,
    outputs: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    known_states: torch.Tensor,
    known_x0: torch.Tensor,
    known_sums: torch.Tensor,
    known_step: torch.Tensor,
    known_length: torch.Tensor,
    table: StepTable,
    scales: Scales,
    patches: Patches,
    forgetting: tuple[float, float],
    unconditional_outputs: torch.Tensor | None,
    guidance_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(states)
    batch, window, numel = states.shape
    column = torch.arange(window, device=step.device)
    steps = (step[:, None] + column).clamp_(max=table.num_steps - 1)  # [B, W]
    x0 = x0_estimate(states.to(dtype), guided(outputs, unconditional_outputs, guidance_scale, dtype), steps, table)
    noise_ratio = at_step(scales.noise_ratio, steps, dtype)
    states, x0 = patches.forward(torch.stack((states.to(dtype) / at_step(scales.signal, steps, dtype), x0))).unbind(0)

    # the innovation: what a state knows beyond the evaluation that it is held against, and how x0 answered to it
    innovation, answer = states.new_zeros(2, 2, batch, window, numel)  # kinds: another state of the step, the step before
    row = torch.arange(batch, device=step.device)[:, None]
    before = step[:, None] + column - known_step[:, None]
    again = (before < known_length[:, None]) & (step[:, None] > 0)  # before step 0 nothing was evaluated
    before = before.clamp(0, known_states.shape[1] - 1)
    torch.sub(states, known_states[row, before], out=innovation[0])
    torch.sub(x0, known_x0[row, before], out=answer[0])
    shrunk = (noise_ratio[:, 1:] / noise_ratio[:, :-1]).square()
    torch.sub(states[:, 1:], torch.lerp(x0[:, :-1], states[:, :-1], shrunk), out=innovation[1, :, 1:])
    torch.sub(x0[:, 1:], x0[:, :-1], out=answer[1, :, 1:])
    counts = torch.stack((again, (column > 0).expand_as(again)), 1) & (column < length[:, None])[:, None]  # [B, 2, W]

    answered = patches.sums(answer * innovation).transpose(0, 1)  # [B, 2, W, bands]
    size = patches.sums(innovation.square()).transpose(0, 1)
    taught = torch.stack((answered, (size - answered) / noise_ratio[:, None]), -2)  # [B, 2, W, 2, bands]
    taught = taught / (size.sum(-1)[..., None, None] + torch.finfo(dtype).tiny)
    # what was not evaluated, or overflowed, teaches nothing
    taught = torch.where(counts[..., None, None] & taught.isfinite(), taught, 0.0)

    # as of each column: what came before, forgotten by so much for every pair since
    pairs = counts.to(dtype).cumsum(-1)  # [B, 2, W]
    since = (pairs[..., :, None] - pairs[..., None, :]).clamp(min=0)
    weight = torch.stack([kept ** since[:, kind] for kind, kept in enumerate(forgetting)], 1).tril()  # [B, 2, W, W]
    left = torch.stack([kept ** pairs[:, kind] for kind, kept in enumerate(forgetting)], 1)
    last = (step - known_step - 1).clamp(0, known_sums.shape[1] - 1)  # of a settled step
    settled = known_sums[row[:, 0], last].to(dtype)  # [B, 2, 2, bands]
    sums = weight @ taught.flatten(-2) + left[..., None] * settled.flatten(-2)[:, :, None]
    return states, x0, sums.transpose(1, 2).unflatten(-1, (2, -1)).contiguous()
