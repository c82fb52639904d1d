"""Captured rounds and steps, rehearsed without a device: what they record, what they keep, and what they keep alive."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor

import free
from free import Drafter, FeatureDrafter, Fresh, HoldX0, ModelDrafter, ReverseProcess, Situation, StepDrafter
from free.drafters import as_drafter
from free.sampling.capture import AncestralGraph, Graphs, drafter_key
from free.sampling.likeness import tensors_of
from free.sampling.loop import Run
from free.sampling.memory import memory_of
from free.sampling.window import Setup
from free.windows import FixedWindow
from tests.unit.helpers import GaussianModel
from tests.unit.rehearsal import Rehearsal, rehearse, run_loop, static_setup


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def _rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse(monkeypatch)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a sampler as on a device: captured, in static shapes, the host a round behind."""
    rehearse(monkeypatch)
    of = Setup.of

    def run(sample: Callable[..., Any], *arguments: Any, **given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(free.sampling.samplers, "wants_capture", lambda *_: True)
            patch.setattr(Setup, "of", lambda *args: dataclasses.replace(of(*args), static_shapes=True))
            return sample(*arguments, **given)

    return run


def kept(setup: Setup) -> object:
    """What an earlier call left for one of this setup."""
    return Graphs.of(setup)._kept


class Preparing(StepDrafter):
    """Part of the way from hold-output to hold-x0, by a table that it makes anew for each process."""

    name = "preparing"
    capturable = True

    def __init__(self) -> None:
        self.share = torch.tensor(0.5)
        self._prepared: tuple[ReverseProcess, torch.Tensor] | None = None

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process = situation.process
        if self._prepared is None or self._prepared[0] is not process:
            self._prepared = process, self.share.repeat(process.num_steps)
        anchor = situation.anchor(step)
        return torch.lerp(anchor.output, anchor.hold_x0(state, step, process), self._prepared[1][step][:, None])


# --- a graph changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_rehearsed")
@pytest.mark.parametrize(("drafter", "window", "lag"), [("hold-x0", 4, 0), ("hold-output", 3, 1), ("hold-x0", 1, 1)])
def test_captured_rounds_change_no_bit_and_serve_again(drafter: str, window: int, lag: int) -> None:
    target, process = free.as_target(GaussianModel()), ReverseProcess.ddpm(24)
    for seed in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):
        common: dict[str, Any] = {"shape": (5,), "process": process, "seed": seed}
        expected = free.speculative_sample(target, drafter, window=window, **common)
        setup = static_setup(target, drafter, window, **common)
        _, state, stats = run_loop(setup, lag, Graphs.of(setup))
        assert torch.equal(state, expected.samples)
        for name in ("rounds", "tested", "accepted"):
            assert getattr(stats, name).tolist() == getattr(expected.stats, name).tolist(), name
    assert 1 <= Rehearsal.made <= 4  # batches of 5, 4, 2, 1


@pytest.mark.usefixtures("_rehearsed")
def test_captured_rounds_of_a_dit_with_features(dit: DiTTransformer2DModel) -> None:
    """Conditioning is read from the graph's own rows, whoever is left."""
    target, process = free.as_target(dit), ReverseProcess.ddpm(14)
    for labels, seed in (([0, 1, 2], [1, 2, 3]), ([4, 3, 2], [5, 6, 7])):
        common: dict[str, Any] = {"class_labels": labels, "guidance_scale": 1.5, "process": process, "seed": seed}
        expected = free.speculative_sample(target, "hold-x0", window=4, **common)
        setup = static_setup(target, "hold-x0", 4, **common)
        _, state, _ = run_loop(setup, 1, Graphs.of(setup))
        torch.testing.assert_close(state.unflatten(1, (2, 8, 8)), expected.samples, rtol=1e-3, atol=1e-3)
    assert Rehearsal.made <= 3


