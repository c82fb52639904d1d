"""The coefficients of a reverse process as the operations take them: whole tables, gathered by step inside."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_values


class StepTable(NamedTuple):
    """Per-step coefficients, each float [S] on one device.

    The mean of step k is ``state_coef[k] * x + model_coef[k] * y``. Where ``clip_range`` is set it is
    ``clip_state_coef[k] * x + clip_x0_coef[k] * clamp(x0, ±clip_range)`` with
    ``x0 = x0_state_coef[k] * x + x0_model_coef[k] * y``. The noise has the standard deviation ``std[k]`` either way.

    With ``memory_gain`` the process is of second order: the network's output y[k] stands in the mean as the effective one,
    ``y[k] + memory_gain[k] * (x0[k] - x0[k-1])``, x0[k] the estimate at x[k]. It goes with no ``clip_range``.
    """

    state_coef: torch.Tensor
    model_coef: torch.Tensor
    std: torch.Tensor
    x0_state_coef: torch.Tensor
    x0_model_coef: torch.Tensor
    clip_state_coef: torch.Tensor
    clip_x0_coef: torch.Tensor
    clip_range: float | None = None
    memory_gain: torch.Tensor | None = None

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """Those that every table has."""
        return self[:7]

    @property
    def num_steps(self) -> int:
        return self.std.shape[0]


def check_table(table: StepTable, device: torch.device) -> None:
    """Every column float [S] on ``device``; ``clip_range`` positive or None, and then no ``memory_gain``."""
    length: int | None = None
    for name, column in zip(table._fields, table.columns, strict=False):
        check_values(f"table.{name}", column, (length,), device)
        length = column.shape[0]
    if table.clip_range is not None and not table.clip_range > 0:
        raise ValueError(f"table.clip_range is {table.clip_range}; allowed is a positive number or None")
    if table.memory_gain is not None:
        check_values("table.memory_gain", table.memory_gain, (length,), device)
        if table.clip_range is not None:
            raise ValueError(f"table.memory_gain is given with a clip_range of {table.clip_range}; allowed is one of them")


def check_memory(table: StepTable, previous_x0: torch.Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """A process of second order needs the estimate of x0 at the step before, and no other takes it."""
    if table.memory_gain is not None and previous_x0 is None:
        raise ValueError("previous_x0 is missing: table has a memory_gain; give the estimate of x0 at the step before")
    if previous_x0 is None:
        return
    if table.memory_gain is None:
        raise ValueError("previous_x0 is given, but table has no memory_gain; leave it out")
    check_values("previous_x0", previous_x0, shape, device)
