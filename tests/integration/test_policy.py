"""A diffusion policy for a robot: 100 steps, squared-cosine betas, clipped; 16 actions of 7 numbers, an observation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import free
from free import ReverseProcess

HORIZON, ACTIONS, OBSERVATION = 16, 7, 10


class Policy(nn.Module):
    """A small temporal convolution with random weights; predicts the noise, as the policies of the literature do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.condition = nn.Linear(OBSERVATION + 2, width)
        self.encode = nn.Conv1d(ACTIONS, width, 5, padding=2)
        self.mix = nn.Conv1d(width, width, 5, padding=2)
        self.decode = nn.Conv1d(width, ACTIONS, 5, padding=2)
        betas = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2").betas
        self.register_buffer("noise_level", (1 - (1 - betas.double()).cumprod(0)).sqrt().float())

    def forward(self, actions: torch.Tensor, timestep: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        angle = timestep[:, None] * (math.pi / 200)
        condition = self.condition(torch.cat((observation, angle.sin(), angle.cos()), dim=1))[:, :, None]
        hidden = torch.nn.functional.gelu(self.encode(actions.transpose(1, 2)) + condition)
        hidden = torch.nn.functional.gelu(self.mix(hidden) + condition)
        # what a trained network gets right first: most of a noisy input is noise
        return self.noise_level[timestep][:, None, None] * actions + 0.3 * self.decode(hidden).transpose(1, 2)


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield Policy().eval()


@pytest.fixture
def call() -> dict[str, Any]:
    observation = torch.randn(4, OBSERVATION, generator=torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    return {
        "conditioning": {"observation": observation},
        "shape": (HORIZON, ACTIONS),
        "process": scheduler,
        "num_inference_steps": 100,
        "seed": [1, 2, 3, 4],
    }


@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output"])
@pytest.mark.parametrize("window", [4, 8, 32])
def test_both_hold_drafters(policy: Policy, call: dict[str, Any], drafter: str, window: int) -> None:
    out = free.speculative_sample(policy, drafter, window=window, **call)
    assert out.samples.shape == (4, HORIZON, ACTIONS)
    assert out.samples.abs().max() <= 1  # the last step is the clipped estimate itself
    assert out.samples.std() > 0.1
    assert out.stats.steps == 100
    assert out.stats.accepted.sum() > 0
    assert out.stats.accepted.sum() + out.stats.rounds.sum() == 4 * 100


def test_hold_x0_saves_most_of_the_rounds(policy: Policy, call: dict[str, Any]) -> None:
    assert free.speculative_sample(policy, **call).stats.parallel_efficiency > 1.5


def test_a_window_of_one_equals_the_ancestral_sampler(policy: Policy, call: dict[str, Any]) -> None:
    speculative = free.speculative_sample(policy, window=1, return_trajectory=True, **call)
    ancestral = free.ancestral_sample(policy, return_trajectory=True, **call)
    assert torch.equal(speculative.samples, ancestral.samples)
    assert torch.equal(speculative.trajectory, ancestral.trajectory)
    assert speculative.stats.parallel_efficiency == 1


def test_the_observation_matters_and_follows_its_sample(policy: Policy, call: dict[str, Any]) -> None:
    together = free.ancestral_sample(policy, **call).samples
    order = torch.tensor([2, 0, 3, 1])
    observation = call["conditioning"]["observation"]
    moved = call | {"conditioning": {"observation": observation[order]}, "seed": [3, 1, 4, 2]}
    torch.testing.assert_close(free.ancestral_sample(policy, **moved).samples, together[order], rtol=1e-4, atol=1e-4)
    other = call | {"conditioning": {"observation": observation[order]}}
    assert (free.ancestral_sample(policy, **other).samples - together).flatten(1).abs().amax(1).min() > 0.05


def test_the_process_is_the_schedulers(policy: Policy, call: dict[str, Any]) -> None:
    by_hand = ReverseProcess.ddpm(
        100, 100, "squaredcos_cap_v2", timestep_spacing="leading", clip_sample=True, clip_sample_range=1.0
    )
    assert torch.equal(
        free.speculative_sample(policy, **call).samples,
        free.speculative_sample(policy, **call | {"process": by_hand}).samples,
    )
    unclipped = call | {"process": DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=False)}
    assert free.ancestral_sample(policy, **unclipped).samples.abs().max() > 1  # so the clipping does something


def test_the_law_is_the_ancestral_samplers(policy: Policy, call: dict[str, Any]) -> None:
    """Means of 400 samples of one observation by either sampler; the statistical tests look closer.

    Each of the 112 numbers has a standard error of at most sqrt(2 / 400) times its standard deviation; 6 of them is a
    p-value of 112 * 2e-9.
    """
    observation = call["conditioning"]["observation"][:1].expand(400, -1)
    common = call | {"conditioning": {"observation": observation}}
    speculative = free.speculative_sample(policy, **common | {"seed": 10}).samples
    ancestral = free.ancestral_sample(policy, **common | {"seed": 11}).samples
    scale = torch.cat((speculative, ancestral)).std(dim=0)
    assert ((speculative.mean(0) - ancestral.mean(0)).abs() < 6 * scale * (2 / 400) ** 0.5 + 1e-6).all()
    # standard deviations: the numbers are bounded, so the variance of a square is at most that of a coin
    gap = (speculative.var(dim=0) - ancestral.var(dim=0)).abs()
    assert (gap < 6 * 0.5 * (2 / 400) ** 0.5).all()
