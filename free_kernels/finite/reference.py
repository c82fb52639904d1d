"""What is finite, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from free_kernels.finite import Finite


def finite(
    target_output: torch.Tensor, length: torch.Tensor, state: torch.Tensor, unconditional_output: torch.Tensor | None
) -> Finite:
    from free_kernels.finite import Finite

    dtype = torch.promote_types(target_output.dtype, torch.float32)
    total = target_output.sum(-1, dtype=dtype)  # [B, W]; a sum shows what is not finite in it
    if unconditional_output is not None:
        total = total + unconditional_output.sum(-1, dtype=dtype)
    leading = torch.isfinite(total).cumprod(-1).sum(-1)
    return Finite(leading.minimum(length).clamp_(min=1), torch.isfinite(state).all(-1))
