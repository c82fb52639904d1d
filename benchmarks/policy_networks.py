"""Networks of the shapes that diffusion policies have, with random weights: what a round costs does not depend on training.

A chunk of 16 actions of 7 numbers is drawn given an observation of 10, in 100 steps.
"""

from __future__ import annotations

import math

import torch
from diffusers import DDPMScheduler
from torch import nn

from free.processes import ReverseProcess

HORIZON, ACTIONS, OBSERVATION, STEPS = 16, 7, 10, 100
_SCHEDULE = "squaredcos_cap_v2"


def process() -> ReverseProcess:
    """As diffusion policies are sampled: epsilon prediction, clipped."""
    return ReverseProcess.ddpm(STEPS, STEPS, beta_schedule=_SCHEDULE, clip_sample=True)


class _Policy(nn.Module):
    """Noise prediction [N, 16, 7]: most of a noisy input is noise, which any trained network has learned first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(OBSERVATION + 2, width), nn.Mish(), nn.Linear(width, width))
        betas = DDPMScheduler(STEPS, beta_schedule=_SCHEDULE).betas
        self.register_buffer("noise_level", (1 - (1 - betas.double()).cumprod(0)).sqrt().float())

    def forward(self, actions: torch.Tensor, timestep: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        angle = timestep[:, None] * (math.pi / 2 / STEPS)
        condition = self.embed(torch.cat((observation, angle.sin(), angle.cos()), 1))  # [N, width]
        return self.noise_level[timestep][:, None, None] * actions + 0.3 * self.correction(actions, condition)

    def correction(self, actions: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _Residual(nn.Module):
    """Two convolutions over time, the first scaled and shifted by the condition (FiLM)."""

    def __init__(self, channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(channels, out_channels, 5, padding=2), nn.GroupNorm(8, out_channels), nn.Mish())
        self.second = nn.Sequential(
            nn.Conv1d(out_channels, out_channels, 5, padding=2), nn.GroupNorm(8, out_channels), nn.Mish()
        )
        self.film = nn.Linear(width, 2 * out_channels)
        self.skip = nn.Conv1d(channels, out_channels, 1)

    def forward(self, values: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(condition)[..., None].chunk(2, 1)
        return self.second(self.first(values) * (1 + scale) + shift) + self.skip(values)


class UNetPolicy(_Policy):
    """The conditional 1-D U-Net of Chi et al. 2023 (Diffusion Policy), three levels."""

    def __init__(self, channels: tuple[int, ...] = (128, 256, 512), width: int = 128) -> None:
        super().__init__(width)
        inner = (ACTIONS, *channels)
        self.down = nn.ModuleList(_Residual(a, b, width) for a, b in zip(inner, channels, strict=False))
        self.up = nn.ModuleList(
            _Residual(2 * b, a, width) for a, b in zip(reversed(channels[:-1]), reversed(channels[1:]), strict=True)
        )
        self.middle = _Residual(channels[-1], channels[-1], width)
        self.narrow = nn.ModuleList(nn.Conv1d(size, size, 3, 2, 1) for size in channels[:-1])
        self.widen = nn.ModuleList(nn.ConvTranspose1d(size, size, 4, 2, 1) for size in reversed(channels[:-1]))
        self.out = nn.Conv1d(channels[0], ACTIONS, 1)

    def correction(self, actions: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        values, skipped = actions.transpose(1, 2), []
        for i, block in enumerate(self.down):
            values = block(values, condition)
            skipped.append(values)
            if i < len(self.narrow):
                values = self.narrow[i](values)
        values = self.middle(values, condition)
        for block, widen in zip(self.up, self.widen, strict=True):
            values = widen(block(torch.cat((values, skipped.pop()), 1), condition))
        return self.out(values).transpose(1, 2)


class TransformerPolicy(_Policy):
    """A transformer over the chunk, the condition a token beside the actions."""

    def __init__(self, layers: int = 6, width: int = 128) -> None:
        super().__init__(width)
        self.enter, self.leave = nn.Linear(ACTIONS, width), nn.Linear(width, ACTIONS)
        self.position = nn.Parameter(0.02 * torch.randn(HORIZON + 1, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def correction(self, actions: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat((condition[:, None], self.enter(actions)), 1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.leave(tokens[:, 1:])
