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
from free.loop import Turn, rounds
from free.request import Request, check_request
from free.statistics import Account, SamplingStatistics, Stopwatch
from free.window import Setup, advance, first_window
from tests.unit.helpers import GaussianModel, Recorder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def request_for(model: Any, **given: Any) -> Request:
    arguments: dict[str, Any] = {
        "class_labels": None,
        "conditioning": None,
        "num_samples": None,
        "shape": None,
        "process": None,
        "num_inference_steps": 250,
        "guidance_scale": 1.0,
        "seed": 0,
        "generator": None,
        "latents": None,
        "impl": "reference",
        "callback_on_step_end": None,
    }
    return check_request(model, **{**arguments, **given})


def on_meta(value: Any) -> Any:
    """The same shapes without numbers: reading one raises, as does a copy to another device, or a shape that needs one."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: on_meta(entry) for name, entry in value.items()}
    if isinstance(value, ReverseProcess):
        moved = object.__new__(ReverseProcess)  # its checks read numbers
        for field in dataclasses.fields(value):
            object.__setattr__(moved, field.name, on_meta(getattr(value, field.name)))
        return moved
    return value


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


def turns(model: Any, drafter: str, window: int, static: bool, lag: int, **given: Any) -> Iterator[tuple[Turn, Any]]:
    """The loop with shapes and lag as given; the samples, account and statistics as they are after each round."""
    request = request_for(model, **given)
    setup = dataclasses.replace(Setup.of(request, as_drafter(drafter), window, "reference"), static_shapes=static)
    steps = request.process.num_steps
    stats, account = (
        SamplingStatistics(steps, window, drafter, np.zeros(request.batch, np.int64)),
        Account(steps, request.seed),
    )
    state = request.initial_state()
    for turn in rounds(setup, state, account, stats, Stopwatch(CPU), lag):
        yield turn, (state, account, stats)


def run(*arguments: Any, **given: Any) -> tuple[list[Turn], torch.Tensor, SamplingStatistics]:
    seen = list(turns(*arguments, **given))
    state, account, stats = seen[-1][1]
    stats.take(account)
    return [turn for turn, _ in seen], state, stats


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output"])
def test_static_shapes_and_a_late_host_change_no_bit(drafter: str, window: int, lag: int) -> None:
    common: dict[str, Any] = {"shape": (5,), "process": ReverseProcess.ddpm(40), "seed": [1, 2, 3, 4, 5]}
    out = free.speculative_sample(GaussianModel(), drafter, window=window, **common)
    seen, state, stats = run(GaussianModel(), drafter, window, True, lag, **common)
    assert torch.equal(state, out.samples)
    for name in ("rounds", "tested", "accepted"):
        assert getattr(stats, name).tolist() == getattr(out.stats, name).tolist(), name
    np.testing.assert_allclose(stats.delta_sum, out.stats.delta_sum, rtol=1e-9)
    # the host is never ahead of what it knows by more than it may, and no round is for nothing but the last few
    assert max(out.stats.rounds) <= len(seen) <= max(out.stats.rounds) + lag


def test_batches_shrink_to_powers_of_two() -> None:
    model, seeds = Recorder(), list(range(6))
    common: dict[str, Any] = {"shape": (5,), "process": ReverseProcess.ddpm(60), "seed": seeds}
    seen, _, stats = run(model, "hold-x0", 4, True, 0, **common)
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
    run(model, "hold-x0", 8, True, 0, shape=(3,), process=process, seed=[1, 2])
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
        run(broken, "hold-x0", 8, True, lag, **given)


def test_nan_at_the_very_last_step_does_not_pass() -> None:
    process, gaussian = ReverseProcess.ddpm(12), GaussianModel()

    def broken(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.where(timestep[:, None] == process.timestep[-1], torch.nan, gaussian(x, timestep))

    with pytest.raises(free.NonFiniteOutputError, match=r"at step 11 "):
        run(broken, "hold-x0", 4, True, 1, shape=(5,), process=process, seed=[4, 5])
