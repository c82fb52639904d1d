"""How much of what the target said of a window is finite, and whether the state that a round reached is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_index, check_values
from free_kernels.dispatch import resolve
from free_kernels.finite import reference

__all__ = ["Finite", "finite"]


class Finite(NamedTuple):
    """Of B samples."""

    usable: torch.Tensor
    """int64 [B]: states of the window with finite outputs before the first other one, at most its length, at least 1."""
    state: torch.Tensor
    """bool [B]: whether the state is finite."""


def finite(
    target_output: torch.Tensor,
    length: torch.Tensor,
    state: torch.Tensor,
    *,
    unconditional_output: torch.Tensor | None = None,
    impl: str = "auto",
) -> Finite:
    """What may become an anchor, and whether a sample is still sound.

    An abandoned state may be one that the target overflows at; it must not become an anchor.

    Args:
        target_output: the target's outputs at a window [B, W, D], float of any dtype.
        length: int64 [B], how many of the W states count.
        state: [B, D], float.
        unconditional_output: of the shape and dtype of ``target_output`` under guidance, else None.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`Finite`: how many states may become anchors, and whether each sample's state is finite.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    device = target_output.device
    check_values("target_output", target_output, (None, None, None), device)
    batch, _, numel = target_output.shape
    check_index("length", length, (batch,), device)
    check_values("state", state, (batch, numel), device)
    if unconditional_output is not None:
        check_values("unconditional_output", unconditional_output, target_output.shape, device)
    chosen = resolve(impl, device, target_output=target_output, unconditional_output=unconditional_output, state=state)
    if chosen == "triton":
        from free_kernels.finite import kernel

        return Finite(*kernel.finite(target_output, length, state, unconditional_output))
    return reference.finite(target_output, length, state, unconditional_output)
