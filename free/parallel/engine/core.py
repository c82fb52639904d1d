"""An engine: a batch that samples join and leave at any round, so that it stays full.

Samples advance independently, and their noise is a pure function of seed and step: whoever takes the slot of a sample that
is finished needs nothing but an empty memory, and draws what it would draw alone. The rounds are those of
:mod:`free.sampling.window`; no server is built, whoever serves drives :meth:`Engine.step`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from free.checks import check_count, is_int, without_gradients
from free.drafters import Drafter, as_drafter
from free.parallel.engine.batch import Batch, Row, refill, rows_together
from free.parallel.engine.handle import EngineStatistics, Handle
from free.parallel.engine.keys import Keys
from free.parallel.engine.rounds import Rounds
from free.processes import ReverseProcess
from free.sampling.capture import Graphs, wants_capture
from free.sampling.company import check_alike, own
from free.sampling.keys import check_seeds
from free.sampling.loop import NonFiniteOutputError
from free.sampling.planning import load_window
from free.sampling.relaxation import Relaxation
from free.sampling.request import DEFAULT_STEPS, Options, Request, check_model, check_samples, check_shape
from free.sampling.window import Setup
from free.windows import WINDOWS, LoadWindow, Schedule, WindowPlan, check_load, check_window, schedule_of
from free_kernels.dispatch import resolve

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Engine:
    """Draws samples as they are asked for, at most ``slots`` of them at a time, in rounds that all of them share.

    A sample has the law of :func:`free.ancestral_sample`; with a number or a plan as ``window`` its very bits depend on its
    own request alone, where the model's outputs do not depend on the batch: neither on when it joined nor on with whom.

    Requests may be added by any thread, also while another one is in a round, and are served in their order. An engine that
    is empty holds no memory of samples, and nothing of it grows with the number of those that it has drawn.

    Args:
        model, drafter, process, num_inference_steps, guidance_scale, shape, relaxation, impl, capture: as in
            :func:`free.speculative_sample`, common to all requests. To compile the model, compile it before.
        slots: samples under way at a time, at most.
        window: W: an int; a plan of :func:`free.plan_window`; windows by load, ``{1: 16, 4: 8, 16: 4}`` for up to so many
            samples under way; or ``"auto"``, which makes them of a pilot run and of rounds that it times when the first
            sample begins. By load the law stays exact, but the sample of a seed may vary with its company.

    Raises:
        ValueError: a wrong argument, named, before any work is done.
        TypeError: a model, a drafter or a relaxation that is none.
    """

    @without_gradients
    def __init__(
        self,
        model: Any,
        drafter: str | Drafter | Any = "gains",
        *,
        slots: int = 16,
        window: int | str | WindowPlan | Mapping[int, int] = 8,
        process: ReverseProcess | SchedulerMixin | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = 1.0,
        shape: Sequence[int] | None = None,
        relaxation: Relaxation | None = None,
        impl: str = "auto",
        capture: str | bool = "auto",
    ) -> None:
        if relaxation is not None and not isinstance(relaxation, Relaxation):
            raise TypeError(f"relaxation is a {type(relaxation).__name__}; allowed is a free.Relaxation, or None")
        slots = check_count("slots", slots)
        self._common = Options.among(locals())
        self.target, process, self._guidance_scale = check_model(model, self._common)
        self.process = process.to(self.target.device or "cpu")
        self.drafter = as_drafter(drafter, self.target.device or "cpu")
        self.drafter.check(self.target)
        if shape is not None:
            check_shape(self.target, shape, None)
        if relaxation is not None:
            relaxation.check(self.target, self.process)
        if self.target.device is not None:  # else the first request says where it is
            resolve(impl, self.target.device)
            nobody = torch.zeros(0, dtype=torch.int64, device=self.target.device)
            like = Request(self.target, self.process, {}, self._guidance_scale, (), nobody, None)
            wants_capture(capture, like, self.drafter, relaxation)
        self._schedule = _schedule_of(window, slots)
        """None until the first samples begin, where it is to be measured."""
        if self._schedule:
            self._schedule.reach(self.process)
        self._relaxation, self._capture = relaxation, capture
        self.stats = EngineStatistics(slots)
        self._keys = Keys()
        self._added = 0
        self._queue: dict[Handle, Request] = {}
        """Waiting, in order."""
        self._batch: Batch | None = None
        self._rounds: Rounds | None = None
        """Those that the batch is in."""
        self._alike: Request | None = None
        """What the requests that are waiting or under way are like."""
        self._ended: dict[Handle, None] = {}
        """That :meth:`step` has not returned yet."""
        self._adding = threading.RLock()
        self._stepping = threading.RLock()
        self._in_step = False

    @without_gradients
    def add(
        self,
        *,
        class_labels: Any = None,
        conditioning: dict[str, Any] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
    ) -> Handle:
        """Ask for a sample; returns at once, also while another thread is in a round.

        Args:
            class_labels, conditioning, seed, generator, latents: as in :func:`free.speculative_sample` of one sample, so
                tensors have one row. Of the conditioning the names, shapes and dtypes, and what is no tensor, are the same
                for all requests in the engine. What is given may be changed afterwards.

        Raises:
            ValueError: a wrong argument, or one unlike those of the requests in the engine, named; nothing else is changed.
        """
        if seed is not None and not is_int(seed):
            raise ValueError(f"seed is {seed!r}; allowed is an int, as a request is of one sample")
        key, *_ = check_seeds(seed, generator, 1)
        given: dict[str, Any] = {"class_labels": class_labels, "conditioning": conditioning, "latents": latents}
        options = replace(self._common, num_samples=1, seed=key, **given)
        request = check_samples(self.target, self.process, self._guidance_scale, options)
        wants_capture(self._capture, request, self.drafter, self._relaxation)
        if self._schedule:
            self._schedule.check_keys([key], "a sample of the same seed")
        request = own(request)
        with self._adding:
            if self._alike is not None and self.unfinished:
                check_alike(request, self._alike, "the requests in the engine")
            else:
                self._alike = request
            handle = Handle(self._added, key, self.stats.rounds, self._cancel)
            self._added += 1
            self._queue[handle] = request
        return handle

    @property
    def unfinished(self) -> int:
        """Requests that are waiting or under way."""
        with self._adding:
            return len(self._queue) + sum(handle not in self._queue for handle in self._under_way())

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    @without_gradients
    def step(self) -> list[Handle]:
        """One round of all samples under way, after those that wait have taken the slots that are free.

        Returns:
            The requests that ended in it, with a sample or with an error of their own: NaN or infinity of the model, or of
            the drafter, ends the request whose step depends on it, and no other. Without requests there is no round.

        Raises:
            RuntimeError: it is called from within a round.
            Exception: whatever the model or the drafter raises, also in the pilot run of automatic windows. No sample has
                moved then, and the round may be tried again, or a request be cancelled.
        """
        with self._stepping:
            if self._in_step:
                raise RuntimeError("engine.step is called from within a round of the same engine; add is what may be")
            self._in_step = True
            try:
                self._end()  # of a round that was interrupted
                if self.unfinished:
                    with self._clocked(), self._running():
                        self._round()
                self._end()
            finally:
                self._in_step = False
            ended, self._ended = self._ended, {}
        return list(ended)

    def run(self) -> Iterator[Handle]:
        """Rounds until nothing is left to do, what is added meanwhile included; yields the requests as they end."""
        while self.unfinished:
            yield from self.step()

    def _round(self) -> None:
        with self._adding:
            under_way = self._under_way()
            inside = set(under_way)
            waiting = (entry for entry in self._queue.items() if entry[0] not in inside)
            joining = list(islice(waiting, self.stats.slots - len(under_way)))
        if not under_way:
            self._batch = self._rounds = None
        if self._rounds is None:
            if not joining:
                return  # all were cancelled
            self._rounds = self._begin(joining[0][1])
        rounds = self._rounds
        if isinstance(rounds.schedule, LoadWindow):
            self._keys.meet([handle for handle, _ in joining], under_way)
        batch = self._batch = refill(self._batch, joining, rounds.setup, rounds.account)
        now = time.perf_counter()
        with self._adding:
            for handle, _ in joining:
                handle.begun = now
                self._queue.pop(handle, None)
        if batch is None:
            return
        window = rounds.window(batch)
        moved, evaluated = rounds.advance(batch, window)
        self._batch = moved
        self.stats.rounds += 1
        self.stats.sample_rounds += len(batch.occupied)
        self.stats.target_evaluations += evaluated
        self.stats.windows[window] += 1

    def _begin(self, like: Request) -> Rounds:
        """The rounds of samples ``like`` the one given."""
        self.target.check_ready()
        slots = self.stats.slots
        request = replace(
            like, seed=like.seed.expand(slots).clone(), conditioning=rows_together([like] * slots), latents=None
        )
        captured = wants_capture(self._capture, request, self.drafter, self._relaxation)

        def rounds(schedule: Schedule | None) -> tuple[Setup, Graphs | None]:
            widest, reach = (schedule.widest, schedule.reach(request.process)) if schedule else (WINDOWS[-1], None)
            setup = Setup.of(request, self.drafter, widest, self._common.impl, reach, self._relaxation)
            return setup, Graphs.of(setup) if captured else None

        self._schedule = self._schedule or load_window(*rounds(None))
        return Rounds(*rounds(self._schedule), self._schedule)

    def _running(self) -> AbstractContextManager[None]:
        """While the target is evaluated; others that share it wait for a round, not for the engine."""
        assert self._alike is not None
        return self._alike.running(self.drafter, self._relaxation)

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stats.seconds += time.perf_counter() - begin

    def _under_way(self) -> list[Handle]:
        batch = self._batch
        return [row.handle for row in batch.rows if row.handle and not row.handle.done] if batch else []

    def _end(self) -> None:
        """The samples that are finished, or cannot be, leave."""
        batch, rounds, num_steps = self._batch, self._rounds, self.process.num_steps
        if batch is None or rounds is None:
            return
        for i, row in enumerate(batch.rows):
            handle = row.handle
            broke = min(row.broke)
            if handle is None or handle.done or (row.step < num_steps and broke >= num_steps):
                continue
            with self._adding:
                if handle.done:  # cancelled by another thread
                    continue
                self._ended[handle] = None
                if broke < num_steps:
                    handle.end(error=self._error(row, handle, broke))
                    self.stats.failed += 1
                else:
                    sample = batch.live.state[i : i + 1].unflatten(1, rounds.setup.request.sample_shape).clone()
                    handle.end(sample, rounds.stats_of(row, handle, self.stats.rounds))
                    self.stats.finished += 1
        if not self._under_way():
            self._batch = self._rounds = None
            if not self.unfinished:
                self._keys.emptied()

    def _error(self, row: Row, handle: Handle, step: int) -> NonFiniteOutputError:
        model, _ = row.broke
        name = "model" if model == step else f"drafter {self.drafter.name!r}"
        timestep = self.process.timestep[step].item()
        return NonFiniteOutputError(
            f"{name} returned NaN or infinity at step {step} (timestep {timestep}) of request {handle.number} (seed "
            f"{handle.seed}); the others go on"
        )

    def _cancel(self, handle: Handle) -> bool:
        with self._adding:
            if handle.done:
                return False
            self._queue.pop(handle, None)
            handle.end(cancelled=True)
            self.stats.cancelled += 1
            return True


def _schedule_of(window: Any, slots: int) -> Schedule | None:
    """The schedule that ``window`` stands for; None is one that has to be measured."""
    if isinstance(window, Mapping):
        check_load(window)
        return LoadWindow(window, slots)
    check_window(window)
    return schedule_of(window)
