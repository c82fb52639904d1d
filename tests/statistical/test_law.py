"""The law of one step and of whole chains. What is checked, and why it suffices, is in ``checks.py``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from free.sampling.window import Setup
from tests.statistical import laws
from tests.statistical.cases import CASES, Case, uneven_variance
from tests.statistical.chains import chain, innovations, run_chain
from tests.statistical.checks import CHECKS
from tests.statistical.laws import BUDGET, PValues
from tests.statistical.mutation_gate import unmutated
from tests.statistical.one_step import one_step


def assert_law(p_values: PValues) -> None:
    # "not at least" rather than "below": NaN is a failure
    failed = {name: p_value for name, p_value in p_values.items() if not p_value >= BUDGET}
    assert not failed, failed


@pytest.mark.parametrize("check", CHECKS)
def test_the_law_is_exact(check: str) -> None:
    assert_law(unmutated(check))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["plain", "guided", "clipped"])
def test_the_kernels_one_step_is_exact(form: str) -> None:
    assert_law(one_step(form, impl="triton", device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_chain_is_exact(name: str) -> None:
    assert_law(chain(name, impl="triton", device="cuda"))


def test_finished_samples_that_stay_in_a_batch_are_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, whose batches keep their shape: what is seen from outside is the same."""
    case, of = Case("mixture", "hold-x0", 4, samples=300, seed=23), Setup.of
    plain = run_chain(case)
    monkeypatch.setattr(Setup, "of", lambda *arguments: dataclasses.replace(of(*arguments), static_shapes=True))
    padded = run_chain(case)
    assert padded.stats[0].target_evaluations > plain.stats[0].target_evaluations
    for name in ("delta", "tested", "accepted", "redrafted"):
        assert torch.equal(getattr(padded, name), getattr(plain, name)), name


def test_statistics_report_what_happened_and_agree_with_eq_40() -> None:
    run = run_chain(Case("gaussian", "shifted", 4, samples=4000, seed=20))
    (stats,) = run.stats
    tested, accepted = run.tested.sum(0).numpy(), run.accepted.sum(0).numpy()
    # the last step, which is never drafted, has no test
    np.testing.assert_array_equal(stats.tested, [*tested, 0])
    np.testing.assert_array_equal(stats.accepted, [*accepted, 0])
    # this drafter's gap is 1.5 at every state
    np.testing.assert_allclose(stats.mean_delta[:-1], 1.5, rtol=1e-3)
    probability = float(laws.acceptance_probability(torch.tensor(1.5)))
    errors = (accepted - tested * probability) / np.sqrt(tested * probability * (1 - probability))
    assert laws.bonferroni([laws.z_score_p(error) for error in errors]) >= BUDGET
    # and with gaps that vary: the account by step against the mean of 2 Phi(-|delta| / 2) over the tests of that step
    run = run_chain(Case("ill-conditioned", "hold-x0", 8, samples=4000, seed=21))
    expected = laws.acceptance_probability(run.delta.norm(dim=-1)) * run.tested
    variance = (expected * (1 - expected)).sum(0).numpy()
    (stats,) = run.stats
    errors = (stats.accepted[:-1] - expected.sum(0).numpy()) / np.sqrt(variance)
    some = stats.tested[:-1] > 100
    assert laws.bonferroni([laws.z_score_p(error) for error in errors[some]]) >= BUDGET


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        (Case("gaussian", "shifted", 4, samples=500), 1),
        (Case("mixture", "shifted", 4, samples=500, clip=0.8), 1),
        (Case("gaussian", "leaning", 6, samples=500, table={"variance": uneven_variance(10, 4)}), 2),
    ],
)
def test_a_step_without_noise_is_the_targets_mean(case: Case, steps: int) -> None:
    run = run_chain(case)
    assert run.noiseless_error.shape[1] == steps
    assert run.noiseless_error.abs().max() < 1e-5


def test_innovations_are_the_streams_own_noise_or_its_reflection() -> None:
    """Noise is never drawn twice: an accepted or exact step has z[k] itself, a rejected one its mirror image at delta."""
    from free_kernels import normal

    case = Case("mixture", "hold-x0", 4, samples=500, seed=22)
    run = run_chain(case)
    steps = torch.arange(case.steps - 1)
    noise = normal(torch.arange(case.samples)[:, None] + case.seed * 2**32, steps, run.delta.shape[-1]).double()
    shift = torch.where(run.accepted[..., None], run.delta, 0.0)  # an accepted step was made from the draft's mean
    rejected = run.tested & ~run.accepted
    direction = torch.where(rejected[..., None], laws.unit(run.delta), 0.0)
    mirrored = noise - 2 * (noise * direction).sum(-1, keepdim=True) * direction
    assert rejected.sum() > 100
    torch.testing.assert_close(run.innovation, mirrored + shift, atol=2e-3, rtol=0.0)


def test_a_wrong_law_has_small_p_values() -> None:
    """The checks judge numbers, not seeds: a chain whose states were scaled by 3 % after the fact is seen."""
    run = run_chain(Case("gaussian", "shifted", 4, seed=2))
    run.innovation *= 1.03
    assert innovations(run)["sum of |z|²"] < BUDGET
