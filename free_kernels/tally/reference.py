"""The account in plain torch."""

from __future__ import annotations

import torch


def tally(
    progress: torch.Tensor,
    by_step: torch.Tensor,
    index: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    advance: torch.Tensor,
    rejected: torch.Tensor,
    squared_norm: torch.Tensor,
    next_step: torch.Tensor,
    state_finite: torch.Tensor,
) -> None:
    num_steps = len(by_step)
    _, rounds, model_broke, drafter_broke = progress[:, index].unbind()
    model_broke = torch.where(state_finite, model_broke, torch.minimum(model_broke, next_step - 1))
    drafts = squared_norm.shape[1]
    if drafts:
        column = torch.arange(drafts, device=step.device)
        steps = (step[:, None] + column).clamp_(max=num_steps - 1)  # [B, W-1]
        settled = (advance - 1)[:, None]
        accepted, tested = column < settled, column < settled + rejected[:, None]
        delta = torch.where(tested, squared_norm.double().sqrt(), 0.0)
        entries = torch.stack((tested, accepted, delta), -1)  # float64, as delta is
        by_step.index_add_(0, steps.flatten(), entries.flatten(0, 1))
        broken = torch.where(delta < float("inf"), num_steps, steps).amin(-1)  # NaN compares false
        drafter_broke = torch.minimum(drafter_broke, broken)
    progress[:, index] = torch.stack((next_step, rounds + (length > 0), model_broke, drafter_broke))
