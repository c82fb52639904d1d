"""What a run cost and how its drafts fared, as it is reported."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from free.sampling.confidence import CONFIDENCE, total_variation_limit

PHASES = ("draft", "target", "verification")
"""Of a round; one that is captured is a single phase, ``"round"``."""


def standard_error(values: np.ndarray) -> float:
    """Of the mean of ``values`` [N]; NaN of a single one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def total_variation(excess_acceptance: np.ndarray, divergence: np.ndarray) -> tuple[float, float]:
    """Bound on the total variation between the relaxed and the exact law of a trajectory, and its standard error.

    The least of three bounds in the means over the samples (``docs/relaxation.md``): that of ``excess_acceptance``, which is
    tight where few steps are relaxed, and with K that of ``divergence``, tight where many are a little, Pinsker's
    ``sqrt(K / 2)`` and Bretagnolle and Huber's ``sqrt(1 - exp(-K))``, which is below 1 always.

    Args:
        excess_acceptance, divergence: float64 [N], as in :class:`SamplingStatistics`.
    """
    spent, nats = float(excess_acceptance.mean()), float(divergence.mean())
    if spent == 0:
        return 0.0, 0.0
    pinsker, huber = (nats / 2) ** 0.5, (-np.expm1(-nats)) ** 0.5
    bounds = [
        (spent, standard_error(excess_acceptance)),
        (pinsker, standard_error(divergence) / (4 * pinsker) if pinsker else 0.0),
        (huber, standard_error(divergence) * np.exp(-nats) / (2 * huber) if huber else 0.0),
    ]
    bound, error = min(bounds)
    return float(bound), float(error)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each, as lines of right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


