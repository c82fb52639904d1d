"""What diffusers' schedulers of noise levels say: Euler ancestral, DPM-Solver++, EDM, flow matching.

Such schedulers keep X = x0 + sigma eps and scale it for the network; the state of a process is what the network sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from free.processes.levels import Levels, kept_share, level_columns, level_std, second_order_memory, x0_columns
from free.processes.reading import Wanted, checked_prediction, prepared, refuse_thresholding

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_SDE = "sde-dpmsolver++"
_ANCESTRAL = "EulerAncestralDiscreteScheduler's step over its sigmas"


def _euler_ancestral(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """The law of ``EulerAncestralDiscreteScheduler.step``."""
    own = prepared(scheduler, wanted)
    return _scaled_by_variance(own, checked_prediction(own, ("epsilon", "v_prediction")), _eta(wanted))


def _euler(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """``EulerDiscreteScheduler.step`` without churn, which adds its noise after the network has seen the state."""
    eta = wanted.eta_of_deterministic(scheduler, _ANCESTRAL)
    own = prepared(scheduler, wanted)
    prediction = checked_prediction(own, ("epsilon", "v_prediction", "sample", "original_sample"))
    return _scaled_by_variance(own, "sample" if prediction == "original_sample" else prediction, eta)


def _scaled_by_variance(own: Any, prediction: str, eta: float) -> dict[str, Any]:
    """States X / sqrt(sigma² + 1)."""
    sigma = own.sigmas.cpu().double()
    scale = (sigma.square() + 1).rsqrt()
    levels = Levels.of(scale, sigma * scale)
    columns = level_columns(levels, x0_columns(levels, prediction), kept_share(levels, eta), level_std(levels, eta))
    return {
        "timestep": own.timesteps.cpu().clone(),
        **columns,
        "initial_std": float(own.init_noise_sigma) * float(scale[0]),
    }


def _dpm_solver(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """The law of ``DPMSolverMultistepScheduler.step`` of ``"sde-dpmsolver++"``, order 1 and 2."""
    config: Any = scheduler.config
    _check_solver(config)
    stochastic = config.algorithm_type == _SDE
    eta = _eta(wanted) if stochastic else wanted.eta_of_deterministic(scheduler, f"algorithm_type={_SDE!r}")
    own = prepared(scheduler, wanted)
    flow = config.use_flow_sigmas
    # diffusers' v is of alpha² + sigma² = 1, its flow of alpha + sigma = 1
    prediction = checked_prediction(own, ("epsilon", "sample", "flow_prediction" if flow else "v_prediction"))
    sigma = own.sigmas.cpu().double()
    alpha = 1 - sigma if flow else (sigma.square() + 1).rsqrt()
    levels = Levels.of(alpha, sigma if flow else sigma * alpha)
    return {
        "timestep": own.timesteps.cpu().clone(),
        **_of_solver(own, levels, x0_columns(levels, prediction), eta),
        "initial_std": float(own.init_noise_sigma),
    }


def _edm_dpm_solver(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """The law of ``EDMDPMSolverMultistepScheduler.step`` of ``"sde-dpmsolver++"``, order 1 and 2."""
    config: Any = scheduler.config
    _check_solver(config)
    stochastic = config.algorithm_type == _SDE
    eta = _eta(wanted) if stochastic else wanted.eta_of_deterministic(scheduler, f"algorithm_type={_SDE!r}")
    own = prepared(scheduler, wanted)
    levels, x0_terms, initial_std = _preconditioned(own)
    return {
        "timestep": own.timesteps.cpu().clone(),
        **_of_solver(own, levels, x0_terms, eta),
        "initial_std": initial_std,
    }


def _edm_euler(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """``EDMEulerScheduler.step`` without churn."""
    eta = wanted.eta_of_deterministic(scheduler, _ANCESTRAL)
    own = prepared(scheduler, wanted)
    levels, x0_terms, initial_std = _preconditioned(own)
    columns = level_columns(levels, x0_terms, kept_share(levels, eta), level_std(levels, eta))
    return {"timestep": own.timesteps.cpu().clone(), **columns, "initial_std": initial_std}


def _flow_match(scheduler: SchedulerMixin, wanted: Wanted) -> dict[str, Any]:
    """``FlowMatchEulerDiscreteScheduler.step``: the law of its stochastic sampling, which keeps nothing of eps, and its
    Euler step at eta = 0.
    """
    config: Any = scheduler.config
    if config.invert_sigmas:
        raise ValueError("scheduler has invert_sigmas=True: its sigmas rise over the steps; allowed are sigmas that fall")
    if config.use_dynamic_shifting and wanted.mu is None and wanted.steps is not None:
        raise ValueError("mu is missing: the scheduler has use_dynamic_shifting=True, and shifts by what its pipeline says")
    if config.stochastic_sampling:
        if wanted.eta is not None:
            raise ValueError(f"eta is {wanted.eta}, but stochastic_sampling=True of the scheduler says how much noise")
        eta = 1.0
    else:
        eta = wanted.eta_of_deterministic(scheduler, "the posterior of flow matching (eta = 1)")
    own = prepared(scheduler, wanted)
    sigma = own.sigmas.cpu().double()
    levels = Levels.of(1 - sigma, sigma)
    kept, std = kept_share(levels, eta), level_std(levels, eta)
    if config.stochastic_sampling:
        kept, std = torch.zeros_like(kept), levels.next_sigma
    return {
        "timestep": own.timesteps.cpu().clone(),
        **level_columns(levels, x0_columns(levels, "flow_prediction"), kept, std),
    }


def _eta(wanted: Wanted) -> float:
    return 1.0 if wanted.eta is None else wanted.eta


def _check_solver(config: Any) -> None:
    """Raise a ValueError unless the configuration of a multistep solver is supported."""
    refuse_thresholding(config)
    if config.algorithm_type not in (_SDE, "dpmsolver++"):
        raise ValueError(
            f"scheduler has algorithm_type={config.algorithm_type!r}, which remembers noise, not x0; allowed is {_SDE!r}"
        )
    if config.solver_order not in (1, 2):
        raise ValueError(
            f"scheduler has solver_order={config.solver_order}, which leans on two steps before; allowed are 1 and 2"
        )


def _of_solver(
    own: Any, levels: Levels, x0_terms: tuple[torch.Tensor, torch.Tensor], eta: float
) -> dict[str, torch.Tensor | None]:
    """The columns of a multistep solver, with diffusers' own rules of when its last step is of first order."""
    config, steps = own.config, len(levels.alpha)
    kept = kept_share(levels, eta)
    memory = None
    if config.solver_order == 2:
        memory = second_order_memory(levels, kept, config.solver_type)
        if config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero":
            memory[-1] = 0
    return {**level_columns(levels, x0_terms, kept, level_std(levels, eta)), "memory": memory}


def _preconditioned(own: Any) -> tuple[Levels, tuple[torch.Tensor, torch.Tensor], float]:
    """EDM's scaling (Karras et al. 2022, table 1): levels, terms of x0, initial std. The sample is not scaled."""
    sign = {"epsilon": 1, "v_prediction": -1}[checked_prediction(own, ("epsilon", "v_prediction"))]
    sigma, data = own.sigmas.cpu().double(), own.config.sigma_data
    total = sigma.square() + data**2
    scale = torch.cat((total[:-1].rsqrt(), total.new_ones(1)))
    levels = Levels.of(scale, sigma * scale)
    x0_terms = data**2 * total[:-1].rsqrt(), sign * sigma[:-1] * data * total[:-1].rsqrt()
    return levels, x0_terms, float(own.init_noise_sigma) * float(scale[0])


SIGMA_READERS: dict[str, Callable[[Any, Wanted], dict[str, Any]]] = {
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "EulerDiscreteScheduler": _euler,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "EDMDPMSolverMultistepScheduler": _edm_dpm_solver,
    "EDMEulerScheduler": _edm_euler,
    "FlowMatchEulerDiscreteScheduler": _flow_match,
}
