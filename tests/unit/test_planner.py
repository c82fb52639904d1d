"""Windows of one's own, planned or automatic: the arithmetic, the measurement, the promises of a plan."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
import free.sampling.noise
import free.sampling.planning
import free.sampling.request
import free.windows.timing
from free import ReverseProcess, WindowPlan
from free.sampling.request import Options, check_request
from free.targets.ranks import Ranks
from free.windows import (
    WINDOWS,
    AutoWindow,
    Experience,
    ExploringWindow,
    KeyLog,
    Known,
    Measurements,
    RoundSeconds,
    TimedExperience,
    expected_advance,
    together,
)
from free.windows.automatic import MOST_KEYS
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
    """A window of 8 in place of one of 4: 1.5 % faster is no tie, and not worth the change; 3 % is."""
    acceptance, states = 0.6, np.array(WINDOWS, dtype=float)
    farther = (1 - acceptance**8) / (1 - acceptance**4)

    def seconds(of_eight: float) -> RoundSeconds:
        return RoundSeconds(states, np.array([1.0, 1.0, 1.0, of_eight, 100.0, 100.0, 100.0]))

    schedule = auto(seconds(50.0), acceptance)
    assert choice(schedule, 0) == 4
    for faster, expected in ((1.015, 4), (1.03, 8)):
        schedule.seconds = seconds(farther / faster)
        assert choice(schedule, 0) == expected
    assert choice(auto(seconds(farther / 1.015), acceptance), 0) == 8  # nothing was taken before


def test_a_plan_changes_for_no_small_gain_either() -> None:
    acceptance = np.where(np.arange(STEPS) < STEPS // 2, 0.3, 0.6)  # at first 4 is the best, later 8 a little better
    farther = (1 - 0.6**8) / (1 - 0.6**4)
    for faster, expected in ((1.015, 4), (1.03, 8)):
        seconds = np.array([1.0, 1.0, 1.0, farther / faster, 100.0, 100.0, 100.0])
        windows = auto(RoundSeconds(np.array(WINDOWS, dtype=float), seconds), acceptance).plan(1).windows
        assert windows[STEPS // 4] == 4
        assert windows[3 * STEPS // 4] == expected


def test_a_window_that_once_did_badly_is_tried_again() -> None:
    seen, sixteen = experience(0.8), np.array([16])
    for _ in range(30):
        seen.note(16, 1.0, 10.0)
    after_a_bad_spell = seen.correction(sixteen)[0]
    for _ in range(100):
        seen.note(4, 3.0, 3.0)
    assert after_a_bad_spell < 0.4
    assert seen.correction(sixteen)[0] > 0.9


def test_first_windows_which_have_no_anchors_correct_nothing() -> None:
    schedule, nothing = auto(FLAT, 0.9), Known.nothing(1, STEPS)
    after = Known(np.array([1]), nothing.rounds + 1, nothing.broke, nothing.tested, nothing.accepted)
    schedule.learn(8, nothing, after)
    assert not schedule.experience.settled
    later = Known(np.array([3]), nothing.rounds + 2, nothing.broke, nothing.tested, nothing.accepted)
    schedule.learn(8, after, later)
    assert schedule.experience.settled == {8: 2.0}


def test_a_window_whose_rounds_are_never_whole_is_not_tried_forever() -> None:
    seen = TimedExperience.none(STEPS)
    seen.time(1, 1, 1.0)
    schedule = ExploringWindow(seen, PROCESS, 1)
    assert [choice(schedule, 0) for _ in range(6)] == [2, 2, 2, 1, 1, 1]


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

    def timed(run: Callable[[int], Any], window: int, device: torch.device, ranks: Ranks) -> float:
        run(window)
        return 3.0 + max(0, window - 8)

    monkeypatch.setattr(free.windows.timing, "_timed", timed)
    seconds = free.windows.timing.by_window(run, torch.device("cpu"), 64)
    assert seconds == {1: 3.0, 2: 3.0, 4: 3.0, 8: 3.0, 16: 11.0, 32: 27.0}
    assert max(ran.values()) <= 8
    assert list(free.windows.timing.by_window(run, torch.device("cpu"), 3)) == [1, 2]


def test_a_model_is_measured_once_for_each_setting(dit: DiTTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(free.windows.timing.time, "perf_counter", lambda: 0.0)  # too soon for another measurement

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
    common: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 6, "seed": 3}
    before = free.speculative_sample(dit, window=4, **common)
    plan = free.plan_window(dit, **common)
    after = free.speculative_sample(dit, window=4, **common)
    assert torch.equal(before.samples, after.samples)
    assert before.stats.tested.tolist() == after.stats.tested.tolist()
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
    plan = WindowPlan(np.array([4, 2, 1]), np.array([0.5, 0.25, 0.0]), {1: 0.5, 2: 0.75}, frozenset({7, -(2**63)}))
    plan.save(tmp_path / "plan.json")
    again = WindowPlan.load(tmp_path / "plan.json")
    assert again.windows.tolist() == [4, 2, 1]
    assert again.acceptance.tolist() == [0.5, 0.25, 0.0]
    assert again.seconds == plan.seconds
    assert again.keys == plan.keys
    for text in ("", "[]", "{}", '{"format": "other"}', '{"format": "free-dit window plan, 2", "windows": [0]}'):
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


# --- no choice has seen the noise that it chooses for -------------------------------------------------------------------


def test_pilots_draw_from_keys_of_their_own() -> None:
    request = check_request(GaussianModel(), Options(shape=(3,), seed=[5, 5, -7]))
    pilot = request.pilot()
    assert len(set(pilot.keys)) == 3  # rows that share a key are apart
    assert set(pilot.keys).isdisjoint(request.keys)
    assert pilot.keys == request.pilot().keys
    # nor are they a key that another seed derives for a row of its batch
    derived = check_request(GaussianModel(), Options(shape=(3,), seed=5, num_samples=2000)).keys
    assert set(pilot.keys).isdisjoint(derived)


def test_what_is_measured_draws_no_noise_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a plan's pilot nor the timing: all noise is made by ``normal`` and ``uniform``."""
    drawn: set[int] = set()

    def watched(original: Any) -> Any:
        def draw(seed: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            drawn.update(seed.flatten().tolist())
            return original(seed, *args, **kwargs)

        return draw

    for module in (free.sampling.noise, free.sampling.request):
        for name in ("normal", "uniform"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, watched(getattr(module, name)))
    common: dict[str, Any] = {"shape": (3,), "num_inference_steps": 8, "impl": "reference"}
    keys = set(check_request(GaussianModel(), Options(shape=(3,), seed=7, num_samples=4)).keys)
    free.plan_window(GaussianModel(), seed=7, num_samples=4, **common)
    assert drawn
    assert drawn.isdisjoint(keys)
    free.speculative_sample(GaussianModel(), seed=7, num_samples=4, **common)
    assert keys <= drawn


def test_a_plan_of_statistics_is_refused_for_their_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(free.sampling.planning, "_measure", lambda setup, graphs: FLAT)
    model, common = GaussianModel(), {"shape": (3,), "num_inference_steps": 6}
    stats = free.speculative_sample(model, seed=[1, 2], **common).stats
    plan = free.plan_window(model, statistics=stats, **common)
    plan.save(tmp_path / "plan.json")
    # a run whose windows such a plan chose has met its samples too
    after = free.plan_window(
        model, statistics=free.speculative_sample(model, seed=[9], window=plan, **common).stats, **common
    )
    for one, seed in itertools.product((plan, WindowPlan.load(tmp_path / "plan.json"), after), ([2, 5], [1])):
        with pytest.raises(ValueError, match=r"window is a plan that was made from statistics of samples of the same seed"):
            free.speculative_sample(model, seed=seed, window=one, **common)
    assert free.speculative_sample(model, seed=[3, 4], window=plan, **common).samples.isfinite().all()


def test_automatic_windows_begin_anew_for_a_key_that_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.sampling.planning, "_measure", lambda setup, graphs: FLAT)
    made: list[Experience] = []
    original = AutoWindow.__init__

    def watched(schedule: AutoWindow, seconds: Any, experience: Experience, *args: Any) -> None:
        made.append(experience)
        original(schedule, seconds, experience, *args)

    monkeypatch.setattr(AutoWindow, "__init__", watched)
    model = GaussianModel()
    for seed in ([1], [2], [1], [3, 2], [4, 4], [5], [4]):
        free.speculative_sample(model, "hold-output", seed=seed, window="auto", shape=(3,), num_inference_steps=6)
    pooled = made[0]
    assert [one is pooled for one in made] == [True, True, False, False, True, True, False]
    assert set(pooled.keys) == {1, 2, 4, 5}
    assert made[2].tested.sum() > 0  # it learned on the way, for itself


