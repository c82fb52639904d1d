"""The DiTs that are timed: sizes of Peebles & Xie 2023 (table 1), untrained, or trained on photo patches in minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import free
from free.data.images import PATCH, PHOTOGRAPHS, draw_patches, photographs
from free.processes import ReverseProcess
from free.sampling.request import Options, Request, check_request
from free.targets import DiTTarget
from free.targets.base import take_rows
from free.training import DrafterTrainingConfig, TargetTrainingConfig, train_drafter, train_target

GUIDANCE = 1.5
_CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """A DiT with patches of 2."""

    name: str
    layers: int
    heads: int
    head_dim: int
    latent: int = 32
    """Numbers a side of a sample; 32 is 256² pixels."""

    def build(self, channels: int, classes: int, latent: int) -> DiTTransformer2DModel:
        """With random weights, learned variance as the original's."""
        return DiTTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_dim,
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=self.layers,
            sample_size=latent,
            patch_size=2,
            num_embeds_ada_norm=classes,
        )


@dataclass(frozen=True)
class Recipe:
    """How a size is trained on the photo patches, and its drafter after it."""

    size: Size
    target: TargetTrainingConfig
    drafter: dict[str, Any]
    """Of :class:`free.training.DrafterTrainingConfig`."""


S2 = Size("DiT-S/2", 12, 6, 64)
B2 = Size("DiT-B/2", 12, 12, 64)
L2 = Size("DiT-L/2", 24, 16, 64)
XL2 = Size("DiT-XL/2", 28, 16, 72)
XL2_512 = Size("DiT-XL/2, 512²", 28, 16, 72, 64)


@torch.no_grad()
def untrained(size: Size, device: torch.device) -> DiTTarget:
    """Latents [4, latent, latent], 1000 classes; bfloat16 on a GPU. Time does not depend on the weights."""
    torch.manual_seed(0)
    with device:
        model = size.build(4, _CLASSES, size.latent)
    return _as_target(model, device)


def trained(recipe: Recipe, device: torch.device, folder: Path) -> tuple[DiTTarget, free.FeatureDrafter]:
    """The target and its drafter, trained now or, where an earlier run left them in ``folder``, loaded.

    Raises:
        ImportError: the ``train`` extra is not installed.
    """

    def build() -> DiTTransformer2DModel:
        with device:
            model = recipe.size.build(3, len(PHOTOGRAPHS), PATCH)
        return torch.nn.Module.to(model, device)

    where = folder / recipe.size.name.replace("/", "-")
    if not (where / "target" / "config.json").is_file():
        images = photographs()
        train_target(build, lambda count: draw_patches(images, count), where / "target", recipe.target)
    model = DiTTransformer2DModel.from_pretrained(where / "target", torch_dtype=torch.float32, use_safetensors=True)
    target = _as_target(model, device)
    if not (where / "drafter" / "config.json").is_file():
        config = DrafterTrainingConfig(
            output_dir=str(where / "drafter"),
            dataset="photos",
            guidance_scale=GUIDANCE,
            mixed_precision="bf16" if device.type == "cuda" else "no",
            checkpointing_steps=10**9,
            validation_samples=0,
            report_to="none",
            **recipe.drafter,
        )
        train_drafter(config, target)
    drafter = free.FeatureDrafter.from_pretrained(where / "drafter")
    return target, torch.nn.Module.to(drafter, device, target.dtype).eval()


def _as_target(model: DiTTransformer2DModel, device: torch.device) -> DiTTarget:
    # diffusers' own `to` warns of every change of dtype
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return DiTTarget(torch.nn.Module.to(model, device, dtype).eval())


def request_of(target: DiTTarget, batch: int, guidance_scale: float, steps: int) -> Request:
    """A batch of samples of the target, the classes in turn."""
    return check_request(
        target,
        Options(
            class_labels=labels_of(target, batch),
            process=ReverseProcess.ddpm(steps),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=0,
        ),
    )


def labels_of(target: DiTTarget, batch: int) -> list[int]:
    """The classes in turn."""
    return [row % target.null_class for row in range(batch)]


def forward_of(request: Request, window: int) -> Callable[[], Any]:
    """The target's forward at ``window`` states of each sample, as a round asks for it, and nothing else."""
    rows = torch.arange(request.batch, device=request.seed.device).repeat_interleave(window)
    step = torch.arange(len(rows), device=rows.device) % request.process.num_steps
    states = torch.randn(len(rows), *request.sample_shape, device=rows.device)  # [B * W, *sample shape]
    timestep, conditioning = request.process.timestep[step], take_rows(request.conditioning, rows)
    return lambda: request.target.evaluate(states, timestep, conditioning, request.guided)
