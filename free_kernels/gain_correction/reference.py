"""What learned gains add to held drafts, in plain torch."""

from __future__ import annotations

import torch

from free_kernels.gains import NEVER_ABOVE, Scales
from free_kernels.patches import Patches
from free_kernels.posterior.reference import at_step, compute_dtype
from free_kernels.propose.reference import anchor_index
from free_kernels.table import StepTable


def gain_correction(
    path: torch.Tensor,
    step: torch.Tensor,
    known_states: torch.Tensor,
    known_x0: torch.Tensor,
    known_sums: torch.Tensor,
    known_step: torch.Tensor,
    known_length: torch.Tensor,
    table: StepTable,
    scales: Scales,
    patches: Patches,
    ridge: float,
) -> torch.Tensor:
    dtype = compute_dtype(path)
    batch, window, numel = path.shape
    drafts = torch.arange(window - 1, device=step.device)
    steps = (step[:, None] + drafts).clamp_(max=table.num_steps - 1)  # [B, W-1]
    column = anchor_index(steps, known_step, known_length)
    anchor_steps = known_step[:, None] + column
    row = torch.arange(batch, device=step.device)[:, None]
    kind = (anchor_steps < steps).long()  # an anchor of the step itself, or of one before
    gain = gain_of(known_sums[row, column, kind].to(dtype), at_step(scales.noise_ratio, steps, dtype), patches, ridge)
    gain = patches.spread(gain, numel)  # [B, W-1, D]

    x0, states = known_x0[row, column].to(dtype), known_states[row, column].to(dtype)
    signal = at_step(scales.signal, steps, dtype)
    ratio = at_step(scales.noise_ratio, steps, dtype) / at_step(scales.noise_ratio, anchor_steps, dtype)
    innovation = patches.forward(path[:, :-1].to(dtype)) / signal - torch.lerp(x0, states, ratio.square())

    # the corrected path leaves the held one: by how much is linear in what was corrected before, but for clipping
    x0_model_coef = at_step(table.x0_model_coef, steps, dtype)
    if table.clip_range is None:
        x0_coef = at_step(table.model_coef, steps, dtype) / x0_model_coef
        slope = at_step(table.state_coef, steps, dtype) - x0_coef * at_step(table.x0_state_coef, steps, dtype)
    else:
        slope, x0_coef = at_step(table.clip_state_coef, steps, dtype), at_step(table.clip_x0_coef, steps, dtype)
    departure = before = torch.zeros_like(innovation[:, 0])
    corrections = []
    for j in range(window - 1):
        corrections.append(gain[:, j] * torch.addcdiv(innovation[:, j], departure, signal[:, j]))
        effective = corrections[-1]
        if table.memory_gain is not None:  # of second order: what corrects x0 corrects what is remembered of it too
            memory = at_step(table.memory_gain, steps[:, j], dtype) * x0_model_coef[:, j]
            effective, before = effective + memory * (effective - before), effective
        departure = torch.addcmul(slope[:, j] * departure, x0_coef[:, j], effective)
    return patches.inverse(torch.stack(corrections, 1)) / x0_model_coef


def gain_of(sums: torch.Tensor, noise_ratio: torch.Tensor, patches: Patches, ridge: float) -> torch.Tensor:
    """Gains [..., bands] of sums [..., 2, bands], for the step whose noise ratio is given, [..., 1]."""
    answered, unanswered = sums.unbind(-2)
    unanswered = unanswered * noise_ratio
    # a band that little is known of answers as all do together
    share = patches.share.to(sums.dtype).repeat(patches.groups) * (ridge / patches.groups)  # [bands]
    answered = (answered + share * answered.sum(-1, keepdim=True)).clamp(min=0)
    unanswered = unanswered + share * unanswered.sum(-1, keepdim=True)
    unanswered = torch.maximum(unanswered, answered * (1 / NEVER_ABOVE - 1))
    return answered / (answered + unanswered + torch.finfo(sums.dtype).tiny)
