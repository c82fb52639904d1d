"""Networks as diffusion policies have them, through the speculative sampler as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet1DModel
from torch import nn

import free
from benchmarks import policy_networks
from benchmarks.policies.network import ACTIONS, HORIZON, PolicyDiT, Shape

BATCH, GLOBAL = 3, 12


class LeRobotsSignature(nn.Module):
    """Stands in for the network of LeRobot's ``DiffusionModel`` (release 0.4.4), which pins an older torch: called as
    ``unet(sample [N, horizon, actions], timestep int64 [N], global_cond=[N, G])``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.condition = nn.Linear(GLOBAL, width)
        self.steps = nn.Embedding(100, width)
        self.enter, self.leave = nn.Conv1d(ACTIONS, width, 5, padding=2), nn.Conv1d(width, ACTIONS, 5, padding=2)
        betas = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2").betas
        self.register_buffer("noise_level", (1 - (1 - betas).cumprod(0)).sqrt())

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, global_cond: torch.Tensor | None = None) -> torch.Tensor:
        hidden = (self.condition(global_cond) + self.steps(timestep))[:, :, None] + self.enter(x.transpose(1, 2))
        return self.noise_level[timestep][:, None, None] * x + 0.3 * self.leave(hidden.tanh()).transpose(1, 2)


def conditional_sample(unet: nn.Module, scheduler: DDPMScheduler, global_cond: torch.Tensor) -> torch.Tensor:
    """The loop that LeRobot and diffusion_policy have around a scheduler."""
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(len(global_cond), HORIZON, ACTIONS, generator=generator)
    scheduler.set_timesteps(100)
    for timestep in scheduler.timesteps:
        output = unet(sample, timestep.expand(len(sample)), global_cond=global_cond)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    return sample


def _unet_1d() -> tuple[nn.Module, dict[str, torch.Tensor], tuple[int, ...]]:
    """Channels first, no conditioning, an output object: diffusers' habits."""
    network = UNet1DModel(
        sample_size=HORIZON,
        in_channels=ACTIONS,
        out_channels=ACTIONS,
        use_timestep_embedding=True,
        time_embedding_type="positional",
        extra_in_channels=0,
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
        block_out_channels=(16, 32),
        act_fn="mish",
        norm_num_groups=8,
        layers_per_block=1,
    )
    return network, {}, (ACTIONS, HORIZON)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor], tuple[int, ...]]]] = {
    "diffusers' UNet1DModel": _unet_1d,
    "conditional 1-D U-Net": lambda: (
        policy_networks.UNetPolicy((16, 32), 16),
        {"observation": torch.randn(BATCH, policy_networks.OBSERVATION)},
        (policy_networks.HORIZON, policy_networks.ACTIONS),
    ),
    "DiT for actions": lambda: (
        PolicyDiT(Shape(width=24, depth=1)),
        {"observation": torch.randn(BATCH, 2, 24)},
        (HORIZON, ACTIONS),
    ),
    "LeRobot's signature": lambda: (LeRobotsSignature(), {"global_cond": torch.randn(BATCH, GLOBAL)}, (HORIZON, ACTIONS)),
}


@pytest.fixture(params=NETWORKS)
def call(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, conditioning, shape = NETWORKS[request.param]()
        yield {
            "model": network.eval(),
            "conditioning": conditioning,
            "shape": shape,
            "process": DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True),
            "num_inference_steps": 100,
            "seed": [3, 1, 2],
        }


def test_a_network_as_it_is(call: dict[str, Any]) -> None:
    """A window of one is the ancestral sampler to the bit; the default one draws chunks in its bounds, in fewer rounds."""
    assert torch.equal(free.speculative_sample(**call, window=1).samples, free.ancestral_sample(**call).samples)
    out = free.speculative_sample(**call)
    assert out.samples.shape == (BATCH, *call["shape"])
    assert out.samples.abs().max() <= 1
    assert out.stats.rounds.max() < 100


def test_it_takes_the_place_of_lerobots_loop() -> None:
    """Means and variances of 400 chunks of one observation; 6 standard errors are a p-value of 64 * 2e-9 at most."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet, global_cond = LeRobotsSignature().eval(), torch.randn(1, GLOBAL).expand(400, -1)
        scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
        theirs = conditional_sample(unet, scheduler, global_cond)
        ours = free.speculative_sample(
            unet,
            conditioning={"global_cond": global_cond},
            shape=(HORIZON, ACTIONS),
            process=scheduler,
            num_inference_steps=100,
            seed=4,
        ).samples
    scale = torch.cat((ours, theirs)).std(dim=0)
    assert scale.min() > 0.05
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 6 * scale * (2 / 400) ** 0.5).all()
    # the numbers are bounded, so the variance of a square is at most that of a coin
    assert ((ours.var(0) - theirs.var(0)).abs() < 6 * 0.5 * (2 / 400) ** 0.5).all()
