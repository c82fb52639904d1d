"""``window="auto"`` in a pipeline: rounds are timed as they pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import free
from free.sampling.memory import memory_of
from free.windows import ExploringWindow, Known, TimedExperience
from tests.pipelines.stubs import class_pipeline, draw

P_VALUE = 1e-6


def explore(seconds: Any, acceptance: float = 0.95, steps: int = 200, batch: int = 1) -> list[int]:
    """The windows of one run whose rounds take ``seconds(states)``, and settle what is expected of them."""
    process = free.ReverseProcess.ddpm(steps)
    schedule = ExploringWindow(TimedExperience.none(steps), process, batch)
    known, windows = Known.nothing(batch, steps), []
    known.step = known.step + 1
    known.rounds = known.rounds + 1
    while (known.step < steps).all():
        window = schedule.window(known.step, [], batch)
        settled = min(1 + int(acceptance * (window - 1)), steps - int(known.step[0]))
        tested = known.tested.copy()
        tested[known.step[0] : known.step[0] + settled] += batch
        after = Known(known.step + settled, known.rounds + 1, known.broke, tested, acceptance * tested)
        schedule.learn(window, known, after)
        if window * batch <= (steps - known.step).sum():
            schedule.time(window, window * batch, seconds(window * batch))
        windows.append(window)
        known = after
    return windows


def test_windows_widen_while_that_may_pay() -> None:
    free_of_charge = explore(lambda states: 1.0)
    assert free_of_charge[:11] == [1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32]
    by_the_state = explore(lambda states: 0.001 + states)
    # twice as dear twice in a row: wider ones are not even tried
    assert max(by_the_state) == 4
    assert by_the_state.count(1) > 0.9 * len(by_the_state)
    no_drafts = explore(lambda states: 1.0 + 0.2 * states, acceptance=0.0)
    assert max(no_drafts) <= 4
    knee = explore(lambda states: 1.0 + 0.2 * max(0, states - 8))
    assert np.bincount(knee).argmax() == 8


def test_a_busy_machine_does_not_decide_for_good() -> None:
    experience, process = TimedExperience.none(200), free.ReverseProcess.ddpm(200)
    experience.tested[:], experience.accepted[:] = 1000, 990
    for window, seconds in {1: 1.0, 2: 1.0, 4: 1.0, 8: 9.0}.items():
        for _ in range(2):
            experience.time(window, window, seconds)
    step = np.array([10])
    for run in range(2):
        schedule = ExploringWindow(experience, process, 1)
        windows = [schedule.window(step, [], 1) for _ in range(3)]
        assert windows == [[8, 4, 4], [16, 16, 16]][run]
        schedule.time(8, 8, 1.0)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rounds take as long, whatever the machine does."""
    ticks = iter(range(10**9))
    monkeypatch.setattr("free.pipelines.loop.seconds_now", lambda device: float(next(ticks)))


@pytest.mark.usefixtures("steady")
def test_the_law_is_that_of_one_step_a_round() -> None:
    samples, drawn, pipe = 4000, {}, class_pipeline(size=1)
    for window, seeds in ((1, [1]), ("auto", [2, 3, 3])):
        with free.speculate(pipe, window=window, drafter="hold-output") as run:
            for seed in seeds:  # with nothing known, with what was seen, with nothing again
                drawn[window, len(run.history)] = draw(pipe, [0, 3] * (samples // 2), 16, seed).flatten(1).numpy()
    # there were rejections to get wrong, in windows of several widths
    assert all(one.tested.sum() - one.accepted.sum() > 2 * samples for one in run.history)
    assert all(len(one.windows) > 2 for one in run.history)
    one = drawn.pop((1, 1))
    for auto in drawn.values():
        for label in (0, 1):
            for of in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x.sum(1), lambda x: np.ptp(x, 1)):
                assert stats.ks_2samp(of(one[label::2]), of(auto[label::2])).pvalue > P_VALUE


@pytest.mark.usefixtures("steady")
def test_a_call_of_latents_that_were_seen_begins_without_experience() -> None:
    pipe, begun = class_pipeline(), []

    def watch(proposed: Any, answer: Any, turn: Any) -> None:
        if turn.known.rounds[0] == 1:
            schedule = run.loop.run.schedule
            begun.append((sum(schedule.experience.rounds.values()), int(schedule.experience.tested.sum())))

    with free.speculate(pipe, window="auto") as run:
        run.watch = watch
        first, other, again = (draw(pipe, [1, 2], steps=40, seed=seed) for seed in (0, 1, 0))
    assert begun[0] == begun[2] == (0, 0)
    assert min(begun[1]) > 0
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert run.history[1].keys > run.history[0].keys
    assert run.stats.window == "auto"


@pytest.mark.usefixtures("steady")
def test_rows_that_share_a_key_have_one_window_for_all_rounds() -> None:
    pipe = class_pipeline()
    with free.speculate(pipe, window="auto", seed=[5, 5]) as run:
        draw(pipe, [1, 2], steps=40)
    assert set(run.stats.windows) == {1, 8}
    with free.speculate(pipe, window="auto") as run:
        draw(pipe, [1, 2], steps=40)
    with free.speculate(pipe, window="auto", seed=[6, 6]) as run:
        draw(pipe, [1, 2], steps=40, seed=1)
    assert len(run.stats.windows) <= 2


def test_what_is_remembered_goes_with_the_network() -> None:
    import gc
    import weakref

    pipe = class_pipeline()
    with free.speculate(pipe, window="auto"):
        draw(pipe, [1, 2], steps=20)
    assert any(isinstance(known, TimedExperience) for known in memory_of(free.as_target(pipe.transformer)).values())
    network = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert network() is None


def test_auto_has_no_batch_mode() -> None:
    with pytest.raises(ValueError, match="window is 'auto'; where mode is 'batch'"):
        free.speculate(class_pipeline(), window="auto", mode="batch")