def test_rows_of_one_key_get_windows_that_no_row_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.sampling.planning, "_measure", lambda setup, graphs: FLAT)
    out = free.speculative_sample(GaussianModel(), seed=[4, 4], window="auto", shape=(3,), num_inference_steps=STEPS)
    assert out.stats.window == "auto"
    assert len(out.stats.windows) == 1


def test_a_window_for_rows_of_one_key_is_chosen_by_others_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.sampling.planning, "_measure", lambda setup, graphs: FLAT)
    model, common = GaussianModel(), {"shape": (3,), "num_inference_steps": STEPS, "window": "auto"}
    free.speculative_sample(model, seed=1, **common)
    twins = free.speculative_sample(model, seed=[4, 4], **common).stats
    assert twins.keys == {1, 4}
    plan = free.plan_window(model, shape=(3,), num_inference_steps=STEPS, statistics=twins)
    for seed in (1, 4):
        with pytest.raises(ValueError, match="it has seen their noise"):
            free.speculative_sample(model, seed=seed, **(common | {"window": plan}))
    # and what the twins have shown serves the next run, which knows of them
    assert free.speculative_sample(model, seed=9, **common).stats.keys == {1, 4, 9}


def test_keys_are_kept_once_whoever_speaks_of_them() -> None:
    log = KeyLog([3, 1])
    early = log.heard()
    log.add([1, 2])
    late = log.heard()
    assert early == {1, 3}
    assert late == {1, 2, 3} != early
    assert 2 not in early
    assert [*late] == [3, 1, 2]
    assert early.isdisjoint([2, 7])
    assert not late.isdisjoint([2])
    assert together(late, [2], early) is late
    assert together(early, [2], [9]) == {1, 2, 3, 9}
    assert pickle.loads(pickle.dumps(early)) == {1, 3} == copy.deepcopy(early)
    assert early | {5} == {1, 3, 5}