@pytest.mark.usefixtures("_rehearsed")
def test_what_a_graph_cannot_be_told_anew_makes_another(dit: DiTTransformer2DModel) -> None:
    target = free.as_target(dit)
    common: dict[str, Any] = {"class_labels": [1, 2], "process": ReverseProcess.ddpm(8)}
    first = kept(static_setup(target, "hold-x0", 4, **common))
    assert kept(static_setup(target, "hold-x0", 4, **{**common, "class_labels": [3, 4], "seed": 9})) is first
    assert kept(static_setup(target, "hold-x0", 4, **{**common, "process": ReverseProcess.ddpm(8)})) is first
    assert kept(static_setup(dit, "hold-x0", 4, **common)) is first
    others = [
        static_setup(target, "hold-output", 4, **common),
        static_setup(target, "hold-x0", 5, **common),
        static_setup(target, "hold-x0", 4, **common, guidance_scale=1.5),
        static_setup(target, "hold-x0", 4, **{**common, "class_labels": [1, 2, 3]}),
        static_setup(target, "hold-x0", 4, **{**common, "process": ReverseProcess.ddpm(8, variance="beta")}),
        static_setup(free.as_target(dit, max_forward_batch=3), "hold-x0", 4, **common),
    ]
    assert len({id(one) for one in [first, *map(kept, others)]}) == 7
    shelf = memory_of(target)["graphs"]
    assert len(shelf) == 4  # and memory is bounded
    # where the weights are elsewhere, what was recorded of them is of no more use
    target.transformer.pos_embed.proj.weight.data = target.transformer.pos_embed.proj.weight.data.clone()
    before = list(shelf.values())
    assert kept(others[-1]) not in before
    assert len(shelf) == 1


def _with_hook(model: torch.nn.Module) -> None:
    model.transformer_blocks[0].register_forward_hook(lambda module, inputs, output: output * 0.5)


def _with_a_forward_of_its_own(model: torch.nn.Module) -> None:
    block = model.transformer_blocks[1]
    block.forward = lambda hidden_states, **_: hidden_states


CHANGES: dict[str, Callable[[Any], object]] = {
    "a flag, as adapters are turned on and off by": lambda model: setattr(model.transformer_blocks[0], "_disabled", True),
    "a number in a dict, as adapters are scaled by": lambda model: model.proj_out_1.scaling.update(default=3.0),
    "an attention processor": lambda model: model.transformer_blocks[0].attn1.set_processor(AttnProcessor()),
    "a submodule": lambda model: setattr(model, "proj_out_1", torch.nn.Sequential(model.proj_out_1, torch.nn.SiLU()).eval()),
    "a hook": _with_hook,
    "a forward": _with_a_forward_of_its_own,
}


@pytest.mark.usefixtures("_rehearsed")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_was_changed_makes_another(dit: DiTTransformer2DModel, change: Callable[[Any], object]) -> None:
    dit.proj_out_1.scaling = {"default": 1.0}
    common: dict[str, Any] = {"class_labels": [1, 2], "process": ReverseProcess.ddpm(8)}

    def both() -> tuple[object, object, object]:
        setup = static_setup(dit, "hold-x0", 4, **common)
        steps = AncestralGraph.of(setup.request, "auto")._kept
        return kept(setup), steps, drafter_key(ModelDrafter(dit))

    first = both()
    free.speculative_sample(dit, window=4, **common)
    assert both() == first  # runs leave nothing behind
    change(dit)
    second = both()
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert both() == second


@pytest.mark.usefixtures("_rehearsed")
@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
def test_a_null_conditioning_on_the_host_is_seen_when_it_changes(kind: Callable[[Any], Any]) -> None:
    null = kind([0.5, 0.5, 0.5])
    target = free.as_target(lambda x, timestep, center: x - center, null_conditioning={"center": null})
    common: dict[str, Any] = {"shape": (3,), "process": ReverseProcess.ddpm(8), "conditioning": {"center": torch.ones(2, 3)}}
    first = kept(static_setup(target, "hold-x0", 4, **common, guidance_scale=2.0))
    assert kept(static_setup(target, "hold-x0", 4, **common, guidance_scale=2.0)) is first
    null[1] = 0.25
    assert kept(static_setup(target, "hold-x0", 4, **common, guidance_scale=2.0)) is not first


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
        assert ("recording" in out.stats.seconds) == (seed == [1, 2, 3])
        assert Rehearsal.made == 1


