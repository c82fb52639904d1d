"""Verification of a whole window: accept, reflect at the first rejection, or take the exact last step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_drafted, check_guidance, check_index, check_values
from free_kernels.dispatch import resolve
from free_kernels.table import StepTable, check_memory, check_table
from free_kernels.verify import reference

__all__ = ["Verification", "verify"]


class Verification(NamedTuple):
    """The outcome of one window of each sample."""

    next_state: torch.Tensor
    """[B, D]: the state after the settled steps."""
    advance: torch.Tensor
    """int64 [B]: how many steps were settled, 1 … length (0 for a finished sample)."""
    rejected: torch.Tensor
    """bool [B]: whether the last settled step was a reflection; else it is the exact last step of the window."""
    log_ratio: torch.Tensor
    """[B, W-1]: log acceptance ratio of each drafted step, before tau; beyond the first rejection it decided nothing."""
    squared_norm: torch.Tensor
    """[B, W-1]: |delta|² of each drafted step."""
    x0: torch.Tensor | None = None
    """[B, D]: of a process of second order, the target's estimate of x0 at the last settled step, the next window's
    ``previous_x0``; of first order [B, 0].
    """


def verify(
    states: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    table: StepTable,
    *,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    tau: torch.Tensor | None = None,
    previous_x0: torch.Tensor | None = None,
    impl: str = "auto",
) -> Verification:
    """Reflection-maximal coupling of each drafted step with the target's, first rejection ends the window.

    Drafted step j is accepted iff ``log u <= log_ratio``, u the uniform of its step; NaN rejects. The first rejected step
    becomes ``target_mean + std * (z - 2 e <e, z>)``; if there is none the last state takes its step from the target,
    ``target_mean + std * z`` (FREE, arXiv 2511.20390, supplement B; De Bortoli et al., arXiv 2501.05370).

    With ``tau`` a step is accepted iff ``log u <= tau * log_ratio``, and a rejected one becomes the same reflection. At
    tau = 1 the law is the target's, to the bit what it is without tau. Below it the step differs from the exact one of the
    same z and u only where that one rejects and this one accepts, so its law is at most the extra acceptance,
    E[min(1, exp(tau * log_ratio)) - min(1, exp(log_ratio))], away from the target's in total variation. At tau = 0 every
    finite draft is accepted, but not one infinitely far: 0 * -inf is NaN.

    Args:
        states: the window [B, W, D], float.
        target_output: the target's outputs there [B, W, D], float of any dtype; conditional half under guidance.
        draft_output: what steps 0 … W-2 were drafted with [B, W-1, D], float.
        seed: int64 [B].
        step: int64 [B], step of ``states[:, 0]``.
        length: int64 [B], how many of the W states count, 0 … W; 0 is a finished sample, which stays as it is.
        table: the process, columns [S].
        unconditional_output, guidance_scale: as in :func:`free_kernels.posterior`.
        noise: z [B, W, D] if it is at hand; it must be ``normal(seed, step + j, D)``, which is used when left out.
        uniforms: u [B, W-1] (or more columns) if it is at hand; it must be ``uniform(seed, step + j)``, likewise.
        tau: [B, W-1] (or more columns), float of any dtype, in [0, 1]. It is the caller who checks the range, as this reads
            it on the device only; NaN rejects.
        previous_x0: [B, D], float, of a process of second order: the target's estimate of x0 at the step before ``step``, as
            the last verification returned it; anything finite where ``memory_gain`` is 0. ``draft_output`` is the effective
            one, of :class:`free_kernels.StepTable`.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`Verification`, float32 (float64 if ``states`` is).

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    check_values("states", states, (None, None, None), states.device)
    batch, window, numel = states.shape
    check_values("target_output", target_output, states.shape, states.device)
    if window > 1:
        check_values("draft_output", draft_output, (batch, window - 1, numel), states.device)
    check_index("seed", seed, (batch,), states.device)
    check_index("step", step, (batch,), states.device)
    check_index("length", length, (batch,), states.device)
    check_table(table, states.device)
    check_guidance(target_output, unconditional_output, guidance_scale)
    if noise is not None:
        check_values("noise", noise, states.shape, states.device)
    check_drafted("uniforms", uniforms, (batch, None), window, states.device)
    check_drafted("tau", tau, (batch, None), window, states.device)
    check_memory(table, previous_x0, (batch, numel), states.device)
    arguments = (
        states,
        target_output,
        draft_output,
        seed,
        step,
        length,
        table,
        unconditional_output,
        guidance_scale,
        noise,
        uniforms,
        tau,
        previous_x0,
    )
    chosen = resolve(
        impl,
        states.device,
        states=states,
        target_output=target_output,
        draft_output=draft_output,
        unconditional_output=unconditional_output,
        noise=noise,
        uniforms=uniforms,
        tau=tau,
        previous_x0=previous_x0,
    )
    if chosen == "triton":
        from free_kernels.verify import kernel

        return Verification(*kernel.verify(*arguments))
    return reference.verify(*arguments)
