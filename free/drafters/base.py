"""The interface of a drafter, and what a drafter may know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from free_kernels import Proposal, anchor_index, effective_output, guided, posterior, x0_estimate

if TYPE_CHECKING:
    from free.processes import ReverseProcess
    from free.targets import Target


@dataclass
class Anchor:
    """One evaluation of the target for each sample (or N for each, with an axis more)."""

    step: torch.Tensor
    """int64 [B]."""
    state: torch.Tensor
    """float32 [B, D]."""
    output: torch.Tensor
    """float32 [B, D], guided."""
    feature: torch.Tensor | None
    """[B, tokens, width], in the target's dtype, where the drafter asked for features."""

    def x0(self, process: ReverseProcess) -> torch.Tensor:
        """The estimate of the clean sample, [B, D]."""
        return x0_estimate(self.state, self.output, self.step, process.table)

    def hold_x0(self, state: torch.Tensor, step: torch.Tensor, process: ReverseProcess) -> torch.Tensor:
        """The output at ``state`` [B, D] of ``step`` int64 [B] that means the same clean sample, [B, D]."""
        x0_state, x0_model = process.x0_state_coef[step][..., None], process.x0_model_coef[step][..., None]
        return (self.x0(process) - x0_state * state) / x0_model

    def flatten(self) -> Anchor:
        """The anchors of several steps at once, [B, N, ...], as so many of one: [B * N, ...]."""
        feature = None if self.feature is None else self.feature.flatten(0, 1)
        return Anchor(self.step.flatten(), self.state.flatten(0, 1), self.output.flatten(0, 1), feature)

    def take(self, rows: torch.Tensor) -> Anchor:
        """Those of the given rows, int64 [N]."""
        feature = None if self.feature is None else self.feature[rows]
        return Anchor(self.step[rows], self.state[rows], self.output[rows], feature)


@dataclass
class LastWindow:
    """All that the target said in the last round, the abandoned states included. Before the first round: zeros at step 0,
    an x0 estimate of zero, which is the mean of normalised data.
    """

    step: torch.Tensor
    """int64 [B]: step of the first state."""
    length: torch.Tensor
    """int64 [B]: how many states were evaluated, at least 1."""
    states: torch.Tensor
    """float32 [B, A, D]."""
    output: torch.Tensor
    """[B, A, D], as the network gave it, dtype and all; conditional half under guidance."""
    unconditional: torch.Tensor | None
    """Likewise, under guidance; else None."""
    feature: torch.Tensor | None = None
    """[B, A, tokens, width], in the target's dtype, where the drafter asked for features."""


@dataclass
class Situation:
    """What one window is drafted from: B live samples, flattened to D numbers each."""

    state: torch.Tensor
    """float32 [B, D]."""
    step: torch.Tensor
    """int64 [B]: step of ``state``, its own for each sample."""
    seed: torch.Tensor
    """int64 [B]."""
    window: int
    """W: the proposal has W states and W-1 drafted outputs."""
    last: LastWindow
    noise: torch.Tensor | None
    """z [B, W, D] where it is at hand; None leaves it to the operations, which make it from seed and step."""
    process: ReverseProcess
    target: Target
    conditioning: dict[str, Any]
    """The target's, one row a sample."""
    sample_shape: tuple[int, ...]
    guidance_scale: float
    impl: str
    x0: torch.Tensor | None = None
    """float32 [B, D], of a process of second order: the target's estimate of x0 at the step before ``step``."""
    memory: Any = None
    """The drafter's own, as :meth:`Drafter.remember` left it."""

    def anchor(self, step: torch.Tensor) -> Anchor:
        """The evaluation that a draft for ``step`` may lean on: the last window's latest at a step <= its own.

        One at a later step has seen the noise of this one, and a draft that knew it would bias the law.

        Args:
            step: int64 [B], or [B, N] for the anchors of several steps at once, whose fields are then [B, N, ...].
        """
        last = self.last
        row = torch.arange(len(step), device=step.device)
        first = last.step
        if step.dim() == 2:
            row, first = row[:, None], first[:, None]
            column = anchor_index(step, last.step, last.length)
        else:
            column = anchor_index(step[:, None], last.step, last.length)[:, 0]
        unconditional = None if last.unconditional is None else last.unconditional[row, column]
        return Anchor(
            first + column,
            last.states[row, column],
            guided(last.output[row, column], unconditional, self.guidance_scale, torch.float32),
            None if last.feature is None else last.feature[row, column],
        )


