"""A DiT for action chunks: adaptive normalisation, patches of the chunk as tokens, beside those of the observation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

HORIZON, ACTIONS = 16, 4
"""A chunk: actions in [-1, 1]."""
TRAIN_STEPS, BETA_SCHEDULE = 100, "squaredcos_cap_v2"
"""The noise that the network was trained on, as diffusion policies have it (Chi et al. 2023)."""

_FILE = "policy.safetensors"


@dataclass(frozen=True)
class Shape:
    """Sizes of a :class:`PolicyDiT`."""

    frames: int = 2
    """Observations that the policy sees, a token each."""
    frame: int = 24
    """Numbers of one."""
    width: int = 96
    depth: int = 7
    heads: int = 3
    patch: int = 4
    """Actions of one token."""


class PolicyDiT(nn.Module):
    """Predicts the noise [N, 16, 4] in a chunk, given its timestep [N] and the observation [N, frames, frame], as it comes.

    The blocks are those of DiT (Peebles & Xie 2023): adaptive normalisation, gates that begin at zero.
    """

    mean: torch.Tensor
    std: torch.Tensor
    frequencies: torch.Tensor

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        width = shape.width
        # the observation's own statistics, of the demonstrations
        self.register_buffer("mean", torch.zeros(shape.frames, shape.frame))
        self.register_buffer("std", torch.ones(shape.frames, shape.frame))
        self.register_buffer("frequencies", _frequencies(width), persistent=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.observe = nn.Linear(shape.frame, width)
        self.summary = nn.Linear(shape.frames * shape.frame, width)
        self.enter = nn.Linear(shape.patch * ACTIONS, width)
        self.position = nn.Parameter(0.02 * torch.randn(shape.frames + HORIZON // shape.patch, width))
        self.blocks = nn.ModuleList(_Block(width, shape.heads) for _ in range(shape.depth))
        self.modulate = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, shape.patch * ACTIONS)
        for last in (self.modulate, self.leave):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, actions: torch.Tensor, timestep: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        frames = ((observation - self.mean) / self.std).clamp(-5, 5)
        condition = F.silu(self.time(self.frequencies[timestep]) + self.summary(frames.flatten(1)))  # [N, width]
        patches = self.enter(actions.reshape(len(actions), HORIZON // self.shape.patch, -1))
        tokens = torch.cat((self.observe(frames), patches), 1) + self.position  # [N, frames + patches, width]
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulate(condition)[:, None].chunk(2, -1)
        tokens = torch.addcmul(shift, _normalised(tokens[:, self.shape.frames :]), 1 + scale)
        return self.leave(tokens).reshape(actions.shape)

    def save(self, folder: Path) -> None:
        """``policy.safetensors`` in float16, its sizes among the metadata."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().half().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / _FILE, {"shape": json.dumps(asdict(self.shape))})

    @classmethod
    def load(cls, folder: Path) -> PolicyDiT:
        """In float32, eval mode."""
        with safe_open(folder / _FILE, framework="pt") as file:
            network = cls(Shape(**json.loads(file.metadata()["shape"])))
            network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return network.eval().requires_grad_(False)


class _Block(nn.Module):
    """Attention and a perceptron over the tokens, both shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(width, 6 * width)
        self.attend, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulate(condition)[:, None].chunk(6, -1)  # [N, 1, width] each
        inner = self.attend(torch.addcmul(shift, _normalised(tokens), 1 + scale))
        query, key, value = inner.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, tokens, …]
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = torch.addcmul(tokens, gate, self.merge(mixed))
        inner = self.widen(torch.addcmul(shift_2, _normalised(tokens), 1 + scale_2))
        return torch.addcmul(tokens, gate_2, self.narrow(F.gelu(inner, approximate="tanh")))


def _normalised(tokens: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _frequencies(width: int) -> torch.Tensor:
    """Sines and cosines of each timestep, [TRAIN_STEPS, width]."""
    rates = torch.exp(-math.log(1000.0) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(TRAIN_STEPS)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)
