"""Pipelines that are given a picture: control, image to image, editing, filling in, enlarging."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tests.pipelines.images import (
    SQUARE,
    Made,
    chroma_transformer,
    hunyuan_dit_call,
    hunyuan_dit_transformer,
    qwen,
    qwen_prompts,
)
from tests.pipelines.parts import (
    SDXL,
    SIZE,
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
    names = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    extra = {name: SDXL[name] for name in (*names, "attention_head_dim", "transformer_layers_per_block")}
    pipe = assemble(
        "StableDiffusionXLControlNetPipeline",
        unet=unet(**SDXL),
        controlnet=controlnet(use_linear_projection=True, **extra),
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


@case("StableDiffusionImg2ImgPipeline", "image to image", "begins in the middle of the schedule")
def sd_img2img() -> Made:
    pipe = assemble(
        "StableDiffusionImg2ImgPipeline", unet=unet(), vae=image_vae(), scheduler=ddpm(), requires_safety_checker=False
    )
    return pipe, prompts(6, 8) | {"image": picture(), "strength": 0.7}


@case("StableDiffusionXLImg2ImgPipeline", "image to image", "begins in the middle of the schedule")
def sdxl_img2img() -> Made:
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = assemble(
        "StableDiffusionXLImg2ImgPipeline",
        unet=unet(**SDXL),
        vae=image_vae(),
        scheduler=EulerAncestralDiscreteScheduler(),
        add_watermarker=False,
    )
    return pipe, prompts(6, 8, pooled=32) | {"image": picture(), "strength": 0.7}


@case("StableDiffusion3Img2ImgPipeline", "image to image")
def sd3_img2img() -> Made:
    pipe = assemble(
        "StableDiffusion3Img2ImgPipeline",
        transformer=stable_diffusion_3(),
        vae=image_vae(shift_factor=0.1),
        scheduler=flow(),
    )
    return pipe, SQUARE | prompts(6, 8, pooled=16) | {"image": picture(), "strength": 0.7}


@case("FluxImg2ImgPipeline", "image to image")
def flux_img2img() -> Made:
    pipe = assemble(
        "FluxImg2ImgPipeline", transformer=flux(), vae=image_vae(shift_factor=0.1), scheduler=flow(use_dynamic_shifting=True)
    )
    call = prompts(2, 8, pooled=8)
    del call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"]
    return pipe, SQUARE | call | {"image": picture(), "strength": 0.7}


@case("ChromaImg2ImgPipeline", "image to image")
def chroma_img2img() -> Made:
    pipe = assemble(
        "ChromaImg2ImgPipeline", transformer=chroma_transformer(), vae=image_vae(shift_factor=0.1), scheduler=flow()
    )
    return pipe, SQUARE | prompts(4, 8, mask=True) | {"image": picture(), "strength": 0.7}


@case("QwenImageImg2ImgPipeline", "image to image")
def qwen_img2img() -> Made:
    pipe = assemble(
        "QwenImageImg2ImgPipeline", transformer=qwen(), vae=qwen_vae(), scheduler=flow(use_dynamic_shifting=True)
    )
    return pipe, SQUARE | qwen_prompts() | {"image": picture(), "strength": 0.7}


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


@case("FluxKontextPipeline", "editing", "the picture follows the latents")
def flux_kontext() -> Made:
    pipe = assemble(
        "FluxKontextPipeline", transformer=flux(), vae=image_vae(shift_factor=0.1), scheduler=flow(use_dynamic_shifting=True)
    )
    call = prompts(2, 8, pooled=8) | {"image": picture(), "max_area": SIZE * SIZE, "_auto_resize": False}
    return pipe, SQUARE | call | {"true_cfg_scale": 3.0}


@case("StableDiffusionInstructPix2PixPipeline", "editing", "guidance of three parts")
def instruct_pix2pix() -> Made:
    pipe = assemble(
        "StableDiffusionInstructPix2PixPipeline",
        unet=unet(in_channels=8),
        vae=image_vae(),
        scheduler=ddpm(),
        requires_safety_checker=False,
    )
    return pipe, prompts(6, 8) | {"image": picture()}


@case("StableDiffusionXLInstructPix2PixPipeline", "editing", "guidance of three parts")
def sdxl_instruct_pix2pix() -> Made:
    pipe = assemble(
        "StableDiffusionXLInstructPix2PixPipeline",
        unet=unet(in_channels=8, **SDXL),
        vae=image_vae(),
        scheduler=ddpm(),
        add_watermarker=False,
    )
    return pipe, SQUARE | prompts(6, 8, pooled=32) | {"image": picture()}


@case("FluxControlPipeline", "control beside the latents")
def flux_control() -> Made:
    pipe = assemble(
        "FluxControlPipeline",
        transformer=flux(in_channels=32, out_channels=16),
        vae=image_vae(shift_factor=0.1),
        scheduler=flow(use_dynamic_shifting=True),
    )
    call = prompts(2, 8, pooled=8)
    del call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"]
    return pipe, SQUARE | call | {"control_image": picture()}


@case("FluxFillPipeline", "filling in", "mask and picture beside the latents")
def flux_fill() -> Made:
    pipe = assemble(
        "FluxFillPipeline",
        transformer=flux(in_channels=16 + 16 + 256, out_channels=16),
        vae=image_vae(shift_factor=0.1),
        scheduler=flow(use_dynamic_shifting=True),
    )
    call = prompts(2, 8, pooled=8)
    del call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"]
    return pipe, SQUARE | call | {"image": picture(), "mask_image": (picture(1) > 0.5).float()}


@case("StableDiffusionInpaintPipeline, 9 channels", "filling in", "mask and picture beside the latents")
def sd_inpaint() -> Made:
    pipe = assemble(
        "StableDiffusionInpaintPipeline",
        unet=unet(in_channels=9),
        vae=image_vae(),
        scheduler=ddpm(),
        requires_safety_checker=False,
    )
    return pipe, SQUARE | prompts(6, 8) | {"image": picture(), "mask_image": (picture(1) > 0.5).float()}


@case("StableDiffusionUpscalePipeline", "enlarging", "a noise level a sample")
def sd_upscale() -> Made:
    pipe = assemble(
        "StableDiffusionUpscalePipeline",
        unet=unet(in_channels=7, num_class_embeds=1000),
        vae=image_vae(levels=3),
        low_res_scheduler=ddpm(),
        scheduler=ddpm(),
    )
    return pipe, prompts(6, 8) | {"image": picture(size=16)}
