"""A smaller (distilled, pruned) model of the same samples as the drafter."""

from __future__ import annotations

from typing import Any

import torch

from free.drafters.base import Situation, StepDrafter
from free.targets import Target, as_target
from free_kernels import guided


class ModelDrafter(StepDrafter):
    """Drafts by running another model, one step at a time, with the target's conditioning and guidance.

    Args:
        model: anything :func:`free.as_target` takes; it must accept the target's samples and conditioning.
    """

    name = "model"

    def __init__(self, model: Any) -> None:
        self.model = as_target(model)

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.model.capturable

    def check(self, target: Target) -> None:
        self.model.check_ready()
        if None not in (self.model.sample_shape, target.sample_shape) and self.model.sample_shape != target.sample_shape:
            raise ValueError(
                f"drafter makes samples of shape {self.model.sample_shape}; the target's are {target.sample_shape}"
            )

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        output = self.model.evaluate(
            state.view(-1, *situation.sample_shape),
            situation.process.timestep[step],
            situation.conditioning,
            situation.guidance_scale != 1.0,
        )
        unconditional = None if output.unconditional is None else output.unconditional.flatten(1)
        return guided(output.output.flatten(1), unconditional, situation.guidance_scale, torch.float32)
