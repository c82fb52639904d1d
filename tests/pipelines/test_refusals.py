"""What cannot be speculated is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

import free
from free.pipelines.refusals import ARGUMENTS, PIPELINES, check_arguments, check_guiders
from tests.pipelines.cases import CASES
from tests.pipelines.parts import assemble, ddpm, image_vae, picture, prompts, unet
from tests.pipelines.stubs import class_pipeline, draw
from tests.pipelines.test_calls import diffusion
from tests.pipelines.zoo import PAGE


def test_arguments_of_the_call() -> None:
    wrong: dict[str, Any] = {
        "skip_guidance_layers": [7],
        "cfg_trunc_ratio": 0.25,
        "cfg_truncation": 0.5,
        "control_guidance_start": 0.1,
        "control_guidance_end": [1.0, 0.5],
        "adapter_conditioning_factor": 0.5,
        "use_dynamic_cfg": True,
        "pag_adaptive_scale": 0.5,
        "guidance_schedule": [1.0],
        "callback_steps": 2,
        "enable_temporal_reasoning": True,
        "gligen_scheduled_sampling_beta": 0.3,
        "cfg_interval_start": 0.2,
        "cfg_interval_end": 0.9,
        "scaling_watershed": 0.5,
        "use_kv_cache": True,
    }
    assert wrong.keys() == ARGUMENTS.keys()
    for name, value in wrong.items():
        with pytest.raises(free.UnsupportedPipelineError, match=name):
            check_arguments({name: value})
    check_arguments({"control_guidance_end": [1.0, 1.0], "control_guidance_start": 0.0, "cfg_trunc_ratio": 1.0})


@pytest.mark.parametrize(
    ("case", "argument"), [("CogVideoXPipeline", "use_dynamic_cfg"), ("Lumina2Pipeline", "cfg_trunc_ratio")]
)
def test_an_argument_is_refused_before_any_work(case: str, argument: str) -> None:
    pipe, call = CASES[case].make()
    pipe.transformer.forward = None  # nobody gets there
    wrong = {"use_dynamic_cfg": True, "cfg_trunc_ratio": 0.5}[argument]
    with free.speculate(pipe), pytest.raises(free.UnsupportedPipelineError, match=argument):
        pipe(**call, **{argument: wrong})


def test_names_of_refused_pipelines_are_of_diffusers() -> None:
    import diffusers

    for beginning in PIPELINES:
        assert any(name.startswith(beginning) and "Pipeline" in name for name in dir(diffusers)), beginning


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), UniPCMultistepScheduler()])
def test_schedulers_that_stand_for_no_process(scheduler: Any) -> None:
    pipe, call = diffusion()
    own = pipe.scheduler = scheduler
    with free.speculate(pipe), pytest.raises(free.UnsupportedPipelineError, match=type(scheduler).__name__):
        pipe(**call)
    assert pipe.scheduler is own


def test_a_deterministic_scheduler_warns_once_and_is_named() -> None:
    pipe, call = CASES["FluxPipeline"].make()
    call["num_inference_steps"] = 3
    with free.speculate(pipe) as run:
        with pytest.warns(UserWarning, match="FlowMatchEulerDiscreteScheduler is deterministic"):
            pipe(**call)
        pipe(**call)
    assert "FlowMatchEulerDiscreteScheduler" in run.stats.sampler
    with free.speculate(pipe, eta=0.5) as run:
        pipe(**call)
    assert "eta 0.5" in run.stats.sampler


def test_an_eta_of_the_call_counts_and_may_not_contradict() -> None:
    from diffusers import DDIMScheduler

    pipe, call = diffusion(eta=0.5)
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    with free.speculate(pipe) as run:
        pipe(**call)
    expected = free.ReverseProcess.from_scheduler(DDIMScheduler(clip_sample=False), 6, eta=0.5)
    torch.testing.assert_close(run.process.std, expected.std)
    with free.speculate(pipe, eta=1.0), pytest.raises(free.UnsupportedPipelineError, match=r"eta is 0\.5"):
        pipe(**call)


def filled_in() -> tuple[Any, dict[str, Any]]:
    """Inpainting with a network that is given neither mask nor picture."""
    parts = {"unet": unet().eval(), "vae": image_vae().eval(), "scheduler": ddpm()}
    pipe = assemble("StableDiffusionInpaintPipeline", **parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = prompts(6, 8) | {"image": picture(), "mask_image": picture(1), "height": 64, "width": 64}
    return pipe, call | {"num_inference_steps": 4, "output_type": "latent"}


def test_blending_between_steps_is_refused_before_any_work() -> None:
    pipe, call = filled_in()
    pipe.unet.forward = None  # nobody gets there
    with free.speculate(pipe), pytest.raises(free.UnsupportedPipelineError, match="takes 4 channels, none beside"):
        pipe(**call)


def test_blending_that_nobody_foresaw_is_refused_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("free.pipelines.speculation.check_blending", lambda *given: None)
    pipe, call = filled_in()
    with free.speculate(pipe), pytest.raises(free.UnsupportedPipelineError, match=r"looks up timesteps|were changed"):
        pipe(**call)


def test_a_network_with_a_cache() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe, call = CASES["FluxPipeline"].make()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with free.speculate(pipe), pytest.raises(ValueError, match=r"transformer: .*cache"):
        pipe(**call)


def test_dynamic_thresholding() -> None:
    pipe, call = diffusion()
    pipe.scheduler = DDPMScheduler(thresholding=True)
    with free.speculate(pipe), pytest.raises(free.UnsupportedPipelineError, match="thresholding"):
        pipe(**call)


def test_networks_that_are_not_functions_of_their_input() -> None:
    pipe, call = diffusion()
    pipe.unet.train()
    with free.speculate(pipe), pytest.raises(ValueError, match="unet: model is in train mode"):
        pipe(**call)


def test_guidance_that_is_written_for_a_number_of_samples() -> None:
    pipe, call = CASES["ZImagePipeline"].make()
    call |= {"guidance_scale": 3.0, "negative_prompt_embeds": call["prompt_embeds"][::-1]}
    with (
        free.speculate(pipe),
        pytest.warns(UserWarning, match="deterministic"),
        pytest.raises(free.UnsupportedPipelineError, match="shape"),
    ):
        pipe(**call)


def test_a_network_in_a_pipeline_of_two_schedulers() -> None:
    schedulers = {"scheduler": DDPMScheduler(), "prior_scheduler": DDPMScheduler()}
    pipe = assemble("KandinskyV22CombinedPipeline", movq=image_vae(), **schedulers)
    with pytest.raises(free.UnsupportedPipelineError, match="prior_scheduler"):
        free.speculate(pipe)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"window": 0}, ValueError, "window is 0"),
        ({"drafter": "best"}, ValueError, "drafter is 'best'"),
        ({"drafter": torch.nn.Linear(1, 1).eval()}, ValueError, "asks for the target's conditioning"),
        ({"relaxation": 1.0}, TypeError, "relaxation is a float"),
        ({"relaxation": free.Relaxation(strength=1.0, uncertainty="learned")}, ValueError, "learned variance"),
        ({"seed": 3}, ValueError, "seed is 3"),
        ({"seed": [1.5, 2.0]}, ValueError, "seed holds 1.5"),
    ],
)
def test_arguments_of_the_door(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        free.speculate(class_pipeline(), **arguments)


def test_guiders_that_count_steps_or_remember() -> None:
    from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance

    check_guiders({"guider": ClassifierFreeGuidance(guidance_scale=3.0)})
    with pytest.raises(free.UnsupportedPipelineError, match=r"ocr_guider guides from 0\.2 to 1"):
        check_guiders({"ocr_guider": ClassifierFreeGuidance(start=0.2)})
    with pytest.raises(free.UnsupportedPipelineError, match="AdaptiveProjectedGuidance"):
        check_guiders({"guider": AdaptiveProjectedGuidance()})


def test_the_page_names_every_pipeline_and_every_refusal() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = [*CASES, *ARGUMENTS, *(f"{beginning}…" for beginning in PIPELINES)]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_perturbed_attention_guidance() -> None:
    pipe = assemble("StableDiffusionPAGPipeline", unet=unet(), scheduler=ddpm(), requires_safety_checker=False)
    with pytest.raises(free.UnsupportedPipelineError, match="perturbed attention"):
        free.speculate(pipe)


def test_something_that_is_no_pipeline() -> None:
    with pytest.raises(TypeError, match="pipe is a Linear"):
        free.speculate(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_outputs_that_are_not_finite() -> None:
    pipe = class_pipeline(scale=float("nan"))
    with free.speculate(pipe), pytest.raises(free.NonFiniteOutputError, match="step 0"):
        draw(pipe, [1])


def test_a_wrong_option_of_the_process() -> None:
    pipe, call = CASES["StableDiffusion3Pipeline"].make()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with free.speculate(pipe, variance="beta"), pytest.raises(free.UnsupportedPipelineError, match="variance"):
        pipe(**call)


def test_a_scheduler_that_pipelines_treat_in_a_way_of_their_own() -> None:
    pipe = class_pipeline()
    pipe.scheduler = CogVideoXDPMScheduler()
    with free.speculate(pipe), pytest.raises(free.UnsupportedPipelineError, match="scheduler is a CogVideoXDPMScheduler"):
        draw(pipe, [1])


def test_noise_that_does_not_follow_a_clipped_estimate() -> None:
    """Of DDIM's step with eta: no table keeps the unclipped noise beside a clipped x0."""
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 5, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    with free.speculate(pipe, window=3):
        for wrong in ({}, {"use_clipped_model_output": False}):
            with pytest.raises(free.UnsupportedPipelineError, match="keeps the noise as it was"):
                pipe(eta=1.0, **call, **wrong)
        pipe(eta=1.0, use_clipped_model_output=True, **call)
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    with free.speculate(pipe, window=3):
        pipe(eta=1.0, **call)
