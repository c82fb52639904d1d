"""Pipelines with a network beside the main one: ControlNet, T2I-Adapter."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tests.pipelines.conditioned import qwen_vae
from tests.pipelines.flows import qwen, qwen_prompts
from tests.pipelines.images import SQUARE, Made, hunyuan_dit_call, hunyuan_dit_transformer
from tests.pipelines.parts import (
    SDXL,
    assemble,
    case,
    ddpm,
    flow,
    flux,
    image_vae,
    picture,
    prompts,
    sd3_config,
    stable_diffusion_3,
    unet,
)


def controlnet(**config: Any) -> Any:
    from diffusers import ControlNetModel

    given: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "in_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (2, 4, 4, 4),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return _awake(ControlNetModel(**given | config))


def _awake(network: torch.nn.Module) -> torch.nn.Module:
    """Control begins at zero: with random weights everywhere it takes part."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@case("StableDiffusionControlNetPipeline", "ControlNet")
def sd_controlnet() -> Made:
    pipe = assemble(
        "StableDiffusionControlNetPipeline",
        unet=unet(),
        controlnet=controlnet(),
        scheduler=ddpm(),
        requires_safety_checker=False,
    )
    return pipe, prompts(6, 8) | {"image": picture()}


@case("StableDiffusionControlNetPipeline, two, guess_mode", "ControlNet", "two nets, for the conditional half only")
def sd_two_controlnets() -> Made:
    pipe = assemble(
        "StableDiffusionControlNetPipeline",
        unet=unet(),
        controlnet=[controlnet(), controlnet()],
        scheduler=ddpm(),
        requires_safety_checker=False,
    )
    scales = {"controlnet_conditioning_scale": [1.0, 0.5], "guess_mode": True}
    return pipe, prompts(6, 8) | scales | {"image": [picture(), 1 - picture()]}


@case("StableDiffusionControlNetImg2ImgPipeline", "ControlNet")
def sd_controlnet_img2img() -> Made:
    pipe = assemble(
        "StableDiffusionControlNetImg2ImgPipeline",
        unet=unet(),
        vae=image_vae(),
        controlnet=controlnet(),
        scheduler=ddpm(),
        requires_safety_checker=False,
    )
    return pipe, prompts(6, 8) | {"image": picture(), "control_image": 1 - picture()}


@case("StableDiffusionXLControlNetPipeline", "ControlNet")
def sdxl_controlnet() -> Made:
    pipe = assemble(
        "StableDiffusionXLControlNetPipeline",
        unet=unet(**SDXL),
        controlnet=controlnet(**SDXL),
        scheduler=ddpm(),
        add_watermarker=False,
    )
    return pipe, prompts(6, 8, pooled=32) | {"image": picture()}


@case("StableDiffusion3ControlNetPipeline", "ControlNet", "a list of residuals, one a layer")
def sd3_controlnet() -> Made:
    from diffusers import SD3ControlNetModel

    pipe = assemble(
        "StableDiffusion3ControlNetPipeline",
        transformer=stable_diffusion_3(),
        controlnet=_awake(SD3ControlNetModel(**sd3_config(num_layers=2))),
        vae=image_vae(shift_factor=0.1),
        scheduler=flow(),
    )
    return pipe, SQUARE | prompts(6, 8, pooled=16) | {"control_image": picture()}


@case("FluxControlNetPipeline", "ControlNet")
def flux_controlnet() -> Made:
    from diffusers import FluxControlNetModel

    transformer = flux(guidance_embeds=False)
    control = FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16
    )
    pipe = assemble(
        "FluxControlNetPipeline",
        transformer=transformer,
        controlnet=_awake(control),
        vae=image_vae(shift_factor=0.1),
        scheduler=flow(),
    )
    return pipe, SQUARE | prompts(2, 8, pooled=8) | {"control_image": picture()}


@case("HunyuanDiTControlNetPipeline", "ControlNet")
def hunyuan_dit_controlnet() -> Made:
    from diffusers import HunyuanDiT2DControlNetModel

    transformer = hunyuan_dit_transformer()
    names = inspect.signature(HunyuanDiT2DControlNetModel.__init__).parameters
    config = {name: value for name, value in transformer.config.items() if name in names}
    control = HunyuanDiT2DControlNetModel(**config | {"transformer_num_layers": 2})
    pipe = assemble(
        "HunyuanDiTControlNetPipeline",
        transformer=transformer,
        controlnet=_awake(control),
        vae=image_vae(),
        scheduler=ddpm(),
        requires_safety_checker=False,
    )
    return pipe, hunyuan_dit_call() | {"control_image": picture(size=128)}


_FOR_ADAPTERS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@case("StableDiffusionAdapterPipeline", "T2I-Adapter")
def sd_adapter() -> Made:
    from diffusers import T2IAdapter

    adapter = T2IAdapter(in_channels=3, channels=[4, 8], num_res_blocks=2, downscale_factor=8)
    pipe = assemble(
        "StableDiffusionAdapterPipeline",
        unet=unet(**_FOR_ADAPTERS),
        adapter=adapter,
        scheduler=ddpm(),
        requires_safety_checker=False,
    )
    return pipe, prompts(6, 8) | {"image": picture()}


@case("StableDiffusionXLAdapterPipeline", "T2I-Adapter")
def sdxl_adapter() -> Made:
    from diffusers import T2IAdapter

    adapter = T2IAdapter(in_channels=3, channels=[4, 8], num_res_blocks=2, downscale_factor=8)
    pipe = assemble("StableDiffusionXLAdapterPipeline", unet=unet(**SDXL | _FOR_ADAPTERS), adapter=adapter, scheduler=ddpm())
    return pipe, prompts(6, 8, pooled=32) | {"image": picture()}


@case("StableDiffusionXLControlNetImg2ImgPipeline", "ControlNet")
def sdxl_controlnet_img2img() -> Made:
    pipe = assemble(
        "StableDiffusionXLControlNetImg2ImgPipeline",
        unet=unet(**SDXL),
        vae=image_vae(),
        controlnet=controlnet(**SDXL),
        scheduler=ddpm(),
        add_watermarker=False,
    )
    return pipe, prompts(6, 8, pooled=32) | {"image": picture(), "control_image": 1 - picture()}


@case("QwenImageControlNetPipeline", "ControlNet")
def qwen_controlnet() -> Made:
    from diffusers import QwenImageControlNetModel

    known = inspect.signature(QwenImageControlNetModel.__init__).parameters
    config = {name: value for name, value in qwen().config.items() if name in known}
    pipe = assemble(
        "QwenImageControlNetPipeline",
        transformer=qwen(),
        controlnet=_awake(QwenImageControlNetModel(**config)),
        vae=qwen_vae(),
        scheduler=flow(use_dynamic_shifting=True),
    )
    return pipe, SQUARE | qwen_prompts() | {"control_image": picture()}
