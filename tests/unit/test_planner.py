"""Windows of one's own, planned or automatic: the arithmetic, the measurement, the promises of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
import free.sampling.planning
import free.windows.timing
from free import ReverseProcess, WindowPlan
from free.windows import WINDOWS, AutoWindow, Experience, Known, RoundSeconds, expected_advance
from tests.analytic import ElementwiseTarget
from tests.unit.helpers import GaussianModel, Recorder

STEPS = 40
PROCESS = ReverseProcess.ddpm(STEPS)
FLAT = RoundSeconds(np.array([1.0, 4096.0]), np.array([1.0, 1.001]))
PROPORTIONAL = RoundSeconds(np.array([1.0, 4096.0]), np.array([1.0, 4096.0]))


def experience(acceptance: float | np.ndarray, tests: float = 1e6) -> Experience:
    tested = np.full(STEPS, tests)
    return Experience(tested, tested * acceptance)


def auto(seconds: RoundSeconds, acceptance: float | np.ndarray, batch: int = 1) -> AutoWindow:
    return AutoWindow(seconds, experience(acceptance), PROCESS, batch)


def choice(schedule: AutoWindow, *step: int) -> int:
    return schedule.window(np.array(step), [], len(step))


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def test_the_expected_advance_is_the_sum_of_the_products() -> None:
    acceptance = np.array([0.9, 0.5, 0.8, 0.7, 0.0])
    got = expected_advance(acceptance, np.array([0, 2, 4]), np.array([1, 2, 4, 64]))
    assert got[0].tolist() == pytest.approx([1, 1.9, 1 + 0.9 + 0.45 + 0.36, 1 + 0.9 + 0.45 + 0.36 + 0.252])
    assert got[1].tolist() == pytest.approx([1, 1.8, 1 + 0.8 + 0.56, 1 + 0.8 + 0.56])
    assert got[2].tolist() == [1, 1, 1, 1]  # the last step is never drafted


def test_seconds_between_and_beyond_what_was_measured() -> None:
    seconds = RoundSeconds(np.array([4.0, 8.0, 16.0]), np.array([1.0, 1.5, 3.5]))
    np.testing.assert_allclose(seconds.at(np.array([4, 6, 8, 12, 16])), [1, 1.25, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(seconds.at(np.array([32, 2])), [3.5 + 16 * 0.25, 0.75])
    assert seconds.at(np.array([0.1]))[0] > 0
    one = RoundSeconds(np.array([2.0]), np.array([1.0]))
    np.testing.assert_allclose(one.at(np.array([1, 2, 4])), [1, 1, 2])
    assert seconds.windows(4).tolist() == [1, 2, 4]
    assert seconds.windows(16).tolist() == [1]


@pytest.mark.parametrize("batch", [1, 3])
def test_where_states_cost_one_by_one_the_choice_is_the_ancestral_sampler(batch: int) -> None:
    for acceptance in (0.0, 0.5, 0.9, 1.0):
        assert choice(auto(PROPORTIONAL, acceptance, batch), *range(batch)) == 1


def test_where_a_wide_forward_is_free_the_widest_that_helps_is_chosen() -> None:
    assert choice(auto(FLAT, 0.99), 0) >= 32
    assert choice(auto(FLAT, 0.0), 0) == 1
    assert choice(auto(FLAT, 0.5), 0) <= 8  # beyond a few steps nothing is reached


def test_the_choice_follows_the_step() -> None:
    acceptance = np.where(np.arange(STEPS) < 20, 0.1, 0.98)
    affine = RoundSeconds(np.array([1.0, 65.0]), np.array([1.0, 5.0]))
    assert choice(auto(affine, acceptance), 2) <= 2
    assert choice(auto(affine, acceptance), 22) >= 8
    plan = auto(affine, acceptance).plan(1)
    assert plan.windows[2] <= 2
    assert plan.windows[22] >= 8
    assert (plan.windows <= STEPS - np.arange(STEPS)).all()
    assert plan.seconds[1] == pytest.approx(1.0)


def test_what_rounds_really_settle_corrects_the_sum() -> None:
    """Drafts that are accepted less often in wide windows than in narrow ones: the pooled acceptance does not say so."""
    schedule = auto(FLAT, 0.95)
    first = choice(schedule, 1)
    assert first >= 16
    nothing = Known.nothing(1, STEPS)
    for _ in range(30):
        before = Known(np.array([1]), nothing.rounds, nothing.broke, nothing.tested, nothing.accepted)
        after = Known(np.array([2]), nothing.rounds + 1, nothing.broke, nothing.tested, nothing.accepted)
        schedule.learn(first, before, after)
        before.step = np.array([1])
        schedule.learn(4, before, Known(np.array([5]), nothing.rounds + 1, nothing.broke, nothing.tested, nothing.accepted))
    assert choice(schedule, 1) < first


def test_a_small_gain_changes_nothing() -> None:
    schedule = auto(RoundSeconds(np.array([1.0, 64.0]), np.array([1.0, 1.0])), 0.6)
    kept = choice(schedule, 0)
    schedule.seconds = RoundSeconds(np.array([1.0, 64.0]), np.array([1.0, 1.0 + 1e-3]))
    assert choice(schedule, 0) == kept


def test_acceptance_is_averaged_over_neighbours_and_carried_on() -> None:
    tested, accepted = np.zeros(STEPS), np.zeros(STEPS)
    tested[:10], accepted[:10] = 50, 20
    drafted = np.arange(STEPS) < STEPS - 1
    got = Experience(tested, accepted).acceptance(drafted)
    np.testing.assert_allclose(got[:-1], 0.4, atol=0.02)  # the steps to come are taken for like those that were
    assert got[-1] == 0
    np.testing.assert_allclose(Experience(0 * tested, 0 * tested).acceptance(drafted)[:-1], 0.9)


# --- measurement --------------------------------------------------------------------------------------------------------


def test_wider_windows_are_timed_until_they_are_no_cheaper_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Counter[int] = Counter()

    def run(window: int) -> None:
        ran[window] += 1

    def timed(run: Callable[[int], Any], window: int, device: torch.device) -> float:
        run(window)
        return 3.0 + max(0, window - 8)

    monkeypatch.setattr(free.windows.timing, "_timed", timed)
    seconds = free.windows.timing.by_window(run, torch.device("cpu"), 64)
    assert seconds == {1: 3.0, 2: 3.0, 4: 3.0, 8: 3.0, 16: 11.0}
    assert max(ran.values()) <= 8
    assert list(free.windows.timing.by_window(run, torch.device("cpu"), 3)) == [1, 2]


def test_a_model_is_measured_once_for_each_setting(dit: DiTTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(setup: Any, graphs: Any) -> RoundSeconds:
        measured.append(setup.request.batch)
        return FLAT

    monkeypatch.setattr(free.sampling.planning, "_measure", measure)
    common: dict[str, Any] = {"num_inference_steps": 6, "window": "auto", "seed": 0}
    for labels in ([1], [2], [1, 2], [3]):
        free.speculative_sample(dit, class_labels=labels, **common)
    assert measured == [1, 2]
    free.speculative_sample(dit, class_labels=[1], guidance_scale=1.5, **common)
    free.speculative_sample(dit, "hold-output", class_labels=[1], **common)
    assert measured == [1, 2, 1, 1]


def test_the_measurement_leaves_no_trace(dit: DiTTransformer2DModel) -> None:
    """It runs the sample's own first rounds; noise is of seed and step, so the run begins as if it had not been."""
    plan = free.plan_window(dit, class_labels=[1, 2], num_inference_steps=6)
    common: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 6, "seed": 3, "window": plan}
    assert torch.equal(free.speculative_sample(dit, **common).samples, free.speculative_sample(dit, **common).samples)
    assert set(plan.seconds) <= set(WINDOWS)
    assert all(value > 0 for value in plan.seconds.values())


