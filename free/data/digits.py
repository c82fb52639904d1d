"""The digits: real data that ships with scikit-learn, a DiT of it that is small enough to live in the package, its drafter.

The weights in ``free/data/weights`` were made by :func:`free.demo.retrain.train_digits_dit` with its defaults:
``free-dit demo --retrain --weights free/data/weights/digits_dit``; those of its drafter by :data:`DRAFTER_COMMANDS`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

if TYPE_CHECKING:
    from free.drafters.feature import FeatureDrafter

NUM_CLASSES = 10
DRAFTER_COMMANDS = (
    "common='--dataset digits --subset 1 --label_dropout 0 --num_inference_steps 250 50 --window 12 --train_batch_size 24 "
    "--reuse 8 --lr_scheduler cosine --lr_warmup_steps 100 --ema_decay 0.998 --checkpointing_steps 1000 "
    "--checkpoints_total_limit 1 --validation_steps 100000 --save_dtype float16 --report_to none'",
    "free-dit train-drafter $common --base hold-x0 --learning_rate 1e-3 --max_train_steps 6000 --output_dir on_hold_x0",
    "free-dit train-drafter $common --begin_with on_hold_x0 --loss rejection --learning_rate 5e-4 --max_train_steps 1600 "
    "--output_dir digits_drafter",
)
"""How the weights in ``free/data/weights/digits_drafter`` were made: on hold-x0's drafts first, then on the gains'."""


def weights_path() -> Path:
    """The folder of the embedded weights (``config.json`` and safetensors)."""
    return _weights("digits_dit")


def load_digits_dit(path: str | Path | None = None) -> DiTTransformer2DModel:
    """Load the digits DiT in eval mode, float32, on the CPU.

    Args:
        path: a folder saved by :func:`free.demo.retrain.train_digits_dit`; the package's own weights if left out.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    folder = Path(path) if path is not None else weights_path()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no digits DiT in {str(folder)!r}: expected config.json and safetensors; `free-dit demo --retrain` makes them"
        )
    model = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    return model.eval()


def load_digits_drafter() -> FeatureDrafter:
    """The learned drafter of the package's digits DiT, float32, on the CPU."""
    from free.drafters.feature import FeatureDrafter

    return FeatureDrafter.from_pretrained(_weights("digits_drafter"), torch_dtype=torch.float32).eval()


def digits_data() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1797 digits as float32 [1797, 1, 8, 8] in [-1, 1], and their labels as int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data comes with scikit-learn: pip install 'free-dit[demo]'") from error
    data = load_digits()
    images = torch.from_numpy((data.images / 8.0 - 1.0).astype(np.float32))[:, None]
    return images, torch.from_numpy(data.target.astype(np.int64))


def _weights(name: str) -> Path:
    return Path(str(resources.files("free.data") / "weights" / name))
