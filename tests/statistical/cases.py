"""Configurations of :func:`free.speculative_sample` whose chains are looked at, and how they are made."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import free
from free.sampling.relaxation import DraftedSteps
from tests.analytic import (
    CliffTarget,
    GaussianTarget,
    MixtureTarget,
    ShiftedModel,
    VelocityTarget,
    signal_level,
)
from tests.featured import WIDTH, FeaturedTarget, feature_drafter
from tests.statistical.drafters import (
    BlendingDrafter,
    CliffDrafter,
    FeatureLeaningDrafter,
    LeaningDrafter,
    RememberingDrafter,
    UnevenDrafter,
)

DIM = 6


@dataclass(frozen=True)
class Case:
    """One configuration of :func:`free.speculative_sample`."""

    target: str
    drafter: str
    window: int
    samples: int = 10_000
    steps: int = 10
    guidance_scale: float = 1.0
    clip: float | None = None
    seed: int = 1
    shape: tuple[int, ...] = (DIM,)
    """Of one sample, as the sampler and the drafter see it; the checks see it flattened."""
    table: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of :meth:`free.ReverseProcess.ddpm`."""
    sampler: str = "ddpm"
    """Or, over the same timesteps, ``"2M SDE"`` (DPM-Solver++ of second order) or ``"EDM"`` (churned but at the end)."""
    calls: int = 1
    """Calls of the sampler that the samples are spread over."""
    centers: int = 0
    """How many conditionings there are, which the rows take in turn; 0 is none. Guided cases have one at least."""
    relaxation: tuple[float, float | None] | None = None
    """Strength and budget, every step as uncertain as can be."""


def make_target(case: Case) -> Any:
    gaussian = {"gaussian": GaussianTarget, "velocity": VelocityTarget, "cliff": CliffTarget}
    if case.target in gaussian:
        return gaussian[case.target].example(DIM)
    return MixtureTarget.example(DIM, ill_conditioned=case.target == "ill-conditioned")


def centers(case: Case) -> torch.Tensor | None:
    """The conditionings [C, D] that row i has number i % C of, so that the sample has C closed-form laws; None without."""
    count = max(case.centers, int(case.guidance_scale != 1.0))
    if not count:
        return None
    others = 0.8 * torch.randn(count - 1, DIM, generator=torch.Generator().manual_seed(12))
    return torch.cat((torch.linspace(0.6, -0.4, DIM)[None], others))


def make_process(case: Case) -> free.ReverseProcess:
    if case.sampler != "ddpm":
        timestep = free.ReverseProcess.ddpm(case.steps).timestep
        signal = torch.cat((signal_level(timestep), torch.ones(1)))
        if case.sampler == "2M SDE":
            return free.ReverseProcess.from_levels(signal.sqrt(), (1 - signal).sqrt(), timestep, order=2, initial_std=1.0)
        raised = (1 / signal - 1).sqrt()  # the levels of the states that the network sees
        gamma = torch.where(torch.arange(case.steps) < case.steps - 3, 0.6, 0.0)
        sigma = torch.cat((raised[:-1] / (1 + gamma), raised[-1:]))
        with pytest.warns(UserWarning, match="3 of .* steps have no noise"):
            process = free.ReverseProcess.edm(sigma, gamma=gamma, time=lambda _: timestep)
        return dataclasses.replace(process, initial_std=1.0)
    clipping = {} if case.clip is None else {"clip_sample": True, "clip_sample_range": case.clip}
    return free.ReverseProcess.ddpm(case.steps, **clipping, **case.table)


def uneven_variance(steps: int, without_noise: int) -> torch.Tensor:
    """The posterior's variances times 0.6 … 1.5, and 0 at one step in the middle."""
    variance = free.ReverseProcess.ddpm(steps).std.double().square() * torch.linspace(0.6, 1.5, steps)
    variance[without_noise] = 0
    return variance


def make_relaxation(case: Case) -> free.Relaxation | None:
    def everywhere(drafted: DraftedSteps) -> torch.Tensor:
        return torch.ones(drafted.step.shape, device=drafted.step.device)

    return None if case.relaxation is None else free.Relaxation(case.relaxation[0], everywhere, case.relaxation[1])