class Stopwatch:
    """Seconds spent in each phase. On CUDA it places events, which stall nothing, and reads them at the end."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._add(phase, time.perf_counter() - begin)

    @contextmanager
    def on_host(self, phase: str) -> Iterator[None]:
        """Of what the host does while the device waits: it has finished all that was asked of it before and after."""
        if self._cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self._add(phase, time.perf_counter() - begin)

    def finish(self) -> dict[str, float]:
        """Seconds by phase; waits for the device once."""
        if self._events:
            torch.cuda.synchronize()
        for phase, start, end in self._events:
            self._add(phase, start.elapsed_time(end) / 1e3)
        self._events.clear()
        return self.seconds

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


@dataclass
class SamplingStatistics:
    """The account of one call. Arrays by step are [S]; nothing grows with the number of samples times steps."""

    steps: int
    """S."""
    window: int | str
    """W; ``"auto"`` and ``"plan"`` took windows of several widths."""
    drafter: str
    """``"none"`` for the ancestral sampler."""
    rounds: np.ndarray
    """int64 [B]: sequential evaluations of the target that each sample took part in."""
    target_evaluations: int = 0
    """States that the target was evaluated at (a guided evaluation counts once)."""
    forwards: int = 0
    """Forwards of the target."""
    forward_batch_sizes: Counter[int] = field(default_factory=Counter)
    """How many forwards had how many states."""
    draft_calls: int = 0
    """Windows proposed."""
    windows: Counter[int] = field(default_factory=Counter)
    """How many rounds had windows of how many states."""
    tested: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [S]: acceptance tests by step."""
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [S]: drafts accepted by step."""
    delta_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 [S]: sum of |delta| over the tests of each step."""
    excess_acceptance: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 [B]: sum over each sample's tests of ``E[a_tau] - E[a_1]``, the tests expected to accept what an exact one
    would have rejected; 0 without relaxation."""
    divergence: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 [B]: sum over each sample's tests of a bound on the Kullback-Leibler divergence from the exact step, nats."""
    saved_rejections: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [B]: each sample's tests that accepted what an exact one of the same noise and uniform would have rejected."""
    block: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [B]: samples of different blocks are independent. Those that share a key share a block, and so do all whose
    windows were chosen by how the others fared (``window="auto"``)."""
    budget: float = 0.0
    """The most excess acceptance of a sample: 0 without relaxation, infinity with one that has no budget."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Wall seconds in ``draft``, ``target`` and ``verification``; of captured rounds in ``round``, which is all three, and
    in ``recording``, needed once for each batch size and window."""
    total_seconds: float = 0.0
    """Wall seconds of the whole call."""
    sampler: str = ""
    """What was sampled, where the caller did not name it: of a pipeline, what its scheduler stands for."""
    keys: Set[int] = frozenset()
    """Of the samples, and of those that their windows were chosen by: what follows from these statistics has seen their
    noise, and may choose nothing for them."""

    def __post_init__(self) -> None:
        if not len(self.tested):
            self.tested = np.zeros(self.steps, np.int64)
            self.accepted = np.zeros(self.steps, np.int64)
            self.delta_sum = np.zeros(self.steps)
        if not len(self.excess_acceptance):
            self.excess_acceptance = np.zeros(len(self.rounds))
            self.divergence = np.zeros(len(self.rounds))
            self.saved_rejections = np.zeros(len(self.rounds), np.int64)
        if not len(self.block):
            self.block = np.arange(len(self.rounds))

    @property
    def parallel_efficiency(self) -> float:
        """S / rounds, mean over the samples."""
        return float(np.mean(self.efficiency_per_sample))

    @property
    def efficiency_per_sample(self) -> np.ndarray:
        """float64 [B]: S / rounds of each sample."""
        return self.steps / self.rounds

    @property
    def acceptance_rate(self) -> float:
        """Accepted of tested drafts; NaN if none was tested."""
        tested = int(self.tested.sum())
        return int(self.accepted.sum()) / tested if tested else float("nan")

    @property
    def mean_delta(self) -> np.ndarray:
        """float64 [S]: mean |delta| of the tested drafts; NaN at steps without a test."""
        with np.errstate(invalid="ignore"):
            return np.where(self.tested > 0, self.delta_sum / np.maximum(self.tested, 1), np.nan)

    @property
    def total_variation_bound(self) -> float:
        """Estimate, from these samples, of a bound on the total variation between the law of a trajectory of this run and
        the exact one; exactly 0 without relaxation. See :func:`total_variation`.
        """
        return total_variation(self.excess_acceptance, self.divergence)[0]

    @property
    def total_variation_error(self) -> float:
        """Standard error of :attr:`total_variation_bound`; NaN of a single sample."""
        return total_variation(self.excess_acceptance, self.divergence)[1]

    @property
    def total_variation_limit(self) -> float:
        """What that total variation is at most with 95 % confidence, however few the samples, and where none spent anything;
        exactly 0 without relaxation. Samples that are not independent count as one (:attr:`block`): with ``window="auto"``
        all of a call do, and little is certified. See :func:`free.sampling.confidence.total_variation_limit`.
        """
        spent = self.excess_acceptance, self.divergence, self.saved_rejections
        return total_variation_limit(*spent, self.budget, self.block)

    def count_round(self, window: int, states: int, limit: int | None) -> None:
        """A round of ``window`` states a sample, ``states`` in all, at most ``limit`` a forward."""
        self.draft_calls += 1
        self.windows[window] += 1
        self.count_forward(states, limit)

    def count_forward(self, states: int, limit: int | None) -> None:
        """An evaluation of ``states`` states, at most ``limit`` a forward."""
        self.target_evaluations += states
        for first in range(0, states, limit or states):
            self.forwards += 1
            self.forward_batch_sizes[min(limit or states, states - first)] += 1

    def summary(self) -> str:
        """A short table for people."""
        rounds = self.rounds
        sizes = [f"{size} x {count}" for size, count in sorted(self.forward_batch_sizes.items())]
        largest = ("… " if len(sizes) > 4 else "") + ", ".join(sizes[-4:])
        rows = [
            ("samples", f"{len(rounds)}"),
            ("steps", f"{self.steps}"),
            *([("sampler", self.sampler)] if self.sampler else []),
            ("drafter, window", f"{self.drafter}, {self.window}"),
            ("rounds per sample", f"{rounds.mean():.1f} (least {rounds.min()}, most {rounds.max()})"),
            ("parallel efficiency", f"{self.parallel_efficiency:.2f}"),
            ("drafts accepted", f"{self.accepted.sum()} of {self.tested.sum()}"),
            *self._relaxed(),
            ("target forwards", f"{self.forwards} (states x forwards: {largest})"),
            ("target evaluations", f"{self.target_evaluations}"),
            ("seconds", f"{self.total_seconds:.3f}, of which " + ", ".join(f"{k} {v:.3f}" for k, v in self.seconds.items())),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _relaxed(self) -> list[tuple[str, str]]:
        if not self.budget:
            return []
        bound = f"at most {self.total_variation_bound:.3g} ± {self.total_variation_error:.2g} in total variation"
        limit = f"with {CONFIDENCE:.0%} confidence at most {self.total_variation_limit:.3g}"
        return [("distance from the exact law", f"{bound}; {limit}")]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready numbers, lists and strings; NaN becomes None."""
        return {
            "steps": self.steps,
            "window": self.window,
            "drafter": self.drafter,
            "rounds": self.rounds.tolist(),
            "parallel_efficiency": self.parallel_efficiency,
            "acceptance_rate": None if np.isnan(self.acceptance_rate) else self.acceptance_rate,
            "target_evaluations": self.target_evaluations,
            "forwards": self.forwards,
            "forward_batch_sizes": {str(size): count for size, count in sorted(self.forward_batch_sizes.items())},
            "draft_calls": self.draft_calls,
            "windows": {str(window): count for window, count in sorted(self.windows.items())},
            "tested": self.tested.tolist(),
            "accepted": self.accepted.tolist(),
            "mean_delta": [None if np.isnan(value) else value for value in self.mean_delta.tolist()],
            "excess_acceptance": self.excess_acceptance.tolist(),
            "divergence": self.divergence.tolist(),
            "saved_rejections": self.saved_rejections.tolist(),
            "total_variation_bound": self.total_variation_bound,
            "total_variation_error": None if np.isnan(self.total_variation_error) else self.total_variation_error,
            "total_variation_limit": self.total_variation_limit,
            "seconds": dict(self.seconds),
            "total_seconds": self.total_seconds,
            "sampler": self.sampler,
        }
