"""Pipelines that count their latents by prompts, and have a row for each state: ``mode="batch"``."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from tests.pipelines import controlled, flows, images  # noqa: F401 - what these cases are made of
from tests.pipelines.images import Made
from tests.pipelines.parts import CASES, assemble, case, noise


def _perturbed(name: str, base: str, layers: str) -> None:
    """Enters a pipeline of perturbed attention guidance with the parts, and the call, of one without."""

    def build() -> Made:
        pipe, given = CASES[base].build()
        taken = inspect.signature(getattr(diffusers, name).__init__).parameters
        parts: dict[str, Any] = {key: False for key in ("requires_safety_checker", "add_watermarker") if key in taken}
        parts |= {key: part for key, part in pipe.components.items() if key in taken and part is not None}
        made = assemble(name, **parts)
        made.set_pag_applied_layers(layers, **_processors(name))
        return made, given | {"pag_scale": 2.0}

    case(name, "perturbed attention", "guidance by a third answer", mode="batch")(build)


def _processors(name: str) -> dict[str, Any]:
    """What a transformer without the usual attention wants beside the layers."""
    if not name.startswith("Sana"):
        return {}
    from diffusers.models.attention_processor import PAGCFGSanaLinearAttnProcessor2_0, PAGIdentitySanaLinearAttnProcessor2_0

    return {"pag_attn_processors": (PAGCFGSanaLinearAttnProcessor2_0(), PAGIdentitySanaLinearAttnProcessor2_0())}


_perturbed("StableDiffusionPAGPipeline", "StableDiffusionPipeline", "mid")
_perturbed("StableDiffusionXLPAGPipeline", "StableDiffusionXLPipeline", "mid")
_perturbed("StableDiffusionControlNetPAGPipeline", "StableDiffusionControlNetPipeline", "mid")
_perturbed("StableDiffusionXLControlNetPAGPipeline", "StableDiffusionXLControlNetPipeline", "mid")
_perturbed("PixArtSigmaPAGPipeline", "PixArtSigmaPipeline", "blocks.0")
_perturbed("SanaPAGPipeline", "SanaPipeline", "transformer_blocks.0")


@case("ZImagePipeline, guided", "Z-Image", "states and prompts are lists", mode="batch")
def z_image_guided() -> Made:
    pipe, call = flows.z_image()
    return pipe, call | {"negative_prompt_embeds": [noise(6, 8, seed=2), noise(6, 8, seed=3)], "guidance_scale": 3.0}
