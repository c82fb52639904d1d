"""The loop as a GPU runs it: rounds that ask the device nothing, a host that is a round behind, padded batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free import Drafter, LinearDrafter, ReverseProcess
from free.drafters import as_drafter
from free.sampling.account import Account
from free.sampling.capture import Graphs
from free.sampling.loop import Run, Turn
from free.sampling.request import Options, Request, check_request
from free.sampling.statistics import SamplingStatistics, Stopwatch
from free.sampling.window import Setup, advance, first_window
from free.windows import FixedWindow
from tests.unit.helpers import GaussianModel, Recorder, on_meta

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def request_for(model: Any, **given: Any) -> Request:
    return check_request(model, Options(**{"seed": 0, "impl": "reference", **given}))


def linear(process: ReverseProcess) -> LinearDrafter:
    return LinearDrafter(torch.full((process.num_steps, 3), 0.5), process.timestep, (2, 8, 8))


# --- no round waits for the device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", ["hold-x0", "hold-output", "linear", "model"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_round_of_static_shapes_reads_nothing_from_the_device(
    make_dit: Callable[..., DiTTransformer2DModel],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    window: int,
    clip: bool,
    guidance_scale: float,
) -> None:
    process = ReverseProcess.ddpm(20, clip_sample=clip)
    request = request_for(make_dit(), class_labels=[1, 2, 3], process=process, guidance_scale=guidance_scale)
    moved = {field: on_meta(getattr(request, field)) for field in ("process", "conditioning", "seed")}
    request = dataclasses.replace(request, target=free.as_target(make_dit().to("meta")), **moved)
    drafter: Drafter = (
        linear(process) if name == "linear" else as_drafter(make_dit().to("meta") if name == "model" else name)
    )
    # it checks the process where it first meets it, before the first window
    monkeypatch.setattr(LinearDrafter, "_check_process", lambda self, process: None)
    setup = dataclasses.replace(Setup.of(request, drafter, window, "auto"), static_shapes=True)
    account, watch = Account(20, request.seed), Stopwatch(CPU)
    live = first_window(setup, torch.empty(3, 128, device="meta"))
    for _ in range(2):
        live, done = advance(live, setup, window, watch)
        account.add(live, done)
        assert live.state.shape == (3, 128)
        assert done.evaluated == 3 * window
    assert live.keep((live.step >= 20).int().argsort(stable=True)[:2]).state.shape == (2, 128)


def test_a_round_of_other_shapes_does_read(make_dit: Callable[..., DiTTransformer2DModel]) -> None:
    """Which states count, so that no other is evaluated: the test above does see it."""
    request = request_for(make_dit(), class_labels=[1, 2], process=ReverseProcess.ddpm(20))
    moved = {field: on_meta(getattr(request, field)) for field in ("process", "conditioning", "seed")}
    request = dataclasses.replace(request, target=free.as_target(make_dit().to("meta")), **moved)
    setup = Setup.of(request, as_drafter("hold-x0"), 4, "auto")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        advance(first_window(setup, torch.empty(2, 128, device="meta")), setup, 4, Stopwatch(CPU))


# --- static shapes change nothing ---------------------------------------------------------------------------------------


def static_setup(model: Any, drafter: Any, window: int, **given: Any) -> Setup:
    setup = Setup.of(request_for(model, **given), as_drafter(drafter), window, "reference")
    return dataclasses.replace(setup, static_shapes=True)


def run_loop(
    setup: Setup, lag: int = 0, graphs: Graphs | None = None
) -> tuple[list[Turn], torch.Tensor, SamplingStatistics]:
    """The rounds, the samples and the statistics."""
    run = Run(setup, graphs)
    seen = list(run.turns(FixedWindow(setup.widest), lag))
    return seen, run.state, run.finish()


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output"])
def test_static_shapes_and_a_late_host_change_no_bit(drafter: str, window: int, lag: int) -> None:
    common: dict[str, Any] = {"shape": (5,), "process": ReverseProcess.ddpm(40), "seed": [1, 2, 3, 4, 5]}
    out = free.speculative_sample(GaussianModel(), drafter, window=window, **common)
    seen, state, stats = run_loop(static_setup(GaussianModel(), drafter, window, **common), lag)
    assert torch.equal(state, out.samples)
    for name in ("rounds", "tested", "accepted"):
        assert getattr(stats, name).tolist() == getattr(out.stats, name).tolist(), name
    np.testing.assert_allclose(stats.delta_sum, out.stats.delta_sum, rtol=1e-9)
    # the host is never ahead of what it knows by more than it may, and no round is for nothing but the last few
    assert max(out.stats.rounds) <= len(seen) <= max(out.stats.rounds) + lag


def test_batches_shrink_to_powers_of_two() -> None:
    model, seeds = Recorder(), list(range(6))
    common: dict[str, Any] = {"shape": (5,), "process": ReverseProcess.ddpm(60), "seed": seeds}
    seen, _, stats = run_loop(static_setup(model, "hold-x0", 4, **common))
    sizes = [len(turn.live.index) for turn in seen]
    assert set(sizes) <= {6, 4, 2, 1}
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
    assert model.rows == [4 * size for size in sizes]
    assert stats.target_evaluations == sum(model.rows)
    for turn, following in itertools.pairwise(seen):
        unfinished = set(turn.live.index[turn.live.step < 60].tolist())
        assert unfinished <= set(following.live.index.tolist())


def test_states_beyond_a_window_are_told_the_last_timestep() -> None:
    model, process = Recorder(), ReverseProcess.ddpm(10)
    run_loop(static_setup(model, "hold-x0", 8, shape=(3,), process=process, seed=[1, 2]))
    for timestep in model.timesteps:
        assert len(timestep) == 16 or len(timestep) == 8
        assert set(timestep.tolist()) <= set(process.timestep.tolist())


@pytest.mark.parametrize("lag", [0, 1])
def test_a_late_host_still_names_step_and_sample(lag: int) -> None:
    process, gaussian = ReverseProcess.ddpm(30), GaussianModel()

    def broken(x: torch.Tensor, timestep: torch.Tensor, who: torch.Tensor) -> torch.Tensor:
        output = gaussian(x, timestep)
        output[(timestep == process.timestep[9]) & (who == 1)] = torch.nan
        return output

    given: dict[str, Any] = {"conditioning": {"who": torch.arange(3)}, "shape": (5,), "process": process, "seed": [4, 5, 6]}
    with pytest.raises(free.NonFiniteOutputError, match=r"model returned NaN or infinity at step 9 \(.*\) of sample 1"):
        run_loop(static_setup(broken, "hold-x0", 8, **given), lag)


def test_nan_at_the_very_last_step_does_not_pass() -> None:
    process, gaussian = ReverseProcess.ddpm(12), GaussianModel()

    def broken(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.where(timestep[:, None] == process.timestep[-1], torch.nan, gaussian(x, timestep))

    with pytest.raises(free.NonFiniteOutputError, match=r"at step 11 "):
        run_loop(static_setup(broken, "hold-x0", 4, shape=(5,), process=process, seed=[4, 5]), 1)


# --- captured rounds, rehearsed without a device ------------------------------------------------------------------------


class Rehearsal:
    """In place of a recording: runs what a graph would replay, on the same buffers."""

    made = 0

    def __init__(self, function: Callable[[], Any], pool: Any) -> None:
        self.function = function
        Rehearsal.made += 1
        for _ in range(3):  # two to warm up, one to record
            function()

    def __call__(self) -> Any:
        return self.function()


@pytest.fixture
def _rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.sampling.capture, "Recording", Rehearsal)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Rehearsal, "made", 0)


@pytest.mark.usefixtures("_rehearsed")
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("drafter", "window"), [("hold-x0", 4), ("hold-output", 3), ("hold-x0", 1)])
def test_captured_rounds_change_no_bit_and_serve_again(drafter: str, window: int, lag: int) -> None:
    target, process = free.as_target(GaussianModel()), ReverseProcess.ddpm(40)
    for seed in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):
        common: dict[str, Any] = {"shape": (5,), "process": process, "seed": seed}
        expected = free.speculative_sample(target, drafter, window=window, **common)
        setup = static_setup(target, drafter, window, **common)
        _, state, stats = run_loop(setup, lag, Graphs.of(setup))
        assert torch.equal(state, expected.samples)
        for name in ("rounds", "tested", "accepted"):
            assert getattr(stats, name).tolist() == getattr(expected.stats, name).tolist(), name
        assert len(target.graphs) == 1
    made, graphs = Rehearsal.made, next(iter(target.graphs.values()))
    assert made == len(graphs._rounds) <= 4  # batches of 5, 4, 2, 1


@pytest.mark.usefixtures("_rehearsed")
def test_captured_rounds_of_a_dit_with_features(dit: DiTTransformer2DModel) -> None:
    """Conditioning is read from the graph's own rows, whoever is left."""
    target, process = free.as_target(dit), ReverseProcess.ddpm(30)
    for labels, seed in (([0, 1, 2], [1, 2, 3]), ([4, 3, 2], [5, 6, 7])):
        common: dict[str, Any] = {"class_labels": labels, "guidance_scale": 1.5, "process": process, "seed": seed}
        expected = free.speculative_sample(target, window=4, **common)
        setup = static_setup(target, "hold-x0", 4, **common)
        _, state, _ = run_loop(setup, 1, Graphs.of(setup))
        torch.testing.assert_close(state.unflatten(1, (2, 8, 8)), expected.samples, rtol=1e-3, atol=1e-3)
    assert len(target.graphs) == 1


