"""Relaxation: its closed forms, where its uncertainty comes from, its budget, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from scipy import integrate, stats

import free
from free.sampling.confidence import mean_limit, total_variation_limit
from free.sampling.relaxation import DraftedSteps, divergence, excess_acceptance, relaxed_acceptance
from free.sampling.request import Options, check_request
from free.sampling.statistics import total_variation
from free.sampling.variance import average_learned_variance
from tests.analytic import ElementwiseTarget
from tests.unit.helpers import GaussianModel, Recorder

MakeDiT = Callable[..., DiTTransformer2DModel]

NORMS = [0.0, 0.05, 0.5, 1.0, 2.0, 6.0]
TAUS = [0.0, 0.1, 0.5, 0.9, 0.999, 1.0]

RUN: dict[str, Any] = {"shape": (5,), "num_inference_steps": 16, "seed": [3, 1, 4, 1592], "window": 4}


def ones(drafted: DraftedSteps) -> torch.Tensor:
    return torch.ones(drafted.step.shape)


# --- the closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("norm", NORMS[1:])
def test_acceptance_agrees_with_quadrature(norm: float, tau: float) -> None:
    law = stats.norm(-(norm**2) / 2, norm)
    reach = (-(norm**2) / 2 - 10 * norm, -(norm**2) / 2 + 10 * norm)
    below = integrate.quad(lambda r: math.exp(tau * r) * law.pdf(r), reach[0], 0, epsabs=1e-13)[0]
    got = relaxed_acceptance(torch.tensor(norm**2, dtype=torch.float64), tau).item()
    assert got == pytest.approx(below + law.sf(0), abs=1e-10)
    exact = 2 * stats.norm.cdf(-norm / 2)
    assert excess_acceptance(torch.tensor(norm**2, dtype=torch.float64), tau).item() == pytest.approx(got - exact, abs=1e-10)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("norm", NORMS[1:])
def test_divergence_bounds_quadrature_closely(norm: float, tau: float) -> None:
    def integrand(y: float) -> float:
        log_rho = norm * y - norm**2 / 2
        ratio = 1 + math.exp(log_rho) - math.exp(tau * log_rho) if log_rho < 0 else math.exp((1 - tau) * log_rho)
        return ratio * math.log(ratio) * stats.norm.pdf(y) if ratio > 0 else 0.0

    exact = sum(integrate.quad(integrand, *ends, epsabs=1e-14)[0] for ends in ((-10, norm / 2), (norm / 2, norm + 10)))
    got = divergence(torch.tensor(norm**2, dtype=torch.float64), tau).item()
    assert exact - 1e-10 <= got <= 1.2 * exact + 1e-10


@pytest.mark.parametrize("norm", [*NORMS, 40.0, 1e4])
def test_an_exact_test_costs_exactly_nothing_and_no_cost_is_negative_or_nan(norm: float) -> None:
    square = torch.tensor(norm**2)
    for cost in (excess_acceptance, divergence):
        assert cost(square, 1.0).item() == 0
        values = cost(square, torch.linspace(0, 1, 101))
        assert (values >= 0).all()
        assert (values.diff() <= 1e-12).all()  # falls with tau


def test_the_bound_is_the_least_of_three() -> None:
    many, few = np.array([2.0, 4.0]), np.array([0.01, 0.03])
    assert total_variation(few, many)[0] == pytest.approx(0.02)
    assert total_variation(few, many)[1] == pytest.approx(0.01)
    bound, error = total_variation(many, few)
    assert bound == pytest.approx(0.1)  # Pinsker: sqrt(0.02 / 2)
    assert error == pytest.approx(0.01 / (4 * 0.1))
    bound, error = total_variation(many, many)
    assert bound == pytest.approx(math.sqrt(1 - math.exp(-3)))
    assert error == pytest.approx(math.exp(-3) / (2 * bound))
    assert total_variation(np.zeros(3), np.zeros(3)) == (0.0, 0.0)
    assert math.isnan(total_variation(few[:1], many[:1])[1])


def test_the_limit_is_of_what_is_known() -> None:
    zero, none = np.zeros(100), np.zeros(100, np.int64)
    assert total_variation_limit(zero, zero, none, 0.0) == 0
    # none of 100: the two risks are 4 % and 1 %
    assert total_variation_limit(zero, zero, none, math.inf) == pytest.approx(1 - 0.04**0.01)
    assert total_variation_limit(zero, zero, none, 0.05) == pytest.approx(0.05 * (1 - 0.04**0.01))
    # every sample saved a rejection, but their divergences are small: Pinsker's of 0.02 nats, and of few samples more
    every, little = np.ones(100_000, np.int64), np.full(100_000, 0.02)
    assert total_variation_limit(np.ones(100_000), little, every, math.inf) == pytest.approx(0.1, abs=0.005)
    assert 0.3 < total_variation_limit(np.ones(50), little[:50], every[:50], math.inf) < 0.5
    assert total_variation_limit(np.ones(50), np.full(50, 5.0), every[:50], math.inf) == 1
    assert total_variation_limit(np.full(50, 0.2 + 1e-12), np.full(50, 5.0), every[:50], 0.2) == 0.2


def test_samples_that_depend_on_each_other_count_as_one() -> None:
    zero, none = np.zeros(100), np.zeros(100, np.int64)
    together, pairs = np.zeros(100, np.int64), np.arange(100) // 2
    assert total_variation_limit(zero, zero, none, math.inf, together) == pytest.approx(0.96)
    assert total_variation_limit(zero, zero, none, math.inf, pairs) == pytest.approx(1 - 0.04**0.02)
    model, common = (
        GaussianModel(),
        {"shape": (3,), "num_inference_steps": 8, "relaxation": free.Relaxation(9.0, "residual")},
    )
    for window, seed, blocks in ((2, [5, 6, 5], [0, 1, 0]), ("auto", [5, 6, 7], [0, 0, 0]), (2, 3, [0])):
        drawn = free.speculative_sample(model, window=window, seed=seed, **common).stats
        assert drawn.block.tolist() == blocks
        assert drawn.total_variation_limit >= 1 - 0.04 ** (1 / len(set(blocks)))


@pytest.mark.parametrize("sizes", [[1] * 40, [5] * 40, [30, *[1] * 40], [1]])
def test_the_limit_of_a_mean_holds_for_blocks_of_any_size(sizes: list[int]) -> None:
    """Blocks whose values are all the same, the worst that values which depend on each other can do."""
    generator, risk, mean, runs = np.random.default_rng(0), 0.05, 0.2, 4000
    block = np.repeat(np.arange(len(sizes)), sizes)
    draws = (generator.random((runs, len(sizes))) < mean).astype(float)
    missed = sum(mean_limit(values[block], risk, block) < mean for values in draws)
    assert missed <= stats.binom.ppf(1 - 1e-6, runs, risk)
    assert mean_limit(np.ones(len(block)), risk, block) == 1


@pytest.mark.parametrize("count", [10, 1000])
def test_the_limit_of_a_mean_is_where_hoeffdings_bound_is_the_risk(count: int) -> None:
    for mean in (0.0, 0.02, 0.5, 0.9):
        limit = mean_limit(np.full(count, mean), 0.04)
        assert mean < limit < 1
        heads = mean * math.log(mean / limit) if mean else 0.0
        assert count * (heads + (1 - mean) * math.log((1 - mean) / (1 - limit))) == pytest.approx(-math.log(0.04))
    assert mean_limit(np.ones(count), 0.04) == 1


# --- exact where it must be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "relaxation",
    [
        free.Relaxation(0, ones),
        free.Relaxation(0.0, "residual"),
        free.Relaxation(7.0, lambda drafted: torch.zeros(drafted.step.shape)),
        free.Relaxation(7.0, ones, budget=0),
    ],
)
def test_tau_of_one_is_exact_to_the_bit(relaxation: free.Relaxation) -> None:
    exact = free.speculative_sample(GaussianModel(), **RUN, return_trajectory=True)
    output = free.speculative_sample(GaussianModel(), **RUN, relaxation=relaxation, return_trajectory=True)
    assert exact.stats.accepted.sum() < exact.stats.tested.sum()
    assert exact.trajectory is not None
    assert output.trajectory is not None
    assert torch.equal(exact.trajectory, output.trajectory)
    for stats_ in (exact.stats, output.stats):
        assert stats_.total_variation_bound == stats_.total_variation_error == 0
        assert stats_.excess_acceptance.tolist() == stats_.divergence.tolist() == [0.0] * 4
        assert stats_.saved_rejections.tolist() == [0] * 4
    # that it may spend nothing is known beforehand, or only that four samples spent nothing
    known = relaxation.strength == 0 or relaxation.budget == 0
    assert exact.stats.total_variation_limit == 0
    assert output.stats.total_variation_limit == (0 if known else pytest.approx(1 - 0.04 ** (1 / 4)))
    assert ("distance from the exact law" in output.stats.summary()) == (not known)


def test_a_window_of_one_tests_nothing() -> None:
    output = free.speculative_sample(GaussianModel(), **{**RUN, "window": 1}, relaxation=free.Relaxation(3, ones, 0.5))
    assert torch.equal(output.samples, free.speculative_sample(GaussianModel(), **{**RUN, "window": 1}).samples)
    assert output.stats.total_variation_bound == 0


def test_relaxation_accepts_more_and_says_so() -> None:
    exact = free.speculative_sample(GaussianModel(), "hold-output", **RUN).stats
    relaxed = free.speculative_sample(GaussianModel(), "hold-output", **RUN, relaxation=free.Relaxation(5, ones)).stats
    assert relaxed.parallel_efficiency > 1.2 * exact.parallel_efficiency
    assert relaxed.acceptance_rate > exact.acceptance_rate
    assert 0 < relaxed.total_variation_bound <= 1
    assert 0 < relaxed.total_variation_limit <= 1
    limit = f"; with 95% confidence at most {relaxed.total_variation_limit:.3g}"
    line = next(line for line in relaxed.summary().splitlines() if line.startswith("distance from the exact law"))
    assert line.endswith(limit)
    words = relaxed.to_dict()
    assert words["total_variation_bound"] == relaxed.total_variation_bound
    assert words["total_variation_limit"] == relaxed.total_variation_limit
    assert words["excess_acceptance"] == relaxed.excess_acceptance.tolist()
    assert words["saved_rejections"] == relaxed.saved_rejections.tolist()
    assert relaxed.saved_rejections.sum() > 0


def test_a_sample_does_not_depend_on_its_batch() -> None:
    arguments = {**RUN, "drafter": "hold-output", "relaxation": free.Relaxation(4.0, "residual", budget=0.6)}
    together = free.speculative_sample(ElementwiseTarget(), **arguments)
    assert together.stats.excess_acceptance.all()
    for row, seed in enumerate(RUN["seed"]):
        alone = free.speculative_sample(ElementwiseTarget(), **{**arguments, "seed": [seed]})
        assert torch.equal(alone.samples[0], together.samples[row])
        assert alone.stats.excess_acceptance[0] == pytest.approx(together.stats.excess_acceptance[row], rel=1e-12)


# --- the budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("drafter", ["hold-output", "hold-x0"])
def test_no_sample_spends_more_than_its_budget(budget: float, drafter: str) -> None:
    arguments = {**RUN, "seed": list(range(64)), "drafter": drafter}
    free_of_it = free.speculative_sample(GaussianModel(), **arguments, relaxation=free.Relaxation(1.0, ones)).stats
    relaxation = free.Relaxation(1.0, ones, budget)
    held = free.speculative_sample(GaussianModel(), **arguments, relaxation=relaxation).stats
    assert (free_of_it.excess_acceptance > 0.2).any()
    assert (held.excess_acceptance <= budget * (1 + 1e-9)).all()
    assert held.total_variation_bound <= budget * (1 + 1e-9)
    assert held.excess_acceptance.mean() < held.total_variation_limit <= budget
    assert budget < 0.2 or (held.excess_acceptance > 0).all()
    if budget == 1.0:
        assert (held.excess_acceptance > 0.8 * np.minimum(budget, free_of_it.excess_acceptance)).mean() > 0.3


# --- uncertainties ------------------------------------------------------------------------------------------------------


class Watch:
    """An uncertainty that keeps what it was shown."""

    def __init__(self) -> None:
        self.drafted: list[DraftedSteps] = []

    def __call__(self, drafted: DraftedSteps) -> torch.Tensor:
        self.drafted.append(drafted)
        return torch.zeros(drafted.step.shape)


def test_what_a_callable_is_shown() -> None:
    watch = Watch()
    output = free.speculative_sample(GaussianModel(), **RUN, relaxation=free.Relaxation(1.0, watch), return_trajectory=True)
    process = free.ReverseProcess.ddpm(16)
    assert len(watch.drafted) == output.stats.rounds.max()
    assert output.trajectory is not None
    for drafted in watch.drafted:
        batch = len(drafted.step)
        assert drafted.states.shape == drafted.target_output.shape == drafted.draft_output.shape == (batch, 3, 5)
        assert torch.equal(drafted.timestep, process.timestep[drafted.step])
        assert torch.equal(drafted.testable, drafted.step[:, :1] + torch.arange(3) < 15)
        got = GaussianModel()(drafted.states.flatten(0, 1), drafted.timestep.flatten()).view_as(drafted.states)
        assert torch.equal(drafted.target_output[drafted.testable], got[drafted.testable])
        assert drafted.unconditional_output is None
        assert drafted.variance_share is None
    first = watch.drafted[0]
    assert torch.equal(first.states[:, 0], output.trajectory[:, 0])
    assert (first.rejection == 0).all()
    assert ((watch.drafted[-1].rejection > 0) & (watch.drafted[-1].rejection < 1)).all()


def test_rejection_is_a_mean_over_earlier_tests_that_fades() -> None:
    from free.sampling.relaxation import Ledger
    from free_kernels import Verification

    def verification(squared_norm: list[float], advance: int, rejected: bool) -> Verification:
        norms = torch.tensor([squared_norm])
        state, log_ratio = torch.zeros(1, 1), torch.full_like(norms, math.log(0.5))
        return Verification(state, torch.tensor([advance]), torch.tensor([rejected]), log_ratio, norms)

    def rejects(norm: float) -> float:
        return 1 - 2 * float(stats.norm.cdf(-norm / 2))

    tau = torch.tensor([[1.0, 0.5, 0.25]])
    low, high = torch.tensor([[0.4] * 4]), torch.tensor([[0.6] * 4])  # an exact test accepts below 0.5
    ledger, where = Ledger.empty(1, torch.device("cpu")), (torch.tensor([7]), torch.tensor([0]))
    ledger = ledger.settle(tau, verification([1.0, 4.0, math.nan], 2, True), *where, high)  # two tests, the second rejected
    assert ledger.rejection[0].tolist() == pytest.approx([rejects(1) + rejects(2), 2.0])
    one_test = verification([9.0, math.inf, math.nan], 2, False)  # and then the exact last step
    ledger = ledger.settle(tau, one_test, *where, low)
    assert ledger.rejection[0].tolist() == pytest.approx([(rejects(1) + rejects(2)) / 2 + rejects(3), 2.0])
    assert ledger.spent[0].tolist() == pytest.approx(
        [*(cost(torch.tensor(4.0), 0.5).item() for cost in (excess_acceptance, divergence)), 0.0]
    )
    # of three accepted drafts the first had an exact test, and the others are saved where such a one would have rejected
    accepted = verification([1.0, 4.0, 4.0], 4, False)
    assert ledger.settle(tau, accepted, *where, high).spent[0, 2] == 2
    assert ledger.settle(tau, accepted, *where, low).spent[0, 2] == 0


def drafted_steps(process: free.ReverseProcess, share: torch.Tensor, step: torch.Tensor) -> DraftedSteps:
    empty = torch.zeros(*step.shape, 1)
    return DraftedSteps(
        step, torch.full_like(step[:, 0], step.shape[1] + 1), empty, empty, None, empty, share,
        torch.zeros(len(step), 2, dtype=torch.float64), process, (1,),
    )  # fmt: skip


@pytest.mark.parametrize("variance", ["posterior", "beta", "geometric"])
def test_learned_uncertainty_is_relative_to_the_std_in_use(variance: str) -> None:
    process = free.ReverseProcess.ddpm(20, variance=variance)
    step = torch.tensor([[0, 9, 18]])
    posterior, beta = (free.ReverseProcess.ddpm(20, variance=name).std[step].square() for name in ("posterior", "beta"))
    for share in (0.0, 0.5, 1.0):
        learned = posterior ** (1 - share) * beta**share
        expected = learned / (learned + process.std[step].square())
        tau = free.Relaxation(2.0).tau(drafted_steps(process, torch.full(step.shape, share), step))
        torch.testing.assert_close(tau, torch.exp(-2.0 * expected), rtol=1e-5, atol=0)
    # more of it is less tau, and what is not a number is an exact test
    rising = free.Relaxation(2.0).tau(drafted_steps(process, torch.tensor([[0.0, 0.4, 0.9]]), torch.tensor([[9, 9, 9]])))
    assert (rising.diff() < 0).all()
    assert free.Relaxation(2.0).tau(drafted_steps(process, torch.full((1, 3), math.nan), step)).tolist() == [[1.0] * 3]


def test_residual_uncertainty() -> None:
    drafted = drafted_steps(free.ReverseProcess.ddpm(20), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    drafted = dataclasses.replace(drafted, fared=torch.tensor([[0.0, 0.0], [0.75, 3.0]], dtype=torch.float64))
    tau = free.Relaxation(2.0, "residual").tau(drafted)
    assert tau.dtype == torch.float32
    torch.testing.assert_close(tau, torch.tensor([[1.0] * 3, [math.exp(-0.5)] * 3]))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("max_forward_batch", [None, 3])
def test_a_learned_variance_is_captured(make_dit: MakeDiT, guidance_scale: float, max_forward_batch: int | None) -> None:
    model = make_dit(out_channels=4)
    target = free.as_target(model, max_forward_batch=max_forward_batch)
    states = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep, labels = torch.tensor([999, 3, 500, 250]), torch.tensor([0, 4, 2, 1])
    with torch.no_grad():
        plain = target.evaluate(states, timestep, {"class_labels": labels}, guidance_scale > 1)
        with target.capture_variance():
            captured = target.evaluate(states, timestep, {"class_labels": labels}, guidance_scale > 1)
        raw = model(states, timestep, labels).sample[:, 2:]
    assert plain.variance_share is None
    assert torch.equal(plain.output, captured.output)
    expected = ((raw + 1) / 2).clamp(0, 1).mean((1, 2, 3))
    torch.testing.assert_close(captured.variance_share, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_relaxed_run_of_a_dit_with_learned_variance(make_dit: MakeDiT, guidance_scale: float) -> None:
    arguments: dict[str, Any] = {
        "class_labels": [0, 1, 2], "num_inference_steps": 12, "seed": 0, "window": 4, "guidance_scale": guidance_scale,
    }  # fmt: skip
    model = make_dit(out_channels=4)
    exact = free.speculative_sample(model, "hold-output", **arguments)
    relaxed = free.speculative_sample(model, "hold-output", **arguments, relaxation=free.Relaxation(6.0))
    assert relaxed.stats.rounds.sum() < exact.stats.rounds.sum()
    assert relaxed.stats.total_variation_bound > 0
    same = free.speculative_sample(model, "hold-output", **arguments, relaxation=free.Relaxation(0.0))
    assert torch.equal(same.samples, exact.samples)


# --- a schedule from the learned variances ------------------------------------------------------------------------------


def test_average_learned_variance(make_dit: MakeDiT) -> None:
    model = make_dit(out_channels=4)
    steps = 10
    variance = average_learned_variance(model, steps, class_labels=[0, 3], seed=5)
    assert variance.shape == (steps,)
    assert variance.dtype == torch.float64
    posterior, beta = (free.ReverseProcess.ddpm(steps, variance=name).std.double() ** 2 for name in ("posterior", "beta"))
    process = free.ReverseProcess.ddpm(steps, variance="geometric")
    pilot = check_request(model, Options(class_labels=[0, 3], seed=5)).pilot()
    trajectory = free.ancestral_sample(
        model, class_labels=[0, 3], seed=pilot.keys, process=process, return_trajectory=True
    ).trajectory  # fmt: skip
    assert trajectory is not None
    for k in range(steps - 1):
        with torch.no_grad():
            raw = model(trajectory[:, k], process.timestep[k].expand(2), torch.tensor([0, 3])).sample[:, 2:].double()
        share = ((raw + 1) / 2).clamp(0, 1)
        expected = (share * beta[k].log() + (1 - share) * posterior[k].log()).mean().exp()
        assert variance[k].item() == pytest.approx(expected.item(), rel=1e-4)
    assert variance[-1] == 0
    assert ((variance >= posterior * (1 - 1e-6)) & (variance <= beta * (1 + 1e-6)))[:-1].all()
    free.ReverseProcess.ddpm(steps, variance=variance)


def test_average_learned_variance_refuses(make_dit: MakeDiT) -> None:
    with pytest.raises(ValueError, match="model has no learned-variance channels"):
        average_learned_variance(make_dit(), 8)
    with pytest.raises(ValueError, match="num_trajectories is 0; allowed is an int, 1 or more"):
        average_learned_variance(make_dit(out_channels=4), 8, num_trajectories=0)
    bare = dataclasses.replace(free.ReverseProcess.ddpm(8), log_variance_range=None)
    with pytest.raises(ValueError, match="process has no log_variance_range"):
        average_learned_variance(make_dit(out_channels=4), process=bare)


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": -0.1}, r"strength is -0\.1; allowed is a finite number, 0 \(exact\) or more"),
        ({"strength": math.nan}, r"strength is nan; allowed is a finite number"),
        ({"strength": math.inf}, r"strength is inf; allowed is a finite number"),
        ({"strength": "1"}, r"strength is '1'; allowed is a finite number"),
        ({"strength": True}, r"strength is True; allowed is a finite number"),
        ({"strength": 1, "budget": -0.01}, r"budget is -0\.01; allowed is a total variation, 0 … 1, or None"),
        ({"strength": 1, "budget": 1.01}, r"budget is 1\.01; allowed is a total variation, 0 … 1"),
        ({"strength": 1, "budget": math.nan}, r"budget is nan; allowed is a total variation, 0 … 1"),
        ({"strength": 1, "uncertainty": "entropy"}, r"uncertainty is 'entropy'; known are 'learned', 'residual' or a"),
        ({"strength": 1, "uncertainty": None}, r"uncertainty is None; known are 'learned', 'residual' or a callable"),
    ],
)
def test_a_relaxation_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        free.Relaxation(**given)


def test_a_relaxation_that_is_none() -> None:
    model = Recorder()
    with pytest.raises(TypeError, match=r"relaxation is a float; allowed is a free\.Relaxation, or None"):
        free.speculative_sample(model, **RUN, relaxation=0.5)  # type: ignore[arg-type]
    assert not model.rows


def test_learned_uncertainty_of_a_model_without_it(make_dit: MakeDiT) -> None:
    model = Recorder()
    with pytest.raises(ValueError, match=r"uncertainty is 'learned': model has no learned-variance.*'residual' fits every"):
        free.speculative_sample(model, **RUN, relaxation=free.Relaxation(1.0))
    assert not model.rows
    with pytest.raises(ValueError, match=r"uncertainty is 'learned': model has no learned-variance"):
        free.speculative_sample(make_dit(), num_inference_steps=8, relaxation=free.Relaxation(1.0))
    bare = dataclasses.replace(free.ReverseProcess.ddpm(8), log_variance_range=None)
    with pytest.raises(ValueError, match=r"uncertainty is 'learned': process has no log_variance_range"):
        free.speculative_sample(make_dit(out_channels=4), process=bare, relaxation=free.Relaxation(1.0))


@pytest.mark.parametrize(
    ("uncertainty", "message"),
    [
        (lambda drafted: 0.5, r"uncertainty returned a float; allowed is a tensor of shape \(4, 3\)"),
        (
            lambda drafted: torch.zeros(4),
            r"uncertainty returned shape \(4,\) and dtype torch\.float32; allowed is a floating",
        ),
        (lambda drafted: torch.zeros(4, 3, dtype=torch.int64), r"dtype torch\.int64; allowed is a floating tensor of shape"),
        (lambda drafted: ones(drafted) * 1.5, r"uncertainty returned 1\.5; allowed is 0 … 1"),
        (lambda drafted: -ones(drafted), r"uncertainty returned -1\.0; allowed is 0 … 1"),
        (lambda drafted: ones(drafted) * math.nan, r"uncertainty returned nan; allowed is 0 … 1"),
    ],
)
def test_a_callable_that_returns_something_else(uncertainty: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        free.speculative_sample(GaussianModel(), **RUN, relaxation=free.Relaxation(1.0, uncertainty))


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        (torch.zeros(8), r"log_variance_range has shape \(8,\); allowed is \(8, 2\)"),
        (torch.full((8, 2), -math.inf), r"log_variance_range holds NaN or infinity"),
    ],
)
def test_a_log_variance_range_that_cannot_be(logs: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(free.ReverseProcess.ddpm(8), log_variance_range=logs)