# --- what is kept, and for how long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [free.speculative_sample, free.ancestral_sample])
def test_a_raw_model_is_recorded_once_and_nothing_outlives_it(
    capture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, sample: Callable[..., Any]
) -> None:
    model = GaussianModel()
    users: list[weakref.ref[Any]] = []
    made: set[int] = set()
    of = free.sampling.request.as_target
    monkeypatch.setattr(
        free.sampling.request, "as_target", lambda model: users.append(weakref.ref(target := of(model))) or target
    )
    # every call has a target and a process of its own, which are gone when it returns
    gc.disable()
    try:
        for seed in range(3):
            common: dict[str, Any] = {"shape": (5,), "num_inference_steps": 20, "seed": seed}
            out = capture(sample, model, **common)
            assert torch.equal(out.samples, sample(model, **common).samples)
            made.add(Rehearsal.made)
        assert len(made) == 1
        assert len(users) == 6
        assert not any(user() for user in users)
        (left,) = [weakref.ref(one) for one in memory_of(free.as_target(model))["graphs"].values()]
        assert left() is not None
        del model
        assert left() is None
    finally:
        gc.enable()


def test_nothing_outlives_a_dit_and_its_drafters(capture: Callable[..., Any], make_dit: Callable[..., Any]) -> None:
    dit, small = make_dit(), make_dit(seed=1)
    learned = free.FeatureDrafter.from_target(dit)
    common: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 4, "window": 3, "seed": 1}
    modules = [weakref.ref(module) for module in (dit, small, learned)]
    for drafter in (small, learned, Fresh(learned)):
        capture(free.speculative_sample, dit, drafter, **common)
        made = Rehearsal.made
        capture(free.speculative_sample, dit, drafter, **common)
        assert Rehearsal.made == made
    left = [weakref.ref(one) for one in memory_of(free.as_target(dit))["graphs"].values()]
    del dit, small, learned, drafter
    gc.collect()  # modules of diffusers may be garbage in circles; what was recorded does not hold them
    assert not any(one() for one in (*modules, *left))


def test_who_uses_graphs_has_them_alone(capture: Callable[..., Any]) -> None:
    """A run within another's callback, of the same kind."""
    common: dict[str, Any] = {"shape": (5,), "num_inference_steps": 8, "window": 3, "num_samples": 2}
    target, inner = free.as_target(GaussianModel()), []

    def within(*_: Any) -> None:
        inner.append(free.speculative_sample(target, seed=2, **common).samples)

    outer = capture(free.speculative_sample, target, seed=1, callback_on_step_end=within, **common).samples
    assert torch.equal(outer, free.speculative_sample(target, seed=1, **common).samples)
    assert len(inner) > 1
    expected = free.speculative_sample(target, seed=2, **common).samples
    assert all(torch.equal(one, expected) for one in inner)
    setup = static_setup(target, "hold-x0", 3, shape=(5,), seed=1)
    first, second = Graphs.of(setup), Graphs.of(setup)
    assert first._kept is not second._kept
    assert first.account is not second.account


def test_what_a_drafter_prepared_lives_with_the_graphs(capture: Callable[..., Any]) -> None:
    """The tables of another process take the place of those that a graph reads."""
    drafter, model = Fresh(Preparing()), GaussianModel()
    other = dataclasses.replace(process := ReverseProcess.ddpm(20), std=process.std * 1.5)
    common: dict[str, Any] = {"shape": (5,), "window": 4, "seed": [1, 2]}
    expected = free.speculative_sample(model, drafter, process=process, **common).samples
    for _ in range(2):
        # each call makes its own process, on a device too
        own = dataclasses.replace(process, std=process.std.clone(), state_coef=process.state_coef.clone())
        assert torch.equal(capture(free.speculative_sample, model, drafter, process=own, **common).samples, expected)
        free.speculative_sample(model, drafter, process=other, **common)
    assert len(memory_of(free.as_target(model))["graphs"]) == 1