@pytest.mark.usefixtures("_rehearsed")
def test_what_a_graph_cannot_be_told_anew_makes_another(dit: DiTTransformer2DModel) -> None:
    target = free.as_target(dit)
    common: dict[str, Any] = {"class_labels": [1, 2], "process": ReverseProcess.ddpm(8)}
    first = Graphs.of(static_setup(target, "hold-x0", 4, **common))
    assert Graphs.of(static_setup(target, "hold-x0", 4, **{**common, "class_labels": [3, 4], "seed": 9})) is first
    assert Graphs.of(static_setup(target, "hold-x0", 4, **{**common, "process": ReverseProcess.ddpm(8)})) is first
    others = [
        static_setup(target, "hold-output", 4, **common),
        static_setup(target, "hold-x0", 5, **common),
        static_setup(target, "hold-x0", 4, **common, guidance_scale=1.5),
        static_setup(target, "hold-x0", 4, **{**common, "class_labels": [1, 2, 3]}),
        static_setup(target, "hold-x0", 4, **{**common, "process": ReverseProcess.ddpm(8, variance="beta")}),
    ]
    assert len({id(Graphs.of(setup)) for setup in others} | {id(first)}) == 6
    assert len(target.graphs) == 4  # and memory is bounded
    target.transformer.pos_embed.proj.weight.data = target.transformer.pos_embed.proj.weight.data.clone()
    assert Graphs.of(others[-1]) not in [Graphs.of(setup) for setup in others[:-1]]


