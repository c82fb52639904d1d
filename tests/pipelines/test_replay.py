"""Every settled state of a family's pipeline is answered as the untouched pipeline answers it."""

from __future__ import annotations

import pytest
import torch

import free
from tests.pipelines.cases import CASES
from tests.pipelines.planted import BUGS, planted

FAMILIES = [
    "DiTPipeline",
    "PixArtSigmaPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "SanaPipeline",
    "AuraFlowPipeline",
    "HunyuanDiTPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
    "StableDiffusionControlNetPipeline, two, guess_mode",
    "StableDiffusionXLImg2ImgPipeline",
    "FluxKontextPipeline",
    "LTXImageToVideoPipeline",
    "WanPipeline, two networks",
    "WanPipeline, expand_timesteps",
    "MochiPipeline",
]


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("name", FAMILIES)
def test_settled_states_are_answered_as_without_speculation(name: str) -> None:
    pipe, call = CASES[name].make()
    check = free.check_pipeline(pipe, verbose=False, **call | {"num_inference_steps": 5})
    assert check.passed, str(check)
    assert len(check.error) == check.stats.steps
    assert check.stats.rounds.max() <= check.stats.steps


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("name", ["DiTPipeline", "StableDiffusionXLPipeline", "LTXImageToVideoPipeline"])
@pytest.mark.parametrize("bug", BUGS)
def test_the_replay_sees_a_row_that_meets_the_wrong_one(name: str, bug: str) -> None:
    pipe, call = CASES[name].make()
    with planted(bug):
        check = free.check_pipeline(pipe, verbose=False, **call | {"num_inference_steps": 5})
    assert not check.refused
    assert not check.passed
    assert "cannot be speculated" in str(check)


def test_what_is_refused_is_said_by_the_check() -> None:
    pipe, call = CASES["StableDiffusionControlNetPipeline, two, guess_mode"].make()
    check = free.check_pipeline(pipe, verbose=False, **call, control_guidance_end=[0.5, 1.0])
    assert not check.passed
    assert "control_guidance_end" in check.refused


def test_a_pipeline_that_does_not_repeat_itself_is_not_judged() -> None:
    pipe, call = CASES["DiTPipeline"].make()
    del call["generator"]

    class Wandering(type(pipe)):  # type: ignore[misc]
        calls = 0

        @torch.no_grad()
        def __call__(self, class_labels: list[int], num_inference_steps: int = 6, **call: object) -> object:
            Wandering.calls += 1
            generator = torch.Generator().manual_seed(Wandering.calls)
            return super().__call__(class_labels, generator=generator, num_inference_steps=num_inference_steps, **call)

    pipe.__class__ = Wandering
    with pytest.raises(RuntimeError, match="does not repeat itself"):
        free.check_pipeline(pipe, verbose=False, **call)