@pytest.mark.usefixtures("_rehearsed")
def test_a_new_window_of_a_kept_graph_knows_nothing_of_an_earlier_call() -> None:
    """An earlier call may have ended in NaN, which the recording of a further window must not enter in the account."""
    process, gaussian = ReverseProcess.ddpm(20), GaussianModel()

    def model(x: torch.Tensor, timestep: torch.Tensor, broken: torch.Tensor) -> torch.Tensor:
        return torch.where(broken[:, None], torch.nan, gaussian(x, timestep))

    def run(broken: bool, window: int) -> torch.Tensor:
        given = {"conditioning": {"broken": torch.full((2,), broken)}, "shape": (5,), "process": process, "seed": [1, 2]}
        setup = static_setup(model, "hold-x0", 8, **given)
        run = Run(setup, Graphs.of(setup))
        for _ in run.turns(FixedWindow(window)):
            pass
        return run.state

    with pytest.raises(free.NonFiniteOutputError):
        run(True, 8)
    for window in (4, 8):
        assert torch.isfinite(run(False, window)).all()


def test_guidance_brings_nothing_from_the_host_while_it_is_recorded(capture: Callable[..., Any]) -> None:
    def model(x: torch.Tensor, timestep: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        return GaussianModel()(x - center, timestep)

    target = free.as_target(model, null_conditioning={"center": [0.0, 0.1, 0.2, 0.3, 0.4]})
    for seed in (1, 2):
        common: dict[str, Any] = {"conditioning": {"center": torch.ones(2, 5)}, "shape": (5,), "guidance_scale": 1.5}
        common |= {"num_inference_steps": 8, "seed": seed}
        for sample in (free.ancestral_sample, free.speculative_sample):
            assert torch.equal(capture(sample, target, **common).samples, sample(target, **common).samples)


@pytest.mark.parametrize("sample", [free.speculative_sample, free.ancestral_sample])
def test_what_was_recorded_under_autocast_serves_under_autocast_alone(
    capture: Callable[..., Any], dit: DiTTransformer2DModel, sample: Callable[..., Any]
) -> None:
    """And reads no cast weights that autocast has let go of."""
    common: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 12, "seed": 3}
    if sample is free.speculative_sample:
        common["window"] = 1  # batches of one shape, whose bits agree
    for dtype in (None, torch.bfloat16, torch.float16, torch.bfloat16, None):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            got, expected = capture(sample, dit, **common), sample(dit, **common)
        assert torch.equal(got.samples, expected.samples)


@pytest.mark.parametrize("sample", [free.speculative_sample, free.ancestral_sample])
def test_what_was_recorded_in_inference_mode_serves_outside(capture: Callable[..., Any], sample: Callable[..., Any]) -> None:
    model = GaussianModel()
    common: dict[str, Any] = {"shape": (5,), "num_inference_steps": 20, "num_samples": 1}
    expected = [sample(model, seed=seed, **common).samples for seed in range(3)]
    with torch.inference_mode():
        assert torch.equal(capture(sample, model, seed=0, **common).samples, expected[0])
    made = Rehearsal.made
    assert torch.equal(capture(sample, model, seed=1, **common).samples, expected[1])
    with torch.inference_mode():
        assert torch.equal(capture(sample, model, seed=2, **common).samples, expected[2])
    assert Rehearsal.made == made


# --- which drafters are alike -------------------------------------------------------------------------------------------


