"""``free-dit check``: whether speculative samples of a model, with a drafter, have the law of its step-by-step sampler.

The package's own drafters are exact by construction and tested to be. What a user adds may not be: a drafter that has seen
the noise of the step that it drafts, or an evaluation of a later step, or a model whose answers depend on the other rows of
its batch. Each test here is of something that holds for every exact sampler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from free.checks import check_count
from free.drafters import Drafter, as_drafter
from free.evaluation.bounds import paired_distribution_p, pairs_p, visible_shift
from free.evaluation.innovations import Innovations
from free.processes import ReverseProcess
from free.sampling.keys import sample_keys
from free.sampling.loop import Run
from free.sampling.request import Options, Request, check_request
from free.sampling.samplers import ancestral_sample
from free.sampling.statistics import SamplingStatistics
from free.sampling.window import Setup, evaluate, propose, settle
from free.targets import as_target
from free.targets.base import TOLERANCES, has_rows, take_rows
from free.windows import FixedWindow
from free_kernels import guided

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

BUDGET = 1e-6
"""Probability that an exact sampler fails, all tests together."""
MEANINGS = {
    "along delta": "a step's noise along delta, the direction in which its draft was off, is N(0, 1)",
    "across delta": "a step's noise orthogonal to delta is N(0, 1)",
    "norm": "the squared noise of a step is chi²",
    "scale": "the noise of all steps together has variance 1",
    "elements": "each element's noise has mean 0",
    "along the last noise": "a step's noise is independent of the step before's",
    "acceptance": "as many drafts are accepted as their distance says, 2 Phi(-|delta| / 2) each",
    "samples, mean": "samples and step-by-step samples have the same mean, element by element",
    "samples, square": "samples and step-by-step samples have the same mean square, element by element",
    "samples, norm": "samples and step-by-step samples have the same law of |x|",
    "samples, along mean delta": "samples and step-by-step samples have the same law along the mean of delta",
}
"""What each test asks."""
_REPLAYED = 8  # samples whose answers are asked for again


@dataclass
class ExactnessCheck:
    """What :func:`check_exactness` found."""

    p_values: dict[str, float]
    """Upper bounds, by test (:data:`MEANINGS`)."""
    answer_error: float
    """Worst difference between the model's answers in a window and alone, over the largest answer."""
    tolerance: float
    """Of it."""
    visible_shift: float
    """A shift of a tested step's noise along delta, in its standard deviations, that would have been found."""
    rounds: float
    """Mean of a sample."""
    steps: int
    samples: int
    """Speculative ones; as many step-by-step ones were drawn."""
    tested: int
    """Drafts."""
    accepted: int
    drafter: str

    @property
    def failed(self) -> list[str]:
        """Tests that an exact sampler would not have failed, but for a chance of :data:`BUDGET`."""
        return [name for name, value in self.p_values.items() if not value >= BUDGET / len(self.p_values)]

    @property
    def repeats(self) -> bool:
        """Whether the model answers a state in a window as it does alone."""
        return self.answer_error <= self.tolerance

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against exactness."""
        return self.repeats and not self.failed

    def __str__(self) -> str:
        width = max(map(len, self.p_values))
        table = [f"{name:<{width}}  {p:<8.2g}  {MEANINGS[name]}" for name, p in self.p_values.items()]
        what = (
            f"drafter {self.drafter}: {self.samples} samples of {self.steps} steps in {self.rounds:.1f} rounds, "
            f"{self.accepted} of {self.tested} drafts accepted; as many samples step by step"
        )
        answers = f"worst difference of an answer in a window and alone: {self.answer_error:.1g} of the largest answer"
        return "\n".join((what, "", f"{'test':<{width}}  p-value", *table, "", answers, self._verdict()))

    def _verdict(self) -> str:
        if not self.repeats:
            return (
                f"NOT EXACT: the model answers a state otherwise in a window than alone, by more than {self.tolerance:g}. "
                "It looks at the other rows of its batch, at the first row's timestep only, or keeps state between calls."
            )
        if self.failed:
            return (
                f"NOT EXACT: {', '.join(self.failed)}. A p-value is how often an exact sampler is as far off. Does the "
                "drafter know the noise of the step that it drafts, or an evaluation of a later step than its own?"
            )
        return (
            "Nothing speaks against exactness: an exact sampler fails with a probability of at most "
            f"{BUDGET:g}. Noise that is shifted by {self.visible_shift:.2g} of its standard deviation along delta would "
            "have failed; more samples see smaller shifts."
        )


@torch.no_grad()
def check_exactness(
    model: Any,
    drafter: str | Drafter | Any = "gains",
    *,
    class_labels: int | Sequence[int] | None = None,
    conditioning: dict[str, Any] | None = None,
    shape: Sequence[int] | None = None,
    process: ReverseProcess | SchedulerMixin | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    window: int = 8,
    num_samples: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
    progress: bool = False,
) -> ExactnessCheck:
    """Test whether speculative sampling with a drafter has the law of the step-by-step sampler, on one's own model.

    Draws ``num_samples`` speculatively, watching the noise that each step ends up with, and as many step by step with other
    keys. All p-values are upper bounds that hold for any number of samples; together they fail an exact sampler with a
    probability of at most :data:`BUDGET`. What is found depends on how far drafts are off: of drafts that are all but
    perfect there is little to see, so test with few steps too. Rounds are not captured as CUDA graphs here.

    Args:
        model, drafter: as in :func:`free.speculative_sample`.
        class_labels: an int, or several that the samples take in turn; None is the null class, or none.
        conditioning: of a callable model; the rows of its tensors are taken in turn.
        shape, process, guidance_scale: as there.
        num_inference_steps: S, where ``process`` does not say.
        window: W, 2 or more.
        num_samples: 16 or more.
        batch_size: samples drawn at once.
        seed: of the keys.
        tolerance: of :attr:`ExactnessCheck.answer_error`; left out, 1e-4 in float32, 2e-2 in float16, 0.1 in bfloat16.
        progress: show a bar that counts samples.

    Returns:
        :class:`ExactnessCheck`: ``passed``, ``p_values``; its ``str`` says it in words.

    Raises:
        ValueError, TypeError: a wrong argument, named, before any work is done.
        NonFiniteOutputError: as there.
    """
    window = check_count("window", window, least=2, why="as a window of 1 is the step-by-step sampler itself")
    num_samples = check_count("num_samples", num_samples, least=16)
    batch_size = check_count("batch_size", batch_size)
    target = as_target(model)
    common: dict[str, Any] = {
        "shape": shape, "process": process, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale
    }  # fmt: skip
    keys = sample_keys(seed, range(2 * num_samples))
    batches = [range(first, min(first + batch_size, num_samples)) for first in range(0, num_samples, batch_size)]
    given = [_rows_in_turn(class_labels, conditioning, batch) for batch in batches]
    requests = [
        check_request(target, Options(seed=[keys[i] for i in batch], **rows, **common))
        for batch, rows in zip(batches, given, strict=True)
    ]
    request = requests[0]
    drafter = as_drafter(drafter, request.seed.device)
    drafter.check(target)

    seen = Innovations(math.prod(request.sample_shape))
    replay = _Replay(requests[0])
    runs, speculative, ancestral = [], [], []
    with tqdm(total=2 * num_samples, disable=not progress, unit="sample") as bar:
        for batch, rows, one in zip(batches, given, requests, strict=True):
            samples, stats = _run(one, drafter, window, seen, replay if one is request else None)
            bar.update(len(batch))
            others = [keys[num_samples + i] for i in batch]
            alone = ancestral_sample(target, seed=others, **rows, **common)
            bar.update(len(batch))
            runs.append(stats)
            speculative.append(samples.flatten(1).double().cpu())
            ancestral.append(alone.samples.flatten(1).double().cpu())
    ours, theirs, off = torch.cat(speculative), torch.cat(ancestral), seen.off.cpu()
    p_values = {
        **seen.p_values(),
        "samples, mean": pairs_p(ours - theirs),
        "samples, square": pairs_p(ours.square() - theirs.square()),
        "samples, norm": paired_distribution_p(ours.norm(dim=1), theirs.norm(dim=1)),
        "samples, along mean delta": paired_distribution_p(ours @ off, theirs @ off),
    }
    return ExactnessCheck(
        p_values,
        replay.error(),
        TOLERANCES.get(target.dtype, TOLERANCES[torch.float32]) if tolerance is None else tolerance,
        visible_shift(sum(map(len, seen.along)), BUDGET / len(p_values)),
        float(torch.cat([torch.from_numpy(stats.rounds) for stats in runs]).double().mean()),
        request.process.num_steps,
        num_samples,
        seen.tested,
        seen.accepted,
        drafter.name,
    )


def _rows_in_turn(class_labels: Any, conditioning: dict[str, Any] | None, batch: range) -> dict[str, Any]:
    """What a sampler is given for the samples of a batch."""
    given: dict[str, Any] = {"num_samples": len(batch)}
    if class_labels is not None:
        labels = torch.as_tensor(class_labels).flatten()
        given["class_labels"] = labels[torch.tensor(batch) % max(1, len(labels))] if len(labels) else labels
    if conditioning is not None:
        given["conditioning"] = {
            name: value[torch.tensor(batch, device=value.device) % len(value)] if has_rows(value) else value
            for name, value in conditioning.items()
        }
    return given


def _run(
    request: Request, drafter: Drafter, window: int, seen: Innovations, replay: _Replay | None
) -> tuple[torch.Tensor, SamplingStatistics]:
    """A speculative run that is watched round by round: its samples [B, D] and statistics."""
    setup = Setup.of(request, drafter, window, "auto")
    seen.begin(request)
    with request.running(drafter):
        run = Run(setup)
        run.begin(FixedWindow(setup.widest))
        while run.unfinished:
            width = run.next_window()
            proposed = propose(run.live, setup, width)
            answers = evaluate(proposed.query, run.live.conditioning, request)
            live, done = settle(run.live, setup, proposed, answers)
            run.account.add(live, done)
            output = seen.see(request, proposed, live, done)
            if replay is not None:
                replay.keep(done.step, done.verification.advance, live.index, done.states, output)
            run.enter(live, done, width)
            run.release()
        if replay is not None:
            replay.ask()
    return run.state, run.finish()


class _Replay:
    """Asks the model again, step by step, what it was asked in windows: the first samples of a request."""

    def __init__(self, request: Request) -> None:
        rows, steps = min(_REPLAYED, request.batch), request.process.num_steps
        self.request, self.rows = request, rows
        empty = torch.zeros(steps, rows, math.prod(request.sample_shape), device=request.seed.device)
        self.states, self.answers, self.again = empty, torch.zeros_like(empty), torch.zeros_like(empty)

    def keep(
        self, step: torch.Tensor, advance: torch.Tensor, index: torch.Tensor, states: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Keep the settled states of a round, and the guided answers there."""
        for j in range(states.shape[1]):
            row = ((j < advance) & (index < self.rows)).nonzero()[:, 0]
            self.states[step[row] + j, index[row]] = states[row, j]
            self.answers[step[row] + j, index[row]] = output[row, j]

    def ask(self) -> None:
        """Ask again; within the request's run."""
        request = self.request
        conditioning = take_rows(request.conditioning, torch.arange(self.rows, device=request.seed.device))
        for k, states in enumerate(self.states):
            timestep = request.process.timestep[k].expand(self.rows)
            answer = request.target.evaluate(states.view(-1, *request.sample_shape), timestep, conditioning, request.guided)
            self.again[k] = guided(answer.output, answer.unconditional, request.guidance_scale, torch.float32).flatten(1)

    def error(self) -> float:
        """Worst difference over the largest answer."""
        largest = float(self.again.abs().max())
        return float((self.answers - self.again).abs().max()) / largest if largest else 0.0
