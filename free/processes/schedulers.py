"""What diffusers' schedulers say: the fields of the process that each one stands for, by the name of its class.

A scheduler is read by a copy of it that has set the timesteps; the user's own is left as it is. This file knows those that
step between timesteps of training; those that hold noise levels are in ``sigma_schedulers.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from free.checks import check_count, check_number
from free.processes.ddpm import VARIANCES, check_noise_level, ddpm_columns, known_names
from free.processes.levels import Levels, kept_share, level_columns, level_std, x0_columns
from free.processes.reading import Wanted, checked_prediction, prepared, refuse_thresholding
from free.processes.sigma_schedulers import SIGMA_READERS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_TWICE = "it evaluates the network twice a step, the second time at a state that the first one made"
_CORRECTS = "its corrector takes the network's output at the state that it is about to change"
_OTHER_STATE = "its step is not Gaussian, so it cannot be coupled"
_AS_SDE = (
    "it is deterministic; DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type='sde-dpmsolver++') is "
    "the stochastic sampler of its schedule"
)
_REFUSED = {
    "KDPM2AncestralDiscreteScheduler": _TWICE,
    "KDPM2DiscreteScheduler": _TWICE,
    "HeunDiscreteScheduler": _TWICE,
    "FlowMatchHeunDiscreteScheduler": _TWICE,
    "DPMSolverSDEScheduler": _TWICE,
    "DPMSolverSinglestepScheduler": "its steps of second order are made of two, with outputs that later steps do not know",
    "UniPCMultistepScheduler": _CORRECTS,
    "SASolverScheduler": _CORRECTS,
    "LCMScheduler": "it noises an estimate of x0 that was scaled for a distilled model: its few steps leave little to draft",
    "FlowMatchLCMScheduler": "its few steps, of a distilled model, leave little to draft",
    "TCDScheduler": "its few steps, of a distilled model, leave little to draft",
    "CosineDPMSolverMultistepScheduler": "its noise comes from a Brownian tree, and is not drawn anew for each step",
    "PNDMScheduler": _AS_SDE,
    "LMSDiscreteScheduler": _AS_SDE,
    "DEISMultistepScheduler": _AS_SDE,
    "IPNDMScheduler": "it is deterministic, and leans on more than one step before",
    "ScoreSdeVeScheduler": "it corrects by Langevin steps, with evaluations of their own",
    "RePaintScheduler": "it goes back to noise and forth again",
    "VQDiffusionScheduler": _OTHER_STATE,
    "AmusedScheduler": _OTHER_STATE,
}


def scheduler_columns(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None,
    variance: str | torch.Tensor | None,
    stochasticity: float,
    eta: float | None,
    mu: float | None,
) -> dict[str, Any]:
    """The fields of a :class:`free.ReverseProcess`; arguments and errors as of its ``from_scheduler``."""
    name = next((kind.__name__ for kind in type(scheduler).__mro__ if kind.__name__ in READERS), None)
    if name is None:
        name = type(scheduler).__name__
        reason = f": {_REFUSED[name]}" if name in _REFUSED else ""
        raise ValueError(
            f"scheduler is a {name}{reason}; allowed are {', '.join(READERS)}, or a free.ReverseProcess, which "
            "ReverseProcess.from_levels makes of any noise levels"
        )
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        if variance is not None:
            raise ValueError(f"variance is given with a {name}, whose noise follows from its levels; leave variance out")
        if stochasticity != 1:
            raise ValueError(f"stochasticity is {stochasticity} with a {name}; give eta, or leave it out")
    if eta is not None:
        check_number("eta", eta, "0 … 1", 0, 1)
    return READERS[name](scheduler, Wanted(num_inference_steps, variance, stochasticity, eta, mu))


def _ddpm(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """The law of ``DDPMScheduler.step``, and the DDPM of a DDIM's configuration."""
    from diffusers import DDPMScheduler

    config = scheduler.config
    refuse_thresholding(config)
    wanted.refuse_mu(scheduler)
    variance = _variance_of(config) if wanted.variance is None else wanted.variance
    if not isinstance(variance, torch.Tensor) and variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; known are {known_names(VARIANCES)} or a tensor of variances")
    set_before = prepared(scheduler, wanted).timesteps.cpu().clone() if wanted.steps is None else None
    steps = len(set_before) if set_before is not None else wanted.steps
    steps = check_count("num_inference_steps", steps, config.num_train_timesteps, why="the steps that the process has")
    check_noise_level(wanted.stochasticity, wanted.eta, variance)

    # a scheduler of our own: set_timesteps would change the user's
    # (from_config would forget what was given to the scheduler by position: diffusers counts it as a default)
    values = {name: value for name, value in config.items() if name != "_use_default_values"}
    own = DDPMScheduler.from_config(values, variance_type="fixed_small")
    own.set_timesteps(steps)
    timestep = own.timesteps.clone() if set_before is None else set_before
    _check_timestep(timestep, config)
    return {
        "timestep": timestep,
        "clip_range": float(config.clip_sample_range) if config.clip_sample else None,
        **ddpm_columns(own.betas.double(), timestep, config.prediction_type, variance, wanted.stochasticity, wanted.eta),
    }


