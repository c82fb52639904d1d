"""Behaviour cloning by denoising: predict the noise in the expert's chunk, one network for all tasks."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.policies.demonstrations import Demonstrations
from benchmarks.policies.network import BETA_SCHEDULE, TRAIN_STEPS, PolicyDiT

BATCH, LEARNING_RATE, WARM_UP, DECAY = 128, 1e-3, 200, 0.998
_KEEP_EVERY = 200
_STATE = "training.safetensors"
_LEAST_STD = 0.01  # of numbers that hardly change, such as those of another task's object


def train(data: Demonstrations, folder: Path, num_steps: int, seed: int = 0) -> PolicyDiT:
    """Adam with a cosine, the average of the weights kept as ``policy.safetensors`` in ``folder``.

    A run that was stopped is taken up where it was last kept, and goes on as if it had not been: what a step draws depends
    on its number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    network = PolicyDiT().train()
    network.mean.copy_(data.observation.mean(0))
    network.std.copy_(data.observation.std(0).clamp(min=_LEAST_STD))
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = DDPMScheduler(TRAIN_STEPS, beta_schedule=BETA_SCHEDULE)
    first = _take_up(folder / _STATE, network, average, optimizer)
    begin, losses = time.perf_counter(), 0.0
    for step in range(first, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _rate(step, num_steps)
        generator = torch.Generator().manual_seed(seed * 2**32 + step)
        rows = torch.randint(len(data.chunk), (BATCH,), generator=generator)
        timestep = torch.randint(TRAIN_STEPS, (BATCH,), generator=generator)
        chunk = data.chunk[rows]
        noise = torch.randn(chunk.shape, generator=generator)
        loss = (
            (network(scheduler.add_noise(chunk, noise, timestep), timestep, data.observation[rows]) - noise).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        losses += float(loss.detach())
        if (step + 1) % _KEEP_EVERY == 0 or step + 1 == num_steps:
            _keep(folder / _STATE, step + 1, network, average, optimizer)
            average.module.save(folder)
            print(f"step {step + 1}  loss {losses / ((step % _KEEP_EVERY) + 1):.4f}  "
                  f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
            losses = 0.0
    return average.module.eval()


def _rate(step: int, num_steps: int) -> float:
    return min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def _keep(path: Path, step: int, network: PolicyDiT, average: AveragedModel, optimizer: torch.optim.Optimizer) -> None:
    """All that the next step depends on."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    unfinished = path.with_suffix(".part")
    save_file({name: value.detach().clone() for name, value in tensors.items()}, unfinished, {"step": str(step)})
    unfinished.replace(path)


def _take_up(path: Path, network: PolicyDiT, average: AveragedModel, optimizer: torch.optim.Optimizer) -> int:
    """The step that comes next."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(file.metadata()["step"])
    for module, kind in ((network, "network."), (average, "average.")):
        module.load_state_dict({name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)})
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".")
            state["state"].setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict(state)
    return step
