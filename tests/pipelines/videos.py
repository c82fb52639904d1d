"""Pipelines that draw films."""

from __future__ import annotations

import inspect
from typing import Any

from tests.pipelines.images import SQUARE, Made
from tests.pipelines.parts import assemble, case, ddpm, flow, picture, prompts, unet


@case("LattePipeline", "Latte")
def latte() -> Made:
    from diffusers import DDIMScheduler, LatteTransformer3DModel

    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        video_length=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    pipe = assemble("LattePipeline", transformer=transformer, scheduler=DDIMScheduler(clip_sample=False))
    return pipe, SQUARE | prompts(6, 8) | {"video_length": 2, "negative_prompt": None}


def cogvideox(**config: Any) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    given: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 8,
        "num_layers": 1,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 6,
    }
    return CogVideoXTransformer3DModel(**given | config)


def cogvideox_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


@case("CogVideoXPipeline", "CogVideoX")
def cogvideox_text() -> Made:
    from diffusers import CogVideoXDDIMScheduler

    pipe = assemble("CogVideoXPipeline", transformer=cogvideox(), scheduler=CogVideoXDDIMScheduler())
    return pipe, SQUARE | prompts(6, 8) | {"num_frames": 9, "max_sequence_length": 6}


@case("CogVideoXImageToVideoPipeline", "CogVideoX", "the picture beside the latents")
def cogvideox_image() -> Made:
    from diffusers import CogVideoXDDIMScheduler

    pipe = assemble(
        "CogVideoXImageToVideoPipeline",
        transformer=cogvideox(in_channels=8),
        vae=cogvideox_vae(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    return pipe, SQUARE | prompts(6, 8) | {"image": picture(), "num_frames": 9, "max_sequence_length": 6}


@case("CogVideoXVideoToVideoPipeline", "CogVideoX")
def cogvideox_video() -> Made:
    from diffusers import CogVideoXDDIMScheduler

    pipe = assemble(
        "CogVideoXVideoToVideoPipeline", transformer=cogvideox(), vae=cogvideox_vae(), scheduler=CogVideoXDDIMScheduler()
    )
    film = list(picture(batch=9))
    call = {name: value[:1] for name, value in prompts(6, 8).items()}
    return pipe, SQUARE | call | {"video": [film], "max_sequence_length": 6, "strength": 0.7}


def ltx() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=8,
    )


def ltx_vae() -> Any:
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


@case("LTXPipeline", "LTX")
def ltx_text() -> Made:
    pipe = assemble("LTXPipeline", transformer=ltx(), vae=ltx_vae(), scheduler=flow())
    return pipe, prompts(6, 8, mask=True) | {"height": 32, "width": 32, "num_frames": 9}


@case("LTXImageToVideoPipeline", "LTX", "a timestep a token; the first frame is given")
def ltx_image() -> Made:
    pipe = assemble("LTXImageToVideoPipeline", transformer=ltx(), vae=ltx_vae(), scheduler=flow())
    call = prompts(6, 8, mask=True) | {"image": picture(size=32)}
    return pipe, call | {"height": 32, "width": 32, "num_frames": 9}


def wan(**config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    given: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**given | config)


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


FILM = {"height": 32, "width": 32, "num_frames": 5}


@case("WanPipeline", "Wan 2.1", "guidance by a second call")
def wan_text() -> Made:
    pipe = assemble("WanPipeline", transformer=wan(), vae=wan_vae(), scheduler=flow(shift=3.0))
    return pipe, FILM | prompts(6, 8)


@case("WanPipeline, two networks", "Wan 2.2", "the network changes at a timestep")
def wan_two() -> Made:
    pipe = assemble(
        "WanPipeline",
        transformer=wan(),
        transformer_2=wan(),
        vae=wan_vae(),
        scheduler=flow(shift=3.0),
        boundary_ratio=0.8,
    )
    return pipe, FILM | prompts(6, 8) | {"guidance_scale_2": 2.0}


@case("WanPipeline, expand_timesteps", "Wan 2.2", "a timestep a token")
def wan_tokens() -> Made:
    pipe = assemble("WanPipeline", transformer=wan(), vae=wan_vae(), scheduler=flow(shift=3.0), expand_timesteps=True)
    return pipe, FILM | prompts(6, 8)


@case("WanImageToVideoPipeline", "Wan 2.1", "the picture beside the latents")
def wan_image() -> Made:
    pipe = assemble(
        "WanImageToVideoPipeline",
        transformer=wan(in_channels=12),
        vae=wan_vae(),
        scheduler=flow(shift=3.0),
    )
    call = {name: value[:1] for name, value in prompts(6, 8).items()}
    return pipe, FILM | call | {"image": picture(size=32, batch=1)}


@case("WanVideoToVideoPipeline", "Wan 2.1")
def wan_video() -> Made:
    pipe = assemble("WanVideoToVideoPipeline", transformer=wan(), vae=wan_vae(), scheduler=flow(shift=3.0))
    call = {name: value[:1] for name, value in prompts(6, 8).items()} | {"video": [list(picture(size=32, batch=5))]}
    return pipe, {"height": 32, "width": 32, "strength": 0.7} | call


@case("HunyuanVideoPipeline", "HunyuanVideo")
def hunyuan_video() -> Made:
    from diffusers import HunyuanVideoTransformer3DModel

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    pipe = assemble("HunyuanVideoPipeline", transformer=transformer, scheduler=flow(shift=7.0))
    call = prompts(6, 8, pooled=8, mask=True) | {"true_cfg_scale": 3.0}
    return pipe, {"height": 32, "width": 32, "num_frames": 5} | call


@case("MochiPipeline", "Mochi")
def mochi() -> Made:
    from diffusers import MochiTransformer3DModel

    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        qk_norm="rms_norm",
        text_embed_dim=8,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=6,
    )
    pipe = assemble("MochiPipeline", transformer=transformer, scheduler=flow(invert_sigmas=True))
    call = prompts(6, 8, mask=True) | {"height": 32, "width": 32, "num_frames": 7, "max_sequence_length": 6}
    return pipe, {name: value.bool() if "mask" in name else value for name, value in call.items()}


