"""How good a drafter is: the parallel efficiency that its |delta| foretells, and the one it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from free.drafters.feature import FeatureDrafter
from free.processes import ReverseProcess
from free.sampling.samplers import speculative_sample
from free.sampling.statistics import standard_error
from free.targets import DiTTarget
from free.training.examples import Examples
from free.training.loss import drafter_loss

_BINS = 25  # of steps, each with one mean acceptance


def acceptance(delta: torch.Tensor) -> torch.Tensor:
    """Probability that a draft |delta| away is accepted, 2 * Phi(-|delta| / 2) (FREE, eq. 40)."""
    return torch.erfc(delta / 8**0.5)


def expected_rounds(accepted: np.ndarray, exact_step: Sequence[int], window: int) -> float:
    """Rounds of a whole trajectory if the drafts of step k are accepted with probability ``accepted[k]``, independently.

    Args:
        accepted: [S].
        exact_step: [S], the first step >= k that is never drafted.
        window: W.
    """
    steps = len(accepted)
    rounds = np.zeros(steps + 1)  # from step k to the end
    for k in reversed(range(steps)):
        drafts = min(window, exact_step[k] - k + 1) - 1
        reached, rounds[k] = 1.0, 1.0
        for j in range(drafts):
            rounds[k] += reached * (1 - accepted[k + j]) * rounds[k + j + 1]
            reached *= accepted[k + j]
        rounds[k] += reached * rounds[k + drafts + 1]
    return float(rounds[0])


@torch.no_grad()
def predicted_efficiency(drafter: FeatureDrafter, draws: Iterable[Examples], process: ReverseProcess, window: int) -> float:
    """S over the expected rounds, from |delta| by step of fresh examples of ``process``."""
    steps, shares = [], []
    for examples in draws:
        # the mean at a step is over the drafts that are tested there
        steps.append(examples.step[examples.tested].cpu())
        shares.append(acceptance(drafter_loss(drafter, examples)["delta"])[examples.tested].cpu())
    count = process.num_steps
    bins = min(_BINS, count)
    place = torch.cat(steps).numpy() * bins // count
    tested = np.bincount(place, minlength=bins)
    total = np.bincount(place, torch.cat(shares).double().numpy(), minlength=bins)
    seen = np.flatnonzero(tested)
    middle = (seen + 0.5) * count / bins - 0.5
    by_step = np.interp(np.arange(count), middle, total[seen] / tested[seen])
    return count / expected_rounds(by_step, process.exact_step.tolist(), window)


def real_efficiency(
    target: DiTTarget,
    drafter: FeatureDrafter,
    process: ReverseProcess,
    guidance_scale: float,
    window: int,
    samples: int,
    seed: int,
) -> tuple[float, float]:
    """Parallel efficiency of the sampler with the drafter, and its standard error; the classes take turns."""
    output = speculative_sample(
        target,
        drafter,
        class_labels=[i % target.null_class for i in range(samples)],
        process=process,
        guidance_scale=guidance_scale,
        window=window,
        seed=seed,
    )
    efficiency = output.stats.efficiency_per_sample
    return float(efficiency.mean()), standard_error(efficiency)
