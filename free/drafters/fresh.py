"""Any drafter without noise reuse, to see what reuse is worth."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from free.drafters.base import Drafter, Situation
from free.targets import Target
from free_kernels import Proposal


class Fresh(Drafter):
    """Hides the abandoned states from a drafter, which leaves it the evaluations at settled steps.

    The noise of steps to come is independent of those, so efficiency has the law that it has where noise is drawn afresh
    after each rejection, as in FREE (arXiv 2511.20390).
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.name = f"{drafter.name}, fresh noise"
        self.needs_features, self.capturable = drafter.needs_features, drafter.capturable

    def check(self, target: Target) -> None:
        self.drafter.check(target)

    def running(self, *, compile: bool = False, **options: Any) -> AbstractContextManager[None]:
        return self.drafter.running(compile=compile, **options)

    def propose(self, situation: Situation) -> Proposal:
        last = situation.last
        settled = torch.minimum(last.length, situation.step - last.step).clamp(min=1)
        return self.drafter.propose(replace(situation, last=replace(last, length=settled)))
