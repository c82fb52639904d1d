"""``window="auto"`` in a pipeline: nothing can be timed but the rounds that it takes anyway."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from free.drafters import Drafter
from free.sampling.planning import experience_for
from free.sampling.relaxation import Relaxation
from free.sampling.request import Request
from free.windows import ChosenWindow, ExploringWindow, Schedule, TimedExperience

_UNTIMED = 8
"""The window of rows that share a key, while nothing was timed."""


def exploring_window(request: Request, drafter: Drafter, relaxation: Relaxation | None, setting: Hashable) -> Schedule:
    """A schedule that knows what earlier calls have shown of these networks, but nothing of these samples' noise.

    Rows that share a key get a window that is the same in each round, as in :func:`free.sampling.planning.auto_window`.

    Args:
        request, drafter, relaxation: of the call.
        setting: what else makes calls alike.
    """
    setting = (setting, request.batch, request.sample_shape, request.seed.device, torch.get_num_threads())
    experience = experience_for(request, drafter, relaxation, TimedExperience, setting)
    schedule = ExploringWindow(experience, request.process, request.batch)
    keys = request.keys
    if len(set(keys)) == len(keys):
        return schedule
    if experience.latest:
        return schedule.fixed(request.batch)
    return ChosenWindow(min(_UNTIMED, request.process.num_steps), schedule)
