"""``free-dit check``: what is exact passes, and what users get wrong in drafters and models of their own is found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import free
from free.cli import main
from free.demo import load_digits_dit
from free.drafters import Situation, StepDrafter
from free.evaluation import bounds, check_exactness
from free.evaluation.exactness import BUDGET, MEANINGS
from free_kernels import normal
from tests.analytic import GaussianTarget, MixtureTarget

DIM = 6
COMMON: dict[str, Any] = {"shape": (DIM,), "num_inference_steps": 10, "num_samples": 1500, "batch_size": 500, "window": 4}


class Leaking(StepDrafter):
    """The bug that users write: a draft that knows the noise of its own step, here 5 % of it."""

    name = "leaking"

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process = situation.process
        honest = situation.anchor(step).hold_x0(state, step, process)
        z = normal(situation.seed, step, state.shape[1])
        return honest + 0.05 * (process.std / process.model_coef)[step][:, None] * z


class Peeking(StepDrafter):
    """The subtle one: it aims at where the last window's path stood a step later, which that step's noise has moved."""

    name = "peeking"

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process, last, row = situation.process, situation.last, torch.arange(len(step))
        column = step + 1 - last.step
        known = (column >= 0) & (column < last.length)
        later = last.states[row, column.clamp(0, last.states.shape[1] - 1)]
        aimed = (later - process.state_coef[step][:, None] * state) / process.model_coef[step][:, None]
        honest = situation.anchor(step).hold_x0(state, step, process)
        return torch.where(known[:, None], aimed, honest)


class Honest(StepDrafter):
    """The same that the leaking one leaks into."""

    name = "honest"

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        return situation.anchor(step).hold_x0(state, step, situation.process)


@pytest.mark.parametrize("drafter", ["gains", "hold-output", Honest()], ids=["gains", "hold-output", "honest"])
def test_exact_drafters_pass(drafter: Any) -> None:
    found = check_exactness(MixtureTarget.example(DIM), drafter, **COMMON)
    assert found.passed, str(found)
    assert set(found.p_values) == set(MEANINGS)
    assert min(found.p_values.values()) > 1e-4
    assert 0 < found.accepted < found.tested
    assert found.rounds < 10
    assert "Nothing speaks against exactness" in str(found)


def test_a_drafter_that_knows_its_noise_is_found() -> None:
    found = check_exactness(MixtureTarget.example(DIM), Leaking(), **COMMON)
    assert not found.passed
    assert "along delta" in found.failed
    assert "NOT EXACT: along delta" in str(found)


def test_a_drafter_that_leans_on_later_evaluations_is_found() -> None:
    found = check_exactness(MixtureTarget.example(DIM), Peeking(), **COMMON)
    assert not found.passed
    assert found.repeats


@pytest.mark.parametrize("fault", ["first timestep", "other rows", "memory"])
def test_a_model_that_answers_otherwise_in_a_window_is_found(fault: str) -> None:
    model, calls = GaussianTarget.example(DIM), [0]

    def faulty(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if fault == "first timestep":
            timestep = timestep[:1].expand(len(x))
        output = model(x, timestep)
        if fault == "other rows":
            output = output + 0.01 * x.mean(0)
        return output * (1 + 0.001 * calls[0]) if fault == "memory" else output

    found = check_exactness(faulty, **COMMON)
    assert not found.repeats
    assert not found.passed
    assert "in a window than alone" in str(found)


@pytest.mark.parametrize("form", ["second order", "clipped", "guided"])
def test_every_kind_of_process_passes(form: str) -> None:
    model: Any = GaussianTarget.example(DIM)
    options = {**COMMON, "num_samples": 1000}
    if form == "guided":
        model = free.as_target(model, null_conditioning={"center": torch.zeros(DIM)})
        options |= {"guidance_scale": 1.5, "conditioning": {"center": torch.stack((torch.ones(DIM), -torch.ones(DIM)))}}
    else:
        angle = torch.linspace(1.5, 0.0, 11, dtype=torch.float64)
        timestep = free.ReverseProcess.ddpm(10).timestep
        second = free.ReverseProcess.from_levels(angle.cos(), angle.sin(), timestep, order=2)
        clipped = free.ReverseProcess.ddpm(10, clip_sample=True, clip_sample_range=0.5)
        options |= {"process": second if form == "second order" else clipped, "num_inference_steps": 250}
    found = check_exactness(model, "hold-output", **options)
    assert found.passed, str(found)
    assert min(found.p_values.values()) > 1e-4
    assert found.tested > 1000


def test_the_command_checks_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "--steps", "10", "--num-samples", "24", "--batch-size", "24", "--window", "4", "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "drafter gains: 24 samples of 10 steps" in printed
    for name, meaning in MEANINGS.items():
        assert f"{name}  " in printed
        assert meaning in printed


def test_the_command_fails_with_1_where_it_is_not_exact(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Grossly(Leaking):
        def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
            return 20 * super().draft(state, step, situation) - 19 * Honest.draft(self, state, step, situation)  # type: ignore[arg-type]

    monkeypatch.setattr("free.drafters.loading.drafter_of", lambda *_: Grossly())
    assert main(["check", "--steps", "10", "--num-samples", "16", "--window", "4", "--device", "cpu"]) == 1
    assert "NOT EXACT: along delta" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, "window is 1; allowed is an int, 2 or more"),
        ({"num_samples": 4}, "num_samples is 4; allowed is an int, 16 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"drafter": "hold"}, "drafter is 'hold'"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is below
        check_exactness(load_digits_dit(), **{"num_inference_steps": 4, **change})
    assert message in str(error.value)


def test_bounds_are_no_smaller_than_exact_p_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (50, 4000):
        for shift in (0.0, 0.05, 0.2):
            z = torch.randn(count, generator=generator, dtype=torch.float64) + shift
            exact = stats.kstest(z.numpy(), "norm").pvalue
            assert exact * 0.99 <= bounds.distribution_p(z, bounds.normal_cdf) <= max(30 * exact, exact**0.8)
            squares = torch.randn(count, 300, generator=generator, dtype=torch.float64).square().sum(1) * (1 + shift)
            exact = stats.kstest(squares.numpy(), stats.chi2(300).cdf).pvalue
            assert exact * 0.99 <= bounds.distribution_p(squares, bounds.chi2_cdf(300))
            total = float(z.square().sum())
            tail = 2 * min(stats.chi2(count).sf(total), stats.chi2(count).cdf(total))
            assert tail * 0.999 <= bounds.scale_p(total, count) <= max(1e-300, 40 * count**0.5 * tail)
    for successes in (40, 60, 90):
        exact = stats.binomtest(successes, 100, 0.5).pvalue
        assert exact * 0.999 <= bounds.success_p(successes, 50.0, 25.0)
    assert bounds.success_p(90, 50.0, 25.0) < 1e-8
    assert bounds.mean_p(torch.tensor([0.0, 60.0]), 100) == pytest.approx(2 * 2 * stats.norm.sf(6))


def test_pairs_are_judged_whatever_their_tails() -> None:
    generator = np.random.default_rng(0)
    for draw in (generator.standard_normal, generator.standard_cauchy):
        worst = min(bounds.pairs_p(torch.from_numpy(draw((200, 1)))) for _ in range(500))
        assert worst > 1e-4
    assert bounds.pairs_p(torch.from_numpy(generator.standard_normal((400, 5)) + 0.5)) < BUDGET
    assert bounds.pairs_p(torch.zeros(10, 3)) == 1
    first, second = (torch.from_numpy(generator.standard_normal(2000)) for _ in range(2))
    assert bounds.paired_distribution_p(first, second) > 1e-3
    assert bounds.paired_distribution_p(first, 1.5 * second) < BUDGET


def test_the_visible_shift_is_visible() -> None:
    z = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = bounds.visible_shift(len(z), BUDGET)
    assert bounds.distribution_p(z + shift, bounds.normal_cdf) < BUDGET
    assert bounds.distribution_p(z + shift / 4, bounds.normal_cdf) > BUDGET
    assert bounds.visible_shift(3, BUDGET) == math.inf
