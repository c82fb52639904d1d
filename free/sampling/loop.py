"""Rounds until every sample is finished: their account, what the host reads of it, and the samples that leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from free.processes import ReverseProcess
from free.sampling.account import Account, Report
from free.sampling.capture import Graphs
from free.sampling.statistics import SamplingStatistics, Stopwatch
from free.sampling.window import Live, Round, Setup, advance, first_window
from free.windows import Known, Schedule


class NonFiniteOutputError(FloatingPointError, ValueError):
    """A model returned NaN or infinity; the message names the step and the sample. What was finished before is not lost."""

    def __init__(self, message: str, samples: torch.Tensor | None = None, finished: torch.Tensor | None = None) -> None:
        super().__init__(message)
        self.samples = samples
        """float32 [B, *sample shape]: the states as they were, samples where :attr:`finished`; None outside a sampler."""
        self.finished = finished
        """bool [B], on the CPU: which samples are whole. They are those that took few rounds, and so none that one may keep
        alone: draw the others under their own seeds, or the law is that of quick samples."""


@dataclass
class Turn:
    """A round, as those who watch the loop see it."""

    live: Live
    """After the round, the samples that it finished included."""
    done: Round
    known: Known
    """What the host knows by now."""


class Run:
    """The samples of one setup from their initial states to the end; whoever drives rounds does it by this loop.

    Made and driven while the setup's request is running.

    Args:
        setup: what is asked for.
        graphs: the same setup's captured rounds, if they are to be replayed.
    """

    def __init__(self, setup: Setup, graphs: Graphs | None = None) -> None:
        request, steps = setup.request, setup.request.process.num_steps
        self.setup, self.graphs = setup, graphs
        self.state = request.initial_state()
        """float32 [B, D]: the initial states, into which the samples are written as they are finished."""
        self.account = graphs.account if graphs else Account(steps, request.seed)
        self.stats = SamplingStatistics(steps, setup.widest, setup.drafter.name, np.zeros(request.batch, np.int64))
        self.stats.budget = setup.relaxation.spendable if setup.relaxation else 0.0
        self.watch = Stopwatch(request.seed.device)

    def turns(self, schedule: Schedule, lag: int = 0, guess: torch.Tensor | None = None) -> Iterator[Turn]:
        """Rounds until every sample is finished; who has seen enough stops asking.

        The host knows how the samples fared ``lag`` rounds ago: with one it prepares a round while the device is at the one
        before, and neither waits for the other. It reads what is under way at once where that may have been the last round.

        Args:
            schedule: of the windows, none wider than the setup's.
            lag: rounds; 0 reads each before the next.
            guess: of the samples, float32 [B, D], see :func:`free.sampling.window.first_window`.

        Raises:
            NonFiniteOutputError: a step that depends on NaN or infinity.
        """
        self.begin(schedule, guess)
        while self.unfinished:
            window = self.next_window()
            if self.graphs is not None:
                live, done = self.graphs.advance(self.live, window, self.watch)
            else:
                live, done = advance(self.live, self.setup, window, self.watch)
                self.account.add(live, done)
            yield self.enter(live, done, window, lag)
            self.release()

    def begin(self, schedule: Schedule, guess: torch.Tensor | None = None) -> None:
        """All samples in their initial states; whoever evaluates the target elsewhere drives the rounds by these parts of
        :meth:`turns`: ``next_window``, the two halves of a round, ``enter`` and ``release``, until none is unfinished.
        """
        self.schedule, self.stats.window = schedule, schedule.name
        self.live = first_window(self.setup, self.state.clone(), guess)
        self.known = Known.nothing(self.setup.request.batch, self.setup.request.process.num_steps)
        self._under_way: deque[tuple[int, Report]] = deque()
        self._forward_batch = self.setup.request.target.forward_batch(self.setup.request.guided)

    @property
    def unfinished(self) -> bool:
        """Whether some sample is, as far as the host knows."""
        return bool((self.known.step < self.setup.request.process.num_steps).any())

    def next_window(self) -> int:
        """The next round's, as the schedule has it."""
        step = self.known.step[self.known.step < self.setup.request.process.num_steps]
        unread = [window for window, _ in self._under_way]
        return min(self.schedule.window(step, unread, len(self.live.index)), self.setup.widest)

    def enter(self, live: Live, done: Round, window: int, lag: int = 0) -> Turn:
        """Enter a round of ``window`` states, which the account has seen; reads those that are ``lag`` rounds old."""
        process, stats, under_way = self.setup.request.process, self.stats, self._under_way
        self.live = live
        stats.count_round(window, done.evaluated, self._forward_batch)
        under_way.append((window, Report(self.account)))
        while len(under_way) > lag or (under_way and _may_be_finished(self.known.step, under_way, process.num_steps)):
            window, report = under_way.popleft()
            before, self.known = self.known, report.read()
            if (self.known.broke < process.num_steps).any():
                self.state[live.index] = live.state
                check_finite(self.known, stats.drafter, process, self.state.unflatten(-1, self.setup.request.sample_shape))
            self.schedule.learn(window, before, self.known)
        return Turn(live, done, self.known)

    def release(self) -> None:
        """Let the finished samples go."""
        num_steps, live = self.setup.request.process.num_steps, self.live
        rows = rows_to_keep(int((self.known.step < num_steps).sum()), len(live.index), self.setup.static_shapes)
        if rows < len(live.index):
            self.state[live.index] = live.state
            self.live = live.keep((live.step >= num_steps).int().argsort(stable=True)[:rows])

    def finish(self) -> SamplingStatistics:
        """What it cost; waits for the device."""
        self.account.report_to(self.stats)
        self.stats.block = self._blocks()
        self.stats.seconds = self.watch.finish()
        return self.stats

    def _blocks(self) -> np.ndarray:
        """int64 [B], below B: samples that may depend on each other have the same number."""
        if self.schedule.adaptive:
            return np.zeros(self.setup.request.batch, np.int64)
        return np.unique(self.setup.request.keys, return_inverse=True)[1].astype(np.int64)


def check_finite(known: Known, drafter: str, process: ReverseProcess, samples: torch.Tensor) -> None:
    """Raise the error of the first step that was not finite, if there was one.

    Args:
        known: of the samples.
        drafter: its name.
        process: of the samples.
        samples: their states, [B, *sample shape].
    """
    who, sample = np.unravel_index(np.argmin(known.broke), known.broke.shape)
    step = int(known.broke[who, sample])
    if step < process.num_steps:
        name = f"drafter {drafter!r}" if who else "model"
        timestep = process.timestep[step].item()
        finished = (known.step >= process.num_steps) & (known.broke >= process.num_steps).all(0)
        raise NonFiniteOutputError(
            f"{name} returned NaN or infinity at step {step} (timestep {timestep}) of sample {sample}; "
            f"{int(finished.sum())} of {len(finished)} samples were finished before, which this error has as .samples",
            samples.clone(),
            torch.from_numpy(finished),
        )


def _may_be_finished(step: np.ndarray, under_way: deque[tuple[int, Report]], num_steps: int) -> bool:
    """Whether the rounds under way can have settled all that was left: another one might be for nothing."""
    return int(step.min()) + sum(window for window, _ in under_way) >= num_steps


def rows_to_keep(unfinished: int, rows: int, static_shapes: bool) -> int:
    """The unfinished samples; with static shapes as many as the power of two that holds them, so that shapes are few."""
    return min(rows, 1 << (unfinished - 1).bit_length()) if static_shapes and unfinished else unfinished
