"""Whether a pipeline may be speculated: every settled state is shown to the pipeline as it is, and its answers compared.

The replay trusts nothing of this room: no rows, no wrapped networks, no timesteps of our own. The pipeline runs its own loop
of S steps over B samples, and is only handed the states that the speculative run settled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from free.drafters import Drafter
from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.scheduler import driven
from free.pipelines.speculate import speculate
from free.sampling.loop import Turn
from free.sampling.statistics import SamplingStatistics
from free.sampling.window import Proposed
from free.targets.base import TOLERANCES
from free.windows import WindowPlan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class PipelineCheck:
    """What :func:`free.check_pipeline` found."""

    pipeline: str
    """Its class."""
    error: torch.Tensor
    """float32 [S]: worst absolute error of each step's guided output, over the samples, of each loop of the call one after
    the other; NaN where the untouched pipeline was not seen to go."""
    scale: float
    """The largest output."""
    tolerance: float
    """Of the worst error over the scale."""
    stats: SamplingStatistics | None
    """Of the speculative run, its last loop."""
    refused: str = ""
    """Why the pipeline was refused, if it was."""

    @property
    def worst_error(self) -> float:
        """Over all steps and samples; NaN if nothing was compared."""
        return float(self.error.max()) if len(self.error) else float("nan")

    @property
    def passed(self) -> bool:
        """Whether the pipeline may be speculated: nothing refused, everything compared and within the tolerance."""
        return not self.refused and self.worst_error <= self.tolerance * self.scale

    def __str__(self) -> str:
        if self.refused:
            return f"{self.pipeline} cannot be speculated: {self.refused}"
        verdict = "may be speculated" if self.passed else "cannot be speculated: its rows do not meet what they met before"
        missing = int(self.error.isnan().sum())
        if missing:
            verdict = f"cannot be speculated: it leaves out {missing} of the steps that were settled"
        assert self.stats is not None
        return (
            f"{self.pipeline} {verdict}: worst error {self.worst_error:.2g} at scale {self.scale:.2g} over "
            f"{len(self.error)} steps of {len(self.stats.rounds)} samples, settled in {self.stats.rounds.mean():.1f} rounds"
        )


def check_pipeline(
    pipe: DiffusionPipeline,
    *,
    window: int | str | WindowPlan = 5,
    mode: str = "ragged",
    drafter: str | Drafter | Any = "gains",
    tolerance: float | None = None,
    verbose: bool = True,
    **call: Any,
) -> PipelineCheck:
    """Call a pipeline speculatively, then show every settled state to the pipeline as it is, and compare its answers.

    An answer is what the pipeline gives its scheduler's ``step``: guided, of all networks. If every settled state was
    answered as the untouched pipeline answers it, at its own batch size and step, then the samples have the law of the
    step-by-step sampler (up to the rounding of another batch size). Do it once for a pipeline and a kind of call; it costs
    two calls.

    Args:
        pipe: as in :func:`free.speculate`.
        window, mode, drafter: the same.
        tolerance: of the worst error over the largest output; left out, 1e-4 in float32, 2e-2 in float16, 0.1 in bfloat16.
        verbose: print the result.
        call: the arguments of the pipeline's call, which must say its random numbers: ``generator``, or none, for which
            torch's default one is set back between the two calls. Callbacks are left out.

    Returns:
        :class:`PipelineCheck`: ``passed``, ``worst_error``, ``scale``, ``stats``; its ``str`` is what is printed.

    Raises:
        TypeError, ValueError: a wrong argument, as in :func:`free.speculate`; of a refusal the result says why.
        RuntimeError: the pipeline does not repeat itself: its initial latents are others in the second call.
    """
    call = {name: value for name, value in call.items() if name not in ("callback", "callback_on_step_end")}
    generators = [value for value in _flat(call.get("generator")) if isinstance(value, torch.Generator)]
    name = type(pipe).__name__
    records = _Records()
    with _repeatable(generators):
        try:
            with speculate(pipe, window=window, mode=mode, drafter=drafter) as run:
                run.watch = lambda *of_round: records.enter(run.loops_before, *of_round)
                pipe(**call)
                stats = run.stats
        except UnsupportedPipelineError as error:
            result = PipelineCheck(name, torch.zeros(0), float("nan"), float("nan"), None, str(error))
            if verbose:
                print(result)
            return result
    with _repeatable(generators):
        replay = _Replay(records.loops)
        own = pipe.scheduler
        try:
            pipe.__dict__["scheduler"] = driven(own, replay)
            pipe(**call)
        finally:
            pipe.__dict__["scheduler"] = own
    if tolerance is None:
        tolerance = TOLERANCES[replay.dtype]
    result = PipelineCheck(name, replay.error, replay.scale, tolerance, stats)
    if verbose:
        print(result)
    return result


class _Records:
    """Of each loop of a call."""

    def __init__(self) -> None:
        self.loops: list[_Record] = []

    def enter(self, loops_before: int, *of_round: Any) -> None:
        while len(self.loops) <= loops_before:
            self.loops.append(_Record())
        self.loops[loops_before].enter(*of_round)


@dataclass
class _Record:
    """The settled states of a run and what was answered at them, by sample and step."""

    states: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    answers: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    """Of the untouched pipeline's answers, step by step, as far as it was seen to go."""
    batch: int = 0
    shape: tuple[int, ...] = ()

    def enter(self, proposed: Proposed, answer: torch.Tensor, turn: Turn) -> None:
        query, done, live = proposed.query, turn.done, turn.live
        self.batch = max(self.batch, int(live.index.max()) + 1)
        self.shape = tuple(answer.shape[1:])
        settled = query.step < (done.step + done.verification.advance)[query.sample]
        for row in settled.nonzero()[:, 0].tolist():
            sample = int(live.index[query.sample[row]])
            key = sample, int(query.step[row])
            self.states[key] = query.states[row].clone()
            self.answers[key] = answer[row].detach().float().clone()
        for row, sample in enumerate(live.index.tolist()):
            self.states[sample, int(live.step[row])] = live.state[row].clone()

    @property
    def steps(self) -> int:
        """How many were settled."""
        return 1 + max(step for _, step in self.answers)

    def at(self, values: dict[tuple[int, int], torch.Tensor], step: int) -> torch.Tensor:
        """[B, *sample shape] of one step."""
        return torch.stack([values[sample, step] for sample in range(self.batch)]).view(-1, *self.shape)


