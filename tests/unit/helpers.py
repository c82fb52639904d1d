"""Targets that are cheap, exact, and tell what was asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from free import ReverseProcess
from free_kernels import StepTable


class GaussianModel:
    """Epsilon prediction for data N(mean, scale²): exact, elementwise, and free of any dependence on the batch.

    Only products and sums, so that a row comes out the same to the bit wherever it stands in the batch.
    """

    def __init__(self, mean: float = 0.6, scale: float = 0.5) -> None:
        signal = (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        self.slope = ((1 - signal).sqrt() / (signal * scale**2 + 1 - signal)).float()
        self.center = (signal.sqrt() * mean).float()

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        rows = (-1,) + (1,) * (x.dim() - 1)
        return self.slope[timestep].view(rows) * (x - self.center[timestep].view(rows))


class Recorder:
    """Passes calls on to a model and keeps what it was asked."""

    def __init__(self, model: Callable[..., Any] | None = None) -> None:
        self.model = model or GaussianModel()
        self.timesteps: list[torch.Tensor] = []
        self.conditioning: list[dict[str, Any]] = []

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, **conditioning: Any) -> Any:
        self.timesteps.append(timestep.clone())
        self.conditioning.append(conditioning)
        return self.model(x, timestep)

    @property
    def rows(self) -> list[int]:
        """States in each call."""
        return [len(timestep) for timestep in self.timesteps]


def small_table(num_steps: int = 6, clip_range: float | None = None, dtype: torch.dtype = torch.float64) -> StepTable:
    """A table of plausible numbers, none of them special; the last step has no noise."""
    process = ReverseProcess.ddpm(num_steps, clip_sample=clip_range is not None, clip_sample_range=clip_range or 1.0)
    columns = [column.to(dtype) for column in process.table.columns]
    return StepTable(*columns, clip_range)


def on_meta(value: Any) -> Any:
    """The same shapes without numbers: reading one raises, as does a copy to another device, or a shape that needs one."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: on_meta(entry) for name, entry in value.items()}
    if isinstance(value, ReverseProcess):
        moved = object.__new__(ReverseProcess)  # its checks read numbers
        for field in dataclasses.fields(value):
            object.__setattr__(moved, field.name, on_meta(getattr(value, field.name)))
        return moved
    return value
