"""p-values of simple hypotheses. Each is valid far out in the tail, for one failure budget of 1e-6 an assertion."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats

PValues = dict[str, float]
"""By hypothesis."""

BUDGET = 1e-6
"""Probability that an assertion fails by chance, if seeds were drawn anew; they are fixed, so none is flaky."""


def as_array(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy().ravel()


def normal_p(values: torch.Tensor) -> float:
    """Kolmogorov-Smirnov against N(0, 1)."""
    return float(stats.kstest(as_array(values), "norm").pvalue)


def uniform_p(values: torch.Tensor) -> float:
    """Kolmogorov-Smirnov against U(0, 1)."""
    return float(stats.kstest(as_array(values), "uniform").pvalue)


def chi2_p(values: torch.Tensor, degrees: int) -> float:
    """Kolmogorov-Smirnov of squared norms against chi² of ``degrees``."""
    return float(stats.kstest(as_array(values), stats.chi2(degrees).cdf).pvalue)


def two_sample_p(first: torch.Tensor, second: torch.Tensor) -> float:
    """Two-sample Kolmogorov-Smirnov."""
    return float(stats.ks_2samp(as_array(first), as_array(second), method="asymp").pvalue)


def spearman_p(first: torch.Tensor, second: torch.Tensor) -> float:
    """Rank correlation."""
    return float(stats.spearmanr(as_array(first), as_array(second)).pvalue)


def spread_p(values: torch.Tensor) -> float:
    """Sum of squares of iid N(0, 1) against chi², two-sided: the sharpest test of a scale."""
    array = as_array(values)
    law = stats.chi2(len(array))
    total = float(np.square(array).sum())
    return min(1.0, 2 * min(law.cdf(total), law.sf(total)))


def z_score_p(score: float) -> float:
    return math.erfc(abs(score) / math.sqrt(2))


def success_p(success: torch.Tensor, probability: torch.Tensor) -> float:
    """Successes against their probabilities given the past (a martingale, so also within one sample's chain)."""
    success, probability = as_array(success), as_array(probability)
    return z_score_p((success - probability).sum() / math.sqrt((probability * (1 - probability)).sum()))


def bonferroni(p_values: list[float]) -> float:
    """One p-value for a family of tests."""
    return min(1.0, len(p_values) * min(p_values))


def lags_p(rows: torch.Tensor, longest: int) -> float:
    """Rows [n, T, D] that should be iid N(0, I): no two of a sequence, 1 … ``longest`` rows apart, share their numbers."""
    rows = rows.double()
    scores = []
    for lag in range(1, longest + 1):
        products = rows[:, lag:] * rows[:, :-lag]
        scores.append(float(products.sum()) / math.sqrt(products.numel()))
    return bonferroni([z_score_p(score) for score in scores])


def at_most_p(values: torch.Tensor) -> float:
    """That iid values have a mean of 0 or less; n is in the thousands, where the normal law is good at 1e-6."""
    values = values.double()
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    return math.erfc(mean / error / math.sqrt(2)) / 2 if error else float(mean <= 0)


def acceptance_probability(norm: torch.Tensor) -> torch.Tensor:
    """Eq. 40 of FREE (arXiv 2511.20390): 2 Phi(-|delta| / 2)."""
    return torch.special.erfc(norm.double() / math.sqrt(8))


def density_ratio(y: np.ndarray, norm: float, tau: float) -> np.ndarray:
    """Of a relaxed step's innovation to N(0, 1): docs/relaxation.md, written from the two cases there."""
    log_rho = norm * y - norm**2 / 2  # of the draft's density to the target's
    on_the_targets_side = 1 + np.exp(np.minimum(log_rho, 0)) - np.exp(tau * np.minimum(log_rho, 0))
    return np.where(log_rho < 0, on_the_targets_side, np.exp((1 - tau) * np.maximum(log_rho, 0)))


def moments_p(whitened: torch.Tensor) -> dict[str, float]:
    """Bonferroni moments of rows [n, D] that should be iid N(0, I): mean, x², x_i x_j, |x|²."""
    rows = whitened.double()
    count, dim = rows.shape
    upper = torch.triu_indices(dim, dim, 1)
    # x_i x_j has variance 1; n is in the thousands, where the normal law is good at 1e-6
    products = (rows.T @ rows / math.sqrt(count))[upper[0], upper[1]]
    return {
        "mean": bonferroni([z_score_p(float(value)) for value in rows.mean(0) * math.sqrt(count)]),
        "x²": bonferroni([spread_p(column) for column in rows.T]),
        "x_i x_j": bonferroni([z_score_p(float(value)) for value in products]),
        "|x|²": spread_p(rows),
    }


def whiten(rows: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Rows [n, D] of N(mean, covariance) as rows of N(0, I), float64."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (rows.double() - mean).T, upper=False).T


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def orthogonal_to(direction: torch.Tensor) -> torch.Tensor:
    """For unit vectors [..., D] one unit vector each that is orthogonal to it: where coordinate -1 (else -2) points."""
    axis = torch.zeros_like(direction)
    aligned = direction[..., -1].abs() > 0.9
    axis[..., -1] = (~aligned).to(axis)
    axis[..., -2] = aligned.to(axis)
    return unit(axis - (axis * direction).sum(-1, keepdim=True) * direction)
