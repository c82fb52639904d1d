"""Relaxed acceptance by simulation, and the certificate on targets whose distance from the exact law can be computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import free
from free.drafters import Situation, StepDrafter
from free.sampling.confidence import CONFIDENCE, mean_limit
from free.sampling.relaxation import DraftedSteps, excess_acceptance, relaxed_acceptance
from free_kernels import posterior, verify
from tests.analytic import GaussianTarget
from tests.statistical.laws import BUDGET, acceptance_probability, density_ratio, normal_p, success_p

ROWS = 100_000
DIM = 6


class Shifted(StepDrafter):
    """|delta| = ``norm`` at every state, along the first axis."""

    name = "shifted"

    def __init__(self, model: GaussianTarget, norm: float) -> None:
        self.model, self.norm = model, norm

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process = situation.process
        output = self.model(state, process.timestep[step])
        output[:, 0] += self.norm * (process.std / process.model_coef)[step]
        return output


def one_step(
    process: free.ReverseProcess, step: int, output_gap: torch.Tensor, tau: float | None
) -> tuple[torch.Tensor, ...]:
    """Whether a drafted step was accepted, bool [ROWS], and its innovation over the target's mean, float64 [ROWS, D]."""
    generator = torch.Generator().manual_seed(3)
    seed, steps = torch.arange(ROWS) + 2**41, torch.full((ROWS,), step)
    state, target = torch.randn(ROWS, DIM, generator=generator), torch.randn(ROWS, 2, DIM, generator=generator)
    draft = target[:, 0] + output_gap
    drafted = posterior(state, draft, seed, steps, process.table)
    outcome = verify(
        torch.stack((state, drafted), 1),
        target,
        draft[:, None],
        seed,
        steps,
        torch.full_like(steps, 2),
        process.table,
        tau=None if tau is None else torch.full((ROWS, 1), tau),
    )
    settled = torch.where(outcome.rejected[:, None], outcome.next_state, drafted).double()
    mean = process.state_coef[step].double() * state.double() + process.model_coef[step].double() * target[:, 0].double()
    return ~outcome.rejected, (settled - mean) / process.std[step].double()


@pytest.mark.parametrize("norm", [0.4, 1.5])
@pytest.mark.parametrize("tau", [0.02, 0.3, 0.7, 1.0])
def test_a_relaxed_step_accepts_as_often_and_is_as_far_off_as_the_closed_forms_say(tau: float, norm: float) -> None:
    process = free.ReverseProcess.ddpm(12)
    gap = torch.zeros(DIM)
    gap[0] = norm * process.std[4] / process.model_coef[4]
    accepted, innovation = one_step(process, 4, gap, tau)
    square = torch.tensor(norm**2, dtype=torch.float64)
    assert success_p(accepted, relaxed_acceptance(square, tau).expand(ROWS)) >= BUDGET
    # the event that the two laws disagree most on: the bound of one step is attained
    beyond = innovation[:, 0] > norm / 2
    expected = stats.norm.sf(norm / 2) + float(excess_acceptance(square, tau))
    assert success_p(beyond, torch.full((ROWS,), expected)) >= BUDGET
    assert normal_p(innovation[:, 1]) >= BUDGET
    exact = torch.full((ROWS,), stats.norm.sf(norm / 2))
    assert tau == 1 or success_p(beyond, exact) < BUDGET


@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("stochasticity", [0.5, 0.8, 1.0, 1.3])
def test_acceptance_depends_on_stochasticity_as_eq_42_says(stochasticity: float, tau: float | None) -> None:
    """FREE, supplement D: the mean moves with (1 + epsilon²) / 2 and the noise with epsilon, so |delta| with their ratio."""
    gap, step = torch.zeros(DIM), 5
    standard = free.ReverseProcess.ddpm(12)
    gap[:2] = torch.tensor([0.6, -0.8]) * standard.std[step] / standard.model_coef[step]
    norm = torch.tensor((1 + stochasticity**2) / (2 * stochasticity), dtype=torch.float64)
    accepted, _ = one_step(free.ReverseProcess.ddpm(12, stochasticity=stochasticity), step, gap, tau)
    expected = acceptance_probability(norm) if tau is None else relaxed_acceptance(norm**2, tau)
    assert success_p(accepted, expected.expand(ROWS)) >= BUDGET
    # and 0.5 or 1.3 is told from 1
    at_one = acceptance_probability(torch.tensor(1.0)) if tau is None else relaxed_acceptance(torch.tensor(1.0), tau)
    assert stochasticity in (0.8, 1.0) or success_p(accepted, at_one.expand(ROWS)) < BUDGET


