"""Upper bounds on p-values that hold for every sample size, without tables: what is printed is never too small.

A bound loses a little power beside an exact p-value, and needs no law of large numbers: it may be trusted at 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_THRESHOLDS = 31


def normal_cdf(values: torch.Tensor) -> torch.Tensor:
    """Of N(0, 1)."""
    return torch.special.ndtr(values.double())


def chi2_cdf(degrees: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of chi² of ``degrees``."""
    return lambda values: torch.special.gammainc(torch.tensor(degrees / 2, dtype=torch.float64), values.double() / 2)


def distribution_p(values: torch.Tensor, cdf: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """That iid values [n] have this distribution function: Kolmogorov-Smirnov, by the Dvoretzky-Kiefer-Wolfowitz inequality
    with Massart's constant (1990), ``2 exp(-2 n D²)``. 1 of no values.
    """
    count = len(values)
    if not count:
        return 1.0
    expected = cdf(values.double().cpu().sort().values)
    rank = torch.arange(count + 1, dtype=torch.float64) / count
    distance = float(torch.maximum(rank[1:] - expected, expected - rank[:-1]).max())
    return min(1.0, 2 * math.exp(-2 * count * distance**2))


def visible_shift(count: int, budget: float) -> float:
    """The least shift of N(0, 1) that :func:`distribution_p` of ``count`` values takes below ``budget`` but for a chance of
    ``budget``: D must exceed its bound by the same once more. Infinite where no shift is enough."""
    if not count:
        return math.inf
    distance = 2 * math.sqrt(math.log(2 / budget) / (2 * count))
    # a shift of s moves the distribution function by at most 2 Phi(s / 2) - 1
    return (
        math.inf if distance >= 1 else 2 * float(torch.special.ndtri(torch.tensor((1 + distance) / 2, dtype=torch.float64)))
    )


def scale_p(sum_of_squares: float, count: int) -> float:
    """That ``count`` iid values are N(0, 1), by their sum of squares: Chernoff's bound of chi², both sides."""
    if not count:
        return 1.0
    ratio = sum_of_squares / count
    if ratio <= 0 or not math.isfinite(ratio):
        return 0.0
    return min(1.0, 2 * math.exp(-count / 2 * (ratio - 1 - math.log(ratio))))


def mean_p(sums: torch.Tensor, count: int) -> float:
    """That the columns of ``count`` rows of iid N(0, 1), whose sums [D] these are, have mean 0; one p-value for all."""
    if not count:
        return 1.0
    worst = float(sums.double().abs().max()) / math.sqrt(count)
    return min(1.0, len(sums) * math.erfc(worst / math.sqrt(2)))


def success_p(successes: float, expected: float, variance: float) -> float:
    """That successes are as likely as was expected of each given all before: Freedman's inequality (1975), both sides.

    Args:
        successes: how many there were.
        expected: sum of their probabilities.
        variance: sum of probability times its complement.
    """
    off = abs(successes - expected)
    return min(1.0, 2 * math.exp(-(off**2) / (2 * (variance + off / 3)))) if off else 1.0


def pairs_p(differences: torch.Tensor) -> float:
    """That differences [n, F] of exchangeable pairs are symmetric about 0; one p-value for all F columns.

    A self-normalised sum of symmetric numbers is sub-Gaussian, however heavy their tails (Hoeffding 1963, given the absolute
    values): ``2 exp(-T² / 2)`` for ``T = sum d / sqrt(sum d²)``.
    """
    differences = differences.double()
    norm = differences.norm(dim=0)
    score = (differences.sum(0).abs() / norm.clamp(min=1e-300)).max() if norm.numel() else torch.zeros(())
    return min(1.0, differences.shape[1] * 2 * math.exp(-(float(score) ** 2) / 2))


def paired_distribution_p(first: torch.Tensor, second: torch.Tensor) -> float:
    """That the pairs of two lists [n] are exchangeable, by how many of each lie below quantiles of both together."""
    quantiles = torch.linspace(0, 1, _THRESHOLDS + 2, dtype=torch.float64)[1:-1]
    pooled = torch.cat((first, second)).double().sort().values
    thresholds = pooled[(quantiles * (len(pooled) - 1)).long()]
    return pairs_p((first[:, None] <= thresholds).double() - (second[:, None] <= thresholds).double())
