"""Pipelines whose networks others have adapted, hooked or lent to one another."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import free
from tests.pipelines.parts import assemble, noise
from tests.pipelines.planted import BUGS, planted
from tests.pipelines.test_calls import diffusion


def seeded(call: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    return call | {"generator": torch.Generator().manual_seed(seed)}


@pytest.mark.parametrize("way", ["loaded", "peft model"])
def test_low_rank_adapters(way: str) -> None:
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers

    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe, call = diffusion()
    before = pipe(**seeded(call)).images
    if way == "loaded":
        trained = copy.deepcopy(pipe.unet)
        trained.add_adapter(config)
        weights = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(trained))
        pipe.load_lora_weights({f"unet.{name}": value for name, value in weights.items()}, adapter_name="style")
        pipe.set_adapters(["style"], [0.7])
    else:
        pipe.unet = peft.get_peft_model(pipe.unet, config).eval()
    assert not torch.allclose(before, pipe(**seeded(call)).images, atol=0.01)
    check = free.check_pipeline(pipe, verbose=False, **call)
    assert check.passed, str(check)


def test_dropout_of_an_adapter_is_still_refused_in_train_mode() -> None:
    peft = pytest.importorskip("peft")
    pipe, call = diffusion()
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], lora_dropout=0.1))
    with free.speculate(pipe), pytest.raises(ValueError, match="unet: model is in train mode"):
        pipe(**call)
    pipe.unet.eval()
    assert free.check_pipeline(pipe, verbose=False, **call).passed


def image_prompted() -> tuple[Any, dict[str, Any]]:
    """An image prompt (IP-Adapter) beside the words."""
    pipe, call = diffusion()
    weights, modules = {}, dict(pipe.unet.named_modules())
    crossed = [name.removesuffix(".processor") for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossed):
        width = modules[name].to_k.out_features
        weights |= {f"{2 * number + 1}.to_{part}_ip.weight": noise(width, 8, seed=number) for part in "kv"}
    projection = {
        "proj.weight": noise(32, 6),
        "proj.bias": noise(32),
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
    }
    adapter = {"image_proj": projection, "ip_adapter": weights}
    pipe.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.unet.eval()
    return pipe, call | {"ip_adapter_image_embeds": [noise(2, 1, 6, seed=5)]}


@pytest.mark.parametrize("mode", ["ragged", "batch"])
def test_an_image_prompt(mode: str) -> None:
    pipe, call = image_prompted()
    check = free.check_pipeline(pipe, mode=mode, verbose=False, **call)
    assert check.passed, str(check)
    with planted(BUGS[0]):
        assert not free.check_pipeline(pipe, mode=mode, verbose=False, **call).passed


@pytest.mark.parametrize("way", ["model", "group", "layers"])
def test_networks_that_are_brought_when_they_are_needed(way: str) -> None:
    pipe, call = diffusion()
    here = torch.device("cpu")
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif way == "group":
        pipe.unet.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")
    else:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    check = free.check_pipeline(pipe, verbose=False, **call)
    assert check.passed, str(check)


def test_two_speculated_pipelines_share_their_parts_one_within_the_other_and_from_two_threads() -> None:
    pipe, call = diffusion()
    other = assemble("StableDiffusionPipeline", unet=pipe.unet, scheduler=pipe.scheduler, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    within, drawn = [], {}
    with free.speculate(pipe, window=3), free.speculate(other, window=4):
        expected = [one(**seeded(call, seed)).images for seed, one in enumerate((pipe, other))]

        def callback(*shown: Any) -> dict[str, Any]:
            within.append(other(**seeded(call, 1)).images)
            return {}

        assert torch.equal(pipe(**seeded(call), callback_on_step_end=callback).images, expected[0])

        def draw(seed: int, one: Any) -> None:
            drawn[seed] = [one(**seeded(call, seed)).images for _ in range(4)]

        threads = [threading.Thread(target=draw, args=given) for given in enumerate((pipe, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert within
    assert all(torch.equal(samples, expected[1]) for samples in within)
    for seed in (0, 1):
        assert len(drawn[seed]) == 4
        assert all(torch.equal(samples, expected[seed]) for samples in drawn[seed])


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("way", [{}, {"window": "auto"}, {"mode": "batch"}])
def test_few_steps(steps: int, way: dict[str, Any]) -> None:
    pipe, call = diffusion(steps, guidance_scale=1.0)
    del call["negative_prompt_embeds"]
    check = free.check_pipeline(pipe, verbose=False, **way, **call)
    assert check.passed
    assert len(check.error) == steps


def test_what_was_finished_is_not_lost_where_a_network_breaks() -> None:
    pipe, call = diffusion()
    calls: list[int] = []

    def breaking(module: torch.nn.Module, given: Any, output: Any) -> Any:
        calls.append(len(output[0]))
        return (torch.full_like(output[0], float("nan")),) if len(calls) == 3 else output

    hook = pipe.unet.register_forward_hook(breaking)
    with free.speculate(pipe, window=3):
        with pytest.raises(free.NonFiniteOutputError, match=r"model returned NaN or infinity at step \d") as raised:
            pipe(**call)
        hook.remove()
        assert raised.value.samples.shape == (2, 4, 2, 2)
        assert torch.isfinite(pipe(**call).images).all()