# --- automatic windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output"])
@pytest.mark.parametrize("seconds", [FLAT, PROPORTIONAL])
def test_auto_takes_what_pays(monkeypatch: pytest.MonkeyPatch, seconds: RoundSeconds, drafter: str) -> None:
    monkeypatch.setattr(free.sampling.planning, "_measure", lambda setup, graphs: seconds)
    model, common = Recorder(), {"shape": (3,), "num_inference_steps": STEPS, "seed": [1, 2]}
    out = free.speculative_sample(model, drafter, window="auto", **common)
    assert out.stats.window == "auto"
    assert sum(out.stats.windows.values()) == out.stats.draft_calls == max(out.stats.rounds)
    assert out.stats.to_dict()["windows"] == {str(window): count for window, count in sorted(out.stats.windows.items())}
    if seconds is PROPORTIONAL:
        assert set(out.stats.windows) == {1}
        assert torch.equal(out.samples, free.ancestral_sample(GaussianModel(), **common).samples)
    else:
        assert max(out.stats.windows) > 1
        assert out.stats.parallel_efficiency > 1.1


def test_auto_on_a_model_without_weak_references() -> None:
    class Slotted:
        __slots__ = ()

        def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return GaussianModel()(x, timestep)

    out = free.speculative_sample(Slotted(), window="auto", shape=(3,), num_inference_steps=5, seed=0)
    assert torch.isfinite(out.samples).all()


