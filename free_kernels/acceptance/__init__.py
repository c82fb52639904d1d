"""Log acceptance ratios of drafted steps: log target density minus log draft density at the drafted state."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.acceptance import reference
from free_kernels.checks import check_guidance, check_index, check_values
from free_kernels.dispatch import resolve
from free_kernels.table import StepTable, check_memory, check_table

__all__ = ["Acceptance", "acceptance", "acceptance_from_means"]


class Acceptance(NamedTuple):
    """What one reduction over the elements tells of each drafted step; all of one shape."""

    log_ratio: torch.Tensor
    """-inner - squared_norm / 2; NaN where either network output is."""
    inner: torch.Tensor
    """<z, delta>, z the noise of the drafted step."""
    squared_norm: torch.Tensor
    """|delta|², delta = (draft_mean - target_mean) / std."""


def acceptance(
    state: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    *,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    previous_x0: torch.Tensor | None = None,
    impl: str = "auto",
) -> Acceptance:
    """Acceptance ratios from two outputs at the same state and the noise that made the drafted step.

    As draft and target share state, coefficients and std, ``delta = model_coef[k] / std[k] * (draft - target)``: no
    cancellation at small std, and ``state`` is not even read. Where the table clips, delta is
    ``clip_x0_coef[k] / std[k] * (clamp(x0_draft) - clamp(x0_target))``.

    Args:
        state: [B, N, D], float: the states that both outputs were computed at.
        target_output: [B, N, D], float of any dtype; its conditional half where guidance is used.
        draft_output: [B, N, D], float, guided already.
        seed: int64 [B].
        step: int64 [B], the step of the first column; column j is step ``step + j``.
        table: the process, columns [S].
        unconditional_output, guidance_scale: as in :func:`free_kernels.posterior`, for the target.
        noise: z [B, N, D] if it is at hand.
        previous_x0: [B, D], float, of a process of second order, as in :func:`free_kernels.verify`; ``state`` is read then,
            and ``draft_output`` is the effective one.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`Acceptance` of float32 [B, N] (float64 if ``state`` is). A step of std 0 has no ratio: NaN.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    check_values("state", state, (None, None, None), state.device)
    batch = state.shape[0]
    check_values("target_output", target_output, state.shape, state.device)
    check_values("draft_output", draft_output, state.shape, state.device)
    check_index("seed", seed, (batch,), state.device)
    check_index("step", step, (batch,), state.device)
    check_table(table, state.device)
    check_guidance(target_output, unconditional_output, guidance_scale)
    if noise is not None:
        check_values("noise", noise, state.shape, state.device)
    check_memory(table, previous_x0, (batch, state.shape[2]), state.device)
    arguments = (
        state,
        target_output,
        draft_output,
        seed,
        step,
        table,
        unconditional_output,
        guidance_scale,
        noise,
        previous_x0,
    )
    chosen = resolve(
        impl,
        state.device,
        state=state,
        target_output=target_output,
        draft_output=draft_output,
        unconditional_output=unconditional_output,
        noise=noise,
        previous_x0=previous_x0,
    )
    if chosen == "triton":
        from free_kernels.acceptance import kernel

        return Acceptance(*kernel.acceptance(*arguments))
    return reference.acceptance(*arguments)


def acceptance_from_means(
    proposal: torch.Tensor,
    target_mean: torch.Tensor,
    draft_mean: torch.Tensor,
    std: torch.Tensor,
    *,
    impl: str = "auto",
) -> Acceptance:
    """The general form: N(target_mean, std²) against N(draft_mean, std²) at any proposed states.

    Args:
        proposal, target_mean, draft_mean: [N, D], float.
        std: [N], float, positive; 0 gives NaN.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`Acceptance` of float32 [N] (float64 if ``proposal`` is).

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    check_values("proposal", proposal, (None, None), proposal.device)
    check_values("target_mean", target_mean, proposal.shape, proposal.device)
    check_values("draft_mean", draft_mean, proposal.shape, proposal.device)
    check_values("std", std, proposal.shape[:1], proposal.device)
    chosen = resolve(impl, proposal.device, proposal=proposal, target_mean=target_mean, draft_mean=draft_mean, std=std)
    if chosen == "triton":
        from free_kernels.acceptance import kernel

        return Acceptance(*kernel.acceptance_from_means(proposal, target_mean, draft_mean, std))
    return reference.acceptance_from_means(proposal, target_mean, draft_mean, std)
