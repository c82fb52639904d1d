"""How the embedded digits DiT was trained."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from free.data.digits import NUM_CLASSES, digits_data
from free.training import TargetTrainingConfig, train_target


def train_digits_dit(
    output_dir: str | Path, config: TargetTrainingConfig | None = None, progress: bool = True
) -> DiTTransformer2DModel:
    """Train the digits DiT and save it; the default ``config`` made the embedded weights.

    Returns:
        The trained model, in eval mode.

    Raises:
        FloatingPointError: the loss turned NaN; nothing is saved.
    """
    images, labels = digits_data()

    def draw_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(images), (size,))
        return images[rows], labels[rows]

    return train_target(_untrained, draw_batch, output_dir, config, progress)


def _untrained() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