@pytest.mark.usefixtures("_rehearsed")
def test_captured_ancestral_steps_change_no_bit_and_serve_again(monkeypatch: pytest.MonkeyPatch) -> None:
    target, process = free.as_target(GaussianModel()), ReverseProcess.ddpm(12)
    for seed in ([1, 2, 3], [4, 5, 6]):
        common: dict[str, Any] = {"shape": (5,), "process": process, "seed": seed, "return_trajectory": True}
        expected = free.ancestral_sample(target, **common)
        with monkeypatch.context() as patch:
            patch.setattr(free.sampling.samplers, "wants_capture", lambda *_: True)
            out = free.ancestral_sample(target, **common)
        assert torch.equal(out.samples, expected.samples)
        assert torch.equal(out.trajectory, expected.trajectory)
        assert out.stats.seconds["round"] > 0
        assert Rehearsal.made == 1


@pytest.mark.parametrize("sample", [free.speculative_sample, free.ancestral_sample])
def test_capture_that_cannot_be_is_refused(sample: Callable[..., Any]) -> None:
    common: dict[str, Any] = {"shape": (3,), "num_inference_steps": 3, "seed": 0}
    with pytest.raises(ValueError, match=r"capture is True, but the model runs on cpu: a graph needs CUDA"):
        sample(GaussianModel(), capture=True, **common)
    for wrong in ("yes", None, 1):
        with pytest.raises(ValueError, match=r"capture is .*; allowed are 'auto', True and False"):
            sample(GaussianModel(), capture=wrong, **common)
    plain = sample(GaussianModel(), **common).samples
    for allowed in ("auto", False):
        assert torch.equal(sample(GaussianModel(), capture=allowed, **common).samples, plain)


def test_what_is_capturable(dit: DiTTransformer2DModel) -> None:
    assert free.as_target(dit).capturable
    assert not free.as_target(GaussianModel()).capturable
    assert all(as_drafter(name).capturable for name in free.drafters.DRAFTERS)
    assert as_drafter(dit).capturable
    assert not as_drafter(GaussianModel()).capturable
    assert LinearDrafter.capturable
    assert not Drafter.capturable


# --- compiled models ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dit_compiles_without_a_break_features_included(dit: DiTTransformer2DModel) -> None:
    torch._dynamo.reset()
    states, timestep = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) + 3
    labels = {"class_labels": torch.ones(6, dtype=torch.int64)}
    explained = torch._dynamo.explain(dit)(states, timestep=timestep, return_dict=False, **labels)
    assert explained.graph_break_count == 0
    target = free.as_target(dit)
    with target.capture_features():
        expected = target.evaluate(states, timestep, labels, True)
    with target.capture_features(), target.compile(backend="aot_eager"):
        assert target.compiled
        got = target.evaluate(states, timestep, labels, True)
    assert not target.compiled
    assert not any("forward" in vars(module) for module in dit.modules())
    for name in ("output", "unconditional", "feature"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_compiling_needs_a_module() -> None:
    for sample in (free.speculative_sample, free.ancestral_sample):
        with pytest.raises(ValueError, match=r"compile is True, but model is a GaussianModel; allowed is a torch"):
            sample(GaussianModel(), shape=(3,), num_inference_steps=3, compile=True)
