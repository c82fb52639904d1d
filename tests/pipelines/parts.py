"""What the zoo's pipelines are put together from: tiny networks of random weights, embeddings, pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BATCH = 2
SIZE = 64
"""Pixels a side of what is drawn: 8 latents a side."""


@dataclass(frozen=True)
class Case:
    """A pipeline, and a call of it."""

    name: str
    family: str
    build: Callable[[], tuple[Any, dict[str, Any]]]
    note: str = ""
    """What is special about the call."""
    mode: str = "ragged"

    def make(self) -> tuple[Any, dict[str, Any]]:
        """The pipeline in eval mode, and the call's arguments, latents as its result."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe, call = self.build()
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        steps = {} if "num_inference_steps" in call else {"num_inference_steps": 12}
        return pipe, {"generator": torch.Generator().manual_seed(3), "output_type": "latent"} | steps | call


CASES: dict[str, Case] = {}


Build = Callable[[], tuple[Any, dict[str, Any]]]


def case(name: str, family: str, note: str = "", mode: str = "ragged") -> Callable[[Build], Build]:
    """Enters the function below it, which makes a pipeline and a call's arguments, as a case."""

    def enter(build: Build) -> Build:
        assert name not in CASES
        CASES[name] = Case(name, family, build, note, mode)
        return build

    return enter


def assemble(pipeline: str, **components: Any) -> Any:
    """A pipeline of diffusers by its name; what is not given is None."""
    import diffusers

    kind = getattr(diffusers, pipeline)
    needed = {
        name: None
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    return kind(**needed | components)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(channels: int = 3, size: int = SIZE, batch: int = BATCH) -> torch.Tensor:
    """float32 [batch, channels, size, size] in [0, 1]."""
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(5))


def prompts(tokens: int, width: int, *, pooled: int = 0, mask: bool = False, batch: int = BATCH) -> dict[str, torch.Tensor]:
    """The embeddings of a prompt and of a negative one, as most pipelines call them."""
    given = {"prompt_embeds": noise(batch, tokens, width), "negative_prompt_embeds": noise(batch, tokens, width, seed=1)}
    if pooled:
        given["pooled_prompt_embeds"] = noise(batch, pooled, seed=2)
        given["negative_pooled_prompt_embeds"] = noise(batch, pooled, seed=3)
    if mask:
        given["prompt_attention_mask"] = torch.ones(batch, tokens)
        given["negative_prompt_attention_mask"] = torch.ones(batch, tokens)
    return given


def image_vae(latent_channels: int = 4, levels: int = 4, **config: Any) -> Any:
    """An autoencoder that makes a picture ``2 ** (levels - 1)`` times smaller."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[4] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=SIZE,
        **config,
    )


def unet(**config: Any) -> Any:
    """A conditional U-Net of two levels."""
    from diffusers import UNet2DConditionModel

    given: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return UNet2DConditionModel(**given | config)


SDXL = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 80,
}
"""What a U-Net of SDXL has beside that of SD: pooled embeddings of 32 and six numbers of size."""


def flux(**config: Any) -> Any:
    """A Flux transformer over latents of 4 channels, packed to 16."""
    from diffusers import FluxTransformer2DModel

    given: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**given | config)


def sd3_config(**config: Any) -> dict[str, Any]:
    """Of a transformer of SD3, and of its ControlNet."""
    return {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 16,
        "out_channels": 4,
    } | config


def stable_diffusion_3() -> Any:
    """A transformer of SD3."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**sd3_config())


def flow(**config: Any) -> Any:
    """The scheduler of flow models."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def ddpm(**config: Any) -> Any:
    """A scheduler over a schedule of betas that draws noise."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(clip_sample=False, **config)
