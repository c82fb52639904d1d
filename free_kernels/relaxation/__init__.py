"""Relaxed acceptance: tau from an uncertainty, and what it costs. ``docs/relaxation.md`` derives the closed forms."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_drafted, check_flags, check_index, check_sums, check_values
from free_kernels.dispatch import resolve
from free_kernels.relaxation import reference

__all__ = ["RelaxedCost", "relaxed_cost", "relaxed_tau"]


class RelaxedCost(NamedTuple):
    """Of B samples so far."""

    spent: torch.Tensor
    """float64 [B, 3]: sums over the tests of the excess acceptance and of the divergence, and how many saved a rejection:
    accepted, with a tau below 1, what an exact test of the same uniform rejects."""
    rejection: torch.Tensor
    """float64 [B, 2]: sum over the tests of the probability that an exact test rejects, and their number, halved with every
    window."""


def relaxed_tau(
    uncertainty: torch.Tensor,
    strength: float,
    *,
    squared_norm: torch.Tensor | None = None,
    spent: torch.Tensor | None = None,
    budget: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """``exp(-strength * uncertainty)``, and 1 where the uncertainty is not a number or the budget would be exceeded.

    Args:
        uncertainty: [B, W-1], float, in [0, 1].
        strength: 0 or more.
        squared_norm: |delta|² of the drafted steps [B, W-1], float; with a budget only.
        spent: float64 [B, 3] of :class:`RelaxedCost`; with a budget only.
        budget: of each sample's excess acceptance; a test that would exceed it is exact, as are those after it. None is no
            bound.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``. Either computes in float64.

    Returns:
        tau, float32 [B, W-1].

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    device = uncertainty.device
    if uncertainty.shape[-1]:
        check_values("uncertainty", uncertainty, (None, None), device)
    if budget is not None:
        if squared_norm is None or spent is None:
            raise ValueError(f"budget is {budget} without squared_norm and spent; give both, or no budget")
        if uncertainty.shape[-1]:
            check_values("squared_norm", squared_norm, uncertainty.shape, device)
        check_sums("spent", spent, (len(uncertainty), 3), device)
    arguments = (uncertainty, strength, squared_norm, spent, budget)
    if resolve(impl, device, squared_norm=squared_norm) == "triton":
        from free_kernels.relaxation import kernel

        return kernel.relaxed_tau(*arguments)
    return reference.relaxed_tau(*arguments)


def relaxed_cost(
    squared_norm: torch.Tensor,
    log_ratio: torch.Tensor,
    tau: torch.Tensor,
    advance: torch.Tensor,
    rejected: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    spent: torch.Tensor,
    rejection: torch.Tensor,
    *,
    uniforms: torch.Tensor | None = None,
    impl: str = "auto",
) -> RelaxedCost:
    """What a window's tests add: those up to the first rejection, which are the ones that decided.

    Args:
        squared_norm: |delta|² of the drafted steps [B, W-1], float.
        log_ratio: of :class:`free_kernels.Verification`, [B, W-1], float.
        tau: float32 [B, W-1], what they were tested with.
        advance, rejected: of :class:`free_kernels.Verification`.
        seed: int64 [B].
        step: int64 [B], step of the window's first state.
        spent, rejection: of :class:`RelaxedCost`, before.
        uniforms: u [B, W-1] (or more columns) if it is at hand, what :func:`free_kernels.verify` was given or
            ``uniform(seed, step + j, stream=TEST_STREAM)``, which is used when left out.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``. Either computes in float64, but compares u as
            :func:`free_kernels.verify` does.

    Returns:
        :class:`RelaxedCost`: ``spent`` and ``rejection`` with this window's tests.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    batch, device = len(squared_norm), squared_norm.device
    if squared_norm.shape[-1]:  # a window of one drafts nothing
        check_values("squared_norm", squared_norm, (batch, None), device)
        check_values("log_ratio", log_ratio, squared_norm.shape, device)
        check_values("tau", tau, squared_norm.shape, device)
    check_index("advance", advance, (batch,), device)
    check_flags("rejected", rejected, (batch,), device)
    check_index("seed", seed, (batch,), device)
    check_index("step", step, (batch,), device)
    check_sums("spent", spent, (batch, 3), device)
    check_sums("rejection", rejection, (batch, 2), device)
    check_drafted("uniforms", uniforms, (batch, None), squared_norm.shape[-1] + 1, device)
    arguments = (squared_norm, log_ratio, tau, advance, rejected, seed, step, spent, rejection, uniforms)
    floating = {"squared_norm": squared_norm, "log_ratio": log_ratio, "tau": tau, "uniforms": uniforms}
    if resolve(impl, device, **floating) == "triton":
        from free_kernels.relaxation import kernel

        return RelaxedCost(*kernel.relaxed_cost(*arguments))
    return reference.relaxed_cost(*arguments)
