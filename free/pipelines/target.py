"""A pipeline's networks as the target of a request: asked by the pipeline itself, never by the sampler."""

from __future__ import annotations

from typing import Any

import torch

from free.targets import Target, TargetOutput


class PipelineTarget(Target):
    """What a pipeline's loop evaluates: its networks, and whatever guidance the pipeline makes of their answers.

    Args:
        networks: the pipeline's, by name; they are checked one by one.
        sample_shape: of what the scheduler's ``step`` is given.

    Raises:
        ValueError: a network in train mode, or one with a cache.
    """

    def __init__(self, networks: dict[str, torch.nn.Module], sample_shape: tuple[int, ...]) -> None:
        self.networks = networks
        super().__init__(next(iter(networks.values())))
        self.sample_shape = sample_shape

    def check_ready(self) -> None:
        check_networks(self.networks)

    def check_conditioning(
        self, class_labels: Any, conditioning: dict[str, Any] | None, guidance_scale: float, batch: int | None
    ) -> tuple[dict[str, Any], int | None]:
        raise ValueError("the conditioning of a pipeline is the arguments of its call")

    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        raise ValueError("a pipeline evaluates its networks itself")


def check_networks(networks: dict[str, torch.nn.Module]) -> None:
    """Raise a ValueError, with the network's name, where one's output is not a function of its input."""
    for name, module in networks.items():
        try:
            _Ready(module)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


class _Ready(PipelineTarget):
    """The checks that every target passes, of a single network."""

    def __init__(self, module: torch.nn.Module) -> None:
        Target.__init__(self, module)

    def check_ready(self) -> None:
        Target.check_ready(self)
