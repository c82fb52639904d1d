"""One step of a reverse process: guidance, mean and noise in one go."""

from __future__ import annotations

import torch

from free_kernels.checks import check_guidance, check_index, check_values
from free_kernels.dispatch import resolve
from free_kernels.posterior import reference
from free_kernels.table import StepTable, check_memory, check_table

__all__ = ["posterior", "posterior_with_memory"]


def posterior(
    state: torch.Tensor,
    output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    *,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The ancestral (DDPM) update ``mean[k] + std[k] * z`` of each row (Ho et al. 2020, eq. 7).

    Args:
        state: [B, D], float.
        output: the network's output [B, D], float of any dtype; its conditional half where guidance is used.
        seed: int64 [B].
        step: int64 [B], the step k of each row; beyond the table it is taken as the last.
        table: the process, columns [S].
        unconditional_output: [B, D]; ``output`` then becomes ``unconditional + guidance_scale * (output - unconditional)``
            (Ho & Salimans 2022).
        guidance_scale: 1 is no guidance.
        noise: z [B, D] if it is at hand; it must be ``normal(seed, step, D)``, which is what is used when left out.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        The next state [B, D], float32 (float64 if ``state`` is).

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named; a table of second order.
    """
    _check(state, output, seed, step, table, unconditional_output, guidance_scale, noise)
    check_memory(table, None, (len(state), state.shape[1]), state.device)
    arguments = (state, output, seed, step, table, unconditional_output, guidance_scale, noise)
    chosen = resolve(impl, state.device, state=state, output=output, unconditional_output=unconditional_output, noise=noise)
    if chosen == "triton":
        from free_kernels.posterior import kernel

        return kernel.posterior(*arguments)
    return reference.posterior(*arguments)


def posterior_with_memory(
    state: torch.Tensor,
    output: torch.Tensor,
    previous_x0: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    *,
    unconditional_output: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The update of second order (DPM-Solver++ 2M, Lu et al. 2022): as :func:`posterior`, of the effective output.

    Args:
        state, output, seed, step, unconditional_output, guidance_scale, noise, impl: as of :func:`posterior`.
        previous_x0: what this returned for the step before, [B, D], float; anything finite where ``memory_gain`` is 0.
        table: of a process of second order.

    Returns:
        The next state, and the estimate of x0 at this step, [B, D] each, float32 (float64 if ``state`` is).

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named; a table of first order.
    """
    _check(state, output, seed, step, table, unconditional_output, guidance_scale, noise)
    check_memory(table, previous_x0, (len(state), state.shape[1]), state.device)
    arguments = (state, output, previous_x0, seed, step, table, unconditional_output, guidance_scale, noise)
    tensors = {"unconditional_output": unconditional_output, "previous_x0": previous_x0, "noise": noise}
    if resolve(impl, state.device, state=state, output=output, **tensors) == "triton":
        from free_kernels.posterior import kernel

        return kernel.posterior_with_memory(*arguments)
    return reference.posterior_with_memory(*arguments)


def _check(
    state: torch.Tensor,
    output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> None:
    check_values("state", state, (None, None), state.device)
    batch, numel = state.shape
    check_values("output", output, (batch, numel), state.device)
    check_index("seed", seed, (batch,), state.device)
    check_index("step", step, (batch,), state.device)
    check_table(table, state.device)
    check_guidance(output, unconditional_output, guidance_scale)
    if noise is not None:
        check_values("noise", noise, (batch, numel), state.device)
