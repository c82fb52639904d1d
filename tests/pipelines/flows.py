"""Flow models that draw pictures from a prompt."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines.images import SQUARE, Made
from tests.pipelines.parts import BATCH, assemble, case, flow, flux, image_vae, noise, prompts, stable_diffusion_3


@case("StableDiffusion3Pipeline", "Stable Diffusion 3")
def sd3() -> Made:
    pipe = assemble("StableDiffusion3Pipeline", transformer=stable_diffusion_3(), scheduler=flow(shift=3.0))
    return pipe, SQUARE | prompts(6, 8, pooled=16)


@case("FluxPipeline", "FLUX", "embedded guidance and a second network call for true guidance")
def flux_text() -> Made:
    pipe = assemble("FluxPipeline", transformer=flux(), scheduler=flow(use_dynamic_shifting=True))
    return pipe, SQUARE | prompts(2, 8, pooled=8) | {"true_cfg_scale": 3.0}


@case("Flux2Pipeline", "FLUX.2")
def flux2() -> Made:
    return _flux2("Flux2Pipeline", True)


@case("Flux2KleinPipeline", "FLUX.2")
def flux2_klein() -> Made:
    pipe, call = _flux2("Flux2KleinPipeline", False)
    return pipe, call | {"negative_prompt_embeds": noise(BATCH, 2, 8, seed=1), "guidance_scale": 4.0}


def _flux2(name: str, guidance_embeds: bool) -> Made:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=[4] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = assemble(name, transformer=transformer, vae=vae, scheduler=flow(use_dynamic_shifting=True))
    return pipe, SQUARE | {"prompt_embeds": noise(BATCH, 2, 8)}


@case("SanaPipeline", "Sana")
def sana() -> Made:
    from diffusers import SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    pipe = assemble("SanaPipeline", transformer=transformer, scheduler=flow(shift=3.0))
    call = prompts(6, 8, mask=True) | {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, call | {"height": 256, "width": 256}


@case("AuraFlowPipeline", "AuraFlow", "the timestep arrives as a number")
def aura_flow() -> Made:
    from diffusers import AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=8,
        pos_embed_max_size=64,
    )
    pipe = assemble("AuraFlowPipeline", transformer=transformer, scheduler=flow())
    return pipe, SQUARE | prompts(6, 8, mask=True)


def qwen(**config: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    given: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "axes_dims_rope": (8, 4, 4),
    }
    return QwenImageTransformer2DModel(**given | config)


def qwen_prompts(tokens: int = 6) -> dict[str, Any]:
    mask = torch.ones(BATCH, tokens, dtype=torch.int64)
    return prompts(tokens, 8) | {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "true_cfg_scale": 3.0}


@case("QwenImagePipeline", "QwenImage", "guidance by a second call, rescaled")
def qwen_image() -> Made:
    pipe = assemble("QwenImagePipeline", transformer=qwen(), scheduler=flow(use_dynamic_shifting=True))
    return pipe, SQUARE | qwen_prompts()


@case("Lumina2Pipeline", "Lumina", "time runs backwards")
def lumina2() -> Made:
    from diffusers import Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=8,
    )
    pipe = assemble("Lumina2Pipeline", transformer=transformer, scheduler=flow())
    call = {name: value.long() if "mask" in name else value for name, value in prompts(6, 8, mask=True).items()}
    return pipe, SQUARE | call


@case("CogView4Pipeline", "CogView")
def cogview4() -> Made:
    from diffusers import CogView4Transformer2DModel

    transformer = CogView4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = assemble("CogView4Pipeline", transformer=transformer, scheduler=scheduler)
    return pipe, SQUARE | prompts(16, 8)


def chroma_transformer() -> Any:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )


@case("ChromaPipeline", "Chroma")
def chroma() -> Made:
    pipe = assemble("ChromaPipeline", transformer=chroma_transformer(), scheduler=flow())
    return pipe, SQUARE | prompts(4, 8, mask=True)


@case("HiDreamImagePipeline", "HiDream")
def hidream() -> Made:
    from diffusers import HiDreamImageTransformer2DModel

    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    pipe = assemble("HiDreamImagePipeline", transformer=transformer, scheduler=flow())
    call = {
        "prompt_embeds_t5": noise(BATCH, 6, 32),
        "negative_prompt_embeds_t5": noise(BATCH, 6, 32, seed=1),
        "prompt_embeds_llama3": noise(2, BATCH, 6, 16),
        "negative_prompt_embeds_llama3": noise(2, BATCH, 6, 16, seed=1),
        "pooled_prompt_embeds": noise(BATCH, 64),
        "negative_pooled_prompt_embeds": noise(BATCH, 64, seed=1),
    }
    return pipe, SQUARE | call


@case("LuminaPipeline", "Lumina")
def lumina() -> Made:
    from diffusers import LuminaNextDiT2DModel

    transformer = LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=4,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=8,
    )
    pipe = assemble("LuminaPipeline", transformer=transformer, scheduler=flow())
    return pipe, SQUARE | prompts(6, 8, mask=True) | {"negative_prompt": None}


@case("ZImagePipeline", "Z-Image", "states and prompts are lists")
def z_image() -> Made:
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipe = assemble("ZImagePipeline", transformer=transformer, scheduler=flow(shift=3.0))
    call = {"prompt_embeds": [noise(6, 8), noise(6, 8, seed=1)], "negative_prompt_embeds": [], "guidance_scale": 0.0}
    return pipe, SQUARE | call


@case("OvisImagePipeline", "Ovis")
def ovis() -> Made:
    from diffusers import OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = assemble("OvisImagePipeline", transformer=transformer, scheduler=flow(use_dynamic_shifting=True))
    return pipe, SQUARE | prompts(6, 8) | {"negative_prompt": None}


@case("PRXPipeline", "PRX", "written for one sample under guidance")
def prx() -> Made:
    from diffusers import PRXTransformer2DModel

    transformer = PRXTransformer2DModel(
        patch_size=1, in_channels=4, context_in_dim=8, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2]
    )
    pipe = assemble("PRXPipeline", transformer=transformer, vae=image_vae(), scheduler=flow())
    mask = torch.ones(1, 6, dtype=torch.bool)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "use_resolution_binning": False}
    return pipe, SQUARE | prompts(6, 8, batch=1) | masks