def everywhere(drafted: DraftedSteps) -> torch.Tensor:
    return torch.ones(drafted.step.shape)


def relaxed_run(norm: float, tau: float, steps: int, samples: int) -> tuple[free.SamplingOutput, torch.Tensor]:
    """A chain in which every step but the last is tested once, all alike; and its innovations [n, S-1] along delta."""
    model, process = GaussianTarget.example(2), free.ReverseProcess.ddpm(steps)
    output = free.speculative_sample(
        model,
        Shifted(model, norm),
        process=process,
        shape=(2,),
        seed=torch.arange(samples).tolist(),
        window=steps,
        relaxation=free.Relaxation(-math.log(tau), everywhere),
        return_trajectory=True,
    )
    assert output.trajectory is not None
    before, after = output.trajectory[:, :-2], output.trajectory[:, 1:-1]
    timestep = process.timestep[:-1].expand(samples, -1)
    target = model(before.flatten(0, 1), timestep.flatten()).view_as(before)
    mean = process.state_coef[:-1, None] * before + process.model_coef[:-1, None] * target
    innovation = ((after - mean) / process.std[:-1, None])[..., 0]
    assert (output.stats.tested[:-1] == samples).all()
    return output, innovation


@pytest.mark.parametrize(("norm", "tau", "steps"), [(1.5, 0.5, 2), (1.5, 0.3, 4), (0.8, 0.9, 33)])
def test_the_certificate_holds_and_is_tight_where_the_distance_is_known(norm: float, tau: float, steps: int) -> None:
    output, innovation = relaxed_run(norm, tau, steps, 2000)
    # the innovations are independent and have the law of docs/relaxation.md, so the trajectory's is known
    grid = np.linspace(-9, 9 + norm, 20_001)
    density = density_ratio(grid, norm, tau) * stats.norm.pdf(grid)
    cumulative = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2) * (grid[1] - grid[0])))
    assert cumulative[-1] == pytest.approx(1, abs=1e-5)
    level = np.interp(innovation.double().numpy().ravel(), grid, cumulative)
    assert stats.kstest(level, "uniform").pvalue >= BUDGET

    # total variation of the product laws, E under the exact one of (1 - ratio)+
    draws = np.random.default_rng(0).standard_normal((400_000, steps - 1))
    short = np.maximum(1 - density_ratio(draws, norm, tau).prod(1), 0)
    distance, error = short.mean(), short.std() / len(draws) ** 0.5
    bound = output.stats.total_variation_bound
    assert distance - 5 * error <= bound <= 5 * distance
    if steps == 2:
        assert bound == pytest.approx(distance, abs=5 * error)
    # every sample's tests are alike, so the estimate has no error
    assert output.stats.total_variation_error == pytest.approx(0, abs=1e-4)


def test_the_certificate_holds_for_a_drafter_that_is_used() -> None:
    """Nothing but the sample at the end is looked at, by half-lines: that distance is below the bound, and can be seen."""
    model, process, samples = GaussianTarget.example(1), free.ReverseProcess.ddpm(12), 20_000
    mean, covariance = model.chain_moments(process)
    distance = {}
    for strength in (0.0, 0.25, 3.0):
        output = free.speculative_sample(
            model,
            process=process,
            shape=(1,),
            seed=torch.arange(samples).tolist(),
            window=4,
            relaxation=free.Relaxation(strength, everywhere),
        )
        whitened = (output.samples[:, 0].double() - mean) / covariance[0].sqrt()
        distance[strength] = stats.kstest(whitened.numpy(), "norm").statistic
        assert distance[strength] <= output.stats.total_variation_bound + 2.7 / samples**0.5
    assert distance[0.0] < 2.7 / samples**0.5 < distance[3.0]


def test_the_certificate_counts_the_tests_that_decided() -> None:
    """Against the same sums over what the run's states say: |delta| is the same at every state, tau too."""
    model, process = GaussianTarget.example(2), free.ReverseProcess.ddpm(9)
    output = free.speculative_sample(
        model,
        Shifted(model, 1.2),
        process=process,
        shape=(2,),
        seed=torch.arange(300).tolist(),
        window=3,
        relaxation=free.Relaxation(0.5, everywhere),
    )
    tested = output.stats.tested.sum()
    assert 0 < tested < 300 * 8
    each = float(excess_acceptance(torch.tensor(1.44), math.exp(-0.5)))
    assert output.stats.excess_acceptance.sum() == pytest.approx(tested * each, rel=1e-3)


# --- the limit ------------------------------------------------------------------------------------------------------------


