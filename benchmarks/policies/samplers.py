"""The ways to draw a chunk that are compared, all of one network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

import free
from benchmarks.policies.network import ACTIONS, BETA_SCHEDULE, HORIZON, TRAIN_STEPS
from free_kernels import LATENT_STREAM, normal

_SCHEDULE = {"num_train_timesteps": TRAIN_STEPS, "beta_schedule": BETA_SCHEDULE, "prediction_type": "epsilon"}


@dataclass(frozen=True)
class Drawn:
    """Chunks, and what they cost."""

    chunks: torch.Tensor
    """float32 [B, 16, 4]."""
    rounds: float
    """Forwards that follow on one another, a chunk."""
    evaluations: float
    """States that the network was evaluated at, a chunk."""


@dataclass(frozen=True)
class Sampler:
    """One row of the table."""

    method: str
    """Among :data:`METHODS`."""
    steps: int
    """S."""
    drafter: str | None = None
    """None draws step by step."""
    window: int | str | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What its rows are known by."""
        return asdict(self)

    def of(self, network: torch.nn.Module) -> Callable[[torch.Tensor, Sequence[int]], Drawn]:
        """Observations [B, 2, 24] and a seed a row, to chunks."""
        return METHODS[self.method](self, network)


BASELINE = Sampler("diffusers DDPM", TRAIN_STEPS)
"""The loop that people run today."""

SAMPLERS = (
    Sampler("DDPM", 100),
    Sampler("DDPM", 100, "gains", 16),
    Sampler("diffusers DDIM", 10),
    Sampler("2M SDE", 15),
    Sampler("2M SDE", 15, "gains", 8),
    BASELINE,
    Sampler("DDPM", 100, "hold-x0", 16),
    Sampler("DDPM", 100, "gains", "auto"),
    Sampler("DDPM", 100, "hold-x0", "auto"),
    Sampler("DDPM", 100, "gains", 8),
    Sampler("DDPM", 100, "gains", 32),
    Sampler("diffusers DDIM", 16),
    Sampler("2M SDE", 10),
    Sampler("2M SDE", 10, "gains", 8),
    Sampler("DDPM", 100, "hold-x0", 8),
    Sampler("DDPM", 100, "hold-x0", 32),
)
"""In the order in which they are measured."""


def _with_free(sampler: Sampler, network: torch.nn.Module) -> Callable[[torch.Tensor, Sequence[int]], Drawn]:
    if sampler.method == "2M SDE":
        # diffusers' solver has no clip_sample: second order takes the estimate of x0 as it is
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", solver_order=2, timestep_spacing="leading", **_SCHEDULE
        )
        process = free.ReverseProcess.from_scheduler(scheduler, sampler.steps)
    else:
        process = free.ReverseProcess.ddpm(sampler.steps, TRAIN_STEPS, beta_schedule=BETA_SCHEDULE, clip_sample=True)
    target = free.as_target(network)
    made: list[free.Sampler] = []

    def draw(observation: torch.Tensor, seeds: Sequence[int]) -> Drawn:
        common: dict[str, Any] = {
            "conditioning": {"observation": observation},
            "shape": (HORIZON, ACTIONS),
            "process": process,
            "seed": list(seeds),
        }
        if sampler.drafter is None:
            out = free.ancestral_sample(target, **common)
        elif len(seeds) == 1:
            # a lone chunk is drawn by what a robot would call: made once
            if not made:
                made.append(
                    free.Sampler(
                        target,
                        shape=common["shape"],
                        process=process,
                        conditioning=common["conditioning"],
                        drafter=sampler.drafter,
                        window=sampler.window,
                    )
                )
            chunk, stats = made[0](common["conditioning"], seed=common["seed"]), made[0].stats
            assert stats is not None
            return Drawn(chunk, float(stats.rounds[0]), float(stats.target_evaluations))
        else:
            out = free.speculative_sample(target, sampler.drafter, window=sampler.window, **common)
        return Drawn(out.samples, float(out.stats.rounds.mean()), out.stats.target_evaluations / len(seeds))

    return draw


def _with_diffusers(sampler: Sampler, network: torch.nn.Module) -> Callable[[torch.Tensor, Sequence[int]], Drawn]:
    """The loop over a scheduler's steps, as diffusion policies have it."""
    kind = DDIMScheduler if sampler.method == "diffusers DDIM" else DDPMScheduler
    scheduler = kind(clip_sample=True, **_SCHEDULE)
    scheduler.set_timesteps(sampler.steps)

    @torch.no_grad()
    def draw(observation: torch.Tensor, seeds: Sequence[int]) -> Drawn:
        keys = torch.tensor(seeds)
        # every sampler begins a chunk with the same noise
        chunk = normal(keys, torch.zeros_like(keys), HORIZON * ACTIONS, stream=LATENT_STREAM).view(-1, HORIZON, ACTIONS)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = {"generator": generators if len(seeds) > 1 else generators[0]}
        for timestep in scheduler.timesteps:
            output = network(chunk, timestep.expand(len(chunk)), observation)
            chunk = scheduler.step(output, timestep, chunk, **noise).prev_sample
        return Drawn(chunk, sampler.steps, sampler.steps)

    return draw


METHODS = {
    "diffusers DDPM": _with_diffusers,
    "diffusers DDIM": _with_diffusers,
    "DDPM": _with_free,
    "2M SDE": _with_free,
}
