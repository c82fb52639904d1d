"""Pipelines that are given a picture: image to image, editing, filling in, enlarging."""

from __future__ import annotations

from typing import Any

from tests.pipelines.flows import chroma_transformer, qwen, qwen_prompts
from tests.pipelines.images import SQUARE, Made
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
    stable_diffusion_3,
    unet,
)


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


@case("FluxControlImg2ImgPipeline", "control beside the latents")
def flux_control_img2img() -> Made:
    pipe = assemble(
        "FluxControlImg2ImgPipeline",
        transformer=flux(in_channels=32, out_channels=16),
        vae=image_vae(shift_factor=0.1),
        scheduler=flow(use_dynamic_shifting=True),
    )
    call = prompts(2, 8, pooled=8)
    del call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"]
    return pipe, SQUARE | call | {"image": picture(), "control_image": 1 - picture(), "strength": 0.7}


@case("StableDiffusionXLInpaintPipeline, 9 channels", "filling in", "mask and picture beside the latents")
def sdxl_inpaint() -> Made:
    pipe = assemble(
        "StableDiffusionXLInpaintPipeline",
        unet=unet(in_channels=9, **SDXL),
        vae=image_vae(),
        scheduler=ddpm(),
        add_watermarker=False,
    )
    call = {"image": picture(), "mask_image": (picture(1) > 0.5).float(), "strength": 1.0}
    return pipe, SQUARE | prompts(6, 8, pooled=32) | call
