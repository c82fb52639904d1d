"""One round of speculative sampling: propose, evaluate, settle. The file to read first.

Each live sample stands at a step of its own. A round drafts its next W-1 steps, evaluates the target at all W states of all
samples in one forward, settles the steps up to the first rejection (reflected) or up to the exact last step of the window,
and keeps the whole evaluated window, abandoned states included, as the anchors of the next drafts. Noise is a pure function
of seed and step: steps beyond a rejection meet the noise they were drafted with, which decided nothing and is still N(0, I)
given all that was decided (FREE, arXiv 2511.20390, supplement B, with noise reuse on top).

The two halves around the evaluation know nothing of the target but its answers, so that whoever evaluates drives the same
rounds: the sampler's loop, a captured graph, a pipeline's own loop, several processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from free.drafters import Drafter, LastWindow, Situation
from free.sampling.noise import NoiseWindow
from free.sampling.relaxation import Ledger, Relaxation
from free.sampling.request import Request
from free.sampling.statistics import Stopwatch
from free.sampling.tensors import map_tensors
from free.targets.base import TargetOutput, take_rows
from free_kernels import Proposal, Span, Verification, finite, span, verify
from free_kernels.dispatch import resolve


@dataclass(frozen=True)
class Setup:
    """What stays the same from round to round."""

    request: Request
    drafter: Drafter
    widest: int
    """The widest window of any round."""
    reach: torch.Tensor
    """int64 [S]: the last step that a window from step k may settle."""
    static_shapes: bool
    """Whether each round of as many samples and as wide a window has the same shapes, so that the host need not ask the
    device which states count. If not, only those are evaluated: on a CPU nothing is gained by more."""
    impl: str
    relaxation: Relaxation | None = None
    """None is exact."""

    @classmethod
    def of(
        cls,
        request: Request,
        drafter: Drafter,
        widest: int,
        impl: str,
        reach: torch.Tensor | None = None,
        relaxation: Relaxation | None = None,
    ) -> Setup:
        """Windows of at most ``widest`` states, shapes as the device likes them."""
        process = request.process
        # a window ends at a step that is never drafted: the last one, or one without noise
        reach = process.exact_step if reach is None else reach
        static_shapes = request.seed.device.type == "cuda"
        return cls(request, drafter, min(widest, process.num_steps), reach, static_shapes, impl, relaxation)


@dataclass
class Live:
    """The samples under way, B of them, flattened to D numbers each; with static shapes some of them may be finished."""

    index: torch.Tensor
    """int64 [B]: which of the caller's samples each one is."""
    seed: torch.Tensor
    """int64 [B]."""
    step: torch.Tensor
    """int64 [B]: S for a finished sample."""
    state: torch.Tensor
    """float32 [B, D]."""
    last: LastWindow
    conditioning: dict[str, Any]
    """The request's, one row a sample."""
    noise: NoiseWindow | None
    """Kept for the reference operations; the kernels make noise faster than they could read it."""
    ledger: Ledger | None = None
    """Of a relaxed run."""
    x0: torch.Tensor | None = None
    """float32 [B, D], of a process of second order: the target's estimate of x0 at the last settled step; zeros at first."""
    memory: Any = None
    """The drafter's own, see :meth:`free.Drafter.remember`."""

    def keep(self, rows: torch.Tensor) -> Live:
        """The live samples at ``rows`` (int64)."""
        return map_tensors(self, lambda values: values[rows])

    def clone(self) -> Live:
        """The same in memory of its own."""
        return map_tensors(self, torch.clone)


@dataclass
class Round:
    """What a round did, beside moving the samples on."""

    situation: Situation
    """What the drafts leant on."""
    length: torch.Tensor
    """int64 [B]: states that count; 0 for a finished sample."""
    states: torch.Tensor
    """[B, W, D]: the drafted window."""
    evaluated: int
    """States that the target was evaluated at, those that do not count included."""
    verification: Verification
    finite: torch.Tensor
    """bool [B]: whether the state that each sample reached is finite."""

    @property
    def step(self) -> torch.Tensor:
        """int64 [B]: where each sample stood before."""
        return self.situation.step


