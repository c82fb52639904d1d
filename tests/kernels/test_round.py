"""What a round is made of beside its drafts and its test: spans, marks of what is not finite, the account, relaxation."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import mpmath
import pytest
import torch

from free_kernels import finite, relaxed_cost, relaxed_tau, span, tally, verify
from tests.kernels import helpers
from tests.kernels.helpers import LAYOUTS, laid_out

STEPS = 20
BROKEN = (torch.nan, torch.inf, -torch.inf)


def compare(device: torch.device, operation: Any, *arguments: Any, **given: Any) -> tuple[Any, Any]:
    """What the kernel gives, on the CPU, and what the reference does."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    got = operation(*map(moved, arguments), **{name: moved(value) for name, value in given.items()}, impl="triton")
    return tuple(values.cpu() for values in got), operation(*arguments, **given, impl="reference")


@pytest.mark.parametrize("window", [1, 3, 8, 40])
def test_span(device: torch.device, window: int) -> None:
    """Steps of all kinds: the first, ones that a step without noise or the end cuts short, the last, a finished sample."""
    reach = torch.tensor([9] * 10 + [19] * 10)
    got, expected = compare(device, span, torch.tensor([0, 7, 9, 12, 19, 20]), reach, window)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    step, length, steps, sample = got
    assert step.tolist() == [0, 7, 9, 12, 19, 19]
    assert length.tolist() == [min(window, most) for most in (10, 3, 1, 8, 1, 0)]
    assert steps.tolist() == [[min(first + j, 19) for j in range(window)] for first in step.tolist()]
    assert sample.tolist() == [[row] * window for row in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "numel"), [(1, 5), (8, 300), (3, 1025)])
def test_finite(device: torch.device, window: int, numel: int, dtype: torch.dtype) -> None:
    """One number that is none anywhere in the outputs, in either half, or in the state."""
    rows = torch.arange(6)
    output, unconditional = (helpers.normal(6, window, numel, seed=i).to(dtype) for i in (0, 1))
    state = helpers.normal(6, numel, seed=2)
    where = torch.randint(numel, (6,), generator=torch.Generator().manual_seed(numel))
    output[1, 0, where[1]], unconditional[2, window - 1, where[2]], state[3, where[3]] = BROKEN
    output[4, window - 1, numel - 1] = torch.nan
    length = torch.tensor([window, window, window, max(window - 1, 1), window, 0])
    got, expected = compare(device, finite, output, length, state, unconditional_output=unconditional)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    before = max(window - 1, 1)
    assert got[0].tolist() == [window, 1, before, before, before, 1]
    assert got[1].tolist() == [True, True, True, False, True, True]
    alone, _ = compare(device, finite, output, length, state)
    assert alone[0].tolist() == [window, 1, window, before, before, 1]
    assert torch.equal(rows[~alone[1]], rows[3:4])


