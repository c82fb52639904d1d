"""One step of the ancestral sampler, all samples in lockstep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from free.sampling.request import Request
from free.sampling.statistics import Stopwatch
from free.sampling.tensors import map_tensors
from free.targets import TargetOutput
from free_kernels import posterior, posterior_with_memory


@dataclass
class Chain:
    """B samples, flattened to D numbers each."""

    seed: torch.Tensor
    """int64 [B]."""
    step: torch.Tensor
    """int64 [B], the same for all: steps taken."""
    state: torch.Tensor
    """float32 [B, D]."""
    conditioning: dict[str, Any]
    """The request's."""
    x0: torch.Tensor | None = None
    """float32 [B, D], of a process of second order: the estimate of x0 at the step before, zeros at first."""

    @classmethod
    def begin(cls, request: Request) -> Chain:
        """All samples in their initial states."""
        state = request.initial_state()
        x0 = None if request.process.memory is None else torch.zeros_like(state)
        return cls(request.seed, torch.zeros_like(request.seed), state, request.conditioning, x0)

    def clone(self) -> Chain:
        return map_tensors(self, torch.clone)


def step_on(
    chain: Chain, request: Request, noise: torch.Tensor | None, impl: str, watch: Stopwatch
) -> tuple[Chain, TargetOutput]:
    """One forward, one step (Ho et al. 2020, algorithm 2).

    Args:
        chain: where the samples are.
        request: of the same samples.
        noise: z [B, D] of this step if it is at hand.
        impl: of the operations.
        watch: for the phases.

    Returns:
        The samples moved on, and what the target said of them before.
    """
    process = request.process
    step = chain.step.clamp(max=process.num_steps - 1)
    with watch("target"):
        output = request.target.evaluate(
            chain.state.view(-1, *request.sample_shape), process.timestep[step], chain.conditioning, request.guided
        )
    with watch("verification"):
        given: dict[str, Any] = {
            "unconditional_output": None if output.unconditional is None else output.unconditional.flatten(1),
            "guidance_scale": request.guidance_scale,
            "noise": noise,
            "impl": impl,
        }
        drawn, x0 = (chain.seed, step, process.table), chain.x0

        def settle() -> tuple[torch.Tensor, torch.Tensor | None]:
            if x0 is None:
                return posterior(chain.state, output.output.flatten(1), *drawn, **given), None
            return posterior_with_memory(chain.state, output.output.flatten(1), x0, *drawn, **given)

        state, x0 = request.target.ranks.settled(settle)
    return replace(chain, step=chain.step + 1, state=state, x0=x0), output
