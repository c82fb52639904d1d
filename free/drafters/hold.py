"""Drafters that hold what the last window knew. They need no training and cost next to nothing."""

from __future__ import annotations

import torch

from free.drafters.base import Drafter, Situation
from free_kernels import Proposal, propose


def hold(situation: Situation, draft: str, correction: torch.Tensor | None = None, *, effective: bool = True) -> Proposal:
    """The window that holds what the last one knew: ``draft`` is of :data:`free_kernels.HOLD_DRAFTS`, ``correction``
    [B, W-1, D] is added to the drafts.

    Of a process of second order what is held stands for the effective output if ``effective``: at the few steps that such a
    process is for, guessing the change of x0 from what is held saves no rejection. If not, it stands for the output itself,
    as a corrected draft should: those that answer to their states know how x0 changes.
    """
    last = situation.last
    return propose(
        situation.state,
        situation.seed,
        situation.step,
        situation.window,
        last.states,
        last.output,
        last.step,
        last.length,
        situation.process.table,
        draft=draft,
        correction=correction,
        previous_x0=None if effective else situation.x0,
        unconditional_anchor_outputs=last.unconditional,
        guidance_scale=situation.guidance_scale,
        noise=situation.noise,
        impl=situation.impl,
    )


class _Hold(Drafter):
    capturable = True

    def propose(self, situation: Situation) -> Proposal:
        return hold(situation, self.name)


class HoldX0(_Hold):
    """Holds the anchor's estimate of the clean sample: ``y_draft = (x0_anchor - x0_state_coef * x) / x0_model_coef``."""

    name = "hold-x0"


class HoldOutput(_Hold):
    """Holds the anchor's network output (the frozen target draft of De Bortoli et al., arXiv 2501.05370)."""

    name = "hold-output"