def make_drafter(case: Case, model: Any, process: free.ReverseProcess, device: str = "cpu") -> Any:
    """The case's drafter on ``device``, or its name where the package knows it."""
    if case.drafter == "shifted" and case.guidance_scale != 1.0:
        # the bad model is guided as the target is; one standard deviation of the guided output stays one
        null = {"center": torch.zeros(DIM)}
        return free.ModelDrafter(free.as_target(ShiftedModel(model, process), null_conditioning=null))
    makers: dict[str, Callable[[], Any]] = {
        "shifted": lambda: ShiftedModel(model, process),
        "twice shifted": lambda: ShiftedModel(model, process, 2.0),
        "leaning": lambda: LeaningDrafter(model),
        "remembering": lambda: RememberingDrafter(model),
        "leaning on the feature": lambda: FeatureLeaningDrafter(model),
        "uneven": lambda: UnevenDrafter(model),
        "over the cliff": lambda: CliffDrafter(model),
        "blending": lambda: BlendingDrafter(case.steps, case.seed),
        "feature, untrained, one sweep": lambda: feature_drafter("gains", 1).to(device),
        "feature, untrained, two sweeps": lambda: feature_drafter(None, 2).to(device),
        "feature, untrained, walking": lambda: feature_drafter("hold-x0", 0).to(device),
        "the paper's, untrained": lambda: feature_drafter(None, 0).to(device),
        "feature, trained": lambda: copy.deepcopy(trained_drafter(case.target, case.steps)).to(device),
        "fresh hold-x0": lambda: free.Fresh(free.HoldX0()),
        "fresh gains": lambda: free.Fresh(free.Gains()),
    }
    return makers[case.drafter]() if case.drafter in makers else case.drafter


@functools.cache
def trained_drafter(target: str, steps: int) -> free.FeatureDrafter:
    """A FeatureDrafter after a few dozen rounds of training on what its own windows visit."""
    from free.training.loss import drafter_loss
    from free.training.visited import VisitedWindows

    torch.manual_seed(0)
    featured, process = FeaturedTarget(make_target(Case(target, "", 8))), free.ReverseProcess.ddpm(steps)
    drafter = free.FeatureDrafter(1, WIDTH, DIM, 1, 1)
    visited = VisitedWindows(featured, process, 1.0, window=8, pool=64)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    for _ in range(150):
        examples = visited.draw(drafter, lambda: torch.randn(64, DIM, 1, 1), torch.zeros(64, dtype=torch.int64))
        optimizer.zero_grad()
        drafter_loss(drafter, examples)["loss"].backward()
        optimizer.step()
    return drafter.eval()