def first_window(
    setup: Setup, state: torch.Tensor, guess: torch.Tensor | None = None, samples: Request | None = None
) -> Live:
    """All samples at step 0 in their initial states [B, D], with an empty memory.

    Args:
        setup: of the run.
        state: float32 [B, D].
        guess: float32 [B, D], an estimate of the samples that the first window's drafts lean on, in place of zero; it may
            have seen no noise of these samples' keys.
        samples: those that begin, to join others of the setup's; left out, all of the setup's request begin.
    """
    request = samples or setup.request
    seed = request.seed
    batch, numel = state.shape
    index = torch.arange(batch, device=seed.device)
    step = torch.zeros_like(seed)
    zeros = state.new_zeros(batch, setup.widest, numel)
    feature = None
    if setup.drafter.needs_features:
        tokens, width = request.target.check_features()
        feature = zeros.new_zeros(batch, setup.widest, tokens, width, dtype=request.target.dtype)
    output = zeros
    if guess is not None:
        # the output that means it, of a state of zero
        output = zeros.clone()
        output[:, 0] = guess / request.process.x0_model_coef[0]
    last = LastWindow(step, torch.ones_like(step), zeros, output, output if request.guided else None, feature)
    stored = resolve(setup.impl, seed.device) == "reference" and not setup.static_shapes
    noise = NoiseWindow.empty(seed, setup.widest, numel, setup.request.batch) if stored else None
    ledger = Ledger.empty(batch, seed.device) if setup.relaxation else None
    x0 = None if request.process.memory is None else torch.zeros_like(state)
    memory = setup.drafter.begin(last, request.sample_shape)
    return Live(index, seed, step, state, last, request.conditioning, noise, ledger, x0, memory)


@dataclass
class Query:
    """The N states that a round asks the target about, those of all samples: one forward answers them."""

    states: torch.Tensor
    """float32 [N, D]."""
    step: torch.Tensor
    """int64 [N]."""
    sample: torch.Tensor
    """int64 [N]: the live sample that each one belongs to, which is its row of the conditioning."""
    place: torch.Tensor | None
    """int64 [N]: where each one stands in the windows [B * W]; None is everywhere, in order."""


@dataclass
class Proposed:
    """A drafted window of each sample, half a round: the target's answer to :attr:`query` is the other half's."""

    situation: Situation
    """What the drafts leant on."""
    proposal: Proposal
    """States [B, W, D] and draft outputs [B, W-1, D]."""
    span: Span
    """The steps of the states, and how many of them count."""
    uniforms: torch.Tensor | None
    """float32 [B, W] of the tests where they are at hand; None leaves them to the operations."""
    query: Query


def advance(live: Live, setup: Setup, window: int, watch: Stopwatch) -> tuple[Live, Round]:
    """One round of ``window`` states a sample: the samples moved on, and what was done."""
    with watch("draft"):
        proposed = propose(live, setup, window)
    with watch("target"):
        output = evaluate(proposed.query, live.conditioning, setup.request)
    with watch("verification"):
        return settle(live, setup, proposed, output)


def propose(live: Live, setup: Setup, window: int, until: int | None = None) -> Proposed:
    """The first half of a round: drafts, and the states at which the target is wanted. Asks the target nothing.

    Args:
        live: the samples under way.
        setup: of the run.
        window: W.
        until: a step that no sample passes in this round; those that have reached it wait, with no state that counts.
    """
    request = setup.request
    covered = span(live.step, setup.reach, window, impl=setup.impl)
    if until is not None:
        covered = covered._replace(length=torch.minimum(covered.length, (until - covered.step).clamp(min=0)))
    noise, uniforms = live.noise.reach(live.seed, covered.step, window) if live.noise else (None, None)
    situation = Situation(
        live.state,
        covered.step,
        live.seed,
        window,
        live.last,
        noise,
        request.process,
        request.target,
        live.conditioning,
        request.sample_shape,
        request.guidance_scale,
        setup.impl,
        live.x0,
        live.memory,
    )
    proposal = setup.drafter.propose(situation)
    return Proposed(situation, proposal, covered, uniforms, _query(proposal.states, covered, setup.static_shapes))


