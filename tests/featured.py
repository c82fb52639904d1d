"""A target without a network that has all that a FeatureDrafter leans on: a top-block feature and a label embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import free
from free.targets import TargetOutput

WIDTH = 8
CHANNELS = 6


class FeaturedTarget(free.CallableTarget):
    """``model(x [N, 6], timestep) -> [N, 6]`` as a target of samples [6, 1, 1], one token each.

    The feature says what the output is, in other numbers; every sample has the same label.
    """

    sample_shape = (CHANNELS, 1, 1)
    feature_shape = (1, WIDTH)

    def __init__(self, model: Callable[..., torch.Tensor]) -> None:
        super().__init__(lambda x, timestep: model(x.flatten(1), timestep).view(x.shape))
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.randn(CHANNELS, WIDTH, generator=generator)
        self.embedding = torch.randn(WIDTH, generator=generator)
        self._capturing = False

    def check_conditioning(
        self, class_labels: Any, conditioning: dict[str, Any] | None, guidance_scale: float, batch: int | None
    ) -> tuple[dict[str, Any], int | None]:
        return {"class_labels": torch.zeros(batch or 1, dtype=torch.int64)}, batch

    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        output = super().forward(states, timestep, {}, guided)
        feature = (output.output.flatten(1) @ self.projection.to(states))[:, None]
        return TargetOutput(output.output, output.unconditional, feature if self._capturing else None)

    @contextmanager
    def capture_features(self) -> Iterator[None]:
        self._capturing = True
        yield
        self._capturing = False

    def label_embedding(self, conditioning: dict[str, Any]) -> torch.Tensor:
        labels = conditioning["class_labels"]
        return self.embedding.to(labels.device).expand(len(labels), WIDTH)


def feature_drafter(base: str | None, sweeps: int, seed: int = 0) -> free.FeatureDrafter:
    """One that fits :class:`FeaturedTarget` and nothing else: random numbers everywhere, the zeroed layers too."""
    drafter = free.FeatureDrafter(1, WIDTH, CHANNELS, 1, 1, base=base, sweeps=sweeps).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return drafter
