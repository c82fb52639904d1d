"""What the launchers of all kernels share. Plain torch; the kernels themselves are in ``<op>/kernel.py``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

MAX_PROGRAMS = 2**31 - 1
MAX_CHUNKS = 32


def block_size(numel: int) -> int:
    """Elements that a program handles at a time. A function of D alone, so that no sample's sums depend on its batch."""
    if numel <= 256:
        return 256
    return 1024 if numel < 2**15 else 2048


def chunks_of(numel: int) -> tuple[int, int]:
    """How a reduction over D is split: (chunks, blocks a chunk). Few enough chunks that one program can add them up."""
    blocks = -(-numel // block_size(numel))
    chunks = min(blocks, MAX_CHUNKS)
    return chunks, -(-blocks // chunks)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last axis is contiguous, whatever its other strides; else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def check_programs(name: str, programs: int) -> int:
    """A grid has 2**31 - 1 programs at most."""
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{name} has too many rows: {programs} programs; a launch has at most {MAX_PROGRAMS}")
    return programs


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def eager(*tensors: torch.Tensor) -> bool:
    """Whether the launcher itself can be called; a compiler, or a subclass such as fake tensors, needs the registered op."""
    return not torch.compiler.is_compiling() and all(type(tensor) is torch.Tensor for tensor in tensors)
