"""A round entered in the account of its samples, in place."""

from __future__ import annotations

import torch

from free_kernels.checks import check_flags, check_in_place, check_index, check_sums, check_values
from free_kernels.dispatch import resolve
from free_kernels.tally import reference

__all__ = ["tally"]


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
    *,
    impl: str = "auto",
) -> None:
    """Add what a round of B samples did to the account of N.

    The first ``advance - 1`` drafts of a window were accepted, and one more was tested if ``rejected``.

    Args:
        progress: int64 [4, N], written: each sample's step, its rounds, and the first step at which the model, and at which
            the drafter, was not finite (S where none was).
        by_step: float64 [S, 3], written: tests, accepted drafts, sum of |delta| over the tests.
        index: int64 [B], which of the N samples each one is, no two the same.
        step: int64 [B], of each window's first state, below S.
        length: int64 [B], states of it that count, 0 for a finished sample.
        advance, rejected, squared_norm: of :class:`free_kernels.Verification`.
        next_step: int64 [B], where each sample stands now.
        state_finite: bool [B], whether it stands in a finite state.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    device = progress.device
    check_index("progress", progress, (4, None), device)
    check_sums("by_step", by_step, (None, 3), device)
    check_in_place("progress", progress)
    check_in_place("by_step", by_step)
    check_index("index", index, (None,), device)
    for name, values in (("step", step), ("length", length), ("advance", advance), ("next_step", next_step)):
        check_index(name, values, index.shape, device)
    check_flags("rejected", rejected, index.shape, device)
    check_flags("state_finite", state_finite, index.shape, device)
    if squared_norm.shape[-1]:  # a window of one drafts nothing
        check_values("squared_norm", squared_norm, (*index.shape, None), device)
    arguments = (progress, by_step, index, step, length, advance, rejected, squared_norm, next_step, state_finite)
    if resolve(impl, device, squared_norm=squared_norm) == "triton":
        from free_kernels.tally import kernel

        return kernel.tally(*arguments)
    return reference.tally(*arguments)
