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
from free_kernels import NOISE_STREAM, TEST_STREAM, Verification, normal, uniform, verify
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
    feature = None
    if setup.drafter.needs_features:
        target = setup.request.target
        feature = zeros.new_zeros(batch, setup.window, *target.check_features(), dtype=target.dtype)
    last = LastWindow(step, torch.ones_like(step), zeros, zeros, zeros if setup.request.guided else None, feature)
    stored = resolve(setup.impl, seed.device) == "reference"
    noise = NoiseWindow.empty(seed, setup.window, numel) if stored else None
    return Live(index, seed, step, state, last, noise)


def advance(live: Live, setup: Setup, watch: Stopwatch) -> Round:
    """One round; moves ``live`` on in place."""
    request, process = setup.request, setup.request.process
    step = live.step
    # a window ends at a step that is never drafted: the last one, or one without noise
    length = (process.exact_step[step] - step + 1).clamp(max=setup.window)  # [B]

    with watch("draft"):
        noise, uniforms = live.noise.reach(live.seed, step) if live.noise else (None, None)
        situation = Situation(
            live.state,
            step,
            live.seed,
            setup.window,
            live.last,
            noise,
            process,
            request.target,
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
            uniforms=uniforms,
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
    sample = torch.arange(batch, device=step.device).repeat_interleave(window)  # [N], the row of each state
    steps, flat = (step[:, None] + column).flatten(), states.flatten(0, 1)
    whole = bool((length == window).all())
    if not whole:
        rows = (column < length[:, None]).flatten().nonzero()[:, 0]
        sample, steps, flat = sample[rows], steps[rows], flat[rows]
    timestep = request.process.timestep[steps]
    conditioning = take_rows(request.conditioning, index[sample])
    evaluated = request.target.evaluate(flat.view(-1, *request.sample_shape), timestep, conditioning, request.guided)

    def window_of(values: torch.Tensor | None, flatten_from: int) -> torch.Tensor | None:
        if values is None:
            return None
        if not whole:
            padded = values.new_zeros(batch * window, *values.shape[1:])
            padded[rows] = values
            values = padded
        return values.unflatten(0, (batch, window)).flatten(flatten_from)

    output = window_of(evaluated.output, 2)
    assert output is not None
    return TargetOutput(output, window_of(evaluated.unconditional, 2), window_of(evaluated.feature, 3))


def leading_finite(output: TargetOutput) -> torch.Tensor:
    """int64 [B]: how many states of each window the target gave finite outputs for, before the first other one.

    An abandoned state may be one that the target overflows at; it must not become an anchor.
    """
    total = output.output.sum(-1, dtype=torch.float32)  # [B, W]; a sum shows what is not finite in it
    if output.unconditional is not None:
        total = total + output.unconditional.sum(-1, dtype=torch.float32)
    return torch.isfinite(total).cumprod(-1).sum(-1)


# noise is drawn a few windows ahead while that is little: a call costs more than its numbers when they are few
_WINDOWS_AHEAD = 4
_NUMBERS_AHEAD = 2**16


class NoiseWindow:
    """The noise and the test uniforms of the steps that each sample has reached, so that none is drawn twice.

    A ring of a fixed number of steps, a few windows: step k of a sample is in slot k % capacity.
    """

    def __init__(self, noise: torch.Tensor, uniforms: torch.Tensor, drawn: torch.Tensor, window: int) -> None:
        self.noise = noise  # float32 [B, capacity, D]
        self.uniforms = uniforms  # float32 [B, capacity]
        self.drawn = drawn  # int64 [B]: steps below this one are in the ring, or were
        self.window = window

    @classmethod
    def empty(cls, seed: torch.Tensor, window: int, numel: int) -> NoiseWindow:
        affordable = _NUMBERS_AHEAD // (len(seed) * window * numel)
        capacity = window * max(1, min(_WINDOWS_AHEAD, affordable))
        noise = torch.empty(len(seed), capacity, numel, device=seed.device)
        return cls(noise, torch.empty(len(seed), capacity, device=seed.device), torch.zeros_like(seed), window)

    def reach(self, seed: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z and u of steps ``step`` … ``step + W - 1`` of each sample: [B, W, D] and [B, W]."""
        batch, capacity, _ = self.noise.shape
        if bool((step + self.window > self.drawn).any()):
            self._draw(seed, step)
        slots = (step[:, None] + torch.arange(self.window, device=step.device)) % capacity
        row = torch.arange(batch, device=step.device)[:, None]
        return self.noise[row, slots], self.uniforms[row, slots]

    def keep(self, rows: torch.Tensor) -> NoiseWindow:
        return NoiseWindow(self.noise[rows], self.uniforms[rows], self.drawn[rows], self.window)

    def _draw(self, seed: torch.Tensor, step: torch.Tensor) -> None:
        """Fill the ring up to its capacity from ``step`` on."""
        capacity = self.noise.shape[1]
        steps = step[:, None] + torch.arange(capacity, device=step.device)  # [B, capacity]
        row, column = (steps >= self.drawn[:, None]).nonzero(as_tuple=True)
        keys, steps = seed[row], steps[row, column]
        self.noise[row, steps % capacity] = normal(keys, steps, self.noise.shape[2], stream=NOISE_STREAM)
        self.uniforms[row, steps % capacity] = uniform(keys, steps, stream=TEST_STREAM)
        self.drawn = step + capacity


def _take(value: Any, rows: torch.Tensor) -> Any:
    """The rows of every tensor in a dataclass of tensors and such dataclasses."""
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, NoiseWindow):
        return value.keep(rows)
    if value is None:
        return None
    return type(value)(*(_take(getattr(value, entry.name), rows) for entry in fields(value)))