class _Replay:
    """Drives a pipeline's own loops, a step a step, along recorded states."""

    def __init__(self, loops: list[_Record]) -> None:
        self.loops, self._left = loops, iter(loops)
        self.record: _Record | None = None
        """Of the loop under way."""
        self.scale, self.dtype = 0.0, torch.float32
        self.iterating = False

    @property
    def error(self) -> torch.Tensor:
        nan = float("nan")
        return torch.tensor([error for one in self.loops for error in one.errors + [nan] * (one.steps - len(one.errors))])

    @property
    def in_rounds(self) -> bool:
        return self.record is not None and bool(self.record.errors)

    def iterate(self, timesteps: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        self.iterating, self.record = True, next(self._left, None)
        yield from timesteps
        self.iterating, self.record = False, None

    def step(self, model_output: torch.Tensor, sample: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        record = self.record
        if record is None or len(record.errors) == record.steps:
            raise RuntimeError("the pipeline does not repeat itself: it takes more steps in the second call")
        step, self.dtype = len(record.errors), sample.dtype
        copies, rest = divmod(len(sample), record.batch)
        expected = record.at(record.states, step)
        # states are kept in float32, whatever the pipeline's dtype
        if rest or (step == 0 and not torch.equal(sample[: record.batch].float(), expected.to(sample).float())):
            raise RuntimeError("the pipeline does not repeat itself: its initial latents are others in the second call")
        answer = model_output[: record.batch].float()
        record.errors.append(float((answer - record.at(record.answers, step).to(answer)).abs().max()))
        self.scale = max(self.scale, float(answer.abs().max()))
        return torch.cat([record.at(record.states, step + 1).to(sample)] * copies)


@contextmanager
def _repeatable(generators: list[torch.Generator]) -> Iterator[None]:
    """Within this context random numbers are drawn that are drawn again after it."""
    states = [generator.get_state() for generator in generators]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
