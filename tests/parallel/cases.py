"""Runs on targets whose rows have the same bits in every batch, so that however they are split the samples are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import free
from tests.analytic import ElementwiseTarget
from tests.featured import FeaturedTarget, feature_drafter

STEPS = 12
EVERYWHERE = ("uneven", "narrow", "guided")
"""Those that are drawn by groups of all sizes; the rest by three processes."""


class ElementwiseFeatures(FeaturedTarget):
    """Its feature is a sum of products, added up in one order however many rows there are."""

    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> free.TargetOutput:
        output = super().forward(states, timestep, conditioning, guided)
        if output.feature is not None:
            terms = output.output.flatten(1)[:, :, None] * self.projection  # [N, channels, width]
            output.feature = sum(terms.unbind(1))[:, None]
        return output


def _second_order() -> free.ReverseProcess:
    angle = torch.linspace(1.5, 0.0, STEPS + 1, dtype=torch.float64)
    return free.ReverseProcess.from_levels(angle.cos(), angle.sin(), free.ReverseProcess.ddpm(STEPS).timestep, order=2)


def _guided() -> free.CallableTarget:
    null = {"scale": torch.full((6,), 0.9)}
    return free.CallableTarget(ElementwiseTarget(), null_conditioning=null)


_SCALE = torch.linspace(0.7, 1.2, 18).view(3, 6)
_UNEVEN: dict[str, Any] = {"shape": (6,), "seed": [5, 2**41 + 3, -17], "return_trajectory": True}
_STEPS: dict[str, Any] = {"num_inference_steps": STEPS}

DRAWN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    # samples advance at paces of their own and end one by one, so that rounds have all numbers of rows
    "uneven": (ElementwiseTarget, {**_UNEVEN, "window": 5, "num_inference_steps": 24}),
    "narrow": (ElementwiseTarget, {**_STEPS, "shape": (6,), "seed": 8, "window": 2, "drafter": "hold-x0"}),
    "one state": (ElementwiseTarget, {**_STEPS, "shape": (6,), "seed": 8, "window": 1}),
    "ancestral": (ElementwiseTarget, {**_UNEVEN, **_STEPS, "sampler": "ancestral"}),
    "guided": (_guided, {**_UNEVEN, **_STEPS, "conditioning": {"scale": _SCALE}, "guidance_scale": 2.0, "window": 4}),
    "second order": (ElementwiseTarget, {**_UNEVEN, "process": _second_order(), "window": 4}),
    "second order, ancestral": (ElementwiseTarget, {**_UNEVEN, "process": _second_order(), "sampler": "ancestral"}),
    "relaxed": (
        ElementwiseTarget,
        {**_UNEVEN, **_STEPS, "window": 4, "relaxation": free.Relaxation(4.0, "residual", budget=0.5)},
    ),
    "features": (
        lambda: ElementwiseFeatures(ElementwiseTarget()),
        {**_STEPS, "num_samples": 3, "seed": [1, 2, 3], "window": 4, "drafter": feature_drafter("hold-x0", 1)},
    ),
    "several forwards": (
        lambda: free.CallableTarget(ElementwiseTarget(), max_forward_batch=2),
        {**_UNEVEN, **_STEPS, "window": 5},
    ),
}
"""By name: what makes the model, and how it is sampled."""


def draw(name: str, around: Callable[[Any], Any] = lambda model: model) -> dict[str, Any]:
    """One of :data:`DRAWN`, with ``around`` the model; ready for JSON, which keeps every bit of a float."""
    make, settings = DRAWN[name]
    target, settings = around(make()), dict(settings)
    sampler, drafter = settings.pop("sampler", "speculative"), settings.pop("drafter", "gains")
    if sampler == "ancestral":
        output = free.ancestral_sample(target, **settings)
    else:
        output = free.speculative_sample(target, drafter, **settings)
    trajectory = None if output.trajectory is None else output.trajectory.tolist()
    return {"samples": output.samples.tolist(), "rounds": output.stats.rounds.tolist(), "trajectory": trajectory}
