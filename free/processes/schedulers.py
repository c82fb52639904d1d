"""What diffusers' schedulers say: the columns of the process that each one stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from free.processes.ddpm import VARIANCES, check_count, check_noise_level, ddpm_columns, known_names

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def scheduler_columns(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    variance: str | torch.Tensor | None,
    stochasticity: float,
    eta: float | None,
) -> dict[str, Any]:
    """The fields of a :class:`free.ReverseProcess`; arguments and errors as of its ``from_scheduler``."""
    from diffusers import DDIMScheduler, DDPMScheduler

    if not isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}; allowed are DDPMScheduler and DDIMScheduler "
            "(DDPMScheduler.from_config(scheduler.config) often serves), or a ReverseProcess with columns of your own"
        )
    config = scheduler.config
    if config.thresholding:
        raise ValueError(
            "scheduler has thresholding=True: dynamic thresholding is not a Gaussian step that can be coupled; "
            "use clip_sample=True with a clip_sample_range instead"
        )
    if variance is None:
        variance = _variance_of(config)
    if not isinstance(variance, torch.Tensor) and variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; known are {known_names(VARIANCES)} or a tensor of variances")
    steps = check_count("num_inference_steps", num_inference_steps, config.num_train_timesteps)
    check_noise_level(stochasticity, eta, variance)

    # a scheduler of our own: set_timesteps would change the user's
    # (from_config would forget what was given to the scheduler by position: diffusers counts it as a default)
    values = {name: value for name, value in config.items() if name != "_use_default_values"}
    scheduler = DDPMScheduler.from_config(values, variance_type="fixed_small")
    scheduler.set_timesteps(steps)
    timestep = scheduler.timesteps.clone()
    if timestep.max() >= config.num_train_timesteps:
        raise ValueError(
            f"steps_offset is {config.steps_offset}: the first timestep would be {int(timestep.max())}, "
            f"beyond the {config.num_train_timesteps} trained ones"
        )
    return {
        "timestep": timestep,
        "clip_range": float(config.clip_sample_range) if config.clip_sample else None,
        **ddpm_columns(scheduler.betas.double(), timestep, config.prediction_type, variance, stochasticity, eta),
    }


def _variance_of(config: Any) -> str:
    """The named variance of a scheduler's ``variance_type``; DDIM has none and takes the posterior's."""
    variance_type = config.get("variance_type", "fixed_small")
    if variance_type.startswith("learned"):
        raise ValueError(
            f"scheduler has variance_type={variance_type!r}: draft and target must share a fixed std; give "
            f"variance={known_names(VARIANCES)} or a tensor of variances ('geometric' is the middle of a learned range)"
        )
    return "beta" if variance_type.startswith("fixed_large") else "posterior"
