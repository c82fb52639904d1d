"""Drafters that only tests use: each leans on what it may know as hard as it can, so that a leak of it is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import free
from free.drafters import Anchor, Situation, StepDrafter
from free.drafters.base import walk
from free_kernels import anchor_index
from tests.analytic import CliffTarget, turning_direction
from tests.featured import FeaturedTarget
from tests.statistical.laws import unit


class LeaningDrafter(StepDrafter):
    """A legal draft that leans on the anchor as hard as it can: |delta| = 1.5 from here towards the anchor's state.

    An anchor at step k+1 lies where the noise of step k threw it, and this draft would point along that noise.
    """

    name = "leaning"

    def __init__(self, model: Callable[..., torch.Tensor], norm: float = 1.5) -> None:
        self.model, self.norm = model, norm

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process = situation.process
        output = self.model(state, process.timestep[step], **self.conditioning(situation))
        towards = self.towards(situation.anchor(step), state, output)
        towards = torch.where(towards.norm(dim=-1, keepdim=True) > 1e-6, towards, turning_direction(state))
        scale = self.gap(situation) * (process.std / process.model_coef)[step]
        return output + scale[:, None] * unit(towards)

    def conditioning(self, situation: Situation) -> dict[str, Any]:
        return situation.conditioning

    def towards(self, anchor: Anchor, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """[B, D], from the state and the target's output there."""
        return anchor.state - state

    def gap(self, situation: Situation) -> torch.Tensor:
        """|delta| of each sample's drafts, [B]."""
        return torch.full_like(situation.state[:, 0], self.norm)


class FeatureLeaningDrafter(LeaningDrafter):
    """The same, from the target's output here towards the one that the anchor's feature tells of."""

    name = "leaning on the feature"
    needs_features = True

    def __init__(self, model: Callable[..., torch.Tensor]) -> None:
        super().__init__(model)
        self.decode = torch.linalg.pinv(FeaturedTarget(model).projection)  # [WIDTH, D]

    def conditioning(self, situation: Situation) -> dict[str, Any]:
        return {}  # the label, which the model inside does not know of

    def towards(self, anchor: Anchor, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        assert anchor.feature is not None
        return anchor.feature.flatten(1) @ self.decode.to(state) - output


class UnevenDrafter(LeaningDrafter):
    """The same for every other key, and the target itself for those between: neighbours in a batch are soon far apart."""

    name = "uneven"

    def gap(self, situation: Situation) -> torch.Tensor:
        return self.norm * (situation.seed % 2).to(situation.state)


class CliffDrafter(StepDrafter):
    """A legal draft that tells how fresh its anchor is, and a path that ends at the edge of the target's cliff.

    The first draft of a window is 1.5 off, to one side from an anchor of its own step and to the other from an older one.
    The next have their means on the edge, so that the noise of the step decides whether the target overflows at the state it
    leads to. A sampler that lets go of an anchor for what a later state of its window was lets that noise pick the side.
    """

    name = "over the cliff"

    def __init__(self, model: CliffTarget) -> None:
        self.model = model

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process = situation.process
        output = self.model(state, process.timestep[step], **situation.conditioning)
        fresh = situation.anchor(step).step == step
        side = torch.where(fresh, 1.5, -1.5) * (process.std / process.model_coef)[step]
        edge = (self.model.cliff - process.state_coef[step] * state[:, 0]) / process.model_coef[step]
        output[:, 0] = torch.where(step == situation.step, output[:, 0] + side, edge)
        return output


class BlendingDrafter(StepDrafter):
    """Between hold-x0 and hold-output, and beyond both: by a random share of each step and age of the anchor."""

    name = "blending"
    oldest = 3

    def __init__(self, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.share = 1.8 * torch.rand(steps, self.oldest + 1, generator=generator) - 0.4

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        anchor = situation.anchor(step)
        age = (step - anchor.step).clamp(max=self.oldest)
        share = self.share.to(state.device)[step, age][:, None]
        return torch.lerp(anchor.output, anchor.hold_x0(state, step, situation.process), share)


class RememberingDrafter(free.Gains):
    """A legal draft that leans on its memory as hard as it can: |delta| = 1.5 along the numbers that lately moved most.

    An evaluation at step k+1 was moved by the noise of step k; a memory that has absorbed it would show where.
    """

    name = "remembering"
    forgetting = (0.5, 0.5)

    def __init__(self, model: Callable[..., torch.Tensor], norm: float = 1.5) -> None:
        self.model, self.norm = model, norm

    def propose(self, situation: Situation) -> Any:
        return walk(situation, lambda state, step: self.draft(state, step, situation))

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process, last = situation.process, situation.last
        column = anchor_index(step[:, None], last.step, last.length)[:, 0]
        answered, unanswered = situation.memory.sums[torch.arange(len(step)), column, 1].unbind(1)  # of neighbours
        moved = answered + process.noise_ratio[step][:, None] * unanswered
        moved = torch.where(moved.norm(dim=-1, keepdim=True) > 1e-6, moved, turning_direction(state))
        scale = (process.std / process.model_coef)[step][:, None]
        return self.model(state, process.timestep[step], **situation.conditioning) + self.norm * scale * unit(moved)
