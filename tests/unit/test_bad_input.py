"""Wrong arguments: the message names the argument, what was given and what is allowed, before any work is done."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import free
import free_kernels
from free import NonFiniteOutputError, ReverseProcess, Situation, StepDrafter
from free_kernels import StepTable
from tests.unit.helpers import GaussianModel, Recorder, small_table

SAMPLERS = [free.speculative_sample, free.ancestral_sample]
STEPS = 12


@pytest.fixture
def model() -> Iterator[Recorder]:
    """A model that must not be called: what is wrong is found before any work is done."""
    recorder = Recorder()
    yield recorder
    assert recorder.rows == [], "the model was evaluated before the error"


def both(*cases: tuple[dict[str, Any], str]) -> Any:
    """Each case for both samplers."""
    return pytest.mark.parametrize(
        ("sample", "given", "message"), [(sample, given, message) for given, message in cases for sample in SAMPLERS]
    )


# --- arguments of the samplers, any model -------------------------------------------------------------------------------


@both(
    ({"impl": "cuda"}, r"impl is 'cuda'; known are 'auto', 'triton', 'reference'"),
    ({"num_inference_steps": 0}, r"num_inference_steps is 0; allowed is an int, 1 … 1000"),
    ({"num_inference_steps": -3}, r"num_inference_steps is -3; allowed is an int, 1 … 1000"),
    ({"num_inference_steps": 1001}, r"num_inference_steps is 1001; allowed is an int, 1 … 1000"),
    ({"num_inference_steps": 12.0}, r"num_inference_steps is 12\.0; allowed is an int"),
    ({"num_inference_steps": True}, r"num_inference_steps is True; allowed is an int"),
    ({"process": DDIMScheduler(100), "num_inference_steps": 101}, r"num_inference_steps is 101; allowed is an int, 1 … 100"),
    ({"process": ReverseProcess.ddpm(7)}, r"num_inference_steps is 12; process has 7 steps: leave it out"),
    ({"process": "ddpm"}, r"scheduler is a str; allowed are DDPMScheduler, DDIMScheduler, .*or a free.ReverseProcess"),
    ({"num_samples": 0}, r"num_samples is 0; allowed is an int, 1 or more"),
    ({"num_samples": -1}, r"num_samples is -1; allowed is an int, 1 or more"),
    ({"num_samples": 2.0}, r"num_samples is 2\.0; allowed is an int, 1 or more"),
    ({"num_samples": True}, r"num_samples is True; allowed is an int, 1 or more"),
    ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5; allowed is 1"),
    ({"guidance_scale": -1}, r"guidance_scale is -1; allowed is 1"),
    ({"guidance_scale": float("nan")}, r"guidance_scale is nan; allowed is 1"),
    ({"guidance_scale": float("inf")}, r"guidance_scale is inf; allowed is 1"),
    ({"guidance_scale": 1.5}, r"guidance_scale is 1\.5, but the model has no unconditional half; use guidance_scale=1"),
    ({"callback_on_step_end": 3}, r"callback_on_step_end is a int; allowed is a callable or None"),
    ({"shape": None}, r"shape is missing: .*give shape or latents"),
    ({"shape": ()}, r"shape is \(\); allowed are positive ints"),
    ({"shape": (3, 0)}, r"shape is \(3, 0\); allowed are positive ints"),
    ({"shape": (3, -1)}, r"shape is \(3, -1\); allowed are positive ints"),
    ({"shape": (2.5,)}, r"shape is \(2\.5,\); allowed are positive ints"),
    ({"shape": 5}, r"shape is 5; allowed are positive ints"),
    # seeds and generators
    ({"seed": [1, 2, 3], "num_samples": 2}, r"num_samples speaks of 2, seed speaks of 3; they must agree"),
    ({"seed": []}, r"seed is empty; at least one sample"),
    ({"seed": [1, 2.5]}, r"seed holds 2\.5; allowed are ints, one a sample"),
    ({"seed": [True, False]}, r"seed holds True; allowed are ints, one a sample"),
    ({"seed": "ab"}, r"seed holds 'a'; allowed are ints, one a sample"),
    ({"seed": 1.5}, r"seed is 1\.5; allowed is an int, or one int a sample"),
    ({"seed": True}, r"seed is True; allowed is an int, or one int a sample"),
    ({"seed": torch.tensor(0.5)}, r"seed is tensor\(0\.5000\); allowed is an int, or one int a sample"),
    ({"seed": 1, "generator": torch.Generator()}, r"seed and generator are both given; give one of them"),
    ({"generator": [torch.Generator()] * 2, "num_samples": 3}, r"num_samples speaks of 3, generator speaks of 2"),
    ({"generator": []}, r"generator is empty; at least one sample"),
    ({"generator": 7}, r"generator holds a int; allowed are torch\.Generator"),
    ({"generator": [torch.Generator(), 7]}, r"generator holds a int; allowed are torch\.Generator"),
    # latents
    ({"latents": torch.zeros(2, 4)}, r"latents has shape \(2, 4\); allowed is \(samples, 5\)"),
    ({"latents": torch.zeros(2, 5, 1)}, r"latents has shape \(2, 5, 1\); allowed is \(samples, 5\)"),
    ({"latents": torch.zeros(5)}, r"latents has shape \(5,\); allowed is \(samples, \*shape of one sample\)"),
    ({"latents": torch.zeros(())}, r"latents has shape \(\); allowed is \(samples, \*shape of one sample\)"),
    ({"latents": torch.zeros(0, 5)}, r"latents is empty; at least one sample"),
    ({"latents": torch.zeros(2, 5, dtype=torch.int64)}, r"latents has dtype torch\.int64; allowed are torch\.float32"),
    ({"latents": torch.zeros(2, 5, dtype=torch.float64)}, r"latents has dtype torch\.float64; allowed are torch\.float32"),
    ({"latents": [[0.0] * 5]}, r"latents has type list; allowed are torch\.float32"),
    ({"latents": torch.full((2, 5), torch.nan)}, r"latents holds NaN or infinity; allowed are finite"),
    ({"latents": torch.zeros(2, 5), "num_samples": 3}, r"num_samples speaks of 3, latents speaks of 2"),
    ({"latents": torch.zeros(2, 5), "seed": [1, 2, 3]}, r"seed speaks of 3, latents speaks of 2"),
    # conditioning
    ({"conditioning": [1, 2]}, r"conditioning is a list; allowed is a dict"),
    (
        {"conditioning": {"goal": torch.zeros(2, 3), "style": torch.zeros(3)}},
        r"conditioning has tensors of different batch sizes: \{'goal': 2, 'style': 3\}; they must agree",
    ),
    ({"conditioning": {"goal": torch.zeros(2, 3)}, "num_samples": 3}, r"num_samples speaks of 3, conditioning speaks of 2"),
    ({"conditioning": {"goal": torch.zeros(0, 3)}}, r"conditioning is empty; at least one sample"),
    ({"class_labels": [1, 2], "num_samples": 3}, r"num_samples speaks of 3, class_labels speaks of 2"),
    (
        {"class_labels": [1, 2], "conditioning": {"class_labels": torch.tensor([1, 2])}},
        r"class_labels is given twice, as an argument and in conditioning; give it once",
    ),
)
def test_samplers(model: Recorder, sample: Callable[..., Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, **{"shape": (5,), "num_inference_steps": STEPS, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, r"window is 0; allowed is an int, 1 or more"),
        ({"window": -4}, r"window is -4; allowed is an int, 1 or more"),
        ({"window": 2.0}, r"window is 2\.0; allowed is an int, 1 or more"),
        ({"window": True}, r"window is True; allowed is an int, 1 or more"),
        (
            {"drafter": "hold"},
            r"drafter is 'hold'; known are 'hold-x0', 'hold-output', 'gains', a drafter's folder, or a Drafter, or a model",
        ),
        ({"drafter": ""}, r"drafter is ''; known are 'hold-x0', 'hold-output', 'gains'"),
    ],
)
def test_speculative_sampler(model: Recorder, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        free.speculative_sample(model, **{"shape": (5,), "num_inference_steps": STEPS, **given})


@pytest.mark.parametrize("drafter", [5, None, free.HoldX0])
def test_a_drafter_that_is_none(model: Recorder, drafter: Any) -> None:
    with pytest.raises(TypeError, match=r"drafter is a .*; allowed are a name, a Drafter, or a model"):
        free.speculative_sample(model, drafter, shape=(5,), num_inference_steps=STEPS)


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("wrong", [None, 3, "dit"])
def test_a_model_that_is_none(sample: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model is a .*; allowed are a DiTTransformer2DModel, a DiTPipeline, or a callable"):
        sample(wrong, shape=(5,), num_inference_steps=STEPS)


def test_a_drafter_that_needs_features_of_a_model_without(model: Recorder) -> None:
    class Leaning(StepDrafter):
        needs_features = True

        def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
            return state

    with pytest.raises(ValueError, match=r"top-block feature, and CallableTarget has none"):
        free.speculative_sample(model, Leaning(), shape=(5,), num_inference_steps=STEPS)


# --- the DiT ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def idle_dit(dit: DiTTransformer2DModel) -> Iterator[DiTTransformer2DModel]:
    """A DiT of 5 classes that must not be called."""
    calls: list[int] = []
    dit.register_forward_pre_hook(lambda *_: calls.append(1))
    yield dit
    assert not calls, "the model was evaluated before the error"


@both(
    ({"class_labels": [0, 5]}, r"class_labels holds 5; allowed are 0 … 4 \(None is the null class\)"),
    ({"class_labels": [-1]}, r"class_labels holds -1; allowed are 0 … 4"),
    ({"class_labels": 7}, r"class_labels holds 7; allowed are 0 … 4"),
    ({"class_labels": []}, r"class_labels is empty; allowed is one label a sample, or None"),
    ({"class_labels": torch.zeros(0, dtype=torch.int64)}, r"class_labels is empty; allowed is one label a sample"),
    ({"class_labels": [1.0]}, r"class_labels has dtype torch\.float32 and shape \(1,\); allowed are integers"),
    ({"class_labels": [True]}, r"class_labels has dtype torch\.bool and shape \(1,\); allowed are integers"),
    (
        {"class_labels": [[1, 2]]},
        r"class_labels has dtype torch\.int64 and shape \(1, 2\); allowed are integers, one a sample",
    ),
    ({"class_labels": [1, 2], "num_samples": 3}, r"num_samples speaks of 3, class_labels speaks of 2; they must agree"),
    ({"class_labels": [1, 2], "seed": [1, 2, 3]}, r"seed speaks of 3, class_labels speaks of 2; they must agree"),
    ({"class_labels": [1, 2], "latents": torch.zeros(3, 2, 8, 8)}, r"latents speaks of 3, class_labels speaks of 2"),
    ({"guidance_scale": 4.0}, r"guidance_scale is 4\.0 without class_labels; give labels, or guidance_scale=1"),
    ({"conditioning": {"goal": torch.zeros(1, 2)}}, r"conditioning has \['goal'\]; a DiT takes class_labels only"),
    ({"shape": (2, 8, 9)}, r"shape is \(2, 8, 9\); the model's samples are \(2, 8, 8\)"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents has shape \(1, 4, 8, 8\); allowed is \(samples, 2, 8, 8\)"),
    ({"latents": torch.zeros(2, 8, 8)}, r"latents has shape \(2, 8, 8\); allowed is \(samples, 2, 8, 8\)"),
)
def test_dit(idle_dit: DiTTransformer2DModel, sample: Callable[..., Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(idle_dit, num_inference_steps=STEPS, **given)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_train_mode(idle_dit: DiTTransformer2DModel, sample: Callable[..., Any]) -> None:
    idle_dit.train()
    with pytest.raises(ValueError, match=r"model is in train mode, .*; call model\.eval\(\)"):
        sample(idle_dit, num_inference_steps=STEPS)


def test_a_drafter_model_in_train_mode(model: Recorder) -> None:
    drafter = free.ModelDrafter(torch.nn.Identity().eval())
    drafter.model.module.train()
    with pytest.raises(ValueError, match="train mode"):
        free.speculative_sample(model, drafter, shape=(5,), num_inference_steps=STEPS)


def test_a_drafter_model_of_other_samples(idle_dit: DiTTransformer2DModel) -> None:
    class Other(free.CallableTarget):
        sample_shape = (3, 4, 4)

    with pytest.raises(ValueError, match=r"drafter makes samples of shape \(3, 4, 4\); the target's are \(2, 8, 8\)"):
        free.speculative_sample(idle_dit, Other(GaussianModel()), num_inference_steps=STEPS)


def test_guidance_by_a_drafter_model_without_an_unconditional_half(model: Recorder) -> None:
    target = free.as_target(model, null_conditioning={"goal": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"guidance is asked of a model without an unconditional half; use free\.as_target"):
        free.speculative_sample(
            target,
            GaussianModel(),
            conditioning={"goal": torch.zeros(2, 3)},
            guidance_scale=1.5,
            shape=(5,),
            num_inference_steps=STEPS,
        )


def test_channels_that_are_no_dits(make_dit: Callable[..., DiTTransformer2DModel]) -> None:
    with pytest.raises(ValueError, match=r"model has 2 input and 3 output channels; allowed are as many outputs, or twice"):
        free.as_target(make_dit(out_channels=3))


@pytest.mark.parametrize("limit", [0, -1])
def test_max_forward_batch(limit: int, dit: DiTTransformer2DModel) -> None:
    for model in (dit, GaussianModel()):
        with pytest.raises(ValueError, match=rf"max_forward_batch is {limit}; allowed is an int, 1 or more"):
            free.as_target(model, max_forward_batch=limit)


def test_arguments_of_as_target_that_a_model_has_no_use_for(dit: DiTTransformer2DModel) -> None:
    with pytest.raises(ValueError, match=r"null_conditioning was given for a DiT, which has a null class of its own"):
        free.as_target(dit, null_conditioning={"class_labels": 5})
    target = free.as_target(dit)
    with pytest.raises(ValueError, match=r"model is a target already; give max_forward_batch and null_conditioning where"):
        free.as_target(target, max_forward_batch=4)
    with pytest.raises(ValueError, match="model is a target already"):
        free.as_target(target, null_conditioning={})


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize(
    ("null", "message"),
    [
        ({}, r"null_conditioning has \[\]; conditioning has \['goal'\]: they must name the same keywords"),
        ({"gaol": torch.zeros(3)}, r"null_conditioning has \['gaol'\]; conditioning has \['goal'\]"),
        ({"goal": torch.zeros(2)}, r"null_conditioning\['goal'\] has shape \(2,\); allowed is \(3,\), with or without"),
        ({"goal": torch.zeros(2, 3)}, r"null_conditioning\['goal'\] has shape \(2, 3\); allowed is \(3,\)"),
        ({"goal": torch.zeros(())}, r"null_conditioning\['goal'\] has shape \(\); allowed is \(3,\)"),
    ],
)
def test_null_conditioning(model: Recorder, sample: Callable[..., Any], null: dict[str, Any], message: str) -> None:
    target = free.as_target(model, null_conditioning=null)
    with pytest.raises(ValueError, match=message):
        sample(
            target,
            conditioning={"goal": torch.zeros(2, 3)},
            guidance_scale=1.5,
            shape=(5,),
            num_inference_steps=STEPS,
        )


# --- what a model returns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x, t: x[..., :-1], r"model returned shape \(\d+, 4\) for states of shape \(\d+, 5\); they must agree"),
        (lambda x, t: x[:1].expand(len(x) + 1, -1), r"model returned shape \(\d+, 5\) for states of shape \(\d+, 5\)"),
        (lambda x, t: x.mean(), r"model returned shape \(\) for states of shape"),
        (lambda x, t: None, r"model returned a NoneType; allowed is a tensor"),
        (lambda x, t: {"output": x}, r"model returned a dict; allowed is a tensor"),
        (lambda x, t: x.long(), r"model returned dtype torch\.int64; allowed is a floating dtype"),
    ],
)
def test_output_of_a_wrong_kind(sample: Callable[..., Any], network: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(network, shape=(5,), num_samples=2, num_inference_steps=STEPS)


class Broken:
    """A good model that returns ``value`` at one step of one sample, in one element."""

    def __init__(self, process: ReverseProcess, step: int, sample: int, value: float) -> None:
        self.gaussian = GaussianModel()
        self.timestep = process.timestep[step]
        self.sample = sample
        self.value = value

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, who: torch.Tensor) -> torch.Tensor:
        output = self.gaussian(x, timestep)
        output[(timestep == self.timestep) & (who == self.sample), 2] = self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [0, 1, 9, 28, 29])
@pytest.mark.parametrize(
    "sample",
    [free.ancestral_sample]
    + [
        lambda *a, w=w, d=d, **k: free.speculative_sample(*a, d, window=w, **k)
        for w in (1, 2, 8, 64)
        for d in free.drafters.DRAFTERS
    ],
)
def test_nan_from_the_target_names_step_and_sample(sample: Callable[..., Any], step: int, value: float) -> None:
    process = ReverseProcess.ddpm(30)
    model = Broken(process, step, 1, value)
    message = f"model returned NaN or infinity at step {step} (timestep {int(process.timestep[step])}) of sample 1"
    with pytest.raises(NonFiniteOutputError, match=re.escape(message)):
        sample(model, process=process, conditioning={"who": torch.arange(3)}, shape=(5,), seed=[4, 5, 6])
    # the samples beside it are none the worse
    sample(model, process=process, conditioning={"who": torch.tensor([0, 2])}, shape=(5,), seed=[4, 6])


def test_a_nan_error_is_both_a_value_error_and_a_floating_point_error() -> None:
    assert issubclass(NonFiniteOutputError, ValueError)
    assert issubclass(NonFiniteOutputError, FloatingPointError)


class Narrow:
    """A model that overflows far from the data, where only a wild draft leads."""

    def __init__(self) -> None:
        self.gaussian = GaussianModel()
        self.overflows = 0

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        far = (x.abs() > 100).any(1, keepdim=True)
        self.overflows += int(far.sum())
        return torch.where(far, torch.nan, self.gaussian(x, timestep))


class Wild(StepDrafter):
    """hold-x0, but its first ``rounds`` windows run off to where the model overflows."""

    name = "wild"

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.usable: list[int] = []

    def propose(self, situation: Situation) -> free_kernels.Proposal:
        self.usable.append(int(situation.last.length.min()))
        self.rounds -= 1
        return super().propose(situation) if self.rounds >= 0 else free.HoldX0().propose(situation)

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        return torch.full_like(state, 1e6)


def test_nan_in_the_abandoned_part_of_a_window_is_no_error() -> None:
    model, drafter = Narrow(), Wild(rounds=10**6)
    common: dict[str, Any] = {"shape": (5,), "num_inference_steps": 30, "seed": [1, 2]}
    out = free.speculative_sample(model, drafter, window=4, **common)
    assert model.overflows > 0
    assert torch.isfinite(out.samples).all()
    assert out.stats.accepted.sum() == 0
    assert out.stats.rounds.tolist() == [30, 30]  # every draft was replaced, so each round settled one step


def test_nan_in_the_abandoned_part_does_not_poison_later_drafts() -> None:
    model, drafter = Narrow(), Wild(rounds=3)
    common: dict[str, Any] = {"shape": (5,), "num_inference_steps": 60, "seed": 3}
    out = free.speculative_sample(model, drafter, window=6, **common)
    assert model.overflows > 0
    # of the wild windows only the first state is left as an anchor
    assert drafter.usable[1:4] == [1, 1, 1]
    assert drafter.usable[4] > 1
    # after three rounds of one step each, hold-x0 does about as well as it does from the start
    tame = free.speculative_sample(GaussianModel(), window=6, **common)
    assert out.stats.rounds[0] <= tame.stats.rounds[0] + 3 + 5
    assert torch.isfinite(out.samples).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_from_a_drafter_names_the_drafter(value: float) -> None:
    class Broke(Wild):
        name = "broke"

        def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
            output = torch.zeros_like(state)
            output[step == 5] = value
            return output

    process = ReverseProcess.ddpm(30)
    message = f"drafter 'broke' returned NaN or infinity at step 5 (timestep {int(process.timestep[5])}) of sample "
    for seed in range(10):
        try:
            free.speculative_sample(GaussianModel(), Broke(10**6), process=process, shape=(5,), seed=seed, window=4)
        except NonFiniteOutputError as error:
            assert str(error).startswith(message)  # noqa: PT017 - some runs settle step 5 exactly, without a draft
            break
    else:
        pytest.fail("step 5 was never drafted")


# --- processes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"num_inference_steps": 0},
            r"num_inference_steps is 0; allowed is an int, 1 … 1000, the steps that the process has",
        ),
        ({"num_inference_steps": 1001}, r"num_inference_steps is 1001; allowed is an int, 1 … 1000"),
        ({"num_inference_steps": 51, "num_train_timesteps": 50}, r"num_inference_steps is 51; allowed is an int, 1 … 50"),
        ({"variance": "small"}, r"variance is 'small'; known are 'posterior', 'beta', 'geometric' or a tensor of variances"),
        ({"variance": torch.ones(9)}, r"variance has shape \(9,\); allowed is \(10,\), one for each step"),
        ({"variance": torch.ones(10, 1)}, r"variance has shape \(10, 1\); allowed is \(10,\)"),
        ({"variance": -torch.ones(10)}, r"variance holds a value that is negative or not finite; allowed is 0 or more"),
        ({"variance": torch.full((10,), torch.nan)}, r"variance holds a value that is negative or not finite"),
        (
            {"beta_schedule": "cosine"},
            r"beta_schedule is 'cosine'; known are 'linear', 'scaled_linear', 'squaredcos_cap_v2'",
        ),
        ({"beta_schedule": torch.ones(2, 5)}, r"beta_schedule is a tensor of shape \(2, 5\); allowed are one dimension"),
        ({"beta_schedule": torch.tensor([0.1, -0.1])}, r"beta_schedule is a tensor of .*betas in \(0, 1\]"),
        ({"beta_schedule": torch.tensor([0.1, 1.1])}, r"beta_schedule is a tensor of .*betas in \(0, 1\]"),
        ({"beta_schedule": torch.tensor([])}, r"beta_schedule is a tensor of shape \(0,\); allowed are one dimension"),
        (
            {"beta_schedule": torch.full((20,), 0.1), "num_train_timesteps": 30},
            r"num_train_timesteps is 30; beta_schedule holds 20 betas",
        ),
        ({"prediction_type": "flow"}, r"prediction_type is 'flow'; known are 'epsilon', 'v_prediction', 'sample'"),
        ({"timestep_spacing": "even"}, r"timestep_spacing is 'even'; known are 'linspace', 'leading', 'trailing'"),
        ({"stochasticity": -0.1}, r"stochasticity is -0\.1; allowed is 0 or more"),
        ({"stochasticity": float("nan")}, r"stochasticity is nan; allowed is 0 or more"),
        ({"stochasticity": float("inf")}, r"stochasticity is inf; allowed is 0 or more"),
        ({"eta": -0.1}, r"eta is -0\.1; allowed is 0 … 1"),
        ({"eta": 1.1}, r"eta is 1\.1; allowed is 0 … 1"),
        ({"eta": 0.5, "stochasticity": 0.5}, r"stochasticity is 0\.5 and eta is 0\.5; give one of them"),
        ({"eta": 0.5, "variance": "beta"}, r"eta is 0\.5 with variance 'beta'; eta scales the posterior variance"),
        ({"eta": 0.5, "variance": torch.ones(10)}, r"eta is 0\.5 with variance .*; eta scales the posterior variance"),
        ({"clip_sample": True, "clip_sample_range": 0.0}, r"clip_range is 0\.0; allowed is a positive number or None"),
        (
            {"timestep_spacing": "leading", "steps_offset": 200},
            r"steps_offset is 200: the first timestep would be 1100, beyond the 1000 trained ones",
        ),
    ],
)
def test_ddpm(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReverseProcess.ddpm(**{"num_inference_steps": 10, **given})


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            DDPMScheduler(thresholding=True),
            r"scheduler has thresholding=True: .*use clip_sample=True with a clip_sample_range",
        ),
        (DDIMScheduler(thresholding=True), r"scheduler has thresholding=True: .*use clip_sample=True"),
        (
            DDPMScheduler(variance_type="learned"),
            r"variance_type='learned': .*give variance='posterior', 'beta', 'geometric' or",
        ),
        (
            DDPMScheduler(variance_type="learned_range"),
            r"variance_type='learned_range': .*'geometric' is the middle of a learned",
        ),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            r"mu is missing: the scheduler has use_dynamic_shifting",
        ),
        (
            DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            r"x0_state_coef is inf at step 0: .*epsilon prediction at zero terminal SNR.*; use v_prediction|state_coef is",
        ),
    ],
)
def test_schedulers(model: Recorder, sample: Callable[..., Any], scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, shape=(5,), process=scheduler, num_inference_steps=STEPS)


@pytest.mark.parametrize("variance", ["fixed_small", 3])
def test_variance_of_from_scheduler(variance: Any) -> None:
    with pytest.raises(ValueError, match=rf"variance is {variance!r}; known are 'posterior', 'beta', 'geometric'"):
        ReverseProcess.from_scheduler(DDPMScheduler(), 10, variance=variance)


def columns(**changes: Any) -> dict[str, Any]:
    names = ("state_coef", "model_coef", "std", "x0_state_coef", "x0_model_coef")
    return {"timestep": torch.arange(4), **{name: torch.ones(4) for name in names}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": torch.zeros(2, 2)}, r"timestep has shape \(2, 2\); allowed is \(steps,\) with at least one step"),
        ({"timestep": torch.zeros(0)}, r"timestep has shape \(0,\); allowed is \(steps,\) with at least one step"),
        ({"model_coef": torch.ones(3)}, r"model_coef has shape \(3,\); timestep has \(4,\): all must agree"),
        ({"std": torch.tensor([1.0, -0.5, 1.0, 1.0])}, r"std is -0\.5 at one step; allowed is 0 or more"),
        (
            {"state_coef": torch.tensor([1.0, 1.0, torch.nan, 1.0])},
            r"state_coef is nan at step 2: this process has no finite",
        ),
        ({"std": torch.tensor([1.0, torch.inf, 1.0, 1.0])}, r"std is inf at step 1: this process has no finite table"),
        ({"clip_range": 1.0}, r"clip_range is 1\.0 without clip_state_coef and clip_x0_coef"),
        (
            {"clip_range": -1.0, "clip_state_coef": torch.ones(4), "clip_x0_coef": torch.ones(4)},
            r"clip_range is -1\.0; allowed is a positive number or None",
        ),
    ],
)
def test_a_table_of_ones_own(changes: dict[str, Any], message: str) -> None:
    ReverseProcess(**columns())
    with pytest.raises(ValueError, match=message):
        ReverseProcess(**columns(**changes))


# --- the operations of free_kernels -------------------------------------------------------------------------------------

B, W, D, S = 2, 3, 5, 6


def good(op: str) -> dict[str, Any]:
    """Arguments that an operation accepts."""
    seed, step = torch.tensor([1, 2]), torch.tensor([0, 1])
    table = small_table(S, dtype=torch.float32)
    window = torch.zeros(B, W, D)
    return {
        "philox": {"seed": seed, "step": step, "num_counters": 3},
        "normal": {"seed": seed, "step": step, "numel": D},
        "uniform": {"seed": seed, "step": step},
        "posterior": {"state": torch.zeros(B, D), "output": torch.zeros(B, D), "seed": seed, "step": step, "table": table},
        "acceptance": {
            "state": window,
            "target_output": window,
            "draft_output": window,
            "seed": seed,
            "step": step,
            "table": table,
        },
        "acceptance_from_means": {
            "proposal": torch.zeros(B, D),
            "target_mean": torch.zeros(B, D),
            "draft_mean": torch.zeros(B, D),
            "std": torch.ones(B),
        },
        "householder": {
            "noise": torch.zeros(B, D),
            "delta": torch.zeros(B, D),
            "inner": torch.zeros(B),
            "squared_norm": torch.zeros(B),
        },
        "propose": {
            "state": torch.zeros(B, D),
            "seed": seed,
            "step": step,
            "window": W,
            "anchor_states": window,
            "anchor_outputs": window,
            "anchor_step": step,
            "anchor_length": torch.tensor([1, 3]),
            "table": table,
        },
        "verify": {
            "states": window,
            "target_output": window,
            "draft_output": torch.zeros(B, W - 1, D),
            "seed": seed,
            "step": step,
            "length": torch.tensor([3, 3]),
            "table": table,
        },
    }[op]


OPERATIONS = (
    "philox",
    "normal",
    "uniform",
    "posterior",
    "acceptance",
    "acceptance_from_means",
    "householder",
    "propose",
    "verify",
)
TENSORS = [(op, name) for op in OPERATIONS for name, value in good(op).items() if isinstance(value, torch.Tensor)]
# any shape of a seed is a shape of the result, so only these are free
ANY_SHAPE = {(op, name) for op in ("philox", "normal", "uniform") for name in ("seed", "step")}


@pytest.mark.parametrize("op", OPERATIONS)
def test_good_arguments_are_accepted(op: str) -> None:
    getattr(free_kernels, op)(**good(op))


@pytest.mark.parametrize("op", OPERATIONS)
def test_unknown_impl(op: str) -> None:
    with pytest.raises(ValueError, match=r"impl is 'fast'; known are 'auto', 'triton', 'reference'"):
        getattr(free_kernels, op)(**good(op), impl="fast")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_tensor_of_a_wrong_dtype(op: str, name: str) -> None:
    given = good(op)
    wrong = torch.int32 if given[name].is_floating_point() else torch.float32
    given[name] = given[name].to(wrong)
    with pytest.raises(ValueError, match=rf"^{name} has dtype {re.escape(str(wrong))}; allowed (is|are) torch\."):
        getattr(free_kernels, op)(**given)


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair not in ANY_SHAPE])
def test_tensor_of_a_wrong_shape(op: str, name: str) -> None:
    given = good(op)
    given[name] = given[name][:1].unsqueeze(0)
    with pytest.raises(ValueError, match=rf"^{name} has shape {re.escape(str(tuple(given[name].shape)))}; allowed is \("):
        getattr(free_kernels, op)(**given)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_tensor_on_another_device(op: str, name: str) -> None:
    given = good(op)
    given[name] = given[name].to("meta")
    # the first tensor sets the device, so it is the second that is named then
    with pytest.raises(ValueError, match=r"^[\w.]+ is on (meta|cpu); the other arguments are on (cpu|meta)"):
        getattr(free_kernels, op)(**given)


@pytest.mark.parametrize("op", ["posterior", "acceptance", "propose", "verify"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_coef": torch.ones(S - 1)}, r"table\.model_coef has shape \(5,\); allowed is \(6\)"),
        ({"std": torch.ones(S, dtype=torch.int64)}, r"table\.std has dtype torch\.int64; allowed are"),
        ({"std": torch.ones(S, device="meta")}, r"table\.std is on meta; the other arguments are on cpu"),
        ({"state_coef": torch.ones(0)}, r"table\.state_coef has shape \(0,\); allowed is \(any\)"),
        ({"clip_range": 0.0}, r"table\.clip_range is 0\.0; allowed is a positive number or None"),
        ({"clip_range": -1.0}, r"table\.clip_range is -1\.0; allowed is a positive number or None"),
    ],
)
def test_table(op: str, change: dict[str, Any], message: str) -> None:
    given = good(op)
    table: StepTable = given["table"]
    with pytest.raises(ValueError, match=message):
        getattr(free_kernels, op)(**{**given, "table": table._replace(**change)})


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        ("posterior", "unconditional_output", (B, D)),
        ("acceptance", "unconditional_output", (B, W, D)),
        ("verify", "unconditional_output", (B, W, D)),
        ("propose", "unconditional_anchor_outputs", (B, W, D)),
    ],
)
def test_guidance_of_an_operation(op: str, name: str, shape: tuple[int, ...]) -> None:
    call = getattr(free_kernels, op)
    with pytest.raises(ValueError, match=rf"guidance_scale is 1\.5 without {name}; give {name} or a guidance_scale of 1"):
        call(**good(op), guidance_scale=1.5)
    with pytest.raises(ValueError, match=rf"{name} has shape \(.*\); allowed is \("):
        call(**good(op), guidance_scale=1.5, **{name: torch.zeros(*shape, 1)})
    with pytest.raises(ValueError, match=rf"{name} has dtype torch\.bfloat16; the conditional output has torch\.float32"):
        call(**good(op), guidance_scale=1.5, **{name: torch.zeros(shape, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("op", "shape"),
    [("posterior", (B, D + 1)), ("acceptance", (B, D)), ("verify", (B, W - 1, D)), ("propose", (B, W, D + 1))],
)
def test_noise_of_an_operation(op: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"noise has shape {re.escape(str(shape))}; allowed is \("):
        getattr(free_kernels, op)(**good(op), noise=torch.zeros(shape))


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("philox", {"num_counters": 0}, r"num_counters is 0; allowed is 1 … 2\*\*34"),
        ("normal", {"numel": 0}, r"numel is 0; allowed is 1 … 2\*\*34"),
        ("normal", {"numel": 2**34 + 1}, r"numel is 17179869185; allowed is 1 … 2\*\*34"),
        ("normal", {"stream": -1}, r"stream is -1; allowed is 0 … 2\*\*32 - 1"),
        ("philox", {"stream": 2**32}, r"stream is 4294967296; allowed is 0 … 2\*\*32 - 1"),
        ("uniform", {"stream": 2**32}, r"stream is 4294967296; allowed is 0 … 2\*\*32 - 1"),
        ("propose", {"draft": "hold"}, r"draft is 'hold'; known are 'hold-x0', 'hold-output'"),
        ("propose", {"window": 0}, r"window is 0; allowed is 1 or more"),
        ("propose", {"noise": torch.zeros(B, 1, D)}, r"noise has 1 columns; a window of 3 needs 2"),
        ("verify", {"uniforms": torch.zeros(B, 1)}, r"uniforms has 1 columns; a window of 3 needs 2"),
        ("verify", {"uniforms": torch.zeros(B)}, r"uniforms has shape \(2,\); allowed is \(2, any\)"),
        ("verify", {"uniforms": torch.zeros(B, W, dtype=torch.int64)}, r"uniforms has dtype torch\.int64; allowed are"),
    ],
)
def test_values_of_an_operation(op: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(free_kernels, op)(**{**good(op), **change})


# --- arguments of kinds that nobody thinks of ---------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [free.speculative_sample, free.ancestral_sample])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": "3"}, r"class_labels is '3'; allowed are integers, one a sample"),
        ({"class_labels": {3}}, r"class_labels is \{3\}; allowed are integers"),
        ({"class_labels": [3, None]}, r"class_labels is \[3, None\]; allowed are integers"),
        ({"class_labels": 2**70}, r"class_labels is 1180591620717411303424; allowed are integers"),
        ({"guidance_scale": "2"}, r"guidance_scale is '2'; allowed is 1"),
        ({"guidance_scale": None}, r"guidance_scale is None; allowed is 1"),
        ({"guidance_scale": [1.5]}, r"guidance_scale is \[1\.5\]; allowed is 1"),
        ({"latents": lambda: torch.zeros(1, 2, 8, 8).to_sparse()}, r"latents is a tensor of layout torch.sparse_coo"),
        ({"latents": lambda: torch.zeros(1, 2, 8, 8, device="meta")}, r"latents is a tensor on the meta device"),
    ],
)
def test_odd_arguments(dit: DiTTransformer2DModel, sample: Any, given: dict[str, Any], message: str) -> None:
    made = {name: value() if callable(value) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        sample(dit, num_inference_steps=4, **made)


def test_odd_arguments_of_processes_targets_and_plans(dit: DiTTransformer2DModel) -> None:
    for given in ({"stochasticity": "1"}, {"eta": "1"}, {"beta_start": None}, {"beta_end": float("nan")}):
        (name, value), *_ = given.items()
        with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed is "):
            free.ReverseProcess.ddpm(10, **given)
    with pytest.raises(ValueError, match=r"max_forward_batch is '4'; allowed is an int"):
        free.as_target(dit, max_forward_batch="4")
    with pytest.raises(ValueError, match=r"statistics is a str; allowed is a free\.SamplingStatistics"):
        free.plan_window(dit, num_inference_steps=4, statistics="x")


def test_integers_of_any_kind_are_taken(dit: DiTTransformer2DModel) -> None:
    common: dict[str, Any] = {"class_labels": [1, 2], "seed": 0}
    plain = free.speculative_sample(dit, num_inference_steps=4, window=3, num_samples=2, **common)
    given = {"num_inference_steps": np.int64(4), "window": torch.tensor(3), "num_samples": np.int32(2)}
    assert torch.equal(free.speculative_sample(dit, **given, **common).samples, plain.samples)


def test_numpy_and_nested_conditioning_have_a_row_a_sample() -> None:
    def model(x: torch.Tensor, timestep: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return 0.5 * x - 0.1 * shift

    def of_nested(x: torch.Tensor, timestep: torch.Tensor, seen: dict[str, Any]) -> torch.Tensor:
        assert seen["unit"] == "m"
        return model(x, timestep, seen["state"]["observation.shift"])

    common: dict[str, Any] = {"num_inference_steps": 6, "shape": (2,), "seed": [1, 2, 3]}
    shift = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    plain = free.speculative_sample(model, conditioning={"shift": shift}, **common).samples
    for given, called in (
        ({"shift": shift.double().numpy()}, model),
        ({"seen": {"state": {"observation.shift": shift}, "unit": "m"}}, of_nested),
        ({"seen": {"state": {"observation.shift": shift.numpy()}, "unit": "m"}}, of_nested),
    ):
        assert torch.equal(free.speculative_sample(called, conditioning=given, **common).samples, plain)
    # and under guidance, with a null of the same shape
    null = {"seen": {"state": {"observation.shift": torch.zeros(2)}, "unit": "m"}}
    guided = free.speculative_sample(
        free.as_target(of_nested, null_conditioning=null),
        conditioning={"seen": {"state": {"observation.shift": shift}, "unit": "m"}}, guidance_scale=2.0, **common,
    )  # fmt: skip
    flat = free.as_target(model, null_conditioning={"shift": torch.zeros(2)})
    expected = free.speculative_sample(flat, conditioning={"shift": shift}, guidance_scale=2.0, **common)
    assert torch.equal(guided.samples, expected.samples)
    del common["seed"]
    assert free.speculative_sample(model, conditioning={"shift": shift.numpy()}, **common).samples.shape == (3, 2)


@pytest.mark.parametrize("sample", [free.speculative_sample, free.ancestral_sample])
def test_the_callers_defaults_change_nothing(dit: DiTTransformer2DModel, sample: Any) -> None:
    """torch's default dtype and device, and autocast around a drafter whose arithmetic is its own."""
    common: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 6, "seed": 0}
    for drafter in ("hold-x0", "gains") if sample is free.speculative_sample else ("none",):
        given = {**common, **({"drafter": drafter} if sample is free.speculative_sample else {})}
        plain = sample(dit, **given).samples
        for change, value, usual in (
            (torch.set_default_dtype, torch.float64, torch.float32),
            (torch.set_default_dtype, torch.float16, torch.float32),
            (torch.set_default_device, "meta", None),
        ):
            change(value)
            try:
                drawn = sample(dit, **given).samples
            finally:
                change(usual)
            assert torch.equal(drawn, plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert sample(dit, **given).samples.isfinite().all()


def test_an_offloaded_model_is_where_it_computes(dit: DiTTransformer2DModel) -> None:
    """accelerate leaves the weights on the meta device, and brings them in for each layer's forward."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    common: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 5, "seed": 0}
    plain = free.speculative_sample(dit, **common).samples
    offloaded = cpu_offload(copy.deepcopy(dit), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert torch.equal(free.speculative_sample(offloaded, **common).samples, plain)
    remove_hook_from_submodules(offloaded)


def test_a_peft_models_base_is_the_dit(dit: DiTTransformer2DModel) -> None:
    """A stand-in with PEFT's method: its base has the adapters in its layers."""

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = dit

        def get_base_model(self) -> DiTTransformer2DModel:
            return self.base_model

    assert isinstance(free.as_target(Adapted().eval()), free.DiTTarget)


def test_a_drafters_folder_is_a_drafter(dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    drafter = free.FeatureDrafter.from_target(dit)
    drafter.save_pretrained(tmp_path / "trained")
    common: dict[str, Any] = {"class_labels": 1, "num_inference_steps": 6, "seed": 0}
    plain = free.speculative_sample(dit, drafter, **common).samples
    for given in (tmp_path / "trained", str(tmp_path / "trained")):
        assert torch.equal(free.speculative_sample(dit, given, **common).samples, plain)
    with pytest.raises(ValueError, match=r"drafter is 'nowhere'; known are .*, a drafter's folder, or a Drafter"):
        free.speculative_sample(dit, "nowhere", **common)


# --- results that would be lost -----------------------------------------------------------------------------------------


def test_a_folder_of_another_kind_is_left_as_it_is(dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    from free.outputs import check_folder

    free.FeatureDrafter.from_target(dit).save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"--output-dir is '.*trained', which holds a FeatureDrafter; give another"):
        check_folder("--output-dir", tmp_path / "trained", "DiTTransformer2DModel")
    check_folder("output_dir", tmp_path / "trained", "FeatureDrafter")  # its own may be written again
    check_folder("output_dir", tmp_path / "new" / "deep", "FeatureDrafter")
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match=r"output_dir is '/proc/nothing', which cannot be made"):
        check_folder("output_dir", Path("/proc/nothing"), "FeatureDrafter")


def test_where_a_figure_goes_is_looked_at_first(tmp_path: Path) -> None:
    from free.outputs import check_figure, check_file

    for path, error, message in (
        (tmp_path / "x.foo", ValueError, r"output is '.*x\.foo'; allowed are files that end in .*\.eps"),
        (Path("/dev/full"), OSError, r"output is '/dev/full', which is no regular file"),
        (tmp_path / "none" / "x.png", FileNotFoundError, r"its folder does not exist"),
    ):
        with pytest.raises(error, match=message):
            check_figure("output", path)
    with pytest.raises(OSError, match=r"results is '/dev/full', which is no regular file"):
        check_file("results", Path("/dev/full"))
    with pytest.raises(PermissionError, match=r"results is '/proc/x', which cannot be written"):
        check_file("results", Path("/proc/x"))
    check_file("results", tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("content", [b"x", b""])
def test_a_broken_data_file_is_named(tmp_path: Path, content: bytes) -> None:
    from free.evaluation.quality import load_data

    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"data is '.*bad\.npz', which is no \.npz of numbers") as caught:
        load_data(str(tmp_path / "bad.npz"))
    assert "pickle" not in str(caught.value)


def test_a_nan_leaves_the_samples_that_were_finished() -> None:
    """One sample is ahead of the other, whose network breaks near its end."""

    def model(x: torch.Tensor, timestep: torch.Tensor, broken: torch.Tensor) -> torch.Tensor:
        return torch.where(broken[:, None] & (timestep[:, None] < 200), torch.nan, 0.5 * x)

    class Uneven(StepDrafter):
        """Right for whole samples; far off for the broken one, which therefore lags behind."""

        def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
            return 0.5 * state + torch.where(situation.conditioning["broken"][:, None], 100.0, 0.0)

    common: dict[str, Any] = {"shape": (3,), "num_inference_steps": 30, "window": 4}
    first_broken = {"broken": torch.tensor([True, False])}
    whole = free.speculative_sample(model, Uneven(), conditioning={"broken": torch.tensor([False])}, seed=[5], **common)
    with pytest.raises(NonFiniteOutputError, match=r"of sample 0; 1 of 2 samples were finished before") as caught:
        free.speculative_sample(model, Uneven(), conditioning=first_broken, seed=[4, 5], **common)
    assert caught.value.finished.tolist() == [False, True]
    assert torch.equal(caught.value.samples[1], whole.samples[0])
    with pytest.raises(NonFiniteOutputError, match=r"1 of 2 samples were finished") as caught:
        free.ancestral_sample(model, conditioning=first_broken, seed=[4, 5], shape=(3,), num_inference_steps=30)
    assert caught.value.samples.shape == (2, 3)


def test_clipping_of_latents_is_warned_of() -> None:
    """``DDPMScheduler.from_config`` of a scheduler that lacks the key turns it on."""
    latent, pixels = (
        DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=8, in_channels=channels, out_channels=channels, num_layers=1,
            sample_size=4, patch_size=2, num_embeds_ada_norm=3,
        ).eval()
        for channels in (4, 3)
    )  # fmt: skip
    scheduler = DDPMScheduler.from_config(DPMSolverMultistepScheduler().config)
    assert scheduler.config.clip_sample
    common: dict[str, Any] = {"class_labels": 1, "num_inference_steps": 3, "seed": 0}
    with pytest.warns(UserWarning, match=r"process clips the estimate of x0 to ±1 \(clip_sample\), but .* 4 channels"):
        free.speculative_sample(latent, process=scheduler, **common)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free.speculative_sample(pixels, process=scheduler, **common)
        free.speculative_sample(latent, **common)