def test_finite_where_a_program_reads_several_blocks(device: torch.device) -> None:
    output, state = helpers.normal(2, 1, 66001), helpers.normal(2, 66001, seed=1)
    output[1, 0, 66000] = torch.inf
    state[0, 2048] = torch.nan
    got, expected = compare(device, finite, output, torch.ones(2, dtype=torch.int64), state)
    assert got[0].tolist() == expected[0].tolist() == [1, 1]
    assert got[1].tolist() == expected[1].tolist() == [False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_finite_reads_any_strides(device: torch.device, layout: str) -> None:
    """What lies between the rows, which is NaN, is not read."""
    output, state = (laid_out(helpers.normal(*shape).to(device), layout) for shape in ((3, 4, 21), (3, 21)))
    length = torch.tensor([4, 2, 3], device=device)
    got = finite(output, length, state, unconditional_output=output, impl="triton")
    assert got.usable.tolist() == [4, 2, 3]
    assert got.state.all()


@pytest.mark.parametrize(("batch", "window"), [(1, 8), (5, 8), (3, 1), (40, 4)])
def test_tally_over_rounds(device: torch.device, monkeypatch: pytest.MonkeyPatch, batch: int, window: int) -> None:
    """Some of the samples in another order, several at one step, finished ones among them, numbers that are none."""
    monkeypatch.setattr(import_module("free_kernels.tally.kernel"), "MAX_SAMPLES", 16)
    chance = torch.Generator().manual_seed(batch)

    def random(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (batch,), generator=chance)

    samples = batch + 3
    accounts = []
    for place in (device, torch.device("cpu")):
        progress = torch.zeros(4, samples, dtype=torch.int64, device=place)
        progress[2:] = STEPS
        accounts.append((progress, torch.zeros(STEPS, 3, dtype=torch.float64, device=place)))
    for _ in range(4):
        index, step = torch.randperm(samples, generator=chance)[:batch], random(0, STEPS)
        length = torch.minimum(random(0, window + 1), STEPS - step)
        advance = torch.minimum(1 + random(0, window), length)
        rejected = (advance < length) & (advance > 0)
        squared_norm = torch.rand(batch, window - 1, generator=chance)
        squared_norm[random(0, 4) == 0] = torch.nan
        squared_norm[random(0, 4) == 0] = torch.inf
        sound = random(0, 5) > 0
        arguments = (index, step, length, advance, rejected, squared_norm, step + advance, sound)
        tally(*accounts[0], *(values.to(device) for values in arguments), impl="triton")
        tally(*accounts[1], *arguments, impl="reference")
    (progress, by_step), (expected_progress, expected_by_step) = accounts
    assert torch.equal(progress.cpu(), expected_progress)
    assert torch.equal(by_step.cpu()[:, :2], expected_by_step[:, :2])
    torch.testing.assert_close(by_step.cpu(), expected_by_step, rtol=1e-14, atol=0, equal_nan=True)
    if window > 1 and batch > 1:
        assert expected_by_step[:, 1].sum() > 0
        assert (expected_progress[2:] < STEPS).any(1).all()


# --- relaxation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drafts", [1, 7, 300])
def test_relaxed_tau(device: torch.device, drafts: int, dtype: torch.dtype) -> None:
    uncertainty = torch.rand(4, drafts, dtype=dtype, generator=torch.Generator().manual_seed(drafts))
    uncertainty[1, drafts // 2] = torch.nan
    tau = relaxed_tau(uncertainty.to(device), 1.7, impl="triton").cpu()
    expected = relaxed_tau(uncertainty, 1.7, impl="reference")
    assert tau.dtype == torch.float32
    torch.testing.assert_close(tau, expected, rtol=3e-7, atol=0)
    assert tau[1, drafts // 2] == 1
    one = uncertainty[:, :1].to(device).expand(4, drafts)
    assert torch.equal(relaxed_tau(one, 1.7, impl="triton").cpu(), tau[:, :1].expand(4, drafts))


@pytest.mark.parametrize("drafts", [1, 7, 300])
def test_a_budget_makes_the_rest_of_a_window_exact(device: torch.device, drafts: int) -> None:
    chance = torch.Generator().manual_seed(drafts)
    uncertainty, squared_norm = torch.rand(5, drafts, generator=chance), torch.rand(5, drafts, generator=chance)
    squared_norm[3, drafts // 2] = torch.nan
    spent = torch.tensor([[0.0, 9.0, 9.0], [0.2, 0, 0], [0.3, 0, 0], [0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    given = {"squared_norm": squared_norm, "spent": spent, "budget": 0.3}
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    tau = relaxed_tau(uncertainty.to(device), 1.7, **moved, impl="triton").cpu()
    expected = relaxed_tau(uncertainty, 1.7, **given, impl="reference")
    torch.testing.assert_close(tau, expected, rtol=3e-7, atol=0)
    assert (tau[2] == 1).all()
    assert (tau[3, drafts // 2 :] == 1).all()
    assert (tau[4] == 1).all()
    assert drafts == 1 or (tau[0, 0] < 1 and (drafts < 300 or tau[0, -1] == 1))


def closed_forms(norm: float, tau: float) -> tuple[float, float, float]:
    """Excess acceptance, divergence and an exact test's rejection with 60 digits, as ``docs/relaxation.md`` writes them."""
    with mpmath.workdps(60):
        d, t = mpmath.mpf(norm), mpmath.mpf(tau)

        def g(power: Any) -> Any:
            return mpmath.exp(power * (power - 1) * d * d / 2) * mpmath.erfc((power - 0.5) * d / mpmath.sqrt(2)) / 2

        slope = (t - mpmath.mpf(1) / 2) * d * d * g(t) - d * mpmath.npdf(d / 2)
        second = g(2 * t) - 2 * g(t + 1) + g(2)
        third = g(3 * t) - 3 * g(2 * t + 1) + 3 * g(t + 2) - g(3)
        divergence = (t - 1) * slope - (g(t) - g(1)) + (second + third) / 2
        return float(g(t) - g(1)), float(divergence), float(mpmath.erf(d / mpmath.sqrt(8)))


@pytest.mark.parametrize("norm", [0.0, 1e-6, 1e-2, 0.5, 1.0, 3.0, 10.0, 40.0, 300.0, 1e9])
def test_what_a_test_costs_is_as_exact_as_float64_is(device: torch.device, norm: float) -> None:
    """Near and far out in the tails, where the density has long gone to zero, and at tau = 1 exactly nothing."""
    tau = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])[:, None]
    square = torch.full_like(tau, norm).square()
    zeros = torch.zeros(len(tau), 3, dtype=torch.float64)
    one = torch.ones(len(tau), dtype=torch.int64)
    tests = (square, -square, tau, one, one > 0, one, one)
    (spent, rejection), expected = compare(device, relaxed_cost, *tests, zeros, zeros[:, :2])
    exact = [closed_forms(math.sqrt(float(a)), float(b)) for a, b in zip(square[:, 0], tau[:, 0], strict=True)]
    truth = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(spent[:, :2], truth[:, :2].clamp(min=0), rtol=1e-13, atol=4e-16)
    torch.testing.assert_close(rejection[:, 0], truth[:, 2], rtol=1e-13, atol=4e-16)
    assert (rejection[:, 1] == 1).all()
    assert not spent[-1].any()
    torch.testing.assert_close(spent, expected.spent, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(rejection, expected.rejection, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("drafts", [0, 1, 7, 300])
def test_only_what_was_tested_costs(device: torch.device, drafts: int, read: bool) -> None:
    """Up to the first rejection; what lies beyond may be no number at all. A finished sample tests nothing."""
    chance = torch.Generator().manual_seed(drafts)
    squared_norm, tau = 4 * torch.rand(4, drafts, generator=chance), torch.rand(4, drafts, generator=chance)
    advance = torch.tensor([0, 1, min(2, drafts + 1), drafts + 1])
    rejected = torch.tensor([False, drafts > 0, False, False])
    log_ratio = -squared_norm
    for row, tests in enumerate((advance - 1 + rejected).clamp(min=0).tolist()):
        squared_norm[row, tests:] = log_ratio[row, tests:] = BROKEN[row % 3]
    spent, rejection = torch.rand(2, 4, 3, dtype=torch.float64, generator=chance)
    rejection, where = rejection[:, :2], (torch.arange(4) - 2**50, torch.arange(4))
    uniforms = torch.rand(4, drafts + 2, generator=chance) if read else None
    tests = (squared_norm, log_ratio, tau, advance, rejected, *where)
    got, expected = compare(device, relaxed_cost, *tests, spent, rejection, uniforms=uniforms)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14)
    assert torch.equal(got[0][0], spent[0])
    assert torch.equal(got[1][0], rejection[0] / 2)
    if drafts > 1:
        assert got[0][3, 2] > spent[3, 2]


def test_a_saved_rejection_is_what_an_exact_test_of_the_same_noise_rejects(device: torch.device) -> None:
    """By verification itself, of windows of one drafted step each: relaxed, then exact, of one seed and step."""
    batch, numel = 18, 3
    seed, step = torch.arange(batch) + 2**40, torch.arange(batch) % (STEPS - 1)
    process = helpers.table(STEPS)
    states, output = helpers.normal(batch, 2, numel), helpers.normal(batch, 2, numel, seed=1)
    delta = (process.std / process.model_coef)[step]
    draft = output[:, :1] + helpers.normal(batch, 1, numel, seed=2) * delta[:, None, None]
    tau = torch.tensor([0.1, 0.3, 1.0]).repeat(batch // 3)[:, None]
    moved = (values.to(device) for values in (states, output, draft, seed, step, torch.full_like(step, 2)))
    arguments, tau = (*moved, helpers.on(device, process)), tau.to(device)
    relaxed, exact = verify(*arguments, tau=tau, impl="triton"), verify(*arguments, impl="triton")
    spent = torch.zeros(batch, 3, dtype=torch.float64, device=device)
    cost = relaxed_cost(
        relaxed.squared_norm,
        relaxed.log_ratio,
        tau,
        relaxed.advance,
        relaxed.rejected,
        *arguments[3:5],
        spent,
        spent[:, :2],
        impl="triton",
    )
    saved = exact.rejected & ~relaxed.rejected
    assert torch.equal(cost.spent[:, 2] == 1, saved)
    assert not cost.spent[~saved, 2].any()
    assert 1 < saved.sum() < exact.rejected.sum() < batch - 1


def test_a_test_at_its_own_bound_is_accepted(device: torch.device) -> None:
    """log u of the kernel's own, to the bit: an exact test that accepts by nothing saves nothing, and one bit less does."""
    words = torch.tensor([0.5, 0.25, 0.125])[:, None]  # powers of two, whose log is rounded once
    log_ratio, words = words.double().log().float().to(device), words.to(device)
    one = torch.ones(3, dtype=torch.int64, device=device)
    spent = torch.zeros(3, 3, dtype=torch.float64, device=device)
    for bound, expected in ((log_ratio, 0), (torch.nextafter(log_ratio, log_ratio - 1), 1)):
        tests = (one[:, None].float(), bound, torch.full_like(words, 0.5), one + 1, one > 1, one, one)
        cost = relaxed_cost(*tests, spent, spent[:, :2], uniforms=words, impl="triton")
        assert (cost.spent[:, 2] == expected).all()
