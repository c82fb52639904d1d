"""Training a small target from scratch: it learns, in bfloat16 products too, and keeps to its time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from free.training import TargetTrainingConfig, train_target
from free.training.target import zero_gates

CLEAN = torch.linspace(-1, 1, 2 * 8 * 8).view(1, 2, 8, 8)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return CLEAN.expand(size, -1, -1, -1), torch.arange(size) % 5


@pytest.mark.parametrize("autocast", [False, True])
def test_a_target_learns(make_dit: Callable[..., DiTTransformer2DModel], tmp_path: Path, autocast: bool) -> None:
    config = TargetTrainingConfig(num_steps=60, batch_size=16, learning_rate=3e-3, warmup_steps=5, autocast=autocast)
    model = train_target(lambda: make_dit(out_channels=4), batch, tmp_path, config, progress=False)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    noise = torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # at the last timestep the state is the noise; an untrained model says zero of it
        predicted = model(noise, torch.full((32,), 999), torch.zeros(32, dtype=torch.int64)).sample[:, :2]
    assert (predicted - noise).square().mean() < 0.8 * noise.square().mean()


def test_a_target_keeps_to_its_time(make_dit: Callable[..., DiTTransformer2DModel], tmp_path: Path) -> None:
    config = TargetTrainingConfig(num_steps=10**6, batch_size=2, max_seconds=0.0)
    model = train_target(make_dit, batch, tmp_path, config, progress=False)
    untrained = zero_gates(make_dit()).half().float()
    for name, weight in untrained.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert (tmp_path / "config.json").is_file()
