"""Models that write into their input and use the memory of their output again: both samplers see none of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free.drafters import Situation, StepDrafter
from tests.analytic import ElementwiseTarget

RUN: dict[str, Any] = {"shape": (5,), "num_inference_steps": 14, "seed": [3, 1, 4, 1592]}


class Masked(ElementwiseTarget):
    """The first element is known, and the network is told so: the law that :class:`Writing` must have."""

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor | None = None, gain: Any = 1.0
    ) -> torch.Tensor:
        known = x.clone()
        known[:, 0] = 0.25
        return super().__call__(known, timestep, scale) * gain


class Writing(ElementwiseTarget):
    """The same outputs, from a model that spares itself the copies, and spoils whatever it was given."""

    def __init__(self) -> None:
        self.buffer = torch.empty(256, 5)

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor | None = None, gain: Any = 1.0
    ) -> torch.Tensor:
        x[:, 0] = 0.25
        output = self.buffer[: len(x)]
        output.copy_(super().__call__(x, timestep, scale) * gain)
        for spoiled in (x, timestep, scale, gain):
            if isinstance(spoiled, torch.Tensor):
                spoiled.add_(7)
        return output


class Own(StepDrafter):
    """A drafter of the caller's around its network."""

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        self.network = network

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        return self.network(state, step.add_(1))


def conditioning() -> dict[str, Any]:
    return {"scale": torch.linspace(0.8, 1.1, 20).view(4, 5), "gain": torch.tensor(0.9)}


def ancestral(model: Any, **run: Any) -> free.SamplingOutput:
    return free.ancestral_sample(model, return_trajectory=True, **run)


def speculative(model: Any, drafter: Any = "hold-x0", **run: Any) -> free.SamplingOutput:
    return free.speculative_sample(model, drafter, window=5, return_trajectory=True, **run)


def of_a_smaller_model(model: Any, **run: Any) -> free.SamplingOutput:
    null = {name: torch.zeros(value.shape[1:]) for name, value in run.get("conditioning", {}).items()}
    smaller = model if "guidance_scale" not in run else free.as_target(model.model, null_conditioning=null)
    return speculative(model, smaller, **run)


def of_its_own_drafter(model: Any, **run: Any) -> free.SamplingOutput:
    return speculative(model, Own(type(getattr(model, "model", model))()), **run)


SAMPLERS = [ancestral, speculative, of_a_smaller_model, of_its_own_drafter]


def same(got: free.SamplingOutput, expected: free.SamplingOutput) -> None:
    assert got.trajectory is not None
    assert expected.trajectory is not None
    assert torch.equal(got.trajectory, expected.trajectory)
    assert expected.trajectory.std(0)[-1].min() > 0.01


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_model_that_writes_into_its_input_and_reuses_its_output(sample: Callable[..., free.SamplingOutput]) -> None:
    same(sample(Writing(), **RUN), sample(Masked(), **RUN))


@pytest.mark.parametrize("sample", SAMPLERS[:3])
def test_conditioning_is_written_into_too(sample: Callable[..., free.SamplingOutput]) -> None:
    given = conditioning()
    same(sample(Writing(), **RUN, conditioning=given), sample(Masked(), **RUN, conditioning=conditioning()))
    for name, value in conditioning().items():
        assert torch.equal(given[name], value)


@pytest.mark.parametrize("sample", SAMPLERS[:3])
@pytest.mark.parametrize(("guidance_scale", "limit"), [(1.0, 3), (2.0, None), (2.0, 5)])
def test_parts_and_guidance(sample: Callable[..., free.SamplingOutput], guidance_scale: float, limit: int | None) -> None:
    run = {**RUN, "conditioning": {"scale": conditioning()["scale"]}, "guidance_scale": guidance_scale}
    null = {"scale": torch.zeros(5)}
    writing, masked = (
        free.as_target(model, max_forward_batch=limit, null_conditioning=null) for model in (Writing(), Masked())
    )
    same(sample(writing, **run), sample(masked, **run))


class Half(torch.nn.Module):
    """A module in half precision: its input is another tensor anyway, its output may be the same every time."""

    def __init__(self, model: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.inner = model
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.buffer = torch.empty(256, 5, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.bfloat16
        output = self.inner(x, timestep) * self.weight
        return self.buffer[: len(x)].copy_(output) if isinstance(self.inner, Writing) else output


@pytest.mark.parametrize("sample", SAMPLERS[:3])
def test_half_precision(sample: Callable[..., free.SamplingOutput]) -> None:
    writing = Half(Writing()).eval()
    writing.inner.buffer = writing.buffer.clone()
    targets = (free.as_target(model, max_forward_batch=3) for model in (writing, Half(Masked()).eval()))
    same(*(sample(target, **RUN) for target in targets))


def test_inference_mode() -> None:
    with torch.inference_mode():
        same(speculative(Writing(), **RUN), speculative(Masked(), **RUN))


# --- a DiT is given no copies, unless there is something of the caller's about it ---------------------------------------


def spoiling(model: DiTTransformer2DModel, around: str) -> None:
    """Let something of the caller's write into the model's input, and into its last output."""
    buffer, forward = torch.empty(256, 4, 8, 8), model.forward

    def spoil(x: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor]:
        x.add_(7)
        return (buffer[: len(output)].copy_(output),)

    def spoiled(x: torch.Tensor, **given: Any) -> tuple[torch.Tensor]:
        return spoil(x, forward(x.clone(), **given)[0])

    if around == "hook":
        model.register_forward_hook(lambda _module, inputs, output: spoil(inputs[0], output[0]))
    elif around == "forward":
        model.forward = spoiled
    elif around == "subclass":
        model.__class__ = type("Own", (DiTTransformer2DModel,), {"forward": lambda _self, x, **given: spoiled(x, **given)})
    elif around == "compiled in place":
        model._compiled_call_impl = spoiled  # where module.compile() puts it


@pytest.mark.parametrize("around", ["hook", "forward", "subclass", "compiled in place"])
@pytest.mark.parametrize("sample", SAMPLERS[:2])
def test_a_dit_that_was_changed(make_dit: Any, sample: Callable[..., free.SamplingOutput], around: str) -> None:
    run = {"num_inference_steps": 6, "seed": [3, 1, 4, 1592], "class_labels": [0, 1, 2, 3]}
    changed = make_dit(out_channels=4)
    spoiling(changed, around)
    same(*(sample(free.as_target(model, max_forward_batch=3), **run) for model in (changed, make_dit(out_channels=4))))


def test_a_dit_as_it_was_written_needs_no_copies(make_dit: Any) -> None:
    model = make_dit()
    target = free.as_target(model)
    assert not target.needs_copies
    with target.capture_features(), target.compile():
        assert not target.needs_copies
    with target.compile(mode="reduce-overhead"):
        assert target.needs_copies
    assert not target.needs_copies
    assert free.as_target(torch.compile(model)).needs_copies
    spoiling(model, "compiled in place")
    target.check_ready()  # as each run does
    assert target.needs_copies
