"""Noise by Euler steps: SDEs of flow matching (Euler-Maruyama), and the churn of EDM."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from free.processes.ddpm import known_names
from free.processes.levels import Levels, x0_columns

SDE_WEIGHTS = ("sigma", "sbdm", "constant", "flow-grpo")


def flow_sde_columns(sigma: torch.Tensor, weight: str | torch.Tensor, noise_level: float) -> dict[str, Any]:
    """``x' = (1 - w d / sigma) x - d (1 + w (1 - sigma) / sigma) y + sqrt(2 w d) z``, d = sigma - sigma', float64 [S]."""
    levels = Levels.of(1 - sigma, sigma)
    if not 0 <= noise_level < math.inf:
        raise ValueError(f"noise_level is {noise_level}; allowed is 0 or more")
    sigma, drop = levels.sigma, levels.sigma - levels.next_sigma
    w = _weight(sigma, weight, noise_level)
    if w.shape != sigma.shape or not bool((torch.isfinite(w) & (w >= 0)).all()):
        raise ValueError(
            f"weight of shape {tuple(w.shape)} is negative or not finite at a step, or not one for each of {len(sigma)}; "
            "'sbdm' is infinite at sigma = 1: begin below it"
        )
    of_model = -drop * (1 + w * (1 - sigma) / sigma)
    x0_state_coef, x0_model_coef = x0_columns(levels, "flow_prediction")
    of_x0 = of_model / x0_model_coef
    state_coef = 1 - w * drop / sigma
    return {
        "state_coef": state_coef,
        "model_coef": of_model,
        # what is added to data stays there: the step that ends at it takes the mean
        "std": torch.where(levels.next_sigma > 0, (2 * w * drop).sqrt(), 0.0),
        "x0_state_coef": x0_state_coef,
        "x0_model_coef": x0_model_coef,
        "clip_state_coef": state_coef - of_x0 * x0_state_coef,
        "clip_x0_coef": of_x0,
        "initial_std": float(sigma[0]),
    }


def _weight(sigma: torch.Tensor, weight: str | torch.Tensor, noise_level: float) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return noise_level * weight.detach().cpu().double()
    if weight not in SDE_WEIGHTS:
        raise ValueError(f"weight is {weight!r}; known are {known_names(SDE_WEIGHTS)} or a tensor")
    if weight == "flow-grpo":
        below = torch.where(sigma == 1, sigma[min(1, len(sigma) - 1)], sigma)  # Flow-GRPO's own way around sigma = 1
        return noise_level**2 * sigma / (2 * (1 - below))
    named = {"sigma": sigma, "sbdm": sigma / (1 - sigma), "constant": torch.ones_like(sigma)}
    return noise_level * named[weight]


def churn(sigma: torch.Tensor, s_churn: float, s_min: float, s_max: float) -> torch.Tensor:
    """gamma of each step (Karras et al. 2022, algorithm 2), float64 [S]."""
    most = min(s_churn / (len(sigma) - 1), math.sqrt(2) - 1)
    return torch.where((sigma[:-1] >= s_min) & (sigma[:-1] <= s_max), most, 0.0).double()


def edm_columns(
    sigma: torch.Tensor,
    gamma: torch.Tensor,
    s_noise: float,
    step_scale: float,
    sigma_data: float | None,
    time: Callable[[torch.Tensor], torch.Tensor] | None,
) -> dict[str, Any]:
    """The fields of a process whose state is the raised one; arguments as of :meth:`free.ReverseProcess.edm`."""
    levels = Levels.of(torch.ones_like(sigma), sigma)
    sigma, after = levels.sigma, levels.next_sigma
    if gamma.shape != sigma.shape or not bool((torch.isfinite(gamma) & (gamma >= 0)).all()):
        raise ValueError(
            f"gamma of shape {tuple(gamma.shape)} is negative or not finite at a step, or not one for each of {len(sigma)}"
        )
    for name, value in (("s_noise", s_noise), ("step_scale", step_scale), ("sigma_data", sigma_data)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; allowed is a positive number")
    raised = sigma * (1 + gamma.detach().cpu().double())
    noise = s_noise * (raised.square() - sigma.square()).clamp(min=0).sqrt()  # that raises each state
    if time is not None:
        scale = (raised.square() + 1).rsqrt()
        told, of_state, of_model = time(raised), 1 / scale, -raised
    elif sigma_data is None:
        told = raised
        scale, of_state, of_model = torch.ones_like(raised), torch.zeros_like(raised), torch.ones_like(raised)
    else:
        told, total = raised.log() / 4, raised.square() + sigma_data**2
        scale, of_state, of_model = total.rsqrt(), sigma_data**2 / total.sqrt(), raised * sigma_data / total.sqrt()
    one = scale.new_ones(1)
    next_scale, next_noise = torch.cat((scale[1:], one)), torch.cat((noise[1:], 0 * one))
    kept = 1 - step_scale * (raised - after) / raised
    of_x0 = next_scale * (1 - kept)
    kept = kept * next_scale / scale
    quiet = int((next_noise[:-1] == 0).sum())
    if quiet:
        warnings.warn(
            f"{quiet} of {len(sigma)} steps have no noise: each of them costs a round of its own", UserWarning, stacklevel=4
        )
    return {
        "timestep": told,
        "state_coef": kept + of_x0 * of_state,
        "model_coef": of_x0 * of_model,
        "std": next_scale * next_noise,
        "x0_state_coef": of_state,
        "x0_model_coef": of_model,
        "clip_state_coef": kept,
        "clip_x0_coef": of_x0,
        "initial_std": float(scale[0] * torch.hypot(sigma[0], noise[0])),
    }