def _query(states: torch.Tensor, covered: Span, static_shapes: bool) -> Query:
    """The states [B, W, D] that count, or with static shapes all of them."""
    window = states.shape[1]
    flat, steps, sample = states.flatten(0, 1), covered.steps.flatten(), covered.sample.flatten()
    if static_shapes or bool((covered.length == window).all()):
        return Query(flat, steps, sample, None)
    column = torch.arange(window, device=steps.device)
    place = (column < covered.length[:, None]).flatten().nonzero()[:, 0]
    return Query(flat[place], steps[place], sample[place], place)


def evaluate(query: Query, conditioning: dict[str, Any], request: Request) -> TargetOutput:
    """The target at the states of ``query``; ``conditioning`` has one row a live sample.

    Returns:
        :class:`free.TargetOutput` of N states, in the order of the query.
    """
    return request.target.evaluate(
        query.states.view(-1, *request.sample_shape),
        request.process.timestep[query.step],
        take_rows(conditioning, query.sample),
        request.guided,
    )


def settle(live: Live, setup: Setup, proposed: Proposed, output: TargetOutput) -> tuple[Live, Round]:
    """The second half of a round: tests the drafts, moves the samples on, remembers the window.

    Args:
        live: as :func:`propose` took them.
        setup: the same.
        proposed: what it returned.
        output: the target's answer to ``proposed.query``, whoever evaluated it.
    """
    process, situation, length = setup.request.process, proposed.situation, proposed.span.length
    states, draft_output = proposed.proposal
    output = _in_windows(output, proposed)  # [B, W, D]
    ledger = live.ledger

    def decide() -> tuple[Any, ...]:
        tau = None
        if setup.relaxation and ledger:
            tau = ledger.tau(setup.relaxation, situation, proposed.proposal, output, proposed.span)  # [B, W-1]
        verification = verify(
            states,
            output.output,
            draft_output,
            live.seed,
            situation.step,
            length,
            process.table,
            unconditional_output=output.unconditional,
            guidance_scale=setup.request.guidance_scale,
            noise=situation.noise,
            uniforms=proposed.uniforms,
            tau=tau,
            previous_x0=live.x0,
            impl=setup.impl,
        )
        return tau, *verification

    tau, *decided = setup.request.target.ranks.settled(decide)
    verification = Verification(*decided)
    if tau is not None and ledger:
        ledger = ledger.settle(tau, verification, live.seed, situation.step, proposed.uniforms, setup.impl)
    sound = finite(
        output.output, length, verification.next_state, unconditional_output=output.unconditional, impl=setup.impl
    )
    last = LastWindow(situation.step, sound.usable, states, output.output, output.unconditional, output.feature)
    moved = replace(
        live,
        state=verification.next_state,
        step=live.step + verification.advance,
        last=last,
        ledger=ledger,
        x0=None if live.x0 is None else verification.x0,
        memory=setup.drafter.remember(situation, last),
    )
    return moved, Round(situation, length, states, len(proposed.query.states), verification, sound.state)


def _in_windows(output: TargetOutput, proposed: Proposed) -> TargetOutput:
    """Answers [N, ...] as windows [B, W, ...]; those that nobody asked for are zero, and mean nothing."""
    batch, window, _ = proposed.proposal.states.shape
    place = proposed.query.place

    def in_windows(values: torch.Tensor | None, flatten_from: int) -> torch.Tensor | None:
        if values is None:
            return None
        if place is not None:
            padded = values.new_zeros(batch * window, *values.shape[1:])
            padded[place] = values
            values = padded
        return values.unflatten(0, (batch, window)).flatten(flatten_from)

    main = in_windows(output.output, 2)
    assert main is not None
    unconditional, feature = in_windows(output.unconditional, 2), in_windows(output.feature, 3)
    return TargetOutput(main, unconditional, feature, in_windows(output.variance_share, 1))
