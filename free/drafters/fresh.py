"""Any drafter without noise reuse, to see what reuse is worth."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from free.drafters.base import Drafter, LastWindow, Situation
from free.targets import Target
from free_kernels import Proposal


class Fresh(Drafter):
    """Hides the abandoned states from a drafter, which leaves it the evaluations at settled steps.

    The noise of steps to come is independent of those, so efficiency has the law that it has where noise is drawn afresh
    after each rejection, as in FREE (arXiv 2511.20390).

    Raises:
        TypeError: something else than a drafter; :func:`free.as_drafter` makes one of a name or a model.
    """

    def __init__(self, drafter: Drafter) -> None:
        if not isinstance(drafter, Drafter):
            raise TypeError(f"drafter is a {type(drafter).__name__}; allowed is a Drafter, as free.as_drafter makes it")
        self.drafter = drafter
        self.name = f"{drafter.name}, fresh noise"
        self.needs_features = drafter.needs_features

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.drafter.capturable

    def check(self, target: Target) -> None:
        self.drafter.check(target)

    def begin(self, last: LastWindow, sample_shape: tuple[int, ...]) -> Any:
        return self.drafter.begin(last, sample_shape)

    def running(self, *, compile: bool = False, **options: Any) -> AbstractContextManager[None]:
        return self.drafter.running(compile=compile, **options)

    def propose(self, situation: Situation) -> Proposal:
        return self.drafter.propose(_settled(situation))

    def remember(self, situation: Situation, window: LastWindow) -> Any:
        return self.drafter.remember(_settled(situation), window)


def _settled(situation: Situation) -> Situation:
    """With the last window up to the last settled step."""
    last = situation.last
    settled = torch.minimum(last.length, situation.step - last.step).clamp(min=1)
    return replace(situation, last=replace(last, length=settled))