def test_drafters_are_alike_that_a_graph_cannot_tell_apart(make_dit: Callable[..., DiTTransformer2DModel]) -> None:
    dit = make_dit()
    first, second = Preparing(), Preparing()
    for one, other in (
        (HoldX0(), as_drafter("hold-x0")),
        (Fresh(HoldX0()), Fresh(HoldX0())),
        (Fresh(first), Fresh(first)),
        (ModelDrafter(dit), ModelDrafter(dit)),
    ):
        assert drafter_key(one) == drafter_key(other)
        assert hash(drafter_key(one)) == hash(drafter_key(other))
    different = [
        HoldX0(),
        as_drafter("hold-output"),
        Fresh(HoldX0()),
        first,
        second,
        Fresh(first),
        Fresh(second),
        ModelDrafter(dit),
        ModelDrafter(make_dit()),
        ModelDrafter(free.as_target(dit, max_forward_batch=2)),
        Fresh(ModelDrafter(dit)),
        free.FeatureDrafter.from_target(dit),
        free.FeatureDrafter.from_target(dit),
    ]
    assert len({drafter_key(drafter) for drafter in different}) == len(different)


def test_a_drafters_weights_and_settings_are_seen(dit: DiTTransformer2DModel) -> None:
    learned = free.FeatureDrafter.from_target(dit)
    for drafter in (learned, Fresh(learned)):
        seen = []
        for sweeps in (1, 2, 0):
            learned.sweeps = sweeps
            seen.append(drafter_key(drafter))
        assert drafter_key(drafter) == seen[-1]
        torch.nn.Module.to(learned, torch.float64)
        seen.append(drafter_key(drafter))
        torch.nn.Module.to(learned, torch.float32)
        with torch.no_grad():
            learned.to_output.weight.add_(1.0)  # in place: a graph reads what is there
        assert len(set(seen)) == 4


class Nested(Drafter):
    """What it learned is a level down, and in place; what it may be told is public."""

    name = "nested"

    @dataclasses.dataclass
    class Learned:
        gain: torch.Tensor

    def __init__(self) -> None:
        self._learned = {"bands": [self.Learned(torch.ones(3))]}
        self.settings = {"rate": 0.5}

    def propose(self, situation: Any) -> Any:
        raise NotImplementedError


def test_a_drafter_compiled_again_is_the_same(dit: DiTTransformer2DModel) -> None:
    learned = free.FeatureDrafter.from_target(dit)
    keys = []
    for _ in range(2):
        with learned.running(compile=True):
            keys.append(drafter_key(learned))
    assert keys[0] == keys[1] != drafter_key(learned)


def test_drafters_that_learn_are_told_apart_by_who_they_are() -> None:
    one, other = Nested(), Nested()
    key = drafter_key(one)
    assert key != drafter_key(other)
    one._learned["bands"][0].gain.add_(1.0)
    one._learned["bands"].append(Nested.Learned(torch.zeros(2)))
    assert drafter_key(one) == key
    (held,) = tensors_of(Fresh(other)).values()
    assert held.data_ptr() == other._learned["bands"][0].gain.data_ptr()
    one.settings["rate"] = 0.25
    assert drafter_key(one) != key
    gone = weakref.ref(one)
    del one
    assert gone() is None


# --- what may be captured -----------------------------------------------------------------------------------------------


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
    assert FeatureDrafter.capturable
    assert not Drafter.capturable


def test_what_a_graph_cannot_hold_is_not_captured(make_dit: Callable[[], DiTTransformer2DModel]) -> None:
    """Graphs in a graph, and weights that are brought or cast for each forward."""

    def capturable(change: Callable[[Any], Any]) -> bool:
        model = make_dit()
        changed = change(model)
        target = free.as_target(model if changed is None else changed)
        assert Fresh(ModelDrafter(target)).capturable == target.capturable
        return target.capturable

    assert capturable(lambda model: torch.compile(model))
    assert capturable(lambda model: model.compile())
    for options in ({"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}, {"backend": "cudagraphs"}):
        assert not capturable(lambda model, options=options: torch.compile(model, **options))
        assert not capturable(lambda model, options=options: model.transformer_blocks[1].compile(**options))
    assert not capturable(lambda model: accelerate.cpu_offload(model) and None)
    casting = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    assert not capturable(lambda model: model.enable_layerwise_casting(**casting))
