"""Windows that change on the way, by step or by what was settled, leave the law as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import free
from free.windows import Known, Schedule
from tests.analytic import GaussianTarget
from tests.statistical.laws import BUDGET, moments_p

SAMPLES, STEPS = 20_000, 10
TARGET, PROCESS = GaussianTarget.example(6), free.ReverseProcess.ddpm(STEPS)


class Fickle(Schedule):
    """Wide after few rejections, narrow after many: as dependent on what was settled as a choice can be."""

    name, widest = "fickle", 6

    def __init__(self) -> None:
        self.chosen = 3
        self.seen: set[int] = set()

    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        self.seen.add(self.chosen)
        return self.chosen

    def learn(self, window: int, before: Known, after: Known) -> None:
        tested, accepted = (after.tested - before.tested).sum(), (after.accepted - before.accepted).sum()
        self.chosen = 2 + int(1e3 * accepted / max(tested, 1)) % 5


def assert_law(samples: torch.Tensor) -> None:
    mean, covariance = TARGET.chain_moments(PROCESS)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (samples.double() - mean).T, upper=False).T
    failed = {name: p_value for name, p_value in moments_p(whitened).items() if not p_value >= BUDGET}
    assert not failed, failed


@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output", "gains"])
def test_a_plan(drafter: str) -> None:
    plan = free.WindowPlan(np.array([3, 1, 5, 2, 4, 1, 6, 3, 2, 1]))
    out = free.speculative_sample(TARGET, drafter, shape=(6,), process=PROCESS, num_samples=SAMPLES, seed=5, window=plan)
    assert 0.05 < out.stats.acceptance_rate < 0.95
    assert_law(out.samples)


@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output", "gains"])
def test_windows_that_follow_what_was_settled(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Fickle()
    monkeypatch.setattr(free.sampling.samplers, "auto_window", lambda setup, graphs: schedule)
    out = free.speculative_sample(TARGET, drafter, shape=(6,), process=PROCESS, num_samples=SAMPLES, seed=6, window="auto")
    assert len(schedule.seen) > 1
    assert_law(out.samples)
