"""Relaxed acceptance in plain torch, and its closed forms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from free_kernels.philox import TEST_STREAM
from free_kernels.philox.reference import uniform
from free_kernels.posterior.reference import compute_dtype

if TYPE_CHECKING:
    from free_kernels.relaxation import RelaxedCost


def relaxed_tau(
    uncertainty: torch.Tensor,
    strength: float,
    squared_norm: torch.Tensor | None,
    spent: torch.Tensor | None,
    budget: float | None,
) -> torch.Tensor:
    # where the uncertainty is not a number the test is exact: NaN would reject every draft
    tau = torch.exp(-strength * uncertainty).nan_to_num_(nan=1.0).float()
    if budget is None or not tau.shape[1]:
        return tau
    assert squared_norm is not None
    assert spent is not None
    would_spend = spent[:, :1] + excess_acceptance(squared_norm, tau).cumsum(-1)
    return torch.where(would_spend <= budget, tau, 1.0)  # NaN compares false, so it is exact


def relaxed_cost(
    squared_norm: torch.Tensor,
    log_ratio: torch.Tensor,
    tau: torch.Tensor,
    advance: torch.Tensor,
    rejected: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    spent: torch.Tensor,
    rejection: torch.Tensor,
    uniforms: torch.Tensor | None,
) -> RelaxedCost:
    from free_kernels.relaxation import RelaxedCost

    squared_norm = squared_norm.double()
    column = torch.arange(squared_norm.shape[1], device=squared_norm.device)
    tested = column < (advance - 1 + rejected)[:, None]  # [B, W-1]
    dtype = compute_dtype(log_ratio)
    if uniforms is None:
        uniforms = uniform(seed[:, None], step[:, None] + column, TEST_STREAM, dtype)
    would_accept = uniforms[:, : len(column)].to(dtype).log() <= log_ratio
    saved = (column < (advance - 1)[:, None]) & ~would_accept & (tau < 1)
    cost = torch.stack((excess_acceptance(squared_norm, tau), divergence(squared_norm, tau), saved.double()), -1)
    rejects = torch.special.erf((squared_norm / 8).sqrt())
    fared = torch.stack((rejects, torch.ones_like(rejects)), -1)
    added_cost, added = (torch.where(tested[..., None], values, 0.0).sum(1) for values in (cost, fared))
    return RelaxedCost(spent + added_cost, rejection / 2 + added)


def relaxed_acceptance(squared_norm: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """``E[min(1, exp(tau * log_ratio))]`` of a draft that is |delta| off, float64.

    ``Phi(-d/2) + exp(tau (tau - 1) d²/2) Phi(d/2 - tau d)`` with d = |delta|; at tau = 1 FREE's eq. 40, ``2 Phi(-d/2)``.

    Args:
        squared_norm: |delta|², any shape.
        tau: in [0, 1], of a shape that goes with it.
    """
    squared_norm = squared_norm.double()
    return torch.special.ndtr(-squared_norm.sqrt() / 2) + _tilted(squared_norm, tau)


def excess_acceptance(squared_norm: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """``E[a_tau] - E[a_1]``, the total variation between the relaxed step and the exact one; exactly 0 at tau = 1.

    Arguments and result as of :func:`relaxed_acceptance`.
    """
    squared_norm = squared_norm.double()
    return (_tilted(squared_norm, tau) - _tilted(squared_norm, 1.0)).clamp_(min=0.0)


def divergence(squared_norm: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """A bound of the Kullback-Leibler divergence of the relaxed step from the exact one, in nats; exactly 0 at tau = 1.

    Of second order in 1 - tau, where :func:`excess_acceptance` is of first. Arguments and result as of
    :func:`relaxed_acceptance`.
    """
    squared_norm = squared_norm.double()
    tau = _double(tau)

    def tilted(power: torch.Tensor | float) -> torch.Tensor:
        return _tilted(squared_norm, power)

    # E[log_ratio exp(tau log_ratio); log_ratio < 0], the derivative of tilted(tau)
    normal_density = torch.exp(-squared_norm / 8) / math.sqrt(2 * math.pi)
    slope = (tau - 0.5) * squared_norm * tilted(tau) - squared_norm.sqrt() * normal_density
    # moments of what the density lacks on the target's side, as differences that are exactly 0 at tau = 1
    first = tilted(tau) - tilted(1.0)
    second = (tilted(2 * tau) - tilted(tau + 1)) - (tilted(tau + 1) - tilted(2.0))
    third = (tilted(3 * tau) - tilted(3.0)) - 3 * (tilted(2 * tau + 1) - tilted(tau + 2))
    return ((tau - 1) * slope - first + (second + third) / 2).clamp_(min=0.0)


def _tilted(squared_norm: torch.Tensor, power: torch.Tensor | float) -> torch.Tensor:
    """``E[exp(power * log_ratio); log_ratio < 0]``, log_ratio ~ N(-d²/2, d²); float64."""
    power = _double(power)
    log_tail = torch.special.log_ndtr((0.5 - power) * squared_norm.sqrt())
    return torch.exp(power * (power - 1) / 2 * squared_norm + log_tail)


def _double(value: torch.Tensor | float) -> torch.Tensor | float:
    """A number stays one: as a tensor it would have to be copied to the device, which a graph cannot record."""
    return value.double() if isinstance(value, torch.Tensor) else value