# --- plans --------------------------------------------------------------------------------------------------------------


def zigzag(steps: int) -> WindowPlan:
    return WindowPlan(np.array([(1, 5, 3, 8, 2)[k // 3 % 5] for k in range(steps)]))


def test_a_plan_of_ones_is_the_ancestral_sampler() -> None:
    common: dict[str, Any] = {"shape": (5,), "num_inference_steps": 12, "seed": [1, 2]}
    out = free.speculative_sample(ElementwiseTarget(), window=WindowPlan(np.ones(12, np.int64)), **common)
    assert torch.equal(out.samples, free.ancestral_sample(ElementwiseTarget(), **common).samples)
    assert out.stats.window == "plan"


def test_a_plan_of_equal_windows_is_that_window() -> None:
    common: dict[str, Any] = {"shape": (5,), "num_inference_steps": 12, "seed": [1, 2]}
    planned = free.speculative_sample(ElementwiseTarget(), window=WindowPlan(np.full(12, 4)), **common)
    assert torch.equal(planned.samples, free.speculative_sample(ElementwiseTarget(), window=4, **common).samples)


def test_under_a_plan_a_sample_does_not_depend_on_the_others_in_its_batch() -> None:
    common: dict[str, Any] = {"shape": (5,), "process": PROCESS, "window": zigzag(STEPS), "return_trajectory": True}
    seeds = [3, 14, 15, 92, 65]
    together = free.speculative_sample(GaussianModel(), seed=seeds, **common)
    assert len(set(together.stats.rounds.tolist())) > 1
    for i, seed in enumerate(seeds):
        alone = free.speculative_sample(GaussianModel(), seed=[seed], **common)
        assert torch.equal(together.trajectory[i], alone.trajectory[0])
        assert together.stats.rounds[i] == alone.stats.rounds[0]


def test_a_planned_window_covers_where_the_rounds_under_way_may_have_led() -> None:
    plan = WindowPlan(np.array([2, 2, 2, 9, 2, 2, 2, 2, 2, 2]))
    assert plan.window(np.array([0]), [], 1) == 2
    assert plan.window(np.array([0]), [2], 1) == 2  # at step 1 or 2
    assert plan.window(np.array([0, 1]), [2], 2) == 9  # the second may be at step 3
    assert plan.window(np.array([8]), [2], 1) == 2  # or beyond the end


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    plan = WindowPlan(np.array([4, 2, 1]), np.array([0.5, 0.25, 0.0]), {1: 0.5, 2: 0.75})
    plan.save(tmp_path / "plan.json")
    again = WindowPlan.load(tmp_path / "plan.json")
    assert again.windows.tolist() == [4, 2, 1]
    assert again.acceptance.tolist() == [0.5, 0.25, 0.0]
    assert again.seconds == plan.seconds
    for text in ("", "[]", "{}", '{"format": "other"}', '{"format": "free-dit window plan, 1", "windows": [0]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json' holds no window plan"):
            WindowPlan.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        WindowPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize("windows", [[], [0, 1], [1.5], [[1]], [-1]])
def test_a_plan_of_what_is_no_window_is_refused(windows: Any) -> None:
    with pytest.raises(ValueError, match=r"windows is .*; allowed are ints, 1 or more, one a step"):
        WindowPlan(np.array(windows))


def test_wrong_windows_and_plans_are_refused(dit: DiTTransformer2DModel) -> None:
    for window in ("automatic", None, 0, 2.0, True, [4]):
        with pytest.raises(ValueError, match=r"window is .*; allowed is an int, 1 or more, 'auto', or a plan"):
            free.speculative_sample(dit, window=window)
    with pytest.raises(ValueError, match=r"window is a plan of 3 steps; the process has 5"):
        free.speculative_sample(dit, window=WindowPlan(np.ones(3, np.int64)), num_inference_steps=5)
    stats = free.speculative_sample(dit, num_inference_steps=6, seed=0).stats
    with pytest.raises(ValueError, match=r"statistics is of 6 steps; the process has 5"):
        free.plan_window(dit, num_inference_steps=5, statistics=stats)


def test_a_plan_from_the_statistics_of_an_earlier_run(dit: DiTTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.sampling.planning, "_measure", lambda setup, graphs: FLAT)
    stats = free.speculative_sample(dit, num_inference_steps=20, seed=0).stats
    accepted = free.plan_window(dit, num_inference_steps=20, statistics=stats)
    stats.accepted[:] = 0
    stats.tested[:] = 10**6
    rejected = free.plan_window(dit, num_inference_steps=20, statistics=stats)
    assert accepted.windows.max() > 1
    assert rejected.windows.max() == 1
