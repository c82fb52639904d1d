"""DDPM and the DDIM family over a schedule of betas: their columns, and what their arguments may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from free.checks import check_number

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
VARIANCES = ("posterior", "beta", "geometric")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


def ddpm_scheduler(
    *,
    num_train_timesteps: int,
    beta_schedule: str | torch.Tensor,
    prediction_type: str,
    timestep_spacing: str,
    **config: Any,
) -> DDPMScheduler:
    """The diffusers scheduler of the arguments of :meth:`free.ReverseProcess.ddpm`, checked."""
    from diffusers import DDPMScheduler

    trained_betas = None
    for name in ("beta_start", "beta_end"):
        check_number(name, config[name], "between 0 and 1", 0, 1)
    if isinstance(beta_schedule, torch.Tensor):
        trained_betas = _check_betas(beta_schedule, num_train_timesteps)
        num_train_timesteps = len(trained_betas)
    elif beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule is {beta_schedule!r}; known are {known_names(BETA_SCHEDULES)} or a tensor of betas")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; known are {known_names(PREDICTION_TYPES)}")
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"timestep_spacing is {timestep_spacing!r}; known are {known_names(TIMESTEP_SPACINGS)}")
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule=beta_schedule if trained_betas is None else "linear",
        trained_betas=trained_betas,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        **config,
    )


def ddpm_columns(
    betas: torch.Tensor,
    timestep: torch.Tensor,
    prediction_type: str,
    variance: str | torch.Tensor,
    stochasticity: float,
    eta: float | None,
) -> dict[str, torch.Tensor]:
    """All columns in float64, from the cumulative alphas at each timestep and at the one after it in sampling order."""
    signal = (1 - betas).cumprod(0)[timestep]  # alpha-bar of x[k], [S]
    next_signal = torch.cat((signal[1:], signal.new_ones(1)))  # of x[k+1]; the last step ends at the data
    alpha = signal / next_signal
    beta = 1 - alpha

    posterior = beta * (1 - next_signal) / (1 - signal)
    if isinstance(variance, torch.Tensor):
        std = check_variance(variance, len(timestep)).sqrt()
    else:
        std = {"posterior": posterior, "beta": beta, "geometric": (posterior * beta).sqrt()}[variance].sqrt()
        std = torch.where(timestep > 0, std, 0.0)  # as DDPMScheduler.step: no noise on the way to timestep -1 from 0

    # the mean in terms of the state and of x0
    if eta is None:
        std = stochasticity * std
        # the noise estimate is (x - sqrt(signal) x0) / sqrt(1 - signal); DDPM's mean takes it off x / sqrt(alpha)
        drift = (1 + stochasticity**2) / 2 * beta / (alpha.sqrt() * (1 - signal))
        clip_state_coef = alpha.rsqrt() - drift
        clip_x0_coef = drift * signal.sqrt()
        if stochasticity == 1:
            # the same numbers without the division by a small alpha
            clip_state_coef = alpha.sqrt() * (1 - next_signal) / (1 - signal)
            clip_x0_coef = next_signal.sqrt() * beta / (1 - signal)
    else:
        std = eta * posterior.clamp(min=0).sqrt()
        clip_state_coef = ((1 - next_signal - std**2).clamp(min=0) / (1 - signal)).sqrt()
        clip_x0_coef = next_signal.sqrt() - signal.sqrt() * clip_state_coef

    x0_state_coef, x0_model_coef = {
        "epsilon": (signal.rsqrt(), -((1 - signal) / signal).sqrt()),
        "v_prediction": (signal.sqrt(), -(1 - signal).sqrt()),
        "sample": (torch.zeros_like(signal), torch.ones_like(signal)),
    }[prediction_type]
    return {
        "state_coef": clip_state_coef + clip_x0_coef * x0_state_coef,
        "model_coef": clip_x0_coef * x0_model_coef,
        "std": std,
        "x0_state_coef": x0_state_coef,
        "x0_model_coef": x0_model_coef,
        "clip_state_coef": clip_state_coef,
        "clip_x0_coef": clip_x0_coef,
        # the last posterior variance is 0: its logarithm is cut off where diffusers does it
        "log_variance_range": torch.stack((posterior, beta), -1).clamp(min=1e-20).log(),
    }


def _check_betas(betas: torch.Tensor, num_train_timesteps: int) -> list[float]:
    if betas.dim() != 1 or not len(betas) or not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(
            f"beta_schedule is a tensor of shape {tuple(betas.shape)}; allowed are one dimension and betas in (0, 1]"
        )
    if num_train_timesteps not in (1000, len(betas)):
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; beta_schedule holds {len(betas)} betas")
    return betas.double().tolist()


def check_variance(variance: torch.Tensor, num_steps: int) -> torch.Tensor:
    if variance.shape != (num_steps,):
        raise ValueError(f"variance has shape {tuple(variance.shape)}; allowed is ({num_steps},), one for each step")
    variance = variance.detach().cpu().double()
    if not bool((torch.isfinite(variance) & (variance >= 0)).all()):
        raise ValueError("variance holds a value that is negative or not finite; allowed is 0 or more")
    return variance


def check_noise_level(stochasticity: float, eta: float | None, variance: str | torch.Tensor) -> None:
    check_number("stochasticity", stochasticity, "0 or more", 0)
    if eta is None:
        return
    check_number("eta", eta, "0 … 1", 0, 1)
    if stochasticity != 1:
        raise ValueError(f"stochasticity is {stochasticity} and eta is {eta}; give one of them")
    if not isinstance(variance, str) or variance != "posterior":
        raise ValueError(f"eta is {eta} with variance {variance!r}; eta scales the posterior variance, leave variance out")


def known_names(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
