"""The loop as a GPU runs it: rounds that ask the device nothing, a host that is a round behind, padded batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free import Drafter, FeatureDrafter, ReverseProcess
from free.drafters import as_drafter
from free.sampling.account import Account
from free.sampling.statistics import Stopwatch
from free.sampling.window import Setup, advance, first_window
from tests.unit.helpers import GaussianModel, Recorder, on_meta
from tests.unit.rehearsal import request_for, run_loop, static_setup

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def second_order(steps: int) -> ReverseProcess:
    angle = torch.linspace(1.5, 0.0, steps + 1, dtype=torch.float64)
    return ReverseProcess.from_levels(angle.cos(), angle.sin(), ReverseProcess.ddpm(steps).timestep, order=2)


# --- no round waits for the device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("form", ["plain", "clipped", "second order"])
@pytest.mark.parametrize("name", ["hold-x0", "hold-output", "gains", "feature", "model"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_round_of_static_shapes_reads_nothing_from_the_device(
    make_dit: Callable[..., DiTTransformer2DModel],
    name: str,
    window: int,
    form: str,
    guidance_scale: float,
) -> None:
    process = second_order(20) if form == "second order" else ReverseProcess.ddpm(20, clip_sample=form == "clipped")
    request = request_for(make_dit(), class_labels=[1, 2, 3], process=process, guidance_scale=guidance_scale)
    moved = {field: on_meta(getattr(request, field)) for field in ("process", "conditioning", "seed")}
    request = dataclasses.replace(request, target=free.as_target(make_dit().to("meta")), **moved)
    drafter: Drafter
    if name == "feature":
        drafter = torch.nn.Module.to(FeatureDrafter.from_target(make_dit()), "meta")
    else:
        drafter = as_drafter(make_dit().to("meta") if name == "model" else name)
    setup = dataclasses.replace(Setup.of(request, drafter, window, "auto"), static_shapes=True)
    account, watch = Account(20, request.seed), Stopwatch(CPU)
    live = first_window(setup, torch.empty(3, 128, device="meta"))
    with request.target.capture_features() if drafter.needs_features else nullcontext():
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


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output", "gains"])
@pytest.mark.parametrize("process", [ReverseProcess.ddpm(40), second_order(40)], ids=["first order", "second order"])
def test_static_shapes_and_a_late_host_change_no_bit(process: ReverseProcess, drafter: str, window: int, lag: int) -> None:
    common: dict[str, Any] = {"shape": (5,), "process": process, "seed": [1, 2, 3, 4, 5]}
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


def test_windows_of_all_widths_are_compiled_once_for_all_blocks(dit: DiTTransformer2DModel) -> None:
    """Once for a single state, which torch sets apart, and once for any number."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    target = free.as_target(dit)
    for guided in (True, False):
        for states in (1, 2, 4, 8, 6):
            labels = {"class_labels": torch.ones(states, dtype=torch.int64)}
            with target.compile(backend=backend):
                target.evaluate(torch.randn(states, 2, 8, 8), torch.full((states,), 5), labels, guided)
    assert len(compiled) == 2
    assert not any(module._forward_pre_hooks for module in dit.modules())


def test_compiling_needs_a_module() -> None:
    for sample in (free.speculative_sample, free.ancestral_sample):
        with pytest.raises(ValueError, match=r"compile is True, but model is a GaussianModel; allowed is a torch"):
            sample(GaussianModel(), shape=(3,), num_inference_steps=3, compile=True)
