"""The steps of a window in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from free_kernels.span import Span


def span(step: torch.Tensor, reach: torch.Tensor, window: int) -> Span:
    from free_kernels.span import Span

    last = len(reach) - 1
    first = step.clamp(max=last)
    length = (reach[first] - step + 1).clamp_(max=window)  # [B]; from beyond the last step there is nothing to reach
    steps = (first[:, None] + torch.arange(window, device=step.device)).clamp_(max=last)  # [B, W]
    sample = torch.arange(len(step), device=step.device)[:, None].expand(-1, window)
    return Span(first, length, steps, sample)