class Drafter(ABC):
    """Proposes a window of steps. Any proposal is exact; a good one is accepted."""

    name: str = "custom"
    needs_features: bool = False
    """Whether the target's top-block feature is captured for the anchors."""
    capturable: bool = False
    """Whether ``propose``, called before with the same process, leaves the host out, so that it may be recorded as a CUDA
    graph: no read from the device, no random state, nothing that differs from call to call. A public attribute that changes
    makes another graph; what a drafter makes or learns by itself is private, and written in place.
    """

    def check(self, target: Target) -> None:  # noqa: B027 - most drafters fit every target
        """Raise a ValueError if this drafter does not fit the target. Called before any work is done."""

    def begin(self, last: LastWindow, sample_shape: tuple[int, ...]) -> Any:
        """The memory of samples that nothing is known of: a dataclass of tensors with one row a sample, or None.

        It goes where the samples go: a sample that leaves takes its rows with it. Tensors may be written in place.

        Args:
            last: the empty window before the first, as wide as any to come.
            sample_shape: of one sample.
        """
        return None

    def remember(self, situation: Situation, window: LastWindow) -> Any:
        """The memory that the next window is drafted with, after ``window`` was drafted from ``situation`` and evaluated.

        How its steps were settled is not known yet, and part of the window may be abandoned. What the next window's draft
        for step k takes from the memory may depend on evaluations at steps <= k only, this window's and all before.
        """
        return None

    def running(self, *, compile: bool = False, **options: Any) -> AbstractContextManager[None]:
        """The context in which windows are proposed, under ``torch.compile`` if asked for; most have nothing to compile.

        Args:
            compile: as the target is, whose :meth:`free.Target.compile` is entered before.
            options: further ones of ``torch.compile``.
        """
        return nullcontext()

    @abstractmethod
    def propose(self, situation: Situation) -> Proposal:
        """Draft ``situation.window - 1`` steps.

        The draft for step k may depend on the state at step k, and on evaluations of the target at steps <= k, but on no
        noise of step k or later. The situation is the sampler's own: it is read, and nothing of it is written into.
        """


class StepDrafter(Drafter):
    """A drafter that works one step after the other: a subclass gives the draft of one step."""

    @abstractmethod
    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        """The guess of the target's guided output.

        Args:
            state: float32 [B, D], the drafted state at ``step``.
            step: int64 [B].
            situation: the window that is drafted; ``situation.anchor(step)`` is what the draft may lean on.

        Returns:
            [B, D], float.
        """

    def propose(self, situation: Situation) -> Proposal:
        return walk(situation, lambda state, step: self.draft(state, step, situation))


def walk(situation: Situation, draft: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Proposal:
    """Draft one step after the other; ``draft`` takes the state [B, D] and its step [B], and gives the output [B, D].

    A network of the caller's may write into what it is given, and use the memory of its output again: both are copied.
    """
    states, outputs, x0, table = [situation.state], [], situation.x0, situation.process.table
    last_step = situation.process.num_steps - 1
    for j in range(situation.window - 1):
        step = (situation.step + j).clamp(max=last_step)
        outputs.append(draft(states[-1].clone(), step.clone()).to(torch.float32, copy=True))
        if x0 is not None:
            outputs[-1], x0 = effective_output(states[-1], outputs[-1], x0, step, table)
        noise = None if situation.noise is None else situation.noise[:, j]
        states.append(
            posterior(
                states[-1],
                outputs[-1],
                situation.seed,
                step,
                table._replace(memory_gain=None),
                noise=noise,
                impl=situation.impl,
            )
        )
    empty = situation.state.new_empty(len(situation.state), 0, situation.state.shape[1])
    return Proposal(torch.stack(states, 1), torch.stack(outputs, 1) if outputs else empty)