def _ddim(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """The law of ``DDIMScheduler.step`` with a given eta; else the DDPM of its configuration."""
    if wanted.eta is None:
        columns = _ddpm(scheduler, wanted)
        warnings.warn(
            "DDIMScheduler is deterministic as it is shipped, and a step without noise cannot be drafted: this is the DDPM "
            "of its configuration; give eta (1 is all of the noise) for DDIM's own steps, or a DDPMScheduler",
            UserWarning,
            stacklevel=5,
        )
        return columns
    refuse_thresholding(scheduler.config)
    wanted.refuse_mu(scheduler)
    check_noise_level(wanted.stochasticity, wanted.eta, "posterior" if wanted.variance is None else wanted.variance)
    jumps = _Jumps.of(scheduler, wanted)
    config = scheduler.config
    return {
        **jumps.columns(config.prediction_type, wanted.eta),
        "clip_range": float(config.clip_sample_range) if config.clip_sample else None,
    }


def _cogvideox_ddim(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """``CogVideoXDDIMScheduler.step`` at eta = 0; it knows no noise of its own, and clips nothing."""
    wanted.refuse_mu(scheduler)
    eta = wanted.eta_of_deterministic(scheduler, "DDIM with eta = 1 over its levels")
    return _Jumps.of(scheduler, wanted).columns(scheduler.config.prediction_type, eta)


def _cogvideox_dpm(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """The law of ``CogVideoXDPMScheduler.step``: 2M SDE, with the noise that it draws last."""
    wanted.refuse_mu(scheduler)
    eta = 1.0 if wanted.eta is None else wanted.eta
    jumps = _Jumps.of(scheduler, wanted)
    columns = jumps.columns(scheduler.config.prediction_type, eta)
    # h of the step before is taken between the timesteps, not along its own jump
    alpha, sigma = jumps.levels.alpha, jumps.levels.sigma
    along = Levels(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]).ratio.log()
    memory = torch.zeros_like(alpha)
    memory[1:] = jumps.levels.ratio.log()[1:] / (2 * along)
    columns["memory"] = torch.where(jumps.final, 0.0, memory)
    return columns


@dataclass
class _Jumps:
    """Steps from timestep t to t - T // S, which need not be the next one: DDIM's, in diffusers."""

    timestep: torch.Tensor
    levels: Levels
    final: torch.Tensor
    """bool [S]: which of the jumps end beyond the first timestep."""

    @classmethod
    def of(cls, scheduler: SchedulerMixin, wanted: Wanted) -> _Jumps:
        config = scheduler.config
        checked_prediction(scheduler, ("epsilon", "v_prediction", "sample"))
        own: Any = prepared(scheduler, wanted, most=config.num_train_timesteps)
        timestep = own.timesteps.cpu().clone()
        _check_timestep(timestep, config)
        signal = own.alphas_cumprod.double()
        if hasattr(own, "betas") and not hasattr(config, "snr_shift_scale"):
            signal = (1 - own.betas.double()).cumprod(0)
        previous = timestep - config.num_train_timesteps // own.num_inference_steps
        ends_at = signal.new_ones(()) if config.set_alpha_to_one else signal[0]
        after = torch.where(previous >= 0, signal[previous.clamp(min=0)], ends_at)
        before = signal[timestep]
        levels = Levels(before.sqrt(), (1 - before).sqrt(), after.sqrt(), (1 - after).sqrt())
        levels.check()
        return cls(timestep, levels, previous < 0)

    def columns(self, prediction_type: str, eta: float) -> dict[str, Any]:
        levels = self.levels
        kept, std = kept_share(levels, eta), level_std(levels, eta)
        return {"timestep": self.timestep, **level_columns(levels, x0_columns(levels, prediction_type), kept, std)}


def _check_timestep(timestep: torch.Tensor, config: Any) -> None:
    if timestep.max() >= config.num_train_timesteps:
        raise ValueError(
            f"steps_offset is {config.steps_offset}: the first timestep would be {int(timestep.max())}, "
            f"beyond the {config.num_train_timesteps} trained ones"
        )


def _variance_of(config: Any) -> str:
    """The named variance of a scheduler's ``variance_type``; DDIM has none and takes the posterior's."""
    variance_type = config.get("variance_type", "fixed_small")
    if variance_type.startswith("learned"):
        raise ValueError(
            f"scheduler has variance_type={variance_type!r}: draft and target must share a fixed std; give "
            f"variance={known_names(VARIANCES)} or a tensor of variances ('geometric' is the middle of a learned range)"
        )
    return "beta" if variance_type.startswith("fixed_large") else "posterior"


Reader = Callable[[Any, Wanted], dict[str, Any]]

READERS: dict[str, Reader] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "CogVideoXDDIMScheduler": _cogvideox_ddim,
    "CogVideoXDPMScheduler": _cogvideox_dpm,
    **SIGMA_READERS,
}
