"""The rounds of an engine's samples."""

from __future__ import annotations

import time

import torch

from free.parallel.engine.batch import Batch, Row
from free.parallel.engine.handle import Handle, RequestStatistics
from free.sampling.account import Account, Report
from free.sampling.capture import Graphs
from free.sampling.statistics import Stopwatch
from free.sampling.window import Setup, advance
from free.windows import LoadWindow, Schedule


class Rounds:
    """The rounds of an engine's samples, from one time that it was empty to the next."""

    def __init__(self, setup: Setup, graphs: Graphs | None, schedule: Schedule) -> None:
        self.setup, self.graphs, self.schedule = setup, graphs, schedule
        request = setup.request
        self.account = graphs.account if graphs else Account(request.process.num_steps, request.seed)
        self._report = Report(self.account)
        self._watch = Stopwatch(torch.device("cpu"))

    def window(self, batch: Batch) -> int:
        """The next round's."""
        schedule = self.schedule
        if isinstance(schedule, LoadWindow) and any(row.handle.of_all for row in batch.rows if row.handle):
            return min(schedule.of_all, self.setup.widest)
        return min(schedule.window(batch.step, [], len(batch.rows)), self.setup.widest)

    def advance(self, batch: Batch, window: int) -> tuple[Batch, int]:
        """A round, and the states that the target was evaluated at; waits for the device."""
        if self.graphs is not None:
            live, done = self.graphs.advance(batch.live, window, self._watch)
        else:
            live, done = advance(batch.live, self.setup, window, self._watch)
            self.account.add(live, done)
        self._report = Report(self.account)
        return batch.moved(live, self._report.read()), done.evaluated

    def stats_of(self, row: Row, handle: Handle, engine_rounds: int) -> RequestStatistics:
        """Of a sample that is whole."""
        spent, divergence, saved = self._report.spent()[row.slot].tolist()
        now = time.perf_counter()
        return RequestStatistics(
            self.setup.request.process.num_steps,
            int(self._report.read().rounds[row.slot]),
            engine_rounds - handle.rounds_before,
            handle.begun - handle.asked,
            now - handle.begun,
            spent,
            divergence,
            int(saved),
        )
