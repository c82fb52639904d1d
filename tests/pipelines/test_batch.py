"""``mode="batch"``: a row of the pipeline's own for each state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import free
from tests.pipelines.cases import CASES
from tests.pipelines.parts import image_vae
from tests.pipelines.planted import BUGS, planted
from tests.pipelines.test_calls import diffusion

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")


def check(name: str, **changed: Any) -> free.PipelineCheck:
    pipe, call = CASES[name].make()
    return free.check_pipeline(pipe, mode="batch", verbose=False, **call | {"num_inference_steps": 5} | changed)


@pytest.mark.parametrize("name", ["StableDiffusionXLPAGPipeline", "SanaPAGPipeline", "ZImagePipeline, guided"])
def test_settled_states_are_answered_as_without_speculation(name: str) -> None:
    checked = check(name)
    assert checked.passed, str(checked)
    assert len(checked.stats.rounds) == 2
    assert checked.stats.forward_batch_sizes == {10: checked.stats.forwards}


@pytest.mark.parametrize("bug", BUGS)
def test_the_replay_sees_a_row_that_meets_the_wrong_one(bug: str) -> None:
    with planted(bug):
        checked = check("StableDiffusionControlNetPAGPipeline")
    assert not checked.refused
    assert not checked.passed


@pytest.mark.parametrize("several", [{}, {"num_images_per_prompt": 2}, {"latents": None}, {"generator": None}])
def test_samples_are_those_of_ragged_rounds(several: dict[str, Any]) -> None:
    pipe, call = diffusion()
    drawn = {}
    for mode in ("ragged", "batch"):
        generator = torch.Generator().manual_seed(1)
        call |= several | {"generator": generator}
        if "latents" in several:
            call["latents"] = torch.randn(2, 4, 2, 2, generator=generator)
        if "generator" in several:
            call["generator"] = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        with free.speculate(pipe, mode=mode, window=3) as run:
            drawn[mode] = pipe(**call).images
            rounds = run.stats.rounds
        assert len(rounds) == len(drawn[mode])
    torch.testing.assert_close(drawn["batch"], drawn["ragged"], rtol=1e-3, atol=1e-3)


def test_only_the_samples_are_decoded_and_seen_by_callbacks() -> None:
    pipe, call = diffusion(output_type="pt")
    pipe.vae = image_vae().eval()
    decode, rows = pipe.vae.decode, []
    pipe.vae.decode = lambda latents, *args, **kwargs: rows.append(len(latents)) or decode(latents, *args, **kwargs)

    def callback(shown: Any, number: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        rows.append(len(tensors["latents"]))
        shown._interrupt = number == 1
        return tensors

    with free.speculate(pipe, mode="batch", window=4) as run:
        assert len(pipe(**call, callback_on_step_end=callback).images) == 2
    assert run.stats.rounds.tolist() == [2, 2]
    assert rows == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("StableDiffusion3ControlNetPipeline", "controlnet is given another controlnet_cond for each row"),
        ("StableDiffusionInstructPix2PixPipeline", "unet is given another sample for each row"),
        ("StableDiffusionAdapterPipeline", "answers the rows of one sample"),
        ("StableDiffusionImg2ImgPipeline", "begins from pictures"),
        ("DiTPipeline", "cannot be asked for several samples of a prompt"),
        ("CogVideoXPipeline", "no multiple of the window"),
    ],
)
def test_what_is_drawn_or_chosen_for_each_row_is_refused(name: str, words: str) -> None:
    assert words in check(name).refused


def test_a_wrong_mode() -> None:
    with pytest.raises(ValueError, match="mode is 'wide'; allowed are 'ragged', 'batch'"):
        free.speculate(diffusion()[0], mode="wide")
