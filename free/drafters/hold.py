"""Drafters that hold what the last window knew. They need no training and cost next to nothing."""

from __future__ import annotations

from free.drafters.base import Drafter, Situation
from free_kernels import Proposal, propose


class _Hold(Drafter):
    capturable = True

    def propose(self, situation: Situation) -> Proposal:
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
            draft=self.name,
            unconditional_anchor_outputs=last.unconditional,
            guidance_scale=situation.guidance_scale,
            noise=situation.noise,
            impl=situation.impl,
        )


class HoldX0(_Hold):
    """Holds the anchor's estimate of the clean sample: ``y_draft = (x0_anchor - x0_state_coef * x) / x0_model_coef``."""

    name = "hold-x0"


class HoldOutput(_Hold):
    """Holds the anchor's network output (the frozen target draft of De Bortoli et al., arXiv 2501.05370)."""

    name = "hold-output"
