"""How far a relaxed run is from the exact law at most: a limit that few samples cannot fool. See docs/relaxation.md."""

from __future__ import annotations

import math

import numpy as np

CONFIDENCE = 0.95
"""Of the limit, whatever the law of the samples is."""

# the risk of a miss is shared between the two ways to a limit, of which the first matters where little is relaxed
_RISK_OF_COUNT, _RISK_OF_DIVERGENCE = 0.8 * (1 - CONFIDENCE), 0.2 * (1 - CONFIDENCE)
_MOST_NATS = 1.0
"""A sample whose divergence is more counts as one that has left the exact law: beyond it there is nothing to certify."""


def total_variation_limit(
    excess_acceptance: np.ndarray,
    divergence: np.ndarray,
    saved_rejections: np.ndarray,
    budget: float,
    block: np.ndarray | None = None,
) -> float:
    """Upper confidence limit of the total variation between the relaxed and the exact law of a trajectory.

    It is missed with probability ``1 - CONFIDENCE`` at most, whatever the law of what samples spend, and however few they
    are. The lesser of two: by the share of samples with a saved rejection, or under a budget by the mean of what they spent;
    and by their divergence, up to 1 nat each. Where none of N samples spent anything it is about 3.2 / N, or so much of the
    budget.

    Args:
        excess_acceptance, divergence, saved_rejections: [N], as in :class:`free.SamplingStatistics`.
        budget: the most excess acceptance of a sample, as there; 0 is exact.
        block: int64 [N], as there: samples of different blocks are independent. None is a block a sample.
    """
    if budget == 0:
        return 0.0
    if budget <= 1:
        spent = mean_limit(np.minimum(excess_acceptance, budget) / budget, _RISK_OF_COUNT, block) * budget
    else:
        spent = mean_limit(saved_rejections > 0, _RISK_OF_COUNT, block)
    beyond = mean_limit(divergence > _MOST_NATS, _RISK_OF_DIVERGENCE / 2, block)
    nats = mean_limit(np.minimum(divergence, _MOST_NATS) / _MOST_NATS, _RISK_OF_DIVERGENCE / 2, block) * _MOST_NATS
    return min(1.0, spent, beyond + min((nats / 2) ** 0.5, (-math.expm1(-nats)) ** 0.5))


def mean_limit(values: np.ndarray, risk: float, block: np.ndarray | None = None) -> float:
    """Upper confidence limit of the expectation of values in [0, 1], of any law; missed with at most ``risk``.

    Hoeffding (1963, theorem 1): a mean over N values falls to m or below with probability at most ``exp(-N kl(m, mu))``, kl
    the divergence between coins. The limit is the mu at which that is ``risk``: ``1 - risk^(1/N)`` where all values are 0.

    Args:
        values: [N], N at least 1.
        risk: in (0, 1).
        block: int [N]: values of different blocks are independent, those of one may depend on each other in any way. A block
            counts as one value, the sum of its own in units of the largest block's size. None is a block a value.
    """
    if block is not None:
        _, block, sizes = np.unique(block, return_inverse=True, return_counts=True)
        sums = np.bincount(block, np.asarray(values, dtype=float)) / sizes.max()
        return float(min(1.0, mean_limit(sums, risk) * len(sizes) * sizes.max() / len(values)))
    mean, allowed = float(np.mean(values)), -math.log(risk) / len(values)
    low, high = mean, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _coin_divergence(mean, middle) < allowed else (low, middle)
    return high


def _coin_divergence(mean: float, other: float) -> float:
    """``mean log(mean / other) + (1 - mean) log((1 - mean) / (1 - other))``, nats; ``other`` in (0, 1)."""
    heads = mean * math.log(mean / other) if mean > 0 else 0.0
    tails = (1 - mean) * (math.log1p(-mean) - math.log1p(-other)) if mean < 1 else 0.0
    return heads + tails