def shaped(model: Any, shape: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    """A model of samples [DIM] as one of samples of ``shape``."""

    def reshaped(x: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        return model(x.flatten(1), timestep, **conditioning).unflatten(1, shape)

    return reshaped


CASES: dict[str, Case] = {
    "gaussian, shifted, W=2": Case("gaussian", "shifted", 2),
    "gaussian, shifted, W=4": Case("gaussian", "shifted", 4, seed=2),
    "gaussian, shifted, W=8, guided": Case("gaussian", "shifted", 8, guidance_scale=1.5, seed=3),
    "gaussian, leaning, W=4": Case("gaussian", "leaning", 4, seed=4),
    "gaussian, hold-x0, W=8": Case("gaussian", "hold-x0", 8, seed=5),
    "gaussian, hold-output, W=4": Case("gaussian", "hold-output", 4, seed=6),
    "gaussian, hold-x0, W=4, guided": Case("gaussian", "hold-x0", 4, guidance_scale=2.0, seed=7),
    "mixture, hold-x0, W=4": Case("mixture", "hold-x0", 4, steps=20, samples=6000, seed=8),
    "mixture, hold-output, W=8": Case("mixture", "hold-output", 8, seed=9),
    "ill-conditioned, hold-x0, W=8": Case("ill-conditioned", "hold-x0", 8, seed=10),
    "ill-conditioned, shifted, W=4": Case("ill-conditioned", "shifted", 4, seed=11),
    "mixture, hold-x0, W=4, clipped": Case("mixture", "hold-x0", 4, clip=0.8, seed=12),
    "mixture, shifted, W=8, clipped": Case("mixture", "shifted", 8, clip=0.8, seed=13),
    "gaussian, gains, W=4": Case("gaussian", "gains", 4, seed=40),
    "gaussian, remembering, W=4": Case("gaussian", "remembering", 4, seed=46),
    "gaussian, gains, W=8, guided": Case("gaussian", "gains", 8, guidance_scale=2.0, seed=41),
    "gaussian, gains, W=8, given variance, 0 at step 6": Case(
        "gaussian", "gains", 8, steps=12, table={"variance": uneven_variance(12, 6)}, seed=42
    ),
    "gaussian, fresh gains, W=4": Case("gaussian", "fresh gains", 4, seed=43),
    "mixture, gains, W=8, clipped": Case("mixture", "gains", 8, clip=0.8, seed=44),
    "ill-conditioned, gains, W=8": Case("ill-conditioned", "gains", 8, steps=20, samples=6000, seed=45),
    "gaussian, second order, gains, W=4": Case("gaussian", "gains", 4, seed=47, sampler="2M SDE"),
    "gaussian, blending, W=4": Case("gaussian", "blending", 4, seed=14, shape=(1, 2, 3)),
    "gaussian, blending, W=8, guided": Case("gaussian", "blending", 8, guidance_scale=2.0, seed=15),
    "mixture, blending, W=8, clipped": Case("mixture", "blending", 8, clip=0.8, seed=16, shape=(1, 3, 2)),
    **{
        f"{target}, {drafter}, W={window}{', clipped' if clip else ''}": Case(
            target, drafter, window, clip=clip, seed=17 + i, shape=FeaturedTarget.sample_shape
        )
        for i, (target, drafter, window, clip) in enumerate(
            (
                ("gaussian", "feature, untrained, one sweep", 4, None),
                ("mixture", "feature, untrained, two sweeps", 8, 0.8),
                ("gaussian", "feature, untrained, walking", 4, None),
                ("gaussian", "the paper's, untrained", 4, None),
                ("ill-conditioned", "feature, trained", 8, None),
                ("gaussian", "fresh hold-x0", 4, None),
            )
        )
    },
    "gaussian, hold-x0, W=4, eta 0.6": Case("gaussian", "hold-x0", 4, table={"eta": 0.6}, seed=30),
    "gaussian, leaning, W=4, stochasticity 1.3": Case("gaussian", "leaning", 4, table={"stochasticity": 1.3}, seed=31),
    "velocity, hold-x0, W=4, variance beta": Case(
        "velocity", "hold-x0", 4, table={"prediction_type": "v_prediction", "variance": "beta"}, seed=32
    ),
    "mixture, hold-output, W=4, clipped, eta 0.5": Case("mixture", "hold-output", 4, clip=0.8, table={"eta": 0.5}, seed=33),
    "gaussian, leaning, W=6, given variance, 0 at step 4": Case(
        "gaussian", "leaning", 6, table={"variance": uneven_variance(10, 4)}, seed=34
    ),
    "gaussian, leaning, W=4, rows of their own": Case("gaussian", "leaning", 4, centers=5, seed=35),
    "gaussian, hold-x0, W=4, guided, rows of their own": Case(
        "gaussian", "hold-x0", 4, guidance_scale=1.5, centers=7, seed=36
    ),
    "cliff, over the cliff, W=3": Case("cliff", "over the cliff", 3, seed=37),
    "gaussian, hold-x0, W=8, one by one": Case("gaussian", "hold-x0", 8, steps=44, samples=100, calls=100, seed=38),
    "gaussian, uneven, W=4, two by two": Case("gaussian", "uneven", 4, steps=48, samples=60, calls=30, seed=39),
    "gaussian, leaning on the feature, W=4": Case(
        "gaussian", "leaning on the feature", 4, seed=42, shape=FeaturedTarget.sample_shape
    ),
    "gaussian, second order, hold-x0, W=4": Case("gaussian", "hold-x0", 4, 20_000, seed=23, sampler="2M SDE"),
    "gaussian, second order, hold-x0, W=16": Case("gaussian", "hold-x0", 16, 20_000, 20, seed=24, sampler="2M SDE"),
    "gaussian, second order, shifted, W=4": Case("gaussian", "shifted", 4, seed=25, sampler="2M SDE"),
    "gaussian, second order, hold-output, W=4, guided": Case(
        "gaussian", "hold-output", 4, guidance_scale=2.0, seed=26, sampler="2M SDE"
    ),
    "mixture, second order, blending, W=8": Case("mixture", "blending", 8, 6000, 15, seed=27, sampler="2M SDE"),
    "gaussian, EDM, hold-x0, W=4": Case("gaussian", "hold-x0", 4, steps=14, seed=48, sampler="EDM"),
    "gaussian, EDM, gains, W=8, guided": Case("gaussian", "gains", 8, steps=14, guidance_scale=2.0, seed=49, sampler="EDM"),
    "mixture, second order, one sweep, W=8": Case(
        "mixture",
        "feature, untrained, one sweep",
        8,
        3000,
        15,
        seed=28,
        sampler="2M SDE",
        shape=FeaturedTarget.sample_shape,
    ),
}

RELAXED: dict[str, Case] = {
    "tau 0.02": Case("gaussian", "twice shifted", 8, samples=6000, steps=9, relaxation=(-math.log(0.02), None), seed=40),
    "within a budget": Case("gaussian", "leaning", 8, samples=4000, steps=9, relaxation=(2.0, 0.4), seed=41),
}
