"""Which implementation of an operation runs. Decided at each call from the tensors at hand, never at import."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

IMPLEMENTATIONS = ("auto", "triton", "reference")


def resolve(impl: str, device: torch.device, **values: torch.Tensor | torch.dtype | None) -> str:
    """The implementation that serves ``impl`` on ``device``: ``"triton"`` or ``"reference"``.

    ``"auto"`` is Triton on CUDA tensors where triton is installed, and the reference everywhere else: on other devices, in
    float64, and where a gradient is asked for, as the kernels have neither.

    Args:
        impl: one of :data:`IMPLEMENTATIONS`.
        device: of the operation's tensors.
        values: the operation's floating tensors (or the dtype of its result), by the name of the argument.

    Raises:
        ValueError: ``impl`` is unknown, or ``"triton"`` and an argument is float64 or needs a gradient.
        RuntimeError: ``impl="triton"`` cannot run here: an explicit request is never served by something else.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; known are {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "reference" or (impl == "auto" and (device.type != "cuda" or not _triton_installed())):
        return "reference"
    for name, value in values.items():
        refused = _refused(value)
        if refused and impl == "triton":
            raise ValueError(f"{name} {refused}, which the Triton kernels do not do; use impl='auto' or 'reference'")
        if refused:
            return "reference"
    if impl == "triton":
        _require_triton(device)
    return "triton"


def _refused(value: torch.Tensor | torch.dtype | None) -> str | None:
    """What keeps the kernels from taking this argument, if anything."""
    if value is None:
        return None
    dtype = value if isinstance(value, torch.dtype) else value.dtype
    if dtype == torch.float64:
        return "is torch.float64"
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        return "requires a gradient"
    return None


def _require_triton(device: torch.device) -> None:
    if not _triton_installed():
        raise RuntimeError("impl='triton' was asked for, but triton is not installed; use impl='auto' or 'reference'")
    if device.type == "cuda":
        return
    if device.type != "cpu":
        raise RuntimeError(f"impl='triton' runs on CUDA tensors; these are on {device}")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "impl='triton' was asked for on CPU tensors, which only Triton's interpreter can serve: "
            "set TRITON_INTERPRET=1 before Python starts, or use impl='auto' or 'reference'"
        )
    if not _interpreted():
        raise RuntimeError(
            "impl='triton' was asked for on CPU tensors, but triton was imported before TRITON_INTERPRET=1 was set; "
            "set it before Python starts"
        )


def _triton_installed() -> bool:
    return "triton" in sys.modules or importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether triton's own functions are the interpreter's: they are made when triton is first imported."""
    import triton.language
    from triton.runtime import JITFunction

    return not isinstance(triton.language.sum, JITFunction)
