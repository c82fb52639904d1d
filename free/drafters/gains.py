"""A drafter that needs no training: it learns, while it samples, how x0 answers to the state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from free.drafters.base import Drafter, LastWindow, Situation
from free.drafters.hold import hold
from free.drafters.patches import patches_of
from free_kernels import Patches, Proposal, Scales, StepTable, gain_correction, learn_gains


@dataclass
class GainMemory:
    """What each sample's last window taught, float32; see :func:`free_kernels.learn_gains`."""

    states: torch.Tensor
    """[B, W, D]."""
    x0: torch.Tensor
    """[B, W, D]."""
    sums: torch.Tensor
    """[B, W, 2, 2, bands]."""


class Gains(Drafter):
    """Holds x0, and adds to it a share of what the state knows that the anchor did not, learned band by band.

    After a rejection the path goes on from another state than the anchor's, by a difference that is known. Many steps are
    evaluated two or three times and all are evaluated next to their neighbours: each such pair says how x0 answers to a
    change of the state, in each band of frequencies (:func:`free.drafters.patches.patches_of`), and the answers of one
    step are much like those of the next. A sample learns from its own evaluations alone.
    """

    name = "gains"
    capturable = True
    forgetting = (0.7, 0.85)
    """What a pair of evaluations of one step, and one of neighbours, leaves of what was learned before."""
    ridge = 0.01
    """Share of all bands' sums that each band's own are drawn towards."""

    def begin(self, last: LastWindow, sample_shape: tuple[int, ...]) -> GainMemory:
        zeros = last.states.new_zeros(last.states.shape)
        bands = patches_of(sample_shape, zeros.device).bands
        return GainMemory(zeros, zeros.clone(), zeros.new_zeros(*zeros.shape[:2], 2, 2, bands))

    def propose(self, situation: Situation) -> Proposal:
        return self.propose_with(situation)[0]

    def propose_with(self, situation: Situation, correction: torch.Tensor | None = None) -> tuple[Proposal, torch.Tensor]:
        """The window where ``correction`` [B, W-1, D] is added to the drafts, from elsewhere, and the gains answer to the
        path that it leads to; and what they add, [B, W-1, D].
        """
        held = hold(situation, "hold-x0", correction, effective=False)
        if situation.window == 1:
            return held, held.draft_output
        added = self._answers(situation, held.states, situation.step)
        together = added if correction is None else added + correction
        return hold(situation, "hold-x0", together, effective=False), added

    def answer(self, situation: Situation, state: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """What the gains add to hold-x0's draft at ``state`` [B, D] of ``step`` int64 [B], [B, D]."""
        return self._answers(situation, state[:, None].expand(-1, 2, -1), step)[:, 0]

    def _answers(self, situation: Situation, path: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        with _own_precision(path):
            return gain_correction(path, step, *_known(situation), ridge=self.ridge, impl=situation.impl)

    def remember(self, situation: Situation, window: LastWindow) -> GainMemory:
        with _own_precision(window.states):
            return GainMemory(
                *learn_gains(
                    window.states,
                    window.output,
                    window.step,
                    window.length,
                    *_known(situation),
                    forgetting=self.forgetting,
                    unconditional_outputs=window.unconditional,
                    guidance_scale=situation.guidance_scale,
                    impl=situation.impl,
                )
            )


def _known(
    situation: Situation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, StepTable, Scales, Patches]:
    """What the last window taught, and what it is read by, as both operations take it."""
    memory, last, process = situation.memory, situation.last, situation.process
    scales, patches = Scales(process.signal, process.noise_ratio), patches_of(situation.sample_shape, situation.state.device)
    return memory.states, memory.x0, memory.sums, last.step, last.length, process.table, scales, patches


def _own_precision(values: torch.Tensor) -> AbstractContextManager[Any]:
    """Turn the caller's autocast off: it is meant for the networks."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)