def test_statistics_of_automatic_windows_do_not_copy_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.sampling.planning, "_measure", lambda setup, graphs: FLAT)
    model, common = GaussianModel(), {"shape": (3,), "num_inference_steps": 3, "window": "auto"}
    keys = [free.speculative_sample(model, seed=[seed], **common).stats.keys for seed in range(5)]
    assert [len(one) for one in keys] == [1, 2, 3, 4, 5]
    assert len({id(one._place) for one in keys}) == 1


def test_experience_has_a_bound_and_is_not_emptied_under_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    experience = Experience.none(3)
    assert experience.admit(range(MOST_KEYS))
    assert not experience.admit([0])
    assert experience.is_full([-1])
    assert not Experience.none(3).is_full([-1])

    monkeypatch.setattr(free.windows.automatic, "MOST_KEYS", 2)
    model = GaussianModel()
    requests = [check_request(model, Options(seed=[seed], shape=(3,), num_inference_steps=3)) for seed in range(4)]
    held = [
        free.sampling.planning.experience_for(request, free.as_drafter("hold-x0"), None, Experience) for request in requests
    ]
    assert held[0] is held[1]
    assert held[2] is held[3]
    assert [set(one.keys) for one in held] == [{0, 1}, {0, 1}, {2, 3}, {2, 3}]


def test_a_measurement_is_made_again_and_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(free.windows.timing.time, "perf_counter", lambda: now[0])
    taken = iter([[1.0, 9.0], [1.1, 1.5, 3.0], [1.2, 2.0], [1.3, 2.5]])
    made: list[float] = []

    def measure() -> RoundSeconds:
        seconds = np.array(next(taken))
        made.append(now[0])
        now[0] += 1.0
        return RoundSeconds(np.array([1.0, 2.0, 4.0])[: len(seconds)], seconds)

    measurements = Measurements()
    assert measurements.latest(measure).seconds.tolist() == [1.0, 9.0]
    now[0] = 1.5  # half a second after its end: too soon
    assert measurements.latest(measure).seconds.tolist() == [1.0, 9.0]
    now[0] = 2.5
    assert measurements.latest(measure).seconds.tolist() == [1.0, 1.5, 3.0]
    now[0] = 9.0
    measurements.latest(measure)
    now[0] = 50.0  # from now on fifty times what one takes
    measurements.latest(measure)
    now[0] = 61.0  # the first is forgotten
    assert measurements.latest(measure).seconds.tolist() == [1.1, 1.5, 3.0]
    assert made == [0.0, 2.5, 9.0, 61.0]
