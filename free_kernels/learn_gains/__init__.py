"""What the evaluations of a window teach of the gains by which x0 answers to the state."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_guidance, check_index, check_values
from free_kernels.dispatch import resolve
from free_kernels.gains import Scales, check_scales
from free_kernels.learn_gains import reference
from free_kernels.patches import Patches, check_patches
from free_kernels.table import StepTable, check_table

__all__ = ["Knowledge", "learn_gains"]


class Knowledge(NamedTuple):
    """A window in the frequencies of its patches, and the sums that gains are made of as of each of its columns."""

    states: torch.Tensor
    """[B, W, D]: frequencies of the states, in units of x0 (over ``scales.signal``)."""
    x0: torch.Tensor
    """[B, W, D]: frequencies of the target's x0 estimates there."""
    sums: torch.Tensor
    """[B, W, 2, 2, bands]: as of each column, for either kind of pair, how far x0 answered to the innovation and, over
    ``scales.noise_ratio``, how far it did not."""


def learn_gains(
    states: torch.Tensor,
    outputs: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    known_states: torch.Tensor,
    known_x0: torch.Tensor,
    known_sums: torch.Tensor,
    known_step: torch.Tensor,
    known_length: torch.Tensor,
    table: StepTable,
    scales: Scales,
    patches: Patches,
    *,
    forgetting: tuple[float, float],
    unconditional_outputs: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    impl: str = "auto",
) -> Knowledge:
    """Absorb a window: how x0 answered to what one state knew beyond another one, band by band.

    With v the state over ``scales.signal`` and r(k) = ``scales.noise_ratio``, the innovation of a state of step k over an
    evaluation (v_a, x0_a) of step a <= k is d = v - x0_a - (v_a - x0_a) (r(k) / r(a))²: were the noise and the data
    Gaussian, x0 = x0_a + g d, with g = c / (c + r(k)²) in a band of variance c (the Wiener filter's gain, updated as the
    Kalman filter does). Two kinds of pairs are absorbed, apart: two states of one step, in this window and in the last
    (column j where that one reached its step), and two neighbours in this window (columns j - 1 and j). A pair adds, for
    each band, <x0 - x0_a, d> and <d - (x0 - x0_a), d> / r(k), both over |d|² of the whole sample.

    What column j holds comes from evaluations at its own step and before, as those of later steps have seen its noise: the
    sums begin with the last window's as of the last settled step, and take up one column after the other.

    Args:
        states: the window [B, W, D], float.
        outputs: the target's there [B, W, D], float of any dtype; conditional half under guidance.
        step: int64 [B], of the first state; 0 means that nothing is known yet.
        length: int64 [B], how many columns were evaluated; the others may hold anything.
        known_states, known_x0, known_sums: the last window's :class:`Knowledge`, A columns.
        known_step: int64 [B], of the last window's first state, below ``step``.
        known_length: int64 [B], how many of its columns were evaluated.
        table: the process, columns [S].
        scales: of its steps.
        patches: how samples of D numbers are cut.
        forgetting: what a pair of a step, and one of neighbours, leaves of the sums before it, 0 to 1.
        unconditional_outputs, guidance_scale: as in :func:`free_kernels.posterior`.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`Knowledge`, float32 (float64 if ``states`` is).

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value, named.
    """
    device = states.device
    check_values("states", states, (None, None, None), device)
    batch, _, numel = states.shape
    check_values("outputs", outputs, states.shape, device)
    check_guidance(outputs, unconditional_outputs, guidance_scale, "unconditional_outputs")
    check_values("known_states", known_states, (batch, None, numel), device)
    check_values("known_x0", known_x0, known_states.shape, device)
    check_patches(patches, numel, device)
    check_values("known_sums", known_sums, (batch, known_states.shape[1], 2, 2, patches.bands), device)
    for name, index in (
        ("step", step),
        ("length", length),
        ("known_step", known_step),
        ("known_length", known_length),
    ):
        check_index(name, index, (batch,), device)
    check_table(table, device)
    check_scales(scales, table.num_steps, device)
    if not all(0 <= kept <= 1 for kept in forgetting):
        raise ValueError(f"forgetting is {forgetting}; allowed are two numbers, 0 to 1")
    arguments = (
        states,
        outputs,
        step,
        length,
        known_states,
        known_x0,
        known_sums,
        known_step,
        known_length,
        table,
        scales,
        patches,
        forgetting,
        unconditional_outputs,
        guidance_scale,
    )
    chosen = resolve(
        impl,
        device,
        states=states,
        outputs=outputs,
        unconditional_outputs=unconditional_outputs,
        known_states=known_states,
        known_x0=known_x0,
        known_sums=known_sums,
    )
    if chosen == "triton":
        from free_kernels.learn_gains import kernel

        return Knowledge(*kernel.learn_gains(*arguments))
    return Knowledge(*reference.learn_gains(*arguments))
