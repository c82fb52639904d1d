"""One round of speculative sampling: propose, evaluate, verify, remember. The file to read first.

Each live sample stands at a step of its own. A round drafts its next W-1 steps, evaluates the target at all W states of all
samples in one forward, settles the steps up to the first rejection (reflected) or up to the exact last step of the window,
and keeps the whole evaluated window, abandoned states included, as the anchors of the next drafts. Noise is a pure function
of seed and step: steps beyond a rejection meet the noise they were drafted with, which decided nothing and is still N(0, I)
given all that was decided (FREE, arXiv 2511.20390, supplement B, with noise reuse on top).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from free.drafters import Drafter, LastWindow, Situation
from free.sampling.relaxation import Ledger, Relaxation
from free.sampling.request import Request
from free.sampling.statistics import Stopwatch
from free.sampling.tensors import map_tensors
from free.targets.base import TargetOutput, take_rows
from free_kernels import NOISE_STREAM, TEST_STREAM, Verification, normal, uniform, verify
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

    @property
    def step(self) -> torch.Tensor:
        """int64 [B]: where each sample stood before."""
        return self.situation.step


def first_window(setup: Setup, state: torch.Tensor) -> Live:
    """All samples at step 0 in their initial states [B, D], with an empty memory."""
    request = setup.request
    seed = request.seed
    batch, numel = state.shape
    index = torch.arange(batch, device=seed.device)
    step = torch.zeros_like(seed)
    zeros = state.new_zeros(batch, setup.widest, numel)
    feature = None
    if setup.drafter.needs_features:
        tokens, width = request.target.check_features()
        feature = zeros.new_zeros(batch, setup.widest, tokens, width, dtype=request.target.dtype)
    last = LastWindow(step, torch.ones_like(step), zeros, zeros, zeros if request.guided else None, feature)
    stored = resolve(setup.impl, seed.device) == "reference" and not setup.static_shapes
    noise = NoiseWindow.empty(seed, setup.widest, numel) if stored else None
    ledger = Ledger.empty(batch, seed.device) if setup.relaxation else None
    return Live(index, seed, step, state, last, request.conditioning, noise, ledger)


def advance(live: Live, setup: Setup, window: int, watch: Stopwatch) -> tuple[Live, Round]:
    """One round of ``window`` states a sample: the samples moved on, and what was done."""
    request, process = setup.request, setup.request.process
    last_step = process.num_steps - 1
    step = live.step.clamp(max=last_step)  # a finished sample's is beyond the tables
    length = (setup.reach[step] - step + 1).clamp(max=window)  # [B]
    if setup.static_shapes:
        length = torch.where(live.step > last_step, 0, length)

    with watch("draft"):
        noise, uniforms = live.noise.reach(live.seed, step, window) if live.noise else (None, None)
        situation = Situation(
            live.state,
            step,
            live.seed,
            window,
            live.last,
            noise,
            process,
            request.target,
            live.conditioning,
            request.sample_shape,
            request.guidance_scale,
            setup.impl,
        )
        proposal = setup.drafter.propose(situation)
        states, draft_output = proposal  # [B, W, D], [B, W-1, D]

    with watch("target"):
        output, evaluated = evaluate(states, step, length, live.conditioning, setup)

    with watch("verification"):
        tau, ledger = None, live.ledger
        if setup.relaxation and ledger:
            tau = ledger.tau(setup.relaxation, situation, proposal, output, length)  # [B, W-1]
        verification = verify(
            states,
            output.output,
            draft_output,
            live.seed,
            step,
            length,
            process.table,
            unconditional_output=output.unconditional,
            guidance_scale=request.guidance_scale,
            noise=noise,
            uniforms=uniforms,
            tau=tau,
            impl=setup.impl,
        )
        if tau is not None and ledger:
            ledger = ledger.settle(tau, verification)
        usable = leading_finite(output).clamp(max=length).clamp_(min=1)
        moved = replace(
            live,
            state=verification.next_state,
            step=live.step + verification.advance,
            last=LastWindow(step, usable, states, output.output, output.unconditional, output.feature),
            ledger=ledger,
        )
    return moved, Round(situation, length, states, evaluated, verification)


def evaluate(
    states: torch.Tensor, step: torch.Tensor, length: torch.Tensor, conditioning: dict[str, Any], setup: Setup
) -> tuple[TargetOutput, int]:
    """The target at the first ``length`` states of each window, in one forward.

    Returns:
        Outputs [B, W, D], and how many states were evaluated. Those beyond ``length`` are zero or, with static shapes,
        evaluated at the last step, and mean nothing.
    """
    request = setup.request
    batch, window, _ = states.shape
    column = torch.arange(window, device=step.device)
    sample = torch.arange(batch, device=step.device)[:, None].expand(-1, window).flatten()  # [N], the row of each state
    steps = (step[:, None] + column).clamp_(max=request.process.num_steps - 1).flatten()
    flat, rows = states.flatten(0, 1), None
    if not setup.static_shapes and not bool((length == window).all()):
        rows = (column < length[:, None]).flatten().nonzero()[:, 0]
        sample, steps, flat = sample[rows], steps[rows], flat[rows]
    evaluated = request.target.evaluate(
        flat.view(-1, *request.sample_shape),
        request.process.timestep[steps],
        take_rows(conditioning, sample),
        request.guided,
    )

    def window_of(values: torch.Tensor | None, flatten_from: int) -> torch.Tensor | None:
        if values is None:
            return None
        if rows is not None:
            padded = values.new_zeros(batch * window, *values.shape[1:])
            padded[rows] = values
            values = padded
        return values.unflatten(0, (batch, window)).flatten(flatten_from)

    output = window_of(evaluated.output, 2)
    assert output is not None
    unconditional, feature = window_of(evaluated.unconditional, 2), window_of(evaluated.feature, 3)
    return TargetOutput(output, unconditional, feature, window_of(evaluated.variance_share, 1)), len(flat)


def leading_finite(output: TargetOutput) -> torch.Tensor:
    """int64 [B]: how many states of each window the target gave finite outputs for, before the first other one.

    An abandoned state may be one that the target overflows at; it must not become an anchor.
    """
    total = output.output.sum(-1, dtype=torch.float32)  # [B, W]; a sum shows what is not finite in it
    if output.unconditional is not None:
        total = total + output.unconditional.sum(-1, dtype=torch.float32)
    return torch.isfinite(total).cumprod(-1).sum(-1)


# noise is drawn some steps ahead while that is little: a call costs more than its numbers when they are few
_STEPS_AHEAD = 32
_NUMBERS_AHEAD = 2**16


@dataclass
class NoiseWindow:
    """The noise and the test uniforms of the steps that each sample has reached, so that none is drawn twice.

    A ring of a fixed number of steps, the widest window's at least: step k of a sample is in slot k % capacity.
    """

    noise: torch.Tensor
    """float32 [B, capacity, D]."""
    uniforms: torch.Tensor
    """float32 [B, capacity]."""
    drawn: torch.Tensor
    """int64 [B]: steps below this one are in the ring, or were."""

    @classmethod
    def empty(cls, seed: torch.Tensor, widest: int, numel: int) -> NoiseWindow:
        affordable = _NUMBERS_AHEAD // (len(seed) * numel)
        capacity = max(widest, min(_STEPS_AHEAD, affordable))
        noise = torch.empty(len(seed), capacity, numel, device=seed.device)
        return cls(noise, torch.empty(len(seed), capacity, device=seed.device), torch.zeros_like(seed))

    def reach(self, seed: torch.Tensor, step: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """z and u of steps ``step`` … ``step + window - 1`` of each sample: [B, W, D] and [B, W]."""
        batch, capacity, _ = self.noise.shape
        if bool((step + window > self.drawn).any()):
            self._draw(seed, step)
        slots = (step[:, None] + torch.arange(window, device=step.device)) % capacity
        row = torch.arange(batch, device=step.device)[:, None]
        return self.noise[row, slots], self.uniforms[row, slots]

    def keep(self, rows: torch.Tensor) -> NoiseWindow:
        return map_tensors(self, lambda values: values[rows])

    def _draw(self, seed: torch.Tensor, step: torch.Tensor) -> None:
        """Fill the ring up to its capacity from ``step`` on."""
        capacity = self.noise.shape[1]
        steps = step[:, None] + torch.arange(capacity, device=step.device)  # [B, capacity]
        row, column = (steps >= self.drawn[:, None]).nonzero(as_tuple=True)
        keys, steps = seed[row], steps[row, column]
        self.noise[row, steps % capacity] = normal(keys, steps, self.noise.shape[2], stream=NOISE_STREAM)
        self.uniforms[row, steps % capacity] = uniform(keys, steps, stream=TEST_STREAM)
        self.drawn = step + capacity
