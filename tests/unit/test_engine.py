"""An engine whose slots are refilled: samples that depend on their own request alone, and whatever may happen on the way."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
import free.parallel.engine.core
import free.parallel.engine.keys
import free.sampling.planning
from free.drafters import Situation
from free.sampling.window import Setup
from free.windows import LoadWindow, RoundSeconds
from tests.analytic import ElementwiseTarget
from tests.statistical.test_identities import make_drafter, make_process
from tests.unit.rehearsal import Rehearsal, rehearse

SEEDS = [5, 2**41 + 3, -17, 6, 1234567, 2**63 - 1, 0, 2**64 - 2, 11, 12, 13]
SHAPE = (2, 3, 4)
NULL = {"scale": torch.ones(SHAPE)}

Asked = dict[str, Any]


def scaled(**options: Any) -> free.Target:
    return free.as_target(ElementwiseTarget(), null_conditioning=NULL, **options)


def asked() -> list[Asked]:
    """Requests of all kinds: every third one brings its initial state."""
    generator = torch.Generator().manual_seed(1)
    requests: list[Asked] = []
    for i, seed in enumerate(SEEDS):
        scale = torch.full((1, *SHAPE), 0.5 + 0.1 * i)
        latents = torch.randn(1, *SHAPE, generator=generator) if i % 3 == 2 else None
        requests.append({"seed": seed, "conditioning": {"scale": scale}, "latents": latents})
    return requests


def alone(model: Any, drafter: Any, request: Asked, **common: Any) -> free.SamplingOutput:
    return free.speculative_sample(model, drafter, **{"shape": SHAPE, "window": 4, **common, **request})


def engine_of(model: Any, drafter: Any = "hold-x0", **options: Any) -> free.Engine:
    return free.Engine(model, drafter, **{"slots": 3, "shape": SHAPE, "window": 4, **options})


def drain(engine: free.Engine, requests: list[Asked], every: int = 1) -> list[Any]:
    """Handles of all requests, one of which is added before every ``every``-th round while there are any."""
    handles = []
    left = list(requests)
    while left or engine.unfinished:
        if left and engine.stats.rounds >= len(handles) * every:
            handles.append(engine.add(**left.pop(0)))
        else:
            engine.step()
    assert all(handle.done and handle.error is None for handle in handles)
    return handles


def assert_alone(handles: list[Any], requests: list[Asked], model: Any, drafter: Any, **common: Any) -> None:
    for handle, request in zip(handles, requests, strict=True):
        expected = alone(model, drafter, request, **common)
        assert torch.equal(handle.sample, expected.samples)
        assert handle.stats.rounds == expected.stats.rounds[0]


@pytest.fixture(params=[False, True], ids=["shapes as they come", "static shapes"])
def _shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Setup.of
    if request.param:
        monkeypatch.setattr(Setup, "of", lambda *args: dataclasses.replace(of(*args), static_shapes=True))


# --- bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("form", ["plain", "second order"])
@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output", "gains", "shifted"])
def test_a_sample_depends_neither_on_when_it_joined_nor_on_with_whom(drafter: str, form: str, guidance_scale: float) -> None:
    model, process = scaled(), make_process(form)
    draft: Any = make_drafter(drafter, process)
    if drafter == "shifted":
        draft = free.ModelDrafter(free.as_target(draft, null_conditioning=NULL))
    common: dict[str, Any] = {"process": process, "guidance_scale": guidance_scale}
    expected = [alone(model, draft, request, **common) for request in asked()]
    # noise reuse is only put to the test if samples are rejected, at different steps
    assert len({int(one.stats.rounds[0]) for one in expected}) > 1
    for slots, every in ((1, 0), (3, 0), (4, 1), (16, 2)):
        engine = engine_of(model, draft, slots=slots, **common)
        handles = drain(engine, asked(), every)
        for handle, one in zip(handles, expected, strict=True):
            assert torch.equal(handle.sample, one.samples)
            assert handle.stats.rounds == one.stats.rounds[0]
        assert engine.stats.finished == len(SEEDS)
        assert engine.stats.sample_rounds == sum(handle.stats.rounds for handle in handles)


def test_a_plan_and_a_relaxation_too() -> None:
    process, model = make_process(), scaled()
    plan = free.WindowPlan(np.array([3, 1, 5, 2, 4, 1, 6, 3, 2, 1, 1]))
    common: dict[str, Any] = {"process": process, "window": plan, "relaxation": free.Relaxation(3.0, "residual", budget=0.5)}
    handles = drain(engine_of(model, "hold-output", **common), asked(), 1)
    assert_alone(handles, asked(), model, "hold-output", **common)
    for handle, request in zip(handles, asked(), strict=True):
        stats = alone(model, "hold-output", request, **common).stats
        assert handle.stats.excess_acceptance == stats.excess_acceptance[0]
        assert handle.stats.divergence == stats.divergence[0]
    assert sum(handle.stats.excess_acceptance for handle in handles) > 0


def test_one_key_in_many_slots() -> None:
    request = asked()[1]
    handles = drain(engine_of(scaled(), "gains", num_inference_steps=11), [request] * 7, 1)
    assert_alone(handles, [request] * 7, scaled(), "gains", num_inference_steps=11)


@pytest.mark.parametrize(
    ("captured", "drafter", "window"), [(False, "gains", 4), (True, "gains", 4), (True, "hold-x0", {1: 5, 3: 4, 8: 2})]
)
def test_static_shapes_and_captured_rounds(
    monkeypatch: pytest.MonkeyPatch, captured: bool, drafter: str, window: Any
) -> None:
    """As on a device: batches of a power of two, whose rows may be of nobody, replayed on memory of their own."""
    of, process, model = Setup.of, make_process(), scaled()
    common: dict[str, Any] = {"process": process, "window": window, "slots": 6, "impl": "reference"}
    expected = drain(engine_of(model, drafter, **common), asked(), 1)
    monkeypatch.setattr(Setup, "of", lambda *args: dataclasses.replace(of(*args), static_shapes=True))
    if captured:
        rehearse(monkeypatch)
        monkeypatch.setattr(free.parallel.engine.core, "wants_capture", lambda *_: True)
    for _ in range(2):
        handles = drain(engine_of(model, drafter, **common), asked(), 1)
        for handle, other in zip(handles, expected, strict=True):
            assert torch.equal(handle.sample, other.sample)
            assert handle.stats.rounds == other.stats.rounds
    # batches of 1, 2, 4 and 6, where the load says so of two windows, and each of them once
    assert Rehearsal.made <= (4 if isinstance(window, int) else 6)
    assert bool(Rehearsal.made) == captured


def test_features(dit: DiTTransformer2DModel) -> None:
    """Of a drafter that asks for them; a DiT's bits do depend on the batch, a little."""
    drafter = free.FeatureDrafter.from_target(dit)
    common: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 1.5, "window": 3}
    engine = free.Engine(dit, drafter, slots=2, **common)
    handles = [engine.add(class_labels=i, seed=i) for i in range(5)]
    list(engine.run())
    for i, handle in enumerate(handles):
        expected = free.speculative_sample(dit, drafter, class_labels=i, seed=i, **common).samples
        torch.testing.assert_close(handle.sample, expected, rtol=1e-3, atol=1e-3)
    assert not dit.transformer_blocks[-1]._forward_hooks


