"""The reference operations against formulas written out in float64."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch

from free_kernels import (
    NOISE_STREAM,
    TEST_STREAM,
    StepTable,
    acceptance,
    acceptance_from_means,
    anchor_index,
    householder,
    normal,
    posterior,
    propose,
    uniform,
    verify,
)
from tests.unit.helpers import small_table

S, D = 6, 7
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mean_of(x: torch.Tensor, y: torch.Tensor, k: int, table: StepTable) -> torch.Tensor:
    """Mean of one row's step k, number by number."""
    if table.clip_range is None:
        return table.state_coef[k] * x + table.model_coef[k] * y
    x0 = (table.x0_state_coef[k] * x + table.x0_model_coef[k] * y).clamp(-table.clip_range, table.clip_range)
    return table.clip_state_coef[k] * x + table.clip_x0_coef[k] * x0


TABLES = pytest.mark.parametrize("table", [small_table(S), small_table(S, clip_range=0.7)], ids=["plain", "clipped"])
GUIDANCE = pytest.mark.parametrize("guidance", [None, 1.0, 1.5, 4.0])


def guided(y: torch.Tensor, unconditional: torch.Tensor | None, scale: float) -> torch.Tensor:
    return y if unconditional is None else (1 - scale) * unconditional + scale * y


def half(guidance: float | None, *shape: int) -> dict[str, Any]:
    """The unconditional half, where guidance is used."""
    if guidance is None:
        return {}
    return {"unconditional_output": randn(*shape, seed=77), "guidance_scale": guidance}


# --- posterior ----------------------------------------------------------------------------------------------------------


@TABLES
@GUIDANCE
def test_posterior(table: StepTable, guidance: float | None) -> None:
    x, y = randn(S, D, seed=1), randn(S, D, seed=2)
    seed, step = torch.arange(100, 100 + S), torch.tensor([5, 0, 3, 3, 1, 4])
    given = half(guidance, S, D)
    got = posterior(x, y, seed, step, table, **given)
    z = normal(seed, step, D, stream=NOISE_STREAM, dtype=torch.float64)
    assert got.dtype == torch.float64
    for row, k in enumerate(step.tolist()):
        output = guided(y[row], given["unconditional_output"][row] if given else None, guidance or 1.0)
        expected = mean_of(x[row], output, k, table) + table.std[k] * z[row]
        torch.testing.assert_close(got[row], expected, **CLOSE)
    assert torch.equal(posterior(x, y, seed, step, table, noise=z, **given), got)
    still = posterior(x, y, seed, step, table, noise=torch.zeros_like(z), **given)
    torch.testing.assert_close(got - still, table.std[step, None] * z, **CLOSE)


def test_posterior_beyond_the_table_is_its_last_step() -> None:
    table, x, y = small_table(S), randn(1, D), randn(1, D, seed=1)
    seed = torch.tensor([3])
    assert torch.equal(
        posterior(x, y, seed, torch.tensor([S + 4]), table), posterior(x, y, seed, torch.tensor([S - 1]), table)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_of_any_dtype_and_states_in_float32(dtype: torch.dtype) -> None:
    table = small_table(S, dtype=torch.float32)
    x, y = randn(3, D, dtype=torch.float32), randn(3, D, seed=1, dtype=dtype)
    seed, step = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 4])
    got = posterior(x, y, seed, step, table)
    assert got.dtype == torch.float32
    assert torch.equal(got, posterior(x, y.float(), seed, step, table))
    # guidance is combined in float32, not in the network's dtype
    other = randn(3, D, seed=2, dtype=dtype)
    guidance: dict[str, Any] = {"guidance_scale": 1.5}
    got = posterior(x, y, seed, step, table, unconditional_output=other, **guidance)
    assert torch.equal(got, posterior(x, y.float(), seed, step, table, unconditional_output=other.float(), **guidance))


# --- acceptance ---------------------------------------------------------------------------------------------------------


