"""Processes over noise levels: the DDIM family, first and second order, from alpha and sigma alone.

A state is ``x[k] = alpha[k] x0 + sigma[k] eps``, as the network sees it. With ``ratio = (sigma'/alpha') / (sigma/alpha)`` a
step takes the estimates of x0 and eps to the next level, with fresh noise for a part of eps (Song et al. 2021, eq. 12):

    x' = alpha' x0 + sqrt(sigma'² - s²) eps + s z,    s = eta sigma' sqrt(1 - ratio²)

DDPM, DDIM, Euler ancestral, first-order SDE-DPM-Solver++ and the posterior of flow matching are this step over levels of
their own. The multistep solvers of second order replace x0 by ``x0[k] + memory[k] (x0[k] - x0[k-1])``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from free.checks import check_number
from free.processes.ddpm import known_names

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
SOLVER_TYPES = ("midpoint", "heun")

# relative rise that a scheduler's float32 rounding may cause
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Levels:
    """The levels before and after each step, float64 [S] each."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    next_alpha: torch.Tensor
    next_sigma: torch.Tensor

    @classmethod
    def of(cls, alpha: torch.Tensor, sigma: torch.Tensor) -> Levels:
        """Of S + 1 points, checked."""
        for name, values in (("alpha", alpha), ("sigma", sigma)):
            if values.dim() != 1 or len(values) < 2:
                raise ValueError(f"{name} has shape {tuple(values.shape)}; allowed is (steps + 1,), two points or more")
            if not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise ValueError(f"{name} holds {_first_bad(values)}; allowed are finite numbers, 0 or more")
        if alpha.shape != sigma.shape:
            raise ValueError(f"alpha has {len(alpha)} points and sigma {len(sigma)}; they must agree")
        alpha, sigma = alpha.detach().cpu().double(), sigma.detach().cpu().double()
        levels = cls(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
        levels.check()
        return levels

    def check(self) -> None:
        """Raise a ValueError unless noise falls from step to step, and is there before each."""
        if not bool((self.sigma > 0).all()):
            step = int((self.sigma <= 0).nonzero()[0])
            raise ValueError(f"sigma is 0 before step {step}; allowed is 0 at the last point only")
        if not bool((self.next_alpha > 0).all()):
            raise ValueError("alpha is 0 after a step; allowed is 0 at the first point only")
        rises = self.next_sigma * self.alpha > (1 + _ROUNDING) * self.sigma * self.next_alpha
        if rises.any():
            step = int(rises.nonzero()[0])
            before, after = (self.sigma / self.alpha)[step].item(), (self.next_sigma / self.next_alpha)[step].item()
            raise ValueError(
                f"sigma / alpha rises from {before:.6g} to {after:.6g} at step {step}; allowed are levels that fall "
                "from noise to data"
            )

    @property
    def ratio(self) -> torch.Tensor:
        """(sigma'/alpha') / (sigma/alpha), in [0, 1]."""
        return (self.next_sigma * self.alpha / (self.next_alpha * self.sigma)).clamp(max=1)


def x0_columns(levels: Levels, prediction_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``x0_state_coef`` and ``x0_model_coef``, solved from ``x = alpha x0 + sigma eps`` and what the output stands for:
    eps, ``alpha eps - sigma x0`` (v), x0, or ``eps - x0`` (flow).
    """
    alpha, sigma = levels.alpha, levels.sigma
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction_type!r}; known are {known_names(PREDICTIONS)}")
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    total = alpha.square() + sigma.square() if prediction_type == "v_prediction" else alpha + sigma
    return (alpha if prediction_type == "v_prediction" else torch.ones_like(alpha)) / total, -sigma / total


def kept_share(levels: Levels, eta: float) -> torch.Tensor:
    """What is kept of eps: ``sqrt(sigma'² - s²) / sigma``, without the cancellation. The rest of sigma' is fresh noise."""
    check_number("eta", eta, "0 (no noise) … 1", 0, 1)
    return levels.next_sigma * (1 - eta**2 * (1 - levels.ratio.square())).sqrt() / levels.sigma


def level_std(levels: Levels, eta: float) -> torch.Tensor:
    """s, the fresh noise of each step."""
    return eta * levels.next_sigma * (1 - levels.ratio.square()).sqrt()


def level_columns(
    levels: Levels, x0_terms: tuple[torch.Tensor, torch.Tensor], kept: torch.Tensor, std: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The columns of first order, float64 [S].

    Args:
        levels: of the process.
        x0_terms: ``x0_state_coef`` and ``x0_model_coef``.
        kept: the share of eps that is kept, ``sqrt(sigma'² - std²) / sigma``.
        std: fresh noise.
    """
    x0_state_coef, x0_model_coef = x0_terms
    of_x0 = levels.next_alpha - levels.alpha * kept
    return {
        "state_coef": kept + of_x0 * x0_state_coef,
        "model_coef": of_x0 * x0_model_coef,
        "std": std,
        "x0_state_coef": x0_state_coef,
        "x0_model_coef": x0_model_coef,
        "clip_state_coef": kept,
        "clip_x0_coef": of_x0,
    }


def second_order_memory(levels: Levels, kept: torch.Tensor, solver_type: str) -> torch.Tensor:
    """``memory`` of the multistep solvers of second order (DPM-Solver++ 2M, Lu et al. 2022, and its SDE), float64 [S].

    With ``h = lambda[k+1] - lambda[k]``, lambda = log(alpha / sigma), ``"midpoint"`` is ``h[k] / (2 h[k-1])``; ``"heun"``
    weighs ``h[k] / h[k-1]`` by what the exact integral of a linear x0 gives. The first step has no past, and the step to
    sigma = 0 no finite h: both are of first order.
    """
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type is {solver_type!r}; known are {known_names(SOLVER_TYPES)}")
    step = -levels.ratio.log()  # h, infinite from alpha = 0 and to sigma = 0
    growth = torch.cat((step.new_zeros(1), step[1:] / step[:-1]))
    share = torch.full_like(step, 0.5)
    if solver_type == "heun":
        # the state decays by exp(-decay) against x0: decay is h without noise, 2 h with all of it
        decay = -(levels.alpha * kept / levels.next_alpha).log()
        share = 1 / -torch.expm1(-decay) - 1 / decay
    first_order = ~torch.isfinite(step) | (step == 0)
    first_order[0] = True
    return torch.where(first_order, 0.0, share * growth)


def _first_bad(values: torch.Tensor) -> float:
    return values[~(torch.isfinite(values) & (values >= 0))][0].item()
