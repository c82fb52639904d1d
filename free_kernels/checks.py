"""Argument checks that the operations share. Each names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_ELEMENTS = 2**34


def check_values(name: str, tensor: torch.Tensor, shape: Sequence[int | None], device: torch.device) -> None:
    """A floating tensor of ``shape`` (``None`` is any size but zero) on ``device``."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed are {', '.join(map(str, FLOATS))}")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, device)
    if tensor.numel() > MAX_ELEMENTS:
        raise ValueError(f"{name} has {tensor.numel()} elements; at most {MAX_ELEMENTS} are allowed")


def check_index(name: str, tensor: torch.Tensor, shape: Sequence[int | None], device: torch.device) -> None:
    """An int64 tensor of ``shape`` on ``device``."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed is torch.int64")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, device)


def check_flags(name: str, tensor: torch.Tensor, shape: Sequence[int | None], device: torch.device) -> None:
    """A bool tensor of ``shape`` on ``device``."""
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed is torch.bool")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, device)


def check_sums(name: str, tensor: torch.Tensor, shape: Sequence[int | None], device: torch.device) -> None:
    """A float64 tensor of ``shape`` on ``device``."""
    if tensor.dtype != torch.float64:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed is torch.float64")
    _check_shape(name, tensor, shape)
    _check_device(name, tensor, device)


def check_in_place(name: str, tensor: torch.Tensor) -> None:
    """Memory that an operation can write as it lies."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; allowed is contiguous memory, as it is written in place")


def check_drafted(
    name: str, values: torch.Tensor | None, shape: Sequence[int | None], window: int, device: torch.device
) -> None:
    """A floating tensor of ``shape`` whose axis 1 has W-1 columns or more. A window of one drafts nothing and reads none."""
    if values is None or window == 1:
        return
    check_values(name, values, shape, device)
    if values.shape[1] < window - 1:
        raise ValueError(f"{name} has {values.shape[1]} columns; a window of {window} needs {window - 1}")


def check_guidance(
    output: torch.Tensor, unconditional: torch.Tensor | None, guidance_scale: float, name: str = "unconditional_output"
) -> None:
    """Guidance needs the unconditional half, of the same shape and dtype as the conditional one."""
    if unconditional is None:
        if guidance_scale != 1.0:
            raise ValueError(f"guidance_scale is {guidance_scale} without {name}; give {name} or a guidance_scale of 1")
        return
    check_values(name, unconditional, output.shape, output.device)
    if unconditional.dtype != output.dtype:
        raise ValueError(f"{name} has dtype {unconditional.dtype}; the conditional output has {output.dtype}")


def _check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int | None]) -> None:
    if tensor.shape == shape:  # nearly always, and at a fraction of the cost of what follows
        return
    fits = tensor.dim() == len(shape) and all(
        size == want if want is not None else size > 0 for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        allowed = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is ({allowed})")


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; the other arguments are on {device}")
