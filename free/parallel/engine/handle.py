"""One request of an engine, as the one who made it sees it, and what requests and engines cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class RequestStatistics:
    """What one request took."""

    steps: int
    """S."""
    rounds: int
    """In which its sample took part: sequential evaluations of the target."""
    engine_rounds: int
    """That the engine made from the time it was asked until the sample was whole, those that it waited for included."""
    seconds_waited: float
    """Until its sample had a slot."""
    seconds_drawn: float
    """From there on."""
    excess_acceptance: float
    """As of :class:`free.SamplingStatistics`; 0 without relaxation."""
    divergence: float
    """Likewise."""
    saved_rejections: int
    """Likewise."""

    @property
    def parallel_efficiency(self) -> float:
        """S / rounds."""
        return self.steps / self.rounds

    @property
    def engine_efficiency(self) -> float:
        """S / the rounds that the engine made meanwhile: what the request has seen of it, its wait for a slot included."""
        return self.steps / self.engine_rounds


@dataclass
class EngineStatistics:
    """What an engine has done so far. Nothing of it grows with the number of requests."""

    slots: int
    rounds: int = 0
    sample_rounds: int = 0
    """Samples that took part, over the rounds."""
    finished: int = 0
    """Requests whose sample is whole."""
    failed: int = 0
    """Requests that ended with an error."""
    cancelled: int = 0
    target_evaluations: int = 0
    """States that the target was evaluated at (a guided evaluation counts once)."""
    windows: Counter[int] = field(default_factory=Counter)
    """How many rounds had windows of how many states."""
    seconds: float = 0.0
    """Wall seconds in rounds, all that belongs to them included."""

    @property
    def busy(self) -> float:
        """Share of the slots with a sample in them, over the rounds; NaN before the first."""
        return self.sample_rounds / (self.slots * self.rounds) if self.rounds else float("nan")


class Handle:
    """One request of a :class:`free.Engine`, which makes it.

    It is written to by the engine alone, :attr:`done` last: whoever sees that reads the rest as it stays.
    """

    def __init__(self, number: int, seed: int, rounds_before: int, cancel: Callable[[Handle], bool]) -> None:
        self.number = number
        """How many requests of this engine came before."""
        self.seed = seed
        """The key of its noise, as a signed integer of 64 bits."""
        self.sample: torch.Tensor | None = None
        """float32 [1, *sample shape], on the engine's device, once it is whole."""
        self.error: Exception | None = None
        """Why there will be no sample."""
        self.stats: RequestStatistics | None = None
        """Of a sample that is whole."""
        self.cancelled = False
        self.done = False
        """Whether there is a sample, an error, or it was cancelled."""
        self.asked = time.perf_counter()
        """When it was made, in seconds of :func:`time.perf_counter`."""
        self.begun = self.asked
        """When its sample had a slot, likewise."""
        self.of_all = False
        """Whether the load may not choose its windows; see :class:`free.parallel.engine.keys.Keys`."""
        self.rounds_before = rounds_before
        """Rounds of the engine before it was asked for."""
        self._cancel: Callable[[Handle], bool] | None = cancel

    def cancel(self) -> bool:
        """Give up the request, whose slot is free at the next round. False if it has ended already.

        An engine's :meth:`~free.Engine.step` does not return it.
        """
        cancel = self._cancel
        return cancel(self) if cancel else False

    def end(
        self,
        sample: torch.Tensor | None = None,
        stats: RequestStatistics | None = None,
        error: Exception | None = None,
        cancelled: bool = False,
    ) -> None:
        """The engine's word on how it ended."""
        self.sample, self.stats, self.error, self.cancelled = sample, stats, error, cancelled
        self._cancel = None
        self.done = True

    def __repr__(self) -> str:
        state = "waits or is under way"
        if self.done:
            state = "cancelled" if self.cancelled else "failed" if self.error else "done"
        return f"<request {self.number}, seed {self.seed}: {state}>"
