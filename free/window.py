"""One round of speculative sampling: propose, evaluate, verify, remember. The file to read first.

Each live sample stands at a step of its own. A round drafts its next W-1 steps, evaluates the target at all W states of all
samples in one forward, settles the steps up to the first rejection (reflected) or up to the exact last step of the window,
and keeps the whole evaluated window, abandoned states included, as the anchors of the next drafts. Noise is a pure function
of seed and step: steps beyond a rejection meet the noise they were drafted with, which decided nothing and is still N(0, I)
given all that was decided (FREE, arXiv 2511.20390, supplement B, with noise reuse on top).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from free.drafters import Drafter, LastWindow, Situation
from free.request import Request
from free.statistics import Stopwatch
from free.targets.base import TargetOutput, take_rows
from free_kernels import NOISE_STREAM, Verification, normal, verify
from free_kernels.dispatch import resolve


@dataclass(frozen=True)
class Setup:
    """What stays the same from round to round."""

    request: Request
    drafter: Drafter
    window: int
    impl: str


@dataclass
class Live:
    """The samples that are not finished, B of them, flattened to D numbers each."""

    index: torch.Tensor
    """int64 [B]: which of the caller's samples each one is."""
    seed: torch.Tensor
    """int64 [B]."""
    step: torch.Tensor
    """int64 [B]."""
    state: torch.Tensor
    """float32 [B, D]."""
    last: LastWindow
    noise: NoiseWindow | None
    """Kept for the reference operations; the kernels make noise faster than they could read it."""

    def keep(self, rows: torch.Tensor) -> Live:
        """The live samples at ``rows`` (int64)."""
        return _take(self, rows)


@dataclass
class Round:
    """What a round did, beside moving the samples on."""

    step: torch.Tensor
    """int64 [B]: where each sample stood before."""
    length: torch.Tensor
    """int64 [B]: states evaluated."""
    states: torch.Tensor
    """[B, W, D]: the drafted window."""
    verification: Verification


def first_window(setup: Setup, state: torch.Tensor) -> Live:
    """All samples at step 0 in their initial states [B, D], with an empty memory."""
    seed = setup.request.seed
    batch, numel = state.shape
    index = torch.arange(batch, device=seed.device)
    step = torch.zeros_like(seed)
    zeros = state.new_zeros(batch, setup.window, numel)
    last = LastWindow(step, torch.ones_like(step), zeros, zeros, zeros if setup.request.guided else None)
    stored = resolve(setup.impl, seed.device) == "reference"
    return Live(index, seed, step, state, last, NoiseWindow(torch.empty_like(zeros), step) if stored else None)


def advance(live: Live, setup: Setup, watch: Stopwatch) -> Round:
    """One round; moves ``live`` on in place."""
    request, process = setup.request, setup.request.process
    step = live.step
    # a window ends at a step that is never drafted: the last one, or one without noise
    length = (process.exact_step[step] - step + 1).clamp(max=setup.window)  # [B]

    with watch("draft"):
        noise = live.noise.reach(live.seed, step) if live.noise else None
        situation = Situation(
            live.state,
            step,
            live.seed,
            setup.window,
            live.last,
            noise,
            process,
            take_rows(request.conditioning, live.index),
            request.sample_shape,
            request.guidance_scale,
            setup.impl,
        )
        states, draft_output = setup.drafter.propose(situation)  # [B, W, D], [B, W-1, D]

    with watch("target"):
        output = evaluate(states, step, length, live.index, request)

    with watch("verification"):
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
            impl=setup.impl,
        )

    live.state = verification.next_state
    live.step = step + verification.advance
    usable = leading_finite(output).clamp(max=length).clamp_(min=1)
    live.last = LastWindow(step, usable, states, output.output, output.unconditional, output.feature)
    return Round(step, length, states, verification)


def evaluate(
    states: torch.Tensor, step: torch.Tensor, length: torch.Tensor, index: torch.Tensor, request: Request
) -> TargetOutput:
    """The target at the first ``length`` states of each window, in one forward. Outputs [B, W, D], zeros beyond."""
    batch, window, _ = states.shape
    column = torch.arange(window, device=step.device)
    rows = (column < length[:, None]).flatten().nonzero()[:, 0]  # [N]
    sample = rows // window
    timestep = request.process.timestep[step[sample] + rows % window]
    conditioning = take_rows(request.conditioning, index[sample])
    flat = states.flatten(0, 1)
    if len(rows) < len(flat):
        flat = flat[rows]
    evaluated = request.target.evaluate(flat.view(-1, *request.sample_shape), timestep, conditioning, request.guided)

    def window_of(values: torch.Tensor | None, flatten_from: int) -> torch.Tensor | None:
        if values is None:
            return None
        if len(rows) < batch * window:
            padded = values.new_zeros(batch * window, *values.shape[1:])
            padded[rows] = values
            values = padded
        return values.unflatten(0, (batch, window)).flatten(flatten_from)

    output = window_of(evaluated.output, 2)
    assert output is not None
    return TargetOutput(output, window_of(evaluated.unconditional, 2), window_of(evaluated.feature, 4))


def leading_finite(output: TargetOutput) -> torch.Tensor:
    """int64 [B]: how many states of each window the target gave finite outputs for, before the first other one.

    An abandoned state may be one that the target overflows at; it must not become an anchor.
    """
    finite = torch.isfinite(output.output).all(-1)
    if output.unconditional is not None:
        finite &= torch.isfinite(output.unconditional).all(-1)
    return finite.long().cumprod(-1).sum(-1)


@dataclass
class NoiseWindow:
    """The noise of the W steps that each sample has reached, so that none is drawn twice. A ring: step k is at k % W."""

    ring: torch.Tensor
    """float32 [B, W, D]."""
    drawn: torch.Tensor
    """int64 [B]: steps below this one are in the ring, or were."""

    def reach(self, seed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """z of steps ``step`` … ``step + W - 1`` for each sample: [B, W, D]."""
        batch, window, numel = self.ring.shape
        steps = step[:, None] + torch.arange(window, device=step.device)  # [B, W]
        missing = (steps >= self.drawn[:, None]).flatten().nonzero()[:, 0]
        slots = torch.arange(batch, device=step.device)[:, None] * window + steps % window  # [B, W] into the flat ring
        if len(missing):
            drawn = normal(seed[missing // window], steps.flatten()[missing], numel, stream=NOISE_STREAM)
            self.ring.view(-1, numel)[slots.flatten()[missing]] = drawn
        self.drawn = step + window
        return self.ring.view(-1, numel)[slots]


def _take(value: Any, rows: torch.Tensor) -> Any:
    """The rows of every tensor in a dataclass of tensors and such dataclasses."""
    if isinstance(value, torch.Tensor):
        return value[rows]
    if value is None:
        return None
    return type(value)(*(_take(getattr(value, entry.name), rows) for entry in fields(value)))
