"""The certificate of relaxed runs, held against what the run's tests and innovations say of themselves."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats

from tests.statistical import laws
from tests.statistical.cases import RELAXED
from tests.statistical.chains import run_chain
from tests.statistical.laws import PValues, at_most_p, density_ratio


def certificate(name: str) -> PValues:
    """All that is tested of one relaxed case.

    By how much more often than an exact test a relaxed one accepts is what ``excess_acceptance`` adds up, so what the tests
    did less what was reported is a martingale; a budget bounds both. Without one |delta| and tau are the same everywhere, so
    that the law of each step is known.
    """
    case = RELAXED[name]
    assert case.relaxation is not None
    strength, budget = case.relaxation
    run = run_chain(case)
    tested, norm = run.tested, run.delta.norm(dim=-1)
    saved = torch.where(tested, run.accepted.double() - laws.acceptance_probability(norm), 0.0).sum(1)  # [n]
    reported = torch.cat([torch.from_numpy(of_call.excess_acceptance) for of_call in run.stats])
    result = {
        "saves no more than is reported": at_most_p(saved - reported),
        "saves no less than is reported": at_most_p(reported - saved),
    }
    if budget is not None:
        return result | {"saves no more than the budget": at_most_p(saved - budget)}

    distance, tau = float(norm[tested].mean()), math.exp(-strength)
    along = (run.innovation * run.delta / norm.clamp(min=1e-9)[..., None]).sum(-1)  # 0 where nothing was tested
    grid = np.linspace(-9, 9 + distance, 20_001)
    density = density_ratio(grid, distance, tau) * stats.norm.pdf(grid)
    cumulative = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2) * (grid[1] - grid[0])))
    level = torch.from_numpy(np.interp(laws.as_array(along[tested]), grid, cumulative))
    nats = torch.from_numpy(np.log(density_ratio(along.numpy(), distance, tau)))
    divergence = torch.cat([torch.from_numpy(of_call.divergence) for of_call in run.stats])
    return result | {
        "along delta: the relaxed law": laws.uniform_p(level),
        "diverges no more than is reported": at_most_p(torch.where(tested, nats, 0.0).sum(1) - divergence),
    }
