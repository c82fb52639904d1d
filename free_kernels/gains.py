"""What the operations of learned gains share: the scales of the steps, and what is known of the gains."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_values

NEVER_ABOVE = 1.1
"""Of a gain; nor is one ever below 0."""


class Scales(NamedTuple):
    """How much signal and noise a state of each step has, each float [S]: x = signal * x0 + noise in the mean."""

    signal: torch.Tensor
    """Positive."""
    noise_ratio: torch.Tensor
    """The noise's standard deviation over ``signal``, positive."""


def check_scales(scales: Scales, num_steps: int, device: torch.device) -> None:
    """Both columns float [S] on ``device``."""
    check_values("scales.signal", scales.signal, (num_steps,), device)
    check_values("scales.noise_ratio", scales.noise_ratio, (num_steps,), device)
