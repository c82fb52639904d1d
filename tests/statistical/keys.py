"""Whether a choice of windows has seen the noise that it chooses for: many runs of one or two samples, keys of their own.

One decision for a batch of thousands dilutes such a leak as many times; with one sample a run it is as sharp as it can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

import free
import free.sampling.planning
from free.drafters import Situation, StepDrafter
from free.sampling.window import Setup
from free.windows import RoundSeconds
from tests.statistical.laws import PValues, normal_p, two_sample_p

# of rounds of one, two and four states a row: near where a second state pays, so that what was seen of a draft decides
SECONDS = np.array([1.0, 1.2, 1.4])


class Line:
    """A network of one number: the noise estimate of N(center, 1) data, a ``center`` [N, 1] a row if given."""

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
        return 0.5 * x if center is None else 0.5 * x - 0.3 * center


class Off(StepDrafter):
    """1.5 standard deviations off at every state, so that 45 % of its drafts are accepted; 0.8 in rows with a center."""

    name = "off"

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process, conditioning = situation.process, situation.conditioning
        gap = torch.where(conditioning.get("center", torch.zeros(1)) == 0, 1.5, 0.8)
        target_output = situation.target.model(state, process.timestep[step], **conditioning)
        return target_output + gap * (process.std / process.model_coef)[step][:, None]


def innovations(output: free.SamplingOutput, process: free.ReverseProcess, **conditioning: torch.Tensor) -> torch.Tensor:
    """What an exact sampler's noise was, float64 [B, S-1]."""
    assert output.trajectory is not None
    state = output.trajectory[..., 0].double()  # [B, S + 1]
    center = conditioning.get("center")
    mean_output = 0.5 * state[:, :-1] - (0.0 if center is None else 0.3 * center.double())
    mean = process.state_coef.double() * state[:, :-1] + process.model_coef.double() * mean_output
    return ((state[:, 1:] - mean) / process.std.double())[:, :-1]


def by_step(runs: list[torch.Tensor]) -> PValues:
    """Of runs [B, S-1] each: every step's noise is normal, whatever was chosen for it."""
    noise = torch.cat(runs)
    return {f"noise of step {k}": normal_p(column) for k, column in enumerate(noise.T)}


def _measured(setup: Setup, graphs: object) -> RoundSeconds:
    return RoundSeconds(setup.request.batch * np.array([1.0, 2.0, 4.0]), SECONDS)


def _runs(count: int, steps: int, one: Callable[[int, dict[str, Any]], torch.Tensor]) -> PValues:
    process = free.ReverseProcess.ddpm(steps)
    common: dict[str, Any] = {"shape": (1,), "process": process, "impl": "reference"}
    with mock.patch.object(free.sampling.planning, "_measure", _measured):
        return by_step([one(10_000 + 7 * i, common) for i in range(count)])


def plan_of_the_same_seed() -> PValues:
    """A plan that was made with the seed that it is used for: its pilot may not have drawn that seed's noise."""

    def one(seed: int, common: dict[str, Any]) -> torch.Tensor:
        model, drafter = Line(), Off()
        plan = free.plan_window(model, drafter, seed=seed, **common)
        out = free.speculative_sample(model, drafter, seed=seed, window=plan, return_trajectory=True, **common)
        return innovations(out, common["process"])

    return _runs(250, 3, one)


def plan_of_statistics() -> PValues:
    """A plan from the statistics of a run: refused for the samples of that run, exact for others."""

    def one(seed: int, common: dict[str, Any]) -> torch.Tensor:
        model, drafter = Line(), Off()
        stats = free.speculative_sample(model, drafter, seed=seed, window=3, **common).stats
        plan = free.plan_window(model, drafter, statistics=stats, **common)
        again: dict[str, Any] = {"window": plan, "return_trajectory": True, **common}
        try:
            out = free.speculative_sample(model, drafter, seed=seed, **again)
        except ValueError:
            out = free.speculative_sample(model, drafter, seed=seed + 1, **again)
        return innovations(out, common["process"])

    return _runs(250, 3, one)


def auto_twice() -> PValues:
    """An automatic window on a model that has seen the seed before."""

    def one(seed: int, common: dict[str, Any]) -> torch.Tensor:
        model, drafter = Line(), Off()
        for _ in range(2):
            out = free.speculative_sample(model, drafter, seed=seed, window="auto", return_trajectory=True, **common)
        return innovations(out, common["process"])

    return _runs(300, 3, one)


def auto_with_a_key_in_two_rows() -> PValues:
    """Two rows of one key, apart in their conditioning: the one ahead knows the noise that the other one comes to."""
    center = torch.tensor([[0.0], [4.0]])

    def one(seed: int, common: dict[str, Any]) -> torch.Tensor:
        asked: dict[str, Any] = {"seed": [seed, seed], "conditioning": {"center": center}, "window": "auto"}
        out = free.speculative_sample(Line(), Off(), return_trajectory=True, **asked, **common)
        # one row a run: the two share their noise, and would count it twice
        return innovations(out, common["process"], center=center)[:1]

    return _runs(900, 6, one)


class Heard(StepDrafter):
    """1.5 standard deviations off where the anchor's x0 is positive, else right: what it has heard of the noise decides."""

    name = "heard"

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process = situation.process
        gap = 1.5 * (situation.anchor(step).x0(process) > 0) * (process.std / process.model_coef)[step][:, None]
        return situation.target.model(state, process.timestep[step]) + gap


def warm_start_of_the_same_seed() -> PValues:
    """A policy that is called with the same seeds again, then with others: its last samples have heard the first ones'."""
    process, count = free.ReverseProcess.ddpm(4), 20_000
    asked: dict[str, Any] = {"shape": (1,), "num_samples": count, "process": process, "impl": "reference"}
    policy = free.Sampler(Line(), drafter=Heard(), window=4, shift=0, **asked)
    expected = free.ancestral_sample(Line(), seed=77, **asked).samples
    return {f"call {i}, seed {seed}": two_sample_p(policy(seed=seed), expected) for i, seed in enumerate((5, 5, 6, 7, 6))}


CHECKS: dict[str, Callable[[], PValues]] = {
    "keys: a plan of the same seed": plan_of_the_same_seed,
    "keys: a plan of statistics": plan_of_statistics,
    "keys: auto twice": auto_twice,
    "keys: auto, a key in two rows": auto_with_a_key_in_two_rows,
    "keys: a warm start of the same seed": warm_start_of_the_same_seed,
}
