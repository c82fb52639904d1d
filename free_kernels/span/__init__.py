"""Which steps the window of each sample spans."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_index
from free_kernels.dispatch import resolve
from free_kernels.span import reference

__all__ = ["Span", "span"]


class Span(NamedTuple):
    """Where the windows of B samples stand, W states each."""

    step: torch.Tensor
    """int64 [B]: step of the first state; of a finished sample, which is beyond the tables, the last one."""
    length: torch.Tensor
    """int64 [B]: states that count, 0 for a finished sample."""
    steps: torch.Tensor
    """int64 [B, W]: step of each state, the last one for those beyond it."""
    sample: torch.Tensor
    """int64 [B, W]: the sample, 0 … B-1, that each state belongs to."""


def span(step: torch.Tensor, reach: torch.Tensor, window: int, *, impl: str = "auto") -> Span:
    """Windows of ``window`` states from ``step`` on, each no further than it may settle.

    Args:
        step: int64 [B], 0 … S; S is a finished sample.
        reach: int64 [S], the last step that a window from step k may settle, k or later; the last step's is itself.
        window: W, 1 or more.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`Span`: where each window stands, how many of its states count, and the step and sample of each state.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    check_index("step", step, (None,), step.device)
    check_index("reach", reach, (None,), step.device)
    if window < 1:
        raise ValueError(f"window is {window}; allowed is 1 or more")
    if resolve(impl, step.device) == "triton":
        from free_kernels.span import kernel

        return Span(*kernel.span(step, reach, window))
    return reference.span(step, reach, window)
