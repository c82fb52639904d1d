"""Training a small class-conditional DiT from scratch, as the package's own models were made."""

from __future__ import annotations

import math
import time
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
    max_seconds: float = math.inf
    """The training ends here if it has not before, at whatever learning rate the schedule had come to."""
    autocast: bool = False
    """Matrix products in bfloat16."""


def train_target(
    make_model: Callable[[], DiTTransformer2DModel],
    draw_batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    output_dir: str | Path,
    config: TargetTrainingConfig | None = None,
    progress: bool = True,
) -> DiTTransformer2DModel:
    """Train a DiT by denoising (epsilon prediction, linear betas) and save its EMA weights in float16.

    Args:
        make_model: builds the model, on the device it is trained on; called after the seed is set.
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
    device, betas = model.device, noise_schedule.betas.to(model.device)
    begin = time.perf_counter()
    steps = tqdm(range(config.num_steps), desc="training", disable=not progress)
    for iteration in steps:
        if time.perf_counter() - begin > config.max_seconds:
            break
        clean, label = draw_batch(config.batch_size)
        label = torch.where(torch.rand(config.batch_size) < config.label_dropout, null_class, label)
        timestep = torch.randint(noise_schedule.config.num_train_timesteps, (config.batch_size,))
        clean, label, timestep = clean.to(device), label.to(device), timestep.to(device)
        noise = torch.randn_like(clean)
        noisy = noise_schedule.add_noise(clean, noise, timestep)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            output = model(noisy, timestep, label).sample.float()
        channels = clean.shape[1]
        predicted, variance = output[:, :channels], output[:, channels:]
        loss = torch.nn.functional.mse_loss(predicted, noise)
        if variance.numel():
            loss = loss + variance_loss(clean, noisy, predicted.detach(), variance, timestep, betas)
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


def variance_loss(
    clean: torch.Tensor,
    noisy: torch.Tensor,
    epsilon: torch.Tensor,
    variance: torch.Tensor,
    timestep: torch.Tensor,
    betas: torch.Tensor,
) -> torch.Tensor:
    """The variational bound's term that trains the learned variance (Nichol & Dhariwal 2021, eqs. 15 and 16), bits a number.

    Args:
        clean, noisy, epsilon, variance: [B, channels, height, width]: data, noised data, the predicted noise (detached: this
            loss must not move the mean), the variance channels, -1 for the posterior's variance and 1 for beta.
        timestep: int64 [B]; t = 0, whose posterior has no variance, counts as zero.
        betas: float32 [T].
    """
    alphas = (1 - betas.double()).cumprod(0)
    before = torch.cat((alphas.new_ones(1), alphas[:-1]))
    posterior = betas * (1 - before) / (1 - alphas)
    posterior[0] = posterior[1]

    def at(table: torch.Tensor) -> torch.Tensor:
        return table[timestep].float().view(-1, 1, 1, 1)

    x0 = (noisy - at((1 - alphas).sqrt()) * epsilon) / at(alphas.sqrt())
    difference = at(before.sqrt() * betas / (1 - alphas)) * (clean - x0)  # of the two posterior means
    share = (variance + 1) / 2
    log_posterior = at(posterior.log())
    log_variance = share * at(betas.log()) + (1 - share) * log_posterior
    divergence = log_variance - log_posterior - 1 + (log_posterior - log_variance).exp()
    divergence = divergence + difference.square() * (-log_variance).exp()
    bits = divergence.flatten(1).mean(-1) / (2 * math.log(2))
    return torch.where(timestep > 0, bits, 0.0).mean()


def zero_gates(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """adaLN-Zero (Peebles & Xie 2023, section 3.2): every block starts as the identity, the output as zero."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model