def most_misses(runs: int, risk: float) -> int:
    """What a limit of that risk exceeds once in a million."""
    return int(stats.binom.isf(BUDGET, runs, risk))


LAWS = {
    "seldom all": lambda generator, shape: generator.random(shape) < 2.8e-4,
    "a coin": lambda generator, shape: generator.random(shape) < 0.035,
    "seldom, and then anything": lambda generator, shape: np.where(
        generator.random(shape) < 0.05, generator.random(shape), 0.0
    ),
    "heavy": lambda generator, shape: generator.beta(0.02, 0.3, shape),
    "even": lambda generator, shape: generator.random(shape),
}
MEANS = {
    "seldom all": 2.8e-4, "a coin": 0.035, "seldom, and then anything": 0.025, "heavy": 0.02 / 0.32, "even": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("count", [3, 100])
@pytest.mark.parametrize("law", LAWS)
def test_the_limit_of_a_mean_covers_it(law: str, count: int) -> None:
    runs, risk = 4000, 0.04
    values = LAWS[law](np.random.default_rng(7), (runs, count)).astype(float)
    misses = sum(mean_limit(row, risk) < MEANS[law] for row in values)
    assert misses <= most_misses(runs, risk)
    # and no mean with its standard error would do: of what is rare most runs see nothing
    if law == "seldom all":
        assert (values.mean(1) == 0).mean() > 0.95


def test_saved_rejections_are_counted_as_often_as_the_closed_form_expects() -> None:
    """Each test saves one with probability c, whatever was before: the expectation that the certificate is the sum of."""
    norm, tau, steps, samples = 1.5, 0.5, 5, 8000
    output, _ = relaxed_run(norm, tau, steps, samples)
    each = float(excess_acceptance(torch.tensor(norm**2, dtype=torch.float64), tau))
    saved = output.stats.saved_rejections
    expected = stats.binom.pmf(np.arange(steps), steps - 1, each) * samples
    assert stats.chisquare(np.bincount(saved, minlength=steps), expected).pvalue >= BUDGET


def test_the_limit_covers_a_distance_that_is_known() -> None:
    """One test a sample: the distance is that test's excess acceptance, and 300 runs of 60 samples each say a limit."""
    norm, tau, runs, count = 1.5, 0.5, 300, 60
    output, _ = relaxed_run(norm, tau, 2, runs * count)
    distance = float(excess_acceptance(torch.tensor(norm**2, dtype=torch.float64), tau))
    limits = [limit_of(output, run, count) for run in range(runs)]
    assert sum(limit < distance for limit in limits) <= most_misses(runs, 1 - CONFIDENCE)
    assert np.mean(limits) < distance + 0.2


def limit_of(output: free.SamplingOutput, run: int, count: int) -> float:
    """What the samples ``run * count`` … would have reported as a run of their own."""
    part, whole = slice(run * count, (run + 1) * count), output.stats
    return free.SamplingStatistics(
        whole.steps, whole.window, whole.drafter, whole.rounds[part],
        excess_acceptance=whole.excess_acceptance[part], divergence=whole.divergence[part],
        saved_rejections=whole.saved_rejections[part], budget=whole.budget,
    ).total_variation_limit  # fmt: skip


@pytest.mark.parametrize("budget", [None, 0.6])
def test_what_is_relaxed_seldom_is_not_certified_as_exact(budget: float | None) -> None:
    """One sample in some 1600 is relaxed, by a lot: nearly all runs of 100 see none of it, and none may say zero."""
    norm, strength, runs, count = 1.5, 9.0, 60, 100
    model, process = GaussianTarget.example(2), free.ReverseProcess.ddpm(2)
    output = free.speculative_sample(
        model,
        Shifted(model, norm),
        process=process,
        shape=(2,),
        seed=torch.arange(runs * count).tolist(),
        window=2,
        relaxation=free.Relaxation(strength, lambda drafted: (drafted.states[..., 1] > 3.22).float(), budget),
    )
    each = float(excess_acceptance(torch.tensor(norm**2, dtype=torch.float64), math.exp(-strength)))
    distance = each * stats.norm.sf(3.22)
    assert 2.5e-4 < distance < 4e-4
    spent = output.stats.excess_acceptance.reshape(runs, count)
    assert (spent.sum(1) == 0).mean() > 0.8  # 0 ± 0
    limits = np.array([limit_of(output, run, count) for run in range(runs)])
    assert (limits > distance).all()
    assert np.median(limits) == pytest.approx((1 - 0.04 ** (1 / count)) * (budget or 1))
