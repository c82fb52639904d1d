"""The variance that a target learned beside its mean (Nichol & Dhariwal 2021, eq. 15; FREE, supplement C)."""

from __future__ import annotations

import torch

from free.processes.table import ReverseProcess


def learned_log_variance(share: torch.Tensor, process: ReverseProcess, step: torch.Tensor) -> torch.Tensor:
    """``share * log beta + (1 - share) * log posterior variance``, float32.

    Args:
        share: in [0, 1], of any shape; the mean of a sample's shares gives the mean of its log variances.
        process: one that has a ``log_variance_range``.
        step: int64, of the same shape.
    """
    assert process.log_variance_range is not None
    low, high = process.log_variance_range[step].unbind(-1)
    return torch.lerp(low, high, share)
