"""The samples of an engine under way, a row each: who is in which slot, who leaves, who joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from free.parallel.engine.handle import Handle
from free.sampling.account import Account
from free.sampling.loop import rows_to_keep
from free.sampling.request import Request
from free.sampling.tensors import append
from free.sampling.window import Live, Setup, first_window
from free.targets.base import has_rows
from free.windows import Known


@dataclass(frozen=True)
class Row:
    """What the host knows of a row."""

    slot: int
    """Its place in the account, which no other row has."""
    handle: Handle | None
    """Whose sample it is; None of one that only fills a static shape."""
    step: int
    broke: tuple[int, int]
    """The first step at which the model's, and the drafter's, output was not finite; S if none."""


@dataclass(frozen=True)
class Batch:
    """The rows between two rounds. It is replaced as a whole: whoever is interrupted leaves the one before."""

    live: Live
    rows: tuple[Row, ...]

    @property
    def occupied(self) -> list[Row]:
        """Those of somebody's."""
        return [row for row in self.rows if row.handle is not None]

    @property
    def step(self) -> np.ndarray:
        """int64 [N]: where the samples under way stand."""
        return np.array([row.step for row in self.occupied], dtype=np.int64)

    def moved(self, live: Live, known: Known) -> Batch:
        """After a round."""
        model, drafter = known.broke
        rows = (
            replace(row, step=int(known.step[row.slot]), broke=(int(model[row.slot]), int(drafter[row.slot])))
            for row in self.rows
        )
        return Batch(live, tuple(rows))


def refill(batch: Batch | None, joining: Sequence[tuple[Handle, Request]], setup: Setup, account: Account) -> Batch | None:
    """The batch without the samples that have ended, and with those of ``joining`` in slots that are free.

    With static shapes there are as many rows as the power of two that holds the samples, and some may be of nobody: of a
    sample that has ended, or, where the batch grows, of one that never began.

    Args:
        batch: as the last round left it; None if there is none.
        joining: no more than there are free slots.
        setup: of the engine.
        account: its slots that are given away begin anew.

    Returns:
        None if nobody is left.
    """
    slots, num_steps = setup.request.batch, setup.request.process.num_steps
    rows = [replace(row, handle=None) if row.handle and row.handle.done else row for row in batch.rows] if batch else []
    staying = [i for i, row in enumerate(rows) if row.handle]
    wanted = rows_to_keep(len(staying) + len(joining), slots, setup.static_shapes)
    if batch and not joining and wanted == len(rows):
        return Batch(batch.live, tuple(rows))
    left = [i for i, row in enumerate(rows) if not row.handle]
    kept = staying + left[: wanted - len(staying) - len(joining)]
    rows = [rows[i] for i in kept]
    live = batch.live.keep(torch.tensor(kept, device=batch.live.step.device)) if batch and kept else None
    if joining:
        taken = {row.slot for row in rows}
        free = [slot for slot in range(slots) if slot not in taken][: wanted - len(kept)]
        fresh = _begin([request for _, request in joining], free, setup)
        account.begin_anew(fresh.index)
        owners = [handle for handle, _ in joining] + [None] * (len(free) - len(joining))
        rows += [Row(slot, owner, 0, (num_steps, num_steps)) for slot, owner in zip(free, owners, strict=True)]
        live = append(live, fresh) if live else fresh
    return Batch(live, tuple(rows)) if live else None


def _begin(samples: list[Request], slots: list[int], setup: Setup) -> Live:
    """Samples at their first step, as rows of ``setup``; the slots beyond them have rows of nobody, which are finished."""
    begin = len(samples)
    samples = samples + samples[-1:] * (len(slots) - begin)
    seed = torch.cat([one.seed for one in samples])
    together = replace(samples[0], seed=seed, conditioning=rows_together(samples), latents=None)
    fresh = first_window(setup, torch.cat([one.initial_state() for one in samples]), samples=together)
    row = torch.arange(len(slots), device=seed.device)
    step = torch.where(row < begin, fresh.step, setup.request.process.num_steps)
    return replace(fresh, index=torch.tensor(slots, device=seed.device), step=step)


def rows_together(samples: Sequence[Request]) -> dict[str, object]:
    """The conditioning of all samples, row after row; what has no rows is the first one's."""
    first = samples[0].conditioning
    return {
        name: torch.cat([one.conditioning[name] for one in samples]) if has_rows(value) else value
        for name, value in first.items()
    }