@TABLES
@GUIDANCE
def test_acceptance_is_the_ratio_of_two_densities(table: StepTable, guidance: float | None) -> None:
    """Three ways: from the outputs, from the means, and from the two normal densities themselves."""
    batch, drafts = 3, 3
    x, y = randn(batch, drafts, D, seed=1), randn(batch, drafts, D, seed=2)
    y_draft = y + 0.3 * randn(batch, drafts, D, seed=3)
    seed, step = torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2])
    given = half(guidance, batch, drafts, D)
    got = acceptance(x, y, y_draft, seed, step, table, **given)
    assert got.log_ratio.shape == (batch, drafts)
    for row, j in itertools.product(range(batch), range(drafts)):
        k = int(step[row]) + j
        z = normal(seed[row], torch.tensor(k), D, dtype=torch.float64)
        output = guided(y[row, j], given["unconditional_output"][row, j] if given else None, guidance or 1.0)
        target_mean, draft_mean = mean_of(x[row, j], output, k, table), mean_of(x[row, j], y_draft[row, j], k, table)
        proposal = draft_mean + table.std[k] * z
        of_target = torch.distributions.Normal(target_mean, table.std[k]).log_prob(proposal).sum()
        of_draft = torch.distributions.Normal(draft_mean, table.std[k]).log_prob(proposal).sum()
        torch.testing.assert_close(got.log_ratio[row, j], of_target - of_draft, **CLOSE)
        delta = (draft_mean - target_mean) / table.std[k]
        torch.testing.assert_close(got.inner[row, j], (z * delta).sum(), **CLOSE)
        torch.testing.assert_close(got.squared_norm[row, j], (delta**2).sum(), **CLOSE)
        general = acceptance_from_means(proposal[None], target_mean[None], draft_mean[None], table.std[k][None])
        for name in ("log_ratio", "inner", "squared_norm"):
            torch.testing.assert_close(getattr(general, name)[0], getattr(got, name)[row, j], rtol=1e-8, atol=1e-8)


@TABLES
def test_equal_outputs_are_accepted_for_sure(table: StepTable) -> None:
    x, y = randn(2, 3, D), randn(2, 3, D, seed=1)
    got = acceptance(x, y, y, torch.tensor([1, 2]), torch.tensor([0, 2]), table)
    assert (got.log_ratio == 0).all()
    assert (got.squared_norm == 0).all()


def test_where_both_estimates_are_clipped_alike_the_outputs_do_not_matter() -> None:
    table = small_table(S, clip_range=0.01)
    x = torch.zeros(1, 1, D, dtype=torch.float64)
    seed, step = torch.tensor([1]), torch.tensor([0])
    same_side = acceptance(x, torch.full_like(x, 5.0), torch.full_like(x, 9.0), seed, step, table)
    assert same_side.squared_norm.item() == 0
    other_side = acceptance(x, torch.full_like(x, 5.0), torch.full_like(x, -9.0), seed, step, table)
    assert other_side.squared_norm.item() > 0


def test_nan_gives_nan() -> None:
    table = small_table(S)
    x, bad = randn(2, 2, D), randn(2, 2, D, seed=1)
    bad[0, 1, 3] = torch.nan
    for target_output, draft_output in ((x, bad), (bad, x)):
        ratio = acceptance(x, target_output, draft_output, torch.tensor([1, 2]), torch.tensor([0, 0]), table).log_ratio
        assert torch.isnan(ratio).tolist() == [[False, True], [False, False]]


def test_no_cancellation_where_the_noise_is_small() -> None:
    """From the means in float32 the gap would drown: states of size 1, std 1e-6, outputs 1e-7 apart."""
    ones = torch.ones(1)
    table = StepTable(ones, ones, 1e-6 * ones, ones, ones, ones, ones)
    x = torch.ones(1, 1, D)
    y = torch.zeros(1, 1, D)
    got = acceptance(x, y, y + 1e-7, torch.tensor([1]), torch.tensor([0]), table)
    assert got.squared_norm.item() == pytest.approx(D * 0.1**2, rel=1e-5)


# --- householder --------------------------------------------------------------------------------------------------------