# --- what goes wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_shapes")
def test_nan_ends_its_own_request_and_no_other() -> None:
    process = make_process()

    def broken(x: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        output = ElementwiseTarget()(x, timestep, scale)
        output[(timestep == process.timestep[7]) & (scale.flatten(1)[:, 0] == 0.75)] = torch.nan
        return output

    requests = asked()
    requests[4]["conditioning"] = {"scale": torch.full((1, *SHAPE), 0.75)}
    engine = engine_of(broken, process=process)
    handles = [engine.add(**request) for request in requests]
    ended = list(engine.run())
    assert set(ended) == set(handles)
    assert engine.stats.failed == 1
    assert handles[4].sample is None
    assert isinstance(handles[4].error, free.NonFiniteOutputError)
    message = str(handles[4].error)
    assert "model returned NaN or infinity at step 7 (timestep " in message
    assert "of request 4 (seed 1234567)" in message
    good = [i for i in range(len(requests)) if i != 4]
    assert_alone([handles[i] for i in good], [requests[i] for i in good], scaled(), "hold-x0", process=process)


class Failing(free.HoldX0):
    """Raises at its calls number ``at``, in whichever half of a round they are."""

    def __init__(self, at: set[int], error: type[BaseException]) -> None:
        self.left, self.error, self.calls = at, error, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls in self.left:
            raise self.error

    def propose(self, situation: Situation) -> Any:
        self._count()
        return super().propose(situation)

    def remember(self, situation: Situation, window: Any) -> Any:
        self._count()
        return super().remember(situation, window)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_round_that_raised_may_be_tried_again(error: type[BaseException]) -> None:
    process = make_process()
    engine = engine_of(scaled(), Failing({1, 2, 6, 9, 15, 16, 17}, error), process=process)
    handles = [engine.add(**request) for request in asked()]
    raised = 0
    while engine.unfinished:
        try:
            engine.step()
        except error:
            raised += 1
    assert raised == 7
    assert_alone(handles, asked(), scaled(), "hold-x0", process=process)
    assert all(handle.stats.engine_rounds <= engine.stats.rounds for handle in handles)


def test_an_interrupt_anywhere_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of the things that a step does in turn."""
    process, count = make_process(), 0

    def interrupting(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def planted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            result = original(*args, **kwargs)
            count += 1
            if count % 5 == 0:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, name, planted)

    core = free.parallel.engine.core
    for owner, name in (
        (core, "refill"),
        (core.Rounds, "window"),
        (core.Rounds, "advance"),
        (core.Rounds, "stats_of"),
        (core.Handle, "end"),
        (core.Keys, "meet"),
    ):
        interrupting(owner, name)
    engine = engine_of(scaled(), process=process, window={3: 4})
    handles = [engine.add(**request) for request in asked()]
    returned = []
    while engine.unfinished or engine._ended:
        try:
            returned += engine.step()
        except KeyboardInterrupt:
            continue
    assert sorted(handle.number for handle in returned) == list(range(len(SEEDS)))
    assert all(torch.equal(h.sample, alone(scaled(), "hold-x0", r, process=process).samples)
               for h, r in zip(handles, asked(), strict=True))  # fmt: skip
    assert count > 50


# --- who comes and goes ---------------------------------------------------------------------------------------------------


def test_an_empty_engine_does_nothing_and_goes_on() -> None:
    engine = engine_of(scaled(), process=make_process())
    assert (engine.step(), list(engine.run()), engine.stats.rounds, engine.unfinished) == ([], [], 0, 0)
    assert math.isnan(engine.stats.busy)
    first = drain(engine, asked()[:2])
    late = drain(engine, asked()[:2])
    assert all(torch.equal(one.sample, other.sample) for one, other in zip(first, late, strict=True))
    assert [handle.number for handle in (*first, *late)] == [0, 1, 2, 3]


def test_slots_are_busy_until_the_queue_is_empty() -> None:
    engine = engine_of(scaled(), process=make_process(), slots=4)
    for request in asked():
        engine.add(**request)
    while engine.waiting >= 4:  # that many slots may be free at once
        engine.step()
    assert engine.stats.rounds > 5
    assert engine.stats.busy == 1.0
    list(engine.run())
    assert 0.5 < engine.stats.busy < 1.0


def test_statistics_of_requests() -> None:
    engine = engine_of(scaled(), process=make_process(), slots=1)
    first, second = (engine.add(**request) for request in asked()[:2])
    list(engine.run())
    assert (first.stats.engine_rounds, second.stats.engine_rounds) == (first.stats.rounds, engine.stats.rounds)
    assert first.stats.parallel_efficiency == first.stats.engine_efficiency == 11 / first.stats.rounds
    assert second.stats.engine_efficiency == 11 / engine.stats.rounds
    assert first.stats.seconds_waited < second.stats.seconds_waited
    assert 0 < first.stats.seconds_drawn < engine.stats.seconds
    assert engine.stats.windows == {4: engine.stats.rounds}
    assert 0 < engine.stats.target_evaluations <= 4 * engine.stats.rounds


@pytest.mark.usefixtures("_shapes")
def test_requests_that_are_cancelled() -> None:
    engine = engine_of(scaled(), process=make_process(), slots=2)
    handles = [engine.add(**request) for request in asked()[:5]]
    engine.step()
    assert handles[0].cancel()  # under way
    assert handles[3].cancel()  # waiting
    assert not handles[3].cancel()
    ended = list(engine.run())
    assert {handle.number for handle in ended} == {1, 2, 4}
    assert all(handle.done and handle.cancelled and handle.sample is None for handle in (handles[0], handles[3]))
    assert not handles[1].cancel()
    kept = [1, 2, 4]
    assert_alone([handles[i] for i in kept], [asked()[i] for i in kept], scaled(), "hold-x0", process=make_process())
    everyone = [engine.add(**request) for request in asked()[:5]]
    engine.step()
    assert all(handle.cancel() for handle in everyone)
    assert (engine.unfinished, engine.step(), engine.stats.cancelled) == (0, [], 7)


@pytest.mark.parametrize("joining", [0, 2])
def test_cancelled_within_a_round(joining: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, after the engine has looked who is there."""
    engine, core = engine_of(scaled(), process=make_process(), slots=4), free.parallel.engine.core
    handles = [engine.add(**request) for request in asked()[:2]]
    engine.step()
    handles += [engine.add(**request) for request in asked()[2 : 2 + joining]]
    refill = core.refill

    def planted(*args: Any) -> Any:
        for handle in handles:
            handle.cancel()
        return refill(*args)

    with monkeypatch.context() as patch:
        patch.setattr(core, "refill", planted)
        assert engine.step() == []
    assert engine.unfinished == 0
    assert_alone(drain(engine, asked()), asked(), scaled(), "hold-x0", process=make_process())


def test_requests_from_the_model_itself() -> None:
    process, added = make_process(), []

    def model(x: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if len(added) < 4:
            added.append(engine.add(**asked()[len(added)]))
            with pytest.raises(RuntimeError, match="step is called from within a round"):
                engine.step()
        return ElementwiseTarget()(x, timestep, scale)

    engine = engine_of(model, process=process, slots=2)
    first = engine.add(**asked()[4])
    list(engine.run())
    assert_alone([*added, first], asked()[:5], scaled(), "hold-x0", process=process)


def test_threads_add_cancel_and_step_at_once() -> None:
    process = make_process()
    engine, returned, handles = engine_of(scaled(), process=process), [], {}
    adding = threading.Barrier(5)

    def client(first: int) -> None:
        adding.wait()
        for i in range(first, len(SEEDS), 4):
            handles[i] = engine.add(**asked()[i])
            engine.add(**asked()[i]).cancel()

    def driver() -> None:
        adding.wait()
        while len(returned) < len(SEEDS):
            returned.extend(engine.step())

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(4)]
    threads.append(threading.Thread(target=driver, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert_alone([handles[i] for i in range(len(SEEDS))], asked(), scaled(), "hold-x0", process=process)


def test_nothing_of_a_request_that_is_done_is_kept() -> None:
    engine = engine_of(scaled(), process=make_process())
    handle = drain(engine, asked()[:1])[0]
    sample = handle.sample.clone()
    gone = weakref.ref(handle)
    drain(engine, asked()[1:3])
    assert torch.equal(handle.sample, sample)
    del handle
    gc.collect()
    assert gone() is None
    assert engine._batch is None
    assert engine._rounds is None
    assert not engine._queue


def test_what_was_given_may_be_changed_afterwards() -> None:
    request = asked()[2]
    engine = engine_of(scaled(), process=make_process())
    handle = engine.add(**request)
    request["latents"].zero_()
    request["conditioning"]["scale"].zero_()
    list(engine.run())
    assert_alone([handle], [asked()[2]], scaled(), "hold-x0", process=make_process())


# --- windows by load ------------------------------------------------------------------------------------------------------


def test_windows_follow_the_load() -> None:
    engine = engine_of(scaled(), window={1: 5, 2: 4, 8: 2}, slots=4, process=make_process())
    windows: list[int] = []
    for request in asked():
        engine.add(**request)
    loads = []
    while engine.unfinished:
        before = engine.stats.windows.copy()
        loads.append(min(engine.unfinished, 4))
        engine.step()
        windows += list((engine.stats.windows - before).elements())
    assert windows == [{1: 5, 2: 4}.get(load, 2) for load in loads]
    assert len(set(windows)) > 1


def test_the_load_does_not_choose_for_a_key_that_was_met() -> None:
    engine = engine_of(scaled(), window={1: 5, 2: 4, 8: 2}, slots=4, process=make_process(), num_inference_steps=11)

    def windows() -> set[int]:
        before = engine.stats.windows.copy()
        engine.step()
        return set(engine.stats.windows - before)

    engine.add(**asked()[0])
    assert windows() == {5}
    engine.add(**asked()[1])
    assert windows() == {4}
    twice = engine.add(**asked()[0])  # while the first is under way: from here on neither
    assert twice.seed == asked()[0]["seed"]
    seen: set[int] = set()
    while engine.unfinished:
        seen |= windows()
    assert seen == {2}
    engine.add(**asked()[2])
    assert windows() == {5}
    list(engine.run())
    engine.add(**asked()[2])  # and after the first has left
    assert windows() == {2}
    list(engine.run())
    # a number does not tell
    engine = engine_of(scaled(), window=4, process=make_process())
    drain(engine, [asked()[0]] * 3)
    assert set(engine.stats.windows) == {4}


def test_keys_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.parallel.engine.keys, "MOST_KEYS", 3)
    engine = engine_of(scaled(), window={1: 5, 2: 4, 8: 2}, slots=2, process=make_process())
    handles = [engine.add(**request) for request in asked()[:6]]
    list(engine.run())
    assert [handle.of_all for handle in handles] == [False] * 3 + [True] * 3
    # the engine was empty: nothing in it tells of any noise
    assert not drain(engine, asked()[:1])[0].of_all
    assert len(engine._keys._met) == 1


def test_automatic_windows_are_those_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cheap as one state up to eight in all, and dear beyond; nothing is measured under a key of a request."""
    seen: set[int] = set()
    measured = []

    def measure(setup: Setup, graphs: object) -> RoundSeconds:
        measured.append(setup.request.batch)
        seen.update(setup.request.keys)
        states = setup.request.batch * np.array([1.0, 2, 4, 8, 16])
        return RoundSeconds(states, 1.0 + 10 * np.maximum(states - 8, 0))

    monkeypatch.setattr(free.sampling.planning, "_measure", measure)
    process = make_process()
    engine = engine_of(scaled(), "gains", window="auto", slots=8, process=process)
    handles = [engine.add(**request) for request in asked()[:5]]
    list(engine.run())
    schedule = engine._schedule
    assert isinstance(schedule, LoadWindow)
    assert list(schedule.windows) == [1, 2, 4, 8]
    widths = list(schedule.windows.values())
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 2 * widths[-1] == 2
    assert seen.isdisjoint(handle.seed for handle in handles)
    assert all(handle.sample.isfinite().all() for handle in handles)
    drain(engine, asked()[5:7])
    assert measured == [8, 1, 2, 4]  # once


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots is 0; allowed is an int, 1 or more"),
        ({"slots": 2.5}, "slots is 2.5; allowed"),
        ({"window": 0}, "window is 0; allowed"),
        ({"window": True}, "window is True; allowed"),
        ({"window": "wide"}, "window is 'wide'; allowed"),
        ({"window": {}}, r"window is \{\}; allowed by load"),
        ({"window": {4: 0}}, r"window is \{4: 0\}; allowed by load"),
        ({"window": {"4": 1}}, "allowed by load"),
        ({"window": free.WindowPlan(np.array([1, 2]))}, "window is a plan of 2 steps; the process has 11"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"shape": (0,)}, r"shape is \(0,\)"),
        ({"drafter": "best"}, "drafter is 'best'"),
        ({"num_inference_steps": 7}, "num_inference_steps is 7; process has 11 steps"),
    ],
)
def test_bad_arguments_of_an_engine(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        free.Engine(scaled(), **{"shape": SHAPE, "process": make_process(), **options})


def test_bad_arguments_of_an_engine_on_a_model_that_says_where_it_is(dit: DiTTransformer2DModel) -> None:
    with pytest.raises(ValueError, match="capture is True, but the model runs on cpu"):
        free.Engine(dit, capture=True)
    with pytest.raises(ValueError, match="impl is 'cuda'"):
        free.Engine(dit, impl="cuda")
    with pytest.raises(ValueError, match="train mode"):
        free.Engine(dit.train())
    with pytest.raises(TypeError, match="relaxation is a float"):
        free.Engine(dit.eval(), relaxation=0.5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": [1, 2]}, r"seed is \[1, 2\]; allowed is an int, as a request is of one sample"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"latents": torch.zeros(1, 5)}, r"latents has shape \(1, 5\)"),
        ({"latents": torch.zeros(2, *SHAPE)}, "num_samples speaks of 1, latents speaks of 2"),
        ({"latents": torch.full((1, *SHAPE), torch.nan)}, "latents holds NaN"),
        ({"conditioning": {"scale": torch.ones(2, *SHAPE)}}, "conditioning speaks of 2"),
        ({"conditioning": {"scale": torch.ones(1, 3)}}, r"'scale' has shape \(1, 3\) and dtype torch.float32; that of"),
        ({"conditioning": {"scale": torch.ones(1, *SHAPE).double()}}, "dtype torch.float64; that of the requests"),
        ({"conditioning": {}}, r"conditioning has \[\]; that of the requests in the engine has \['scale'\]"),
        ({"conditioning": {"scale": 2.0}}, "'scale' is 2.0, which has no row a sample"),
    ],
)
def test_a_bad_request_leaves_the_others_alone(request_: Asked, message: str) -> None:
    engine = engine_of(scaled(), process=make_process())
    first = engine.add(**asked()[0])
    engine.step()
    with pytest.raises(ValueError, match=message):
        engine.add(**{**asked()[1], **request_})
    assert engine.unfinished == 1
    rest = drain(engine, asked()[1:4])
    assert_alone([first, *rest], asked()[:4], scaled(), "hold-x0", process=make_process())


def test_conditioning_that_is_no_tensor() -> None:
    """One value serves the whole batch: another one is refused, until the engine is empty."""
    seen = []

    def model(x: torch.Tensor, timestep: torch.Tensor, name: str, sizes: list[int]) -> torch.Tensor:
        seen.append((name, sizes))
        return ElementwiseTarget()(x, timestep)

    engine = engine_of(model, process=make_process())
    engine.add(seed=0, conditioning={"name": "a", "sizes": [1, 2]})
    engine.add(seed=1, conditioning={"name": "a", "sizes": [1, 2]})
    with pytest.raises(ValueError, match="'name' is 'b', which has no row a sample and so is the same for all"):
        engine.add(seed=2, conditioning={"name": "b", "sizes": [1, 2]})
    with pytest.raises(ValueError, match=r"'sizes' is \[2\]"):
        engine.add(seed=2, conditioning={"name": "a", "sizes": [2]})
    list(engine.run())
    assert {name for name, _ in seen} == {"a"}
    engine.add(seed=2, conditioning={"name": "b", "sizes": [2]})
    assert next(engine.run()).sample is not None
    assert seen[-1] == ("b", [2])


def test_numbers_as_conditioning_are_compared_by_what_they_say() -> None:
    def model(x: torch.Tensor, timestep: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return strength * ElementwiseTarget()(x, timestep)

    engine = engine_of(model, process=make_process())
    for seed in range(2):
        engine.add(seed=seed, conditioning={"strength": np.array(0.5)})
    with pytest.raises(ValueError, match="'strength' is tensor"):
        engine.add(seed=2, conditioning={"strength": np.array(0.75)})
    assert len(list(engine.run())) == 2


def test_requests_and_rounds_in_inference_mode_and_out_of_it() -> None:
    requests, engine = asked()[:4], engine_of(scaled(), slots=2, process=make_process())
    handles = []
    for request, within in zip(requests, (True, False, True, False), strict=True):
        with torch.inference_mode(within):
            handles.append(engine.add(**request))
            engine.step()
    list(engine.run())
    assert_alone(handles, requests, scaled(), "hold-x0", process=make_process())


def test_a_plan_of_the_same_seed_is_refused() -> None:
    process = make_process()
    stats = free.speculative_sample(ElementwiseTarget(), shape=SHAPE, process=process, seed=3).stats
    plan = free.plan_window(ElementwiseTarget(), shape=SHAPE, process=process, statistics=stats)
    engine = engine_of(ElementwiseTarget(), window=plan, process=process)
    with pytest.raises(ValueError, match="statistics of a sample of the same seed"):
        engine.add(seed=3)
    engine.add(seed=4)
    assert next(engine.run()).sample is not None


def test_a_memory_that_a_drafter_began_otherwise_is_named() -> None:
    class Odd(free.HoldX0):
        def remember(self, situation: Situation, window: Any) -> Any:
            return window

    engine = engine_of(ElementwiseTarget(), Odd(), process=make_process(), slots=2)
    engine.add(seed=1)
    engine.step()
    engine.add(seed=2)
    with pytest.raises(TypeError, match="a NoneType cannot follow a LastWindow"):
        engine.step()


# --- the benchmark --------------------------------------------------------------------------------------------------------


def test_an_engine_against_batches(tmp_path: Path) -> None:
    from benchmarks.engine import main
    from benchmarks.rows import read_rows

    arguments = {"samples": 7, "slots": 3, "lone": 7, "steps": 6, "window": 3, "results": tmp_path}
    assert main([word for name, value in arguments.items() for word in (f"--{name}", str(value))]) == 0
    engine, batches = read_rows("engine", tmp_path)
    assert (engine["by"], batches["by"]) == ("engine", "batches")
    # what a sample takes is its own, whoever is beside it
    assert engine["evaluations_over_lone"] == pytest.approx(1.0, abs=0.02)
    assert engine["rounds"] <= batches["rounds"]
    assert engine["busy_while_some_wait"] == 1.0
