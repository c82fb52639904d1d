"""A whole window of elementwise drafts at once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import MAX_ELEMENTS, check_drafted, check_guidance, check_index, check_values
from free_kernels.dispatch import resolve
from free_kernels.propose import reference
from free_kernels.table import StepTable, check_memory, check_table

HOLD_DRAFTS = ("hold-x0", "hold-output")

__all__ = ["HOLD_DRAFTS", "Proposal", "propose"]


class Proposal(NamedTuple):
    """A drafted window."""

    states: torch.Tensor
    """[B, W, D]: the current state and the W-1 drafted ones."""
    draft_output: torch.Tensor
    """[B, W-1, D]: the network output that each drafted step was made with, its correction included; of a process of second
    order the effective one, of :class:`free_kernels.StepTable`.
    """


def propose(
    state: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    window: int,
    anchor_states: torch.Tensor,
    anchor_outputs: torch.Tensor,
    anchor_step: torch.Tensor,
    anchor_length: torch.Tensor,
    table: StepTable,
    *,
    draft: str = "hold-x0",
    unconditional_anchor_outputs: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    previous_x0: torch.Tensor | None = None,
    impl: str = "auto",
) -> Proposal:
    """Draft W-1 steps by holding what the last window knew, with a correction on top where one is given.

    The draft for step k leans on one evaluation of the last window: the latest at a step <= k (one at k+1 would have seen
    the noise of step k). ``hold-output`` holds its network output, ``hold-x0`` its estimate of the clean sample.

    ``correction`` is what a learned drafter predicts on top, ``y_draft = hold(...) + correction[:, j]``: it proposes the
    path, evaluates its network on all the states at once, and proposes again with the network's outputs. The path moves
    with it, and so does hold-x0's draft at later states. Column j may know the noise of steps before ``step + j`` only.

    Args:
        state: [B, D], float.
        seed: int64 [B].
        step: int64 [B], the step of ``state``; columns beyond the table repeat its last step and mean nothing.
        window: W, at least 1.
        anchor_states: states of the last window [B, A, D], float.
        anchor_outputs: the target's outputs there [B, A, D], float of any dtype; conditional half under guidance.
        anchor_step: int64 [B], step of the last window's first state, at most ``step``.
        anchor_length: int64 [B], how many of its A states were evaluated, 1 … A.
        table: the process, columns [S].
        draft: one of :data:`HOLD_DRAFTS`.
        unconditional_anchor_outputs, guidance_scale: as in :func:`free_kernels.posterior`.
        noise: z [B, W-1, D] (or more columns) if it is at hand.
        correction: [B, W-1, D] (or more columns), float of any dtype, added to each step's guided draft; NaN in it shows in
            the states and in ``draft_output``.
        previous_x0: [B, D], float, of a process of second order, as in :func:`free_kernels.verify`. The drafts are guesses
            of the output then, and take the step of second order by the estimates of x0 that they stand for; left out they
            are guesses of the effective output.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`Proposal`, float32 (float64 if ``state`` is).

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value, named.
    """
    if draft not in HOLD_DRAFTS:
        raise ValueError(f"draft is {draft!r}; known are {', '.join(map(repr, HOLD_DRAFTS))}")
    if window < 1:
        raise ValueError(f"window is {window}; allowed is 1 or more")
    check_values("state", state, (None, None), state.device)
    batch, numel = state.shape
    if batch * window * numel > MAX_ELEMENTS:
        raise ValueError(f"window is {window}: more elements than the {MAX_ELEMENTS} allowed for state {tuple(state.shape)}")
    check_index("seed", seed, (batch,), state.device)
    check_index("step", step, (batch,), state.device)
    check_values("anchor_states", anchor_states, (batch, None, numel), state.device)
    check_values("anchor_outputs", anchor_outputs, anchor_states.shape, state.device)
    check_index("anchor_step", anchor_step, (batch,), state.device)
    check_index("anchor_length", anchor_length, (batch,), state.device)
    check_table(table, state.device)
    check_guidance(anchor_outputs, unconditional_anchor_outputs, guidance_scale, "unconditional_anchor_outputs")
    check_drafted("noise", noise, (batch, None, numel), window, state.device)
    check_drafted("correction", correction, (batch, None, numel), window, state.device)
    if previous_x0 is not None:
        check_memory(table, previous_x0, (batch, numel), state.device)
    arguments = (
        state,
        seed,
        step,
        window,
        anchor_states,
        anchor_outputs,
        anchor_step,
        anchor_length,
        table,
        draft,
        unconditional_anchor_outputs,
        guidance_scale,
        noise,
        correction,
        previous_x0,
    )
    chosen = resolve(
        impl,
        state.device,
        state=state,
        anchor_states=anchor_states,
        anchor_outputs=anchor_outputs,
        unconditional_anchor_outputs=unconditional_anchor_outputs,
        noise=noise,
        correction=correction,
        previous_x0=previous_x0,
    )
    if chosen == "triton":
        from free_kernels.propose import kernel

        return Proposal(*kernel.propose(*arguments))
    return reference.propose(*arguments)
