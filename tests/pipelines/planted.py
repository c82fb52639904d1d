"""Bugs that a replay must see: rows that meet the wrong sample, states that are told the wrong timestep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from free.pipelines.loop import Loop
from free.pipelines.rows import Layout

BUGS = ("another sample's row", "another state's timestep")


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Within this context the rows of a round are wrong."""
    index, lay_out = Layout.index, Loop._lay_out

    def of_another_sample(self: Layout, groups: int, inner: int) -> torch.Tensor:
        # of two samples the other one, however many rows each has
        return index(replace(self, row=(self.row + self.batch // 2) % self.batch), groups, inner)

    def of_another_state(self: Loop, number: int, sample: torch.Tensor, timestep: torch.Tensor) -> Layout:
        return lay_out(self, number, sample, timestep.roll(1))

    try:
        if bug == BUGS[0]:
            Layout.index = of_another_sample  # type: ignore[method-assign]
        else:
            Loop._lay_out = of_another_state  # type: ignore[method-assign]
        yield
    finally:
        Layout.index, Loop._lay_out = index, lay_out  # type: ignore[method-assign]
