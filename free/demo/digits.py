"""The digits DiT: real data that ships with scikit-learn, a target small enough to live in the package, its training.

The weights in ``free/demo/weights`` were made by :func:`train_digits_dit` with its defaults:
``free-dit demo --retrain --weights free/demo/weights/digits_dit``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

NUM_CLASSES = 10


@dataclass(frozen=True)
class DigitsTrainingConfig:
    """How the embedded weights are made; the defaults made those in the package."""

    num_steps: int = 8000
    batch_size: int = 128
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0


def weights_path() -> Path:
    """The folder of the embedded weights (``config.json`` and safetensors)."""
    return Path(str(resources.files("free.demo") / "weights" / "digits_dit"))


def load_digits_dit(path: str | Path | None = None) -> DiTTransformer2DModel:
    """Load the digits DiT in eval mode, float32, on the CPU.

    Args:
        path: a folder saved by :func:`train_digits_dit`; the package's own weights if left out.

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


def digits_data() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1797 digits as float32 [1797, 1, 8, 8] in [-1, 1], and their labels as int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data comes with scikit-learn: pip install 'free-dit[demo]'") from error
    data = load_digits()
    images = torch.from_numpy((data.images / 8.0 - 1.0).astype(np.float32))[:, None]
    return images, torch.from_numpy(data.target.astype(np.int64))


def recognised(samples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which samples [B, 1, 8, 8] a support vector classifier trained on the real digits takes for their label; bool [B]."""
    from sklearn.svm import SVC

    images, classes = digits_data()
    classifier = SVC(gamma="scale", C=10.0).fit(images.flatten(1).numpy(), classes.numpy())
    predicted = classifier.predict(samples.clamp(-1, 1).flatten(1).numpy())
    return torch.from_numpy(predicted == labels.numpy())


def train_digits_dit(
    output_dir: str | Path,
    config: DigitsTrainingConfig | None = None,
    progress: bool = True,
) -> DiTTransformer2DModel:
    """Train the digits DiT by denoising (epsilon prediction, linear betas) and save its EMA weights in float16.

    Args:
        output_dir: folder for ``config.json`` and the safetensors file.
        config: training settings; the defaults made the embedded weights.
        progress: show a progress bar.

    Returns:
        The trained model (EMA weights), in eval mode.

    Raises:
        FloatingPointError: the loss turned NaN; nothing is saved.
    """
    config = config or DigitsTrainingConfig()
    torch.manual_seed(config.seed)
    images, labels = digits_data()
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    _zero_gates(model)
    noise_schedule = DDPMScheduler(clip_sample=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.num_steps)
    ema = EMAModel(model.parameters(), decay=config.ema_decay)
    # dropping labels by hand: the null class is written where diffusers' random drop would put it
    model.eval()
    steps = tqdm(range(config.num_steps), desc="digits DiT", disable=not progress)
    for iteration in steps:
        rows = torch.randint(len(images), (config.batch_size,))
        clean, label = images[rows], labels[rows]
        label = torch.where(torch.rand(config.batch_size) < config.label_dropout, NUM_CLASSES, label)
        timestep = torch.randint(noise_schedule.config.num_train_timesteps, (config.batch_size,))
        noise = torch.randn_like(clean)
        predicted = model(noise_schedule.add_noise(clean, noise, timestep), timestep, label).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        if iteration % 100 == 0:
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at training step {iteration}; nothing was saved")
            steps.set_postfix(loss=f"{loss.item():.4f}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
    ema.copy_to(model.parameters())
    model.half().save_pretrained(output_dir, safe_serialization=True)
    return model.float().eval()


def _zero_gates(model: DiTTransformer2DModel) -> None:
    """adaLN-Zero (Peebles & Xie 2023, section 3.2): every block starts as the identity, the output as zero."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