def reflect(z: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return householder(z, delta, (z * delta).sum(-1), delta.square().sum(-1))


def test_householder_is_the_reflection_along_delta() -> None:
    z, delta = randn(50, D, seed=1), 0.4 * randn(50, D, seed=2)
    got = reflect(z, delta)
    e = delta / delta.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(got, z - 2 * e * (e * z).sum(-1, keepdim=True), **CLOSE)
    torch.testing.assert_close(got.norm(dim=-1), z.norm(dim=-1), **CLOSE)  # an isometry
    torch.testing.assert_close((got * e).sum(-1), -(z * e).sum(-1), **CLOSE)  # turns round what lies along delta
    aside = z - e * (e * z).sum(-1, keepdim=True)
    torch.testing.assert_close(got - e * (e * got).sum(-1, keepdim=True), aside, **CLOSE)  # and leaves the rest alone
    torch.testing.assert_close(reflect(got, delta), z, **CLOSE)  # an involution
    torch.testing.assert_close(reflect(z, -3 * delta), got, **CLOSE)  # of the line, not of the vector


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_without_a_direction_the_noise_stays(value: float) -> None:
    z, delta = randn(2, D, seed=1), randn(2, D, seed=2)
    delta[0] = value
    got = reflect(z, delta)
    assert torch.equal(got[0], z[0])
    assert not torch.equal(got[1], z[1])


# --- propose ------------------------------------------------------------------------------------------------------------


def windows(batch: int, anchors: int) -> dict[str, torch.Tensor]:
    return {
        "state": randn(batch, D, seed=3),
        "seed": torch.arange(10, 10 + batch),
        "step": torch.tensor([0, 2, 3])[:batch],
        "anchor_states": randn(batch, anchors, D, seed=4),
        "anchor_outputs": randn(batch, anchors, D, seed=5),
        "anchor_step": torch.tensor([0, 1, 1])[:batch],
        "anchor_length": torch.tensor([1, 3, anchors])[:batch],
    }


@TABLES
@GUIDANCE
@pytest.mark.parametrize("draft", ["hold-x0", "hold-output"])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("corrected", [False, True])
def test_propose_drafts_step_by_step(
    table: StepTable, guidance: float | None, draft: str, window: int, corrected: bool
) -> None:
    given = windows(3, 4)
    extra: dict[str, Any] = {}
    if guidance is not None:
        extra = {"unconditional_anchor_outputs": randn(3, 4, D, seed=77), "guidance_scale": guidance}
    correction = randn(3, window + 1, D, seed=6)
    if corrected:
        extra["correction"] = correction
    states, outputs = propose(**given, window=window, table=table, draft=draft, **extra)
    assert states.shape == (3, window, D)
    assert outputs.shape == (3, window - 1, D)
    noise = torch.zeros(3, window + 2, D, dtype=torch.float64)
    for row in range(3):
        x = given["state"][row]
        assert torch.equal(states[row, 0], x)
        for j in range(window - 1):
            k = int(given["step"][row]) + j
            first, length = int(given["anchor_step"][row]), int(given["anchor_length"][row])
            # the latest evaluated step that is not beyond k
            a = max(at for at in range(first, first + length) if at <= k)
            held = guided(
                given["anchor_outputs"][row, a - first],
                extra["unconditional_anchor_outputs"][row, a - first] if guidance is not None else None,
                guidance or 1.0,
            )
            if draft == "hold-x0":
                x0 = table.x0_state_coef[a] * given["anchor_states"][row, a - first] + table.x0_model_coef[a] * held
                held = (x0 - table.x0_state_coef[k] * x) / table.x0_model_coef[k]
            if corrected:
                held = held + correction[row, j]
            z = normal(given["seed"][row], torch.tensor(k), D, dtype=torch.float64)
            noise[row, j] = z
            x = mean_of(x, held, k, table) + table.std[k] * z
            torch.testing.assert_close(outputs[row, j], held, **CLOSE)
            torch.testing.assert_close(states[row, j + 1], x, **CLOSE)
    at_hand = propose(**given, window=window, table=table, draft=draft, noise=noise, **extra)
    torch.testing.assert_close(at_hand.states, states, **CLOSE)
    torch.testing.assert_close(at_hand.draft_output, outputs, **CLOSE)


@pytest.mark.parametrize("draft", ["hold-x0", "hold-output"])
def test_proposals_made_part_by_part_are_the_same_to_the_bit(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = small_table()
    indices = torch.tensor([3, 4]), torch.tensor([5, 6])
    anchors = drawn(2, 4, 33), drawn(2, 4, 33), indices[1] - 1, torch.tensor([4, 2])
    arguments = (drawn(2, 33), *indices, 5, *anchors, table)
    options = {"draft": draft, "correction": drawn(2, 4, 33), "impl": "reference"}
    whole = propose(*arguments, **options)
    monkeypatch.setattr(sys.modules["free_kernels.propose.reference"], "_CACHED", 70)
    for made, expected in zip(propose(*arguments, **options), whole, strict=True):
        assert torch.equal(made, expected)


def test_hold_x0_keeps_the_anchors_x0_along_the_whole_draft() -> None:
    table, given = small_table(S), windows(1, 1)
    states, outputs = propose(**given, window=5, table=table)
    x0 = table.x0_state_coef[0] * given["anchor_states"][0, 0] + table.x0_model_coef[0] * given["anchor_outputs"][0, 0]
    for j in range(4):
        torch.testing.assert_close(
            table.x0_state_coef[j] * states[0, j] + table.x0_model_coef[j] * outputs[0, j], x0, rtol=1e-7, atol=1e-7
        )


@TABLES
@pytest.mark.parametrize("draft", ["hold-x0", "hold-output"])
def test_a_correction_of_zeros_changes_nothing_to_the_bit(table: StepTable, draft: str) -> None:
    given = windows(3, 4)
    plain = propose(**given, window=4, table=table, draft=draft)
    zeros = propose(**given, window=4, table=table, draft=draft, correction=torch.zeros(3, 3, D))
    for mine, theirs in zip(zeros, plain, strict=True):
        assert torch.equal(mine, theirs)


@TABLES
@pytest.mark.parametrize("draft", ["hold-x0", "hold-output"])
def test_a_correction_is_known_from_its_step_on(table: StepTable, draft: str) -> None:
    """Each column moves its own draft and the states after it, never anything before; NaN is not lost on the way."""
    given = windows(3, 4)
    before = propose(**given, window=4, table=table, draft=draft)
    for column in range(3):
        correction = torch.zeros(3, 3, D)
        correction[1, column, 2] = torch.nan
        states, outputs = propose(**given, window=4, table=table, draft=draft, correction=correction)
        assert torch.equal(states[1, : column + 1], before.states[1, : column + 1])
        assert torch.equal(outputs[1, :column], before.draft_output[1, :column])
        assert outputs[1, column, 2].isnan()
        assert states[1, column + 1 :, 2].isnan().all()
        assert states.isnan().sum() == 3 - column  # of one element of one sample


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_correction_of_any_dtype_is_added_in_the_states(dtype: torch.dtype) -> None:
    given, correction = windows(3, 4), randn(3, 3, D, seed=6, dtype=dtype)
    got = propose(**given, window=4, table=small_table(S), correction=correction)
    assert got.draft_output.dtype == torch.float64
    wide = propose(**given, window=4, table=small_table(S), correction=correction.double())
    for mine, theirs in zip(got, wide, strict=True):
        assert torch.equal(mine, theirs)


def test_anchor_index_never_points_beyond_the_draft() -> None:
    for first, length, k in itertools.product(range(5), range(1, 5), range(12)):
        if k < first:
            continue
        column = int(anchor_index(torch.tensor([[k]]), torch.tensor([first]), torch.tensor([length])))
        assert 0 <= column < length
        assert first + column <= k
        assert column == length - 1 or first + column == k


def test_a_draft_does_not_see_what_the_target_said_beyond_its_step() -> None:
    """The leak of the noise: an evaluation at k + 1 has seen the noise of step k, so a draft for k must not know it."""
    table, given = small_table(S), windows(3, 4)
    before = propose(**given, window=4, table=table)
    for column in range(4):
        changed = {name: given[name].clone() for name in given}
        changed["anchor_outputs"][:, column] += 1
        changed["anchor_states"][:, column] -= 1
        after = propose(**changed, window=4, table=table)
        for row, j in itertools.product(range(3), range(3)):
            if given["anchor_step"][row] + column > given["step"][row] + j:
                assert torch.equal(after.draft_output[row, j], before.draft_output[row, j])
    # nor noise of its own step or later
    noise = normal(given["seed"][:, None], given["step"][:, None] + torch.arange(3), D, dtype=torch.float64)
    for column in range(3):
        changed_noise = noise.clone()
        changed_noise[:, column:] += 1
        after = propose(**given, window=4, table=table, noise=changed_noise)
        torch.testing.assert_close(after.draft_output[:, : column + 1], before.draft_output[:, : column + 1], **CLOSE)
        torch.testing.assert_close(after.states[:, : column + 1], before.states[:, : column + 1], **CLOSE)


# --- verify -------------------------------------------------------------------------------------------------------------


def verified_by_hand(
    states: torch.Tensor,
    y: torch.Tensor,
    y_draft: torch.Tensor,
    seed: int,
    step: int,
    length: int,
    table: StepTable,
    tau: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int, bool]:
    """One sample's window in the words of the design: next state, advance, rejected."""
    if length == 0:
        return states[0], 0, False
    key = torch.tensor(seed)
    for j in range(length):
        k = step + j
        z = normal(key, torch.tensor(k), D, dtype=torch.float64)
        target_mean = mean_of(states[j], y[j], k, table)
        if j == length - 1:
            return target_mean + table.std[k] * z, length, False
        delta = (mean_of(states[j], y_draft[j], k, table) - target_mean) / table.std[k]
        u = float(uniform(key, torch.tensor(k), stream=TEST_STREAM, dtype=torch.float64))
        log_ratio = float(-(z * delta).sum() - (delta * delta).sum() / 2)
        if not math.log(u) <= (log_ratio if tau is None else float(tau[j]) * log_ratio):
            e = delta / delta.norm()
            return target_mean + table.std[k] * (z - 2 * e * (e @ z)), j + 1, True
    raise AssertionError("unreachable")


@TABLES
@GUIDANCE
@pytest.mark.parametrize("window", [1, 2, 4])
def test_verify_is_the_round_of_the_design(table: StepTable, guidance: float | None, window: int) -> None:
    batch = 200
    seed = torch.arange(batch)
    step = seed % 3
    length = torch.where(seed % 7 == 0, 0, 1 + (seed // 3) % window)
    states, y = randn(batch, window, D, seed=1), randn(batch, window, D, seed=2)
    given = half(guidance, batch, window, D)
    combined = guided(y, given.get("unconditional_output"), guidance or 1.0)
    y_draft = combined[:, : window - 1] + 0.1 * randn(batch, window - 1, D, seed=3)
    got = verify(states, y, y_draft, seed, step, length, table, **given)
    assert got.log_ratio.shape == got.squared_norm.shape == (batch, window - 1)
    outcomes = set()
    for row in range(batch):
        expected = verified_by_hand(states[row], combined[row], y_draft[row], row, int(step[row]), int(length[row]), table)
        torch.testing.assert_close(got.next_state[row], expected[0], rtol=1e-8, atol=1e-8)
        assert (int(got.advance[row]), bool(got.rejected[row])) == expected[1:]
        outcomes.add(expected[1:])
    # every outcome did occur: finished, the exact last step of each length, a rejection at each draft
    accepted_all = {(n, False) for n in range(window + 1)}
    assert outcomes == accepted_all | {(n, True) for n in range(1, window)}

    ratios = (
        acceptance(states[:, : window - 1], combined[:, : window - 1], y_draft, seed, step, table) if window > 1 else None
    )
    if ratios is not None:
        torch.testing.assert_close(got.log_ratio, ratios.log_ratio, **CLOSE)
        torch.testing.assert_close(got.squared_norm, ratios.squared_norm, **CLOSE)
    # the same with noise and uniforms at hand
    steps = (step[:, None] + torch.arange(window)).clamp(max=S - 1)
    noise = normal(seed[:, None], steps, D, dtype=torch.float64)
    uniforms = uniform(seed[:, None], steps, dtype=torch.float64)
    for at_hand in ({"noise": noise}, {"uniforms": uniforms}, {"noise": noise, "uniforms": uniforms}):
        again = verify(states, y, y_draft, seed, step, length, table, **at_hand, **given)
        for name in got._fields:
            torch.testing.assert_close(getattr(again, name), getattr(got, name), **CLOSE)
    if window > 1:  # and they are what decides
        assert not verify(states, y, y_draft, seed, step, length, table, uniforms=uniforms * 1e-300, **given).rejected.any()


@TABLES
def test_verify_with_tau_relaxes_the_test_and_nothing_else(table: StepTable) -> None:
    batch, window = 200, 4
    states, y = randn(batch, window, D, seed=1), randn(batch, window, D, seed=2)
    y_draft = y[:, :-1] + 0.3 * randn(batch, window - 1, D, seed=3)
    seed, step, length = torch.arange(batch), torch.arange(batch) % 3, torch.arange(batch) % (window + 1)
    tau = torch.rand(batch, window, generator=torch.Generator().manual_seed(4))  # as the caller holds it, a column too many
    exact = verify(states, y, y_draft, seed, step, length, table)
    got = verify(states, y, y_draft, seed, step, length, table, tau=tau)
    for row in range(batch):
        expected = verified_by_hand(
            states[row], y[row], y_draft[row], row, int(step[row]), int(length[row]), table, tau[row]
        )
        torch.testing.assert_close(got.next_state[row], expected[0], rtol=1e-8, atol=1e-8)
        assert (int(got.advance[row]), bool(got.rejected[row])) == expected[1:]
    assert torch.equal(got.log_ratio, exact.log_ratio)
    assert torch.equal(got.squared_norm, exact.squared_norm)
    assert (got.advance >= exact.advance).all()
    assert (got.advance > exact.advance).sum() > 5
    assert got.rejected.sum() > 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tau_of_one_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    table, window, batch = small_table(S), 4, 60
    states, y = randn(batch, window, D, seed=1), randn(batch, window, D, seed=2)
    y_draft = y[:, :-1] + 0.3 * randn(batch, window - 1, D, seed=3)
    y_draft[0, 1], y_draft[1, 1], y_draft[2, 1] = torch.nan, torch.inf, 1e200
    rest = (torch.arange(batch), torch.arange(batch) % 3, torch.full((batch,), window), table)
    got = verify(states, y, y_draft, *rest, tau=torch.ones(batch, window - 1, dtype=dtype))
    for mine, theirs in zip(got, verify(states, y, y_draft, *rest), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert 0 < got.rejected.sum() < batch


def test_tau_of_zero_accepts_what_is_finite() -> None:
    """Not NaN, not a draft infinitely far; and a tau that is NaN rejects even an exact draft."""
    table, window = small_table(S), 3
    states, y = randn(6, window, D, seed=1), randn(6, window, D, seed=2)
    y_draft = y[:, :-1] + 50.0
    y_draft[1, 1, 3], y_draft[2, 1, 3], y_draft[3, 1, 3], y_draft[4, 1, 3] = torch.nan, torch.inf, -torch.inf, 1e200
    y_draft[5] = y[5, :-1]
    tau = torch.zeros(6, window - 1)
    tau[5, 1] = torch.nan
    seed, step = torch.arange(6), torch.ones(6, dtype=torch.int64)
    got = verify(states, y, y_draft, seed, step, torch.full((6,), window), table, tau=tau)
    assert got.rejected.tolist() == [False, True, True, True, True, True]
    assert got.advance.tolist() == [window, 2, 2, 2, 2, 2]
    assert torch.isfinite(got.next_state).all()


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.8, 1.0])
def test_relaxed_acceptance_has_its_closed_form(tau: float) -> None:
    """E[a_tau] = Phi(-d/2) + exp(tau (tau - 1) d²/2) Phi(d/2 - tau d), d = |delta|; 2 Phi(-d/2) at tau = 1 (eq. 40)."""
    table, batch, distance = small_table(S), 40_000, 1.5
    y = torch.zeros(batch, 2, D, dtype=torch.float64)
    y_draft = y[:, :1] + distance * float(table.std[1] / table.model_coef[1]) / math.sqrt(D)
    rest = (torch.arange(batch), torch.ones(batch, dtype=torch.int64), torch.full((batch,), 2), table)
    got = verify(y, y, y_draft, *rest, tau=torch.full((batch, 1), tau))
    torch.testing.assert_close(got.squared_norm, torch.full_like(got.squared_norm, distance**2), **CLOSE)
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    edges = phi(torch.tensor([-distance / 2, distance / 2 - tau * distance], dtype=torch.float64))
    expected = float(edges[0] + math.exp(tau * (tau - 1) * distance**2 / 2) * edges[1])
    slack = 5 * math.sqrt(expected * (1 - expected) / batch) + 1e-12
    assert abs(float((~got.rejected).double().mean()) - expected) < slack


def test_verify_of_exact_drafts_is_the_ancestral_update() -> None:
    table, batch, window = small_table(S), 5, 4
    states, y = randn(batch, window, D, seed=1), randn(batch, window, D, seed=2)
    seed, step = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    got = verify(states, y, y[:, :-1], seed, step, torch.full((batch,), window), table)
    assert got.advance.tolist() == [window] * batch
    assert not got.rejected.any()
    assert torch.equal(got.next_state, posterior(states[:, -1], y[:, -1], seed, step + window - 1, table))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_verify_rejects_nan_and_takes_an_exact_draw(at: int) -> None:
    table, window = small_table(S), 4
    states, y = randn(1, window, D, seed=1), randn(1, window, D, seed=2)
    y_draft = y[:, :-1].clone()
    y_draft[0, at, 3] = torch.nan
    seed, step = torch.tensor([9]), torch.tensor([1])
    got = verify(states, y, y_draft, seed, step, torch.tensor([window]), table)
    assert got.advance.item() == at + 1
    assert got.rejected.item()
    assert torch.isnan(got.squared_norm[0]).tolist() == [j == at for j in range(window - 1)]
    torch.testing.assert_close(got.next_state, posterior(states[:, at], y[:, at], seed, step + at, table), **CLOSE)


def test_what_lies_beyond_the_window_or_the_rejection_does_not_matter() -> None:
    """NaN in states, outputs and drafts beyond the length, and beyond the first rejection."""
    table, window, batch = small_table(S), 4, 40
    states, y = randn(batch, window, D, seed=1), randn(batch, window, D, seed=2)
    y_draft = y[:, :-1] + 0.4 * randn(batch, window - 1, D, seed=3)
    seed, step = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    length = 1 + seed % window
    clean = verify(states, y, y_draft, seed, step, length, table)
    beyond = torch.arange(window) >= clean.advance[:, None]
    assert (beyond.sum(1)[clean.rejected] > 0).any()
    states, y, y_draft = (value.clone() for value in (states, y, y_draft))
    states[beyond], y[beyond], y_draft[beyond[:, :-1]] = torch.nan, torch.nan, torch.nan
    dirty = verify(states, y, y_draft, seed, step, length, table)
    assert torch.equal(dirty.advance, clean.advance)
    assert torch.equal(dirty.rejected, clean.rejected)
    torch.testing.assert_close(dirty.next_state, clean.next_state, **CLOSE)


def test_verify_in_float32_decides_as_in_float64() -> None:
    """Rounding may only move a decision where log u and the ratio all but agree; in 200 windows it does not."""
    table, window, batch = small_table(S), 3, 200
    states, y = randn(batch, window, D, seed=1), randn(batch, window, D, seed=2)
    y_draft = y[:, :-1] + 0.3 * randn(batch, window - 1, D, seed=3)
    rest = (torch.arange(batch), torch.arange(batch) % 4, torch.full((batch,), window))
    double = verify(states, y, y_draft, *rest, table)
    columns = [column.float() for column in table.columns]
    single = verify(states.float(), y.float(), y_draft.float(), *rest, StepTable(*columns, table.clip_range))
    assert single.next_state.dtype == torch.float32
    assert torch.equal(single.advance, double.advance)
    torch.testing.assert_close(single.next_state.double(), double.next_state, rtol=1e-5, atol=1e-5)
