"""Pipelines that draw pictures from a class or a prompt by schedules of betas."""

from __future__ import annotations

from typing import Any

from tests.pipelines.parts import SDXL, SIZE, assemble, case, ddpm, image_vae, prompts, unet

SQUARE = {"height": SIZE, "width": SIZE}
Made = tuple[Any, dict[str, Any]]


@case("DiTPipeline", "DiT", "guidance doubles the latents before the loop")
def dit() -> Made:
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    pipe = assemble("DiTPipeline", transformer=transformer, vae=image_vae(levels=1), scheduler=ddpm())
    return pipe, {"class_labels": [1, 2], "guidance_scale": 1.5, "output_type": "pt"}


def _pixart(name: str) -> Made:
    from diffusers import DDIMScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        cross_attention_dim=8,
        out_channels=8,
        use_additional_conditions=False,
    )
    pipe = assemble(name, transformer=transformer, scheduler=DDIMScheduler())
    return pipe, SQUARE | prompts(6, 8, mask=True) | {"negative_prompt": None, "use_resolution_binning": False}


@case("PixArtAlphaPipeline", "PixArt", "DDIM as DDPM; a learned variance is dropped")
def pixart_alpha() -> Made:
    return _pixart("PixArtAlphaPipeline")


@case("PixArtSigmaPipeline", "PixArt", "DDIM as DDPM; a learned variance is dropped")
def pixart_sigma() -> Made:
    return _pixart("PixArtSigmaPipeline")


@case("StableDiffusionPipeline", "Stable Diffusion", "Euler ancestral")
def stable_diffusion() -> Made:
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = assemble(
        "StableDiffusionPipeline", unet=unet(), scheduler=EulerAncestralDiscreteScheduler(), requires_safety_checker=False
    )
    return pipe, SQUARE | prompts(6, 8) | {"guidance_scale": 5.0}


@case("StableDiffusionXLPipeline", "Stable Diffusion XL", "SDE-DPM-Solver++ of second order")
def stable_diffusion_xl() -> Made:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    pipe = assemble("StableDiffusionXLPipeline", unet=unet(**SDXL), scheduler=scheduler, add_watermarker=False)
    return pipe, SQUARE | prompts(6, 8, pooled=32)


@case("KolorsPipeline", "Kolors")
def kolors() -> Made:
    network = unet(**SDXL | {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"})
    pipe = assemble("KolorsPipeline", unet=network, scheduler=ddpm())
    return pipe, SQUARE | prompts(6, 8, pooled=32)


@case("HunyuanDiTPipeline", "HunyuanDiT", "the timestep arrives as a number")
def hunyuan_dit() -> Made:
    pipe = assemble(
        "HunyuanDiTPipeline", transformer=hunyuan_dit_transformer(), scheduler=ddpm(), requires_safety_checker=False
    )
    return pipe, hunyuan_dit_call()


def hunyuan_dit_transformer() -> Any:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        hidden_size=24,
        activation_fn="gelu-approximate",
        text_len=6,
        text_len_t5=6,
    )


def hunyuan_dit_call() -> dict[str, Any]:
    call: dict[str, Any] = prompts(6, 8, mask=True)
    call |= {f"{name}_2": value.flip(0) for name, value in call.items()}
    return call | {"height": 128, "width": 128, "use_resolution_binning": False}


@case("CogView3PlusPipeline", "CogView")
def cogview3_plus() -> Made:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusTransformer2DModel

    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    pipe = assemble("CogView3PlusPipeline", transformer=transformer, scheduler=CogVideoXDDIMScheduler())
    return pipe, SQUARE | prompts(16, 8)
