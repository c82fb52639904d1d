"""Pipelines around networks that are known in closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from tests.pipelines.parts import assemble, ddpm


class _Module(torch.nn.Module):
    """What a pipeline asks of its components."""

    dtype, device = torch.float32, torch.device("cpu")


class ClassGaussian(_Module):
    """A DiT's interface around the exact epsilon network of N(center[label], scale²) data; scale 0 holds x0 exactly."""

    def __init__(self, scale: float, size: int = 2, channels: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=size, in_channels=channels, out_channels=channels)
        self.scale = scale
        self.calls: list[int] = []
        """Rows of each call."""
        signal = (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        self.register_buffer("signal", signal.float())

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> Any:
        self.calls.append(len(hidden_states))
        signal = self.signal[timestep].view(-1, 1, 1, 1)
        center = (class_labels.float() * 0.3 - 0.5).view(-1, 1, 1, 1)
        slope = (1 - signal).sqrt() / (signal * self.scale**2 + 1 - signal)
        return Transformer2DModelOutput(sample=slope * (hidden_states - signal.sqrt() * center))


class Passing(_Module):
    """An autoencoder that does nothing."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: torch.Tensor) -> Any:
        # the class-conditional pipeline brings [-1, 1] to [0, 1], and cuts off the rest
        return SimpleNamespace(sample=latents / 8)


def class_pipeline(scale: float = 0.5, **config: Any) -> Any:
    """A ``DiTPipeline`` of :class:`ClassGaussian`; its pictures are ``latents / 16 + 1 / 2``."""
    pipe = assemble("DiTPipeline", transformer=ClassGaussian(scale, **config).eval(), vae=Passing().eval(), scheduler=ddpm())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, labels: list[int], steps: int = 12, seed: int = 0, generator: Any = None) -> torch.Tensor:
    """Latents of one call, without guidance."""
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    call = {"num_inference_steps": steps, "generator": generator, "guidance_scale": 1.0, "output_type": "pt"}
    return (pipe(class_labels=labels, **call).images - 0.5) * 16
