"""Training a small class-conditional DiT from scratch, as the package's own models were made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm


@dataclass(frozen=True)
class TargetTrainingConfig:
    """Settings of :func:`train_target`; the defaults made the digits DiT."""

    num_steps: int = 8000
    batch_size: int = 128
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0


def train_target(
    make_model: Callable[[], DiTTransformer2DModel],
    draw_batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    output_dir: str | Path,
    config: TargetTrainingConfig | None = None,
    progress: bool = True,
) -> DiTTransformer2DModel:
    """Train a DiT by denoising (epsilon prediction, linear betas) and save its EMA weights in float16.

    Args:
        make_model: builds the model; called after the seed is set.
        draw_batch: from n to n clean samples, float32 [n, channels, size, size] in [-1, 1], and labels, int64 [n].
        output_dir: folder for ``config.json`` and the safetensors file.
        config: training settings.
        progress: show a progress bar.

    Returns:
        The trained model (EMA weights, rounded to float16 as saved) in float32 and eval mode.

    Raises:
        FloatingPointError: the loss turned NaN; nothing is saved.
    """
    config = config or TargetTrainingConfig()
    torch.manual_seed(config.seed)
    # eval mode: labels are dropped below, where diffusers would drop them at random by itself
    model = zero_gates(make_model()).eval()
    null_class = model.config.num_embeds_ada_norm
    noise_schedule = DDPMScheduler(clip_sample=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.num_steps)
    ema = EMAModel(model.parameters(), decay=config.ema_decay)
    steps = tqdm(range(config.num_steps), desc="training", disable=not progress)
    for iteration in steps:
        clean, label = draw_batch(config.batch_size)
        label = torch.where(torch.rand(config.batch_size) < config.label_dropout, null_class, label)
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
    return model.float()


def zero_gates(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """adaLN-Zero (Peebles & Xie 2023, section 3.2): every block starts as the identity, the output as zero."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model