@case("AllegroPipeline", "Allegro")
def allegro() -> Made:
    from diffusers import AllegroTransformer3DModel

    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=8,
    )
    pipe = assemble("AllegroPipeline", transformer=transformer, scheduler=ddpm())
    call = prompts(6, 8, mask=True) | {"num_frames": 8, "height": 16, "width": 16, "negative_prompt": None}
    return pipe, call


@case("AnimateDiffPipeline", "AnimateDiff", "frames become rows inside the network")
def animatediff() -> Made:
    from diffusers import DDIMScheduler, MotionAdapter, UNetMotionModel

    adapter = MotionAdapter(
        block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    pipe = assemble(
        "AnimateDiffPipeline",
        unet=UNetMotionModel.from_unet2d(unet(), adapter),
        motion_adapter=adapter,
        scheduler=DDIMScheduler(clip_sample=False, beta_schedule="linear"),
    )
    return pipe, SQUARE | prompts(6, 8) | {"num_frames": 2}


@case("SkyReelsV2Pipeline", "SkyReels")
def skyreels() -> Made:
    from diffusers import SkyReelsV2Transformer3DModel

    names = inspect.signature(SkyReelsV2Transformer3DModel.__init__).parameters
    config = {name: value for name, value in wan().config.items() if name in names}
    transformer = SkyReelsV2Transformer3DModel(**config)
    pipe = assemble("SkyReelsV2Pipeline", transformer=transformer, vae=wan_vae(), scheduler=flow(shift=3.0))
    return pipe, FILM | prompts(6, 8)


@case("SanaVideoPipeline", "Sana")
def sana_video() -> Made:
    from diffusers import SanaVideoTransformer3DModel

    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    pipe = assemble("SanaVideoPipeline", transformer=transformer, vae=wan_vae(), scheduler=flow(shift=3.0))
    call = {"negative_prompt": None, "use_resolution_binning": False, "height": 32, "width": 32, "frames": 5}
    return pipe, prompts(6, 8, mask=True) | call
