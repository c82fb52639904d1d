"""One denoising loop of a pipeline, by rounds: what its scheduler's ``step`` does while it is speculated.

The first round is one plain step of all samples, in which the pipeline shows its latents. From then on the latents are the
states that a round asks about, and ``step`` settles the round, drafts the next, and hands out its states; the last ``step``
hands out the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from free.drafters import Drafter
from free.pipelines.batch import Repeated
from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.planning import exploring_window
from free.pipelines.rows import Layout, Rows, Timestep, plain
from free.pipelines.target import PipelineTarget
from free.processes import ReverseProcess
from free.sampling.keys import keys_of_loop, keys_of_states
from free.sampling.loop import Run, Turn
from free.sampling.relaxation import Relaxation
from free.sampling.request import Request
from free.sampling.window import Proposed, Setup, propose, settle
from free.targets import TargetOutput
from free.windows import Schedule, seconds_now

Watch = Callable[[Proposed, torch.Tensor, Turn], None]
"""Of a round: what was asked, what was answered [N, *sample shape], and what came of it."""


@dataclass(frozen=True)
class Plan:
    """What a loop is asked to do, from its caller and its pipeline."""

    networks: dict[str, torch.nn.Module]
    process: Callable[[dict[str, Any]], ReverseProcess]
    """Of the whole schedule, given the arguments of the first ``step``."""
    schedule: Schedule | None
    """None is chosen on the way."""
    drafter: Drafter
    relaxation: Relaxation | None
    seed: Sequence[int] | None
    """One a sample; None makes them of the latents."""
    impl: str
    setting: Callable[[], Hashable]
    """Calls that agree in this take about as long, given the same batch, shape and device; asked in the first ``step``."""
    copies: int = 1
    """How often the pipeline keeps its samples in its latents: 2 where guidance has doubled them before the loop."""
    repeated: Repeated | None = None
    """Of ``mode="batch"``, in which the pipeline has a row for each state of the widest window."""
    barrier: Callable[[torch.Tensor], bool] | None = None
    """Maps a timestep [] to True or False. Where it changes, every window ends, and no sample goes on until all have
    arrived."""
    watch: Watch | None = None
    """Told of every round."""
    number: int = 0
    """Loops that the call has had before: each draws from keys of its own."""
    spent: torch.Tensor | None = None
    """float64 [B, 3], of :class:`free_kernels.RelaxedCost`: what relaxation has cost the samples in those."""


@dataclass(frozen=True)
class _Timed:
    """A round under way, by the clock."""

    begin: float
    window: int
    states: int
    whole: bool
    """Whether all states of its windows count."""


class Loop:
    """One pass of a pipeline over its scheduler's timesteps.

    Args:
        plan: what is asked for.
        timesteps: [S'] that the pipeline iterates.
        first: the scheduler's step of the first of them.
    """

    def __init__(self, plan: Plan, timesteps: torch.Tensor, first: int) -> None:
        self.plan, self.timesteps, self.first = plan, timesteps, first
        self.shown: torch.Tensor | None = None
        """What the loop was given last; None outside it."""
        self.run: Run | None = None
        self.interrupted = False
        """Whether the pipeline has been given what is settled, and may pass through the rest."""
        self._begin = 0
        self._answered = False
        self._carries_over = False
        self._layout: Layout | None = None
        self._proposed: Proposed | None = None
        self._window = 1
        self._handed_out: torch.Tensor | None = None
        self._timed: _Timed | None = None
        self._width = 1 if plan.repeated is None else plan.repeated.width
        """Rows of the pipeline for each sample."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        try:
            for begin, timestep in enumerate(self.timesteps):
                self._begin, self.shown = begin, timestep
                yield timestep
                if self.run is not None:
                    break
            while self.run is not None and self.run.unfinished:
                assert self._layout is not None
                self._answered = False
                self.shown = Timestep.of(self._layout.shown.clone(), self._layout.timestep, self._layout)
                yield self.shown
                if self.interrupted:
                    break
                if not self._answered:
                    raise UnsupportedPipelineError(
                        "the pipeline went through a round without a call of scheduler.step; it cannot be speculated"
                    )
        finally:
            self.shown = None

    @property
    def in_rounds(self) -> bool:
        """Whether the latents are the states of a round."""
        return self.run is not None

    @torch.no_grad()
    def step(self, model_output: torch.Tensor, sample: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Settle the round that ``model_output`` answers; the next round's states, or the samples.

        Args:
            model_output: guided, a row a state of the round.
            sample: those states, as the pipeline has them.
            arguments: the others of the scheduler's ``step``.
        """
        if self.shown is None:
            raise UnsupportedPipelineError(
                "the pipeline calls scheduler.step outside a loop over scheduler.timesteps; it cannot be speculated"
            )
        if self._answered:
            raise UnsupportedPipelineError(
                "the pipeline calls scheduler.step twice for one timestep (two latents that share a scheduler?); it cannot "
                "be speculated"
            )
        output, sample = plain(model_output), plain(sample)
        if output.shape != sample.shape:
            raise UnsupportedPipelineError(
                f"scheduler.step is given an output of shape {tuple(output.shape)} for a sample of {tuple(sample.shape)}: "
                "the pipeline works with a learned variance, or with a fixed number of rows (mode='batch' may allow it); it "
                "cannot be speculated"
            )
        rows = len(sample) // self.plan.copies
        if self.run is None:
            self._check_copies(sample)
            if self.plan.repeated is not None:
                self.plan.repeated.check_output(output)
            self._start(sample[: rows : self._width], arguments)
        elif not self._is_handed_out(sample):
            raise UnsupportedPipelineError(
                "the latents were changed between two steps (inpainting by blending, or a callback that returns latents); "
                "that is another process, which cannot be speculated"
            )
        self._answered = True
        self._settle(output[:rows])
        handed_out = self._hand_out()
        self._time()
        return handed_out

    def settled(self) -> torch.Tensor:
        """[B, *sample shape], in the pipeline's dtype: where each sample stands."""
        assert self.run is not None
        state, live = self.run.state.clone(), self.run.live
        state[live.index] = live.state
        return state.view(-1, *self.run.setup.request.sample_shape).to(self._dtype)

    def settled_of(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, ...]: the settled samples as the pipeline keeps them in ``latents``."""
        settled = self.settled()
        if latents.shape[1:] == settled.shape[1:]:
            return torch.cat([settled] * self.plan.copies)
        # in another shape than the scheduler sees: the first state of each sample is the settled one, if it has a state
        self._carries_over = True
        if not isinstance(latents, Rows):
            return latents
        batch = torch.arange(len(settled), device=latents.device)
        return plain(latents)[(latents.place.sample[:, None] == batch).int().argmax(0)]

    def timestep(self) -> torch.Tensor:
        """[B]: of each sample's last settled step."""
        assert self.run is not None
        step = torch.from_numpy(self.run.known.step - 1)
        return self.run.setup.request.process.timestep[step.to(self.run.state.device)]

    def _start(self, sample: torch.Tensor, arguments: dict[str, Any]) -> None:
        plan = self.plan
        begin = self.first + self._begin
        process = steps_of(plan.process(arguments), begin, self.first + len(self.timesteps)).to(sample.device)
        if not torch.equal(process.timestep.to(self.timesteps), self.timesteps[self._begin :]):
            raise UnsupportedPipelineError("the pipeline iterates other timesteps than its scheduler's process has")
        if not torch.isfinite(sample).all():
            raise ValueError("latents holds NaN or infinity; allowed are finite numbers")
        self._dtype, shape = sample.dtype, tuple(sample.shape[1:])
        state = sample.detach().float().flatten(1)
        if plan.seed is not None and len(plan.seed) != len(sample):
            raise ValueError(f"seed speaks of {len(plan.seed)} samples; the pipeline draws {len(sample)}")
        keys = keys_of_loop(plan.seed if plan.seed is not None else keys_of_states(state), plan.number)
        target = PipelineTarget(plan.networks, shape)
        plan.drafter.check(target)
        seed = torch.tensor(keys, dtype=torch.int64, device=sample.device)
        request = Request(target, process, {}, 1.0, shape, seed, state)
        if plan.schedule is not None:
            plan.schedule.check_keys(request.keys, "the same latents", "latents")
        if plan.relaxation is not None:
            plan.relaxation.check(target, process)
        schedule = plan.schedule
        if schedule is None:
            schedule = exploring_window(request, plan.drafter, plan.relaxation, (plan.impl, plan.setting()))
        setup = Setup.of(request, plan.drafter, schedule.widest, plan.impl, schedule.reach(process), plan.relaxation)
        self.run = Run(setup)
        self.run.begin(schedule)
        if (ledger := self.run.live.ledger) is not None and plan.spent is not None:
            if plan.spent.shape != ledger.spent.shape:
                raise UnsupportedPipelineError(
                    f"the pipeline's loops have {len(plan.spent)} and {len(sample)} samples: what relaxation costs a sample "
                    "in all of them cannot be said"
                )
            ledger.spent = plan.spent
        self._barriers = self._find_barriers(process)
        with request.running():
            self._proposed = propose(self.run.live, setup, self._window)
        self._batch = len(sample)

    def _check_copies(self, sample: torch.Tensor) -> None:
        """Raise an error unless the pipeline's latents hold each sample as often as they should."""
        copies = self.plan.copies
        first, *others = sample.tensor_split(copies)
        if not all(torch.equal(first, other) for other in others):
            raise UnsupportedPipelineError(
                f"the pipeline's latents should hold each sample {copies} times, as DiTPipeline's do under guidance, but do "
                "not, and it cannot be speculated"
            )

    def _time(self) -> None:
        """Tell the schedule what a round took from ``step`` to ``step``, all that the pipeline does in it included; not the
        first one, which is of another kind, nor one with states that do not count.
        """
        run, before = self.run, self._timed
        assert run is not None
        now = seconds_now(run.state.device)
        if before is not None and before.whole:
            run.schedule.time(before.window, before.states, now - before.begin)
        self._timed = None
        if run.unfinished and self._proposed is not None:
            states, rows = len(self._proposed.query.states), len(run.live.index)
            self._timed = _Timed(now, self._window, states, states == self._window * rows)

    def _is_handed_out(self, sample: torch.Tensor) -> bool:
        """Whether these are the states of the round, which the pipeline may have rounded to a dtype of its own."""
        given = self._handed_out
        if given is None or sample.shape != given.shape:
            return False
        dtypes = (sample.dtype, torch.bfloat16, torch.float16)
        return any(torch.equal(sample, given.to(dtype).to(sample.dtype)) for dtype in dtypes)

    def _find_barriers(self, process: ReverseProcess) -> list[int]:
        """Steps that all samples reach before any passes, ascending; the last is S."""
        steps = [process.num_steps]
        if self.plan.barrier is not None:
            side = [self.plan.barrier(timestep) for timestep in process.timestep]
            steps = [k for k in range(1, len(side)) if side[k] != side[k - 1]] + steps
        return steps

    def _settle(self, output: torch.Tensor) -> None:
        run, proposed = self.run, self._proposed
        assert run is not None
        assert proposed is not None
        states = len(proposed.query.states)
        if len(output) < states:
            raise UnsupportedPipelineError(f"scheduler.step is given {len(output)} rows where the round has {states} states")
        answer = output[:states] if self.plan.repeated is None else output[self._places()]
        with run.setup.request.running(), run.watch("verification"):
            live, done = settle(run.live, run.setup, proposed, TargetOutput(answer))
        done = replace(done, evaluated=len(output))
        run.account.add(live, done)
        turn = run.enter(live, done, self._window)
        if self.plan.watch is not None:
            self.plan.watch(proposed, answer, turn)
        run.release()

    def _hand_out(self) -> torch.Tensor:
        """The next round's states, or the samples; drafts where there is something to draft."""
        run = self.run
        assert run is not None
        request = run.setup.request
        device, number = run.state.device, self._layout.number + 1 if self._layout else 1
        if run.unfinished:
            until = next(step for step in self._barriers if step > int(run.known.step.min()))
            self._window = run.next_window()
            with request.running(), run.watch("draft"):
                self._proposed = propose(run.live, run.setup, self._window, until)
            query = self._proposed.query
            sample, states, step = run.live.index[query.sample], query.states, query.step.clamp(max=until - 1)
            if self.plan.repeated is not None:  # the other rows are where their samples are, and nobody reads their answers
                places = self._places()
                sample = torch.arange(self._batch, device=device).repeat_interleave(self._width)
                states = self.settled().flatten(1).float()[sample].index_put((places,), states)
                step = torch.full_like(sample, until - 1).index_put((places,), step)
            elif self._carries_over:  # a state of each finished sample, whose answer nobody reads
                rest = torch.ones(self._batch, dtype=torch.bool, device=device)
                rest[sample] = False
                rest = rest.nonzero()[:, 0]
                sample, step = torch.cat((sample, rest)), torch.cat((step, torch.full_like(rest, until - 1)))
                states = torch.cat((states, self.settled().flatten(1)[rest].float()))
            self._layout = self._lay_out(number, sample, request.process.timestep[step])
            handed_out: torch.Tensor = self._as_latents(states)
            self._handed_out = handed_out
            return Rows.of(handed_out.clone(), self._layout)
        samples = self._as_latents(self.settled())
        if not self._carries_over:
            return samples
        everyone = torch.arange(self._batch, device=device)
        last = request.process.timestep[-1].expand(self._batch)
        return Rows.of(samples, replace(self._lay_out(number, everyone, last), row=everyone * self._width, final=True))

    def _places(self) -> torch.Tensor:
        """int64 [N]: the pipeline's rows at which the states of the round are, where each sample has a row a state."""
        assert self.run is not None
        assert self._proposed is not None
        query, window = self._proposed.query, self._proposed.proposal.states.shape[1]
        place = torch.arange(len(query.states), device=query.sample.device) if query.place is None else query.place
        return self.run.live.index[query.sample] * self._width + place % window

    def _lay_out(self, number: int, sample: torch.Tensor, timestep: torch.Tensor) -> Layout:
        timestep, batch = timestep.to(self.timesteps), self._batch * self._width
        row = sample if self._width == 1 else torch.arange(len(sample), device=sample.device)
        # where the pipeline makes a number of it, the largest says most about how: 0 is the same in any unit
        return Layout(number, sample, row, batch, timestep, timestep[timestep.abs().argmax()], self._carry_over)

    def _as_latents(self, states: torch.Tensor) -> torch.Tensor:
        assert self.run is not None
        latents = states.view(-1, *self.run.setup.request.sample_shape).to(self._dtype)
        return torch.cat([latents] * self.plan.copies) if self.plan.copies > 1 else latents

    def _carry_over(self) -> None:
        self._carries_over = True


def steps_of(process: ReverseProcess, first: int, last: int) -> ReverseProcess:
    """Steps ``first`` … ``last - 1`` of a process, as a process."""
    if (first, last) == (0, process.num_steps):
        return process
    columns: dict[str, Any] = {
        field.name: value[first:last]
        for field in fields(process)
        if field.init and isinstance(value := getattr(process, field.name), torch.Tensor)
    }
    if "memory" in columns:
        # nothing is remembered of before: the first step is of first order
        columns["memory"] = torch.cat((torch.zeros_like(columns["memory"][:1]), columns["memory"][1:]))
    return replace(process, **columns)
