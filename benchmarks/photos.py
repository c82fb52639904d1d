"""The testbed: a class-conditional DiT on 32×32 colour patches of photographs, 3072 numbers a sample.

``python -m benchmarks.photos`` trains the target again (within an hour on two CPU cores) into ``benchmarks/weights``;
``python -m benchmarks.photos --held-out FILE.npz`` draws patches to judge samples by (``free-dit compare --data FILE.npz``).
The photographs ship with scikit-image and scikit-learn; a class is a source photograph.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

from free.data.images import PATCH, PHOTOGRAPHS, draw_patches, photographs
from free.training import TargetTrainingConfig, train_target

WEIGHTS = Path(__file__).parent / "weights" / "photo_dit"
CONFIG = TargetTrainingConfig(num_steps=4000, batch_size=64, learning_rate=8e-4)


def untrained() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=3,
        out_channels=6,  # learned variance, as the original DiT's
        num_layers=6,
        sample_size=PATCH,
        patch_size=4,
        num_embeds_ada_norm=len(PHOTOGRAPHS),
    )


def write_held_out(path: Path, size: int, seed: int = 2**31) -> None:
    """``size`` patches of a seed that training does not use, as images and labels; whole files are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patches, labels = draw_patches(photographs(), size)
    np.savez_compressed(path, images=patches.numpy(), labels=labels.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=WEIGHTS)
    parser.add_argument("--num-steps", type=int, default=CONFIG.num_steps)
    parser.add_argument("--held-out", type=Path, default=None, metavar="FILE.npz", help="write patches, train nothing")
    parser.add_argument("--size", type=int, default=4096, help="patches of --held-out")
    arguments = parser.parse_args()
    if arguments.held_out is not None:
        write_held_out(arguments.held_out, arguments.size)
        return
    images = photographs()
    config = dataclasses.replace(CONFIG, num_steps=arguments.num_steps)
    train_target(untrained, lambda size: draw_patches(images, size), arguments.output_dir, config)


if __name__ == "__main__":
    main()
