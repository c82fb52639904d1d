"""The paper's examples: noised data, and the target's reverse steps from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler

from free.drafters import Anchor
from free.drafters.feature import FeatureDrafter
from free.processes import ReverseProcess
from free.targets import DiTTarget
from free.training.examples import Examples, together
from free_kernels import guided, posterior


class NoisedPairs:
    """FREE's examples (arXiv 2511.20390): noise the data to a step, take the target's reverse step, draft the next one.

    Args:
        target: frozen.
        process: with steps as far apart as inference will take them.
        guidance_scale: of the outputs that are learned.
        unroll: drafts in a row; from the second on the block leans on its own feature, at a state that its own draft made.
        depth_weight: of each draft relative to the one before it.
        scheduler: noises the data; the original DiT's linear betas if left out.
    """

    def __init__(
        self,
        target: DiTTarget,
        process: ReverseProcess,
        guidance_scale: float,
        *,
        unroll: int = 1,
        depth_weight: float = 0.8,
        scheduler: DDPMScheduler | None = None,
    ) -> None:
        if not 1 <= unroll < process.num_steps - 1:
            raise ValueError(
                f"unroll is {unroll}; allowed is 1 … {process.num_steps - 2}, the process has {process.num_steps} steps"
            )
        self.target, self.process, self.guidance_scale = target, process, guidance_scale
        self.unroll, self.depth_weight = unroll, depth_weight
        self.scheduler = scheduler or DDPMScheduler(clip_sample=False)

    @torch.no_grad()
    def draw(self, drafter: FeatureDrafter, clean: Callable[[], torch.Tensor], labels: torch.Tensor) -> Examples:
        """``unroll`` examples for each of n clean samples, which ``clean`` returns, [n, *sample shape]; labels int64 [n].

        Raises:
            ValueError: the drafter's base is ``"gains"``.
        """
        if drafter.base == "gains":
            raise ValueError("the drafter's base is 'gains', which learn from a run: noised data is none")
        process, data, count = self.process, clean(), len(labels)
        conditioning = {"class_labels": labels}
        label_embedding = self.target.label_embedding(conditioning)
        # the last step is never drafted
        step = torch.randint(process.num_steps - 1 - self.unroll, (count,), device=data.device)
        noised = self.scheduler.add_noise(data, torch.randn_like(data), process.timestep[step].long())
        anchor = _evaluate(self.target, noised.flatten(1), step, conditioning, process, self.guidance_scale)
        state, output, feature = anchor.state, anchor.output, anchor.feature
        seed = torch.zeros_like(step)  # not used: the noise is given
        parts = []
        for depth in range(self.unroll):
            state = posterior(state, output, seed, step, process.table, noise=torch.randn_like(state))
            step = step + 1
            # the paper's block leans on the step before, which from the second draft on is one of its own
            leant = anchor if drafter.base is not None else Anchor(step - 1, anchor.state, anchor.output, anchor.feature)
            exact = _evaluate(self.target, state, step, conditioning, process, self.guidance_scale)
            weight = torch.full((count,), self.depth_weight**depth, device=state.device)
            hold_x0 = leant.hold_x0(state, step, process) if drafter.base is not None else torch.zeros_like(state)
            wanted = exact.output - hold_x0
            tested = torch.ones_like(step, dtype=torch.bool)
            parts.append(
                Examples(process, state, step, leant, label_embedding, feature, wanted, exact.feature, weight, tested)
            )
            if depth + 1 < self.unroll:
                drafted, own = drafter.predict(state, step, leant, label_embedding, process, feature)
                output, feature = drafted + hold_x0, feature if drafter.base is not None else own
        return together(parts)


def _evaluate(
    target: DiTTarget,
    state: torch.Tensor,
    step: torch.Tensor,
    conditioning: dict[str, torch.Tensor],
    process: ReverseProcess,
    guidance_scale: float,
) -> Anchor:
    """The target at states [N, D], with its feature."""
    assert target.sample_shape is not None
    shaped = state.view(-1, *target.sample_shape)
    with target.capture_features():
        output = target.evaluate(shaped, process.timestep[step], conditioning, guidance_scale != 1.0)
    unconditional = None if output.unconditional is None else output.unconditional.flatten(1)
    return Anchor(
        step, state, guided(output.output.flatten(1), unconditional, guidance_scale, torch.float32), output.feature
    )
