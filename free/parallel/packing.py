"""Tensors of any dtypes and shapes as one run of bytes, so that one exchange carries them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 16  # bytes, as kernels like it


def pack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """uint8 [N], each tensor at a multiple of 16 bytes; at least one of them is no None."""
    parts = []
    for tensor in tensors:
        if tensor is not None:
            content = as_bytes(tensor)
            parts += [content, content.new_zeros(_padding(len(content)))]
    return torch.cat(parts)


def unpack(packed: torch.Tensor, like: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The tensors of R runs of bytes, uint8 [R, N], each run of tensors ``like`` these.

    Returns:
        For each of ``like`` those of all runs, [R * its first size, ...], or None.
    """
    tensors: list[torch.Tensor | None] = []
    begin = 0
    for tensor in like:
        if tensor is None:
            tensors.append(None)
            continue
        size = tensor.numel() * tensor.element_size()
        content = packed[:, begin : begin + size].contiguous().view(-1).view(tensor.dtype)
        tensors.append(content.view(len(packed) * len(tensor), *tensor.shape[1:]))
        begin += size + _padding(size)
    return tensors


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [N], the tensor's own memory where that is dense."""
    # a single element may have any stride, and would not be viewed
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _padding(size: int) -> int:
    return -size % _ALIGNMENT
