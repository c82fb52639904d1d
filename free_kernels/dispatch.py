"""Which implementation of an operation runs. Decided at each call from the tensors at hand, never at import."""

from __future__ import annotations

import torch

IMPLEMENTATIONS = ("auto", "triton", "reference")


def resolve(impl: str, device: torch.device) -> str:
    """The implementation that serves ``impl`` on ``device``: ``"reference"`` for now, everywhere.

    Raises:
        ValueError: ``impl`` is not one of :data:`IMPLEMENTATIONS`.
        NotImplementedError: ``impl="triton"``: an explicit request is never served by something else.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; known are {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "triton":
        raise NotImplementedError(
            "impl='triton' was asked for, but the Triton kernels are not part of this release; use 'auto' or 'reference'"
        )
    return "reference"
