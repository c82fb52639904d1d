"""What is finite, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from free_kernels.finite import Finite

INFINITY = float("inf")


def finite(
    target_output: torch.Tensor, length: torch.Tensor, state: torch.Tensor, unconditional_output: torch.Tensor | None
) -> Finite:
    from free_kernels.finite import Finite

    dtype = torch.promote_types(target_output.dtype, torch.float32)
    total = target_output.sum(-1, dtype=dtype)  # [B, W]; a sum shows what is not finite in it
    if unconditional_output is not None:
        total = total + unconditional_output.sum(-1, dtype=dtype)
    leading = (total.abs() < INFINITY).cumprod(-1).sum(-1)  # NaN compares false
    return Finite(leading.minimum(length).clamp_(min=1), (state.abs() < INFINITY).all(-1))
