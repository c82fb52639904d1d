"""Counter-based random numbers: a pure function of (seed, step, stream, element). Nothing is stored, nothing is rewound."""

from __future__ import annotations

import torch

from free_kernels.checks import MAX_ELEMENTS, check_index
from free_kernels.dispatch import resolve
from free_kernels.philox import reference

NOISE_STREAM = 0
"""The noise of a step, one normal number an element."""
TEST_STREAM = 1
"""The uniform number of a step's acceptance test."""
LATENT_STREAM = 2
"""The initial state (step 0 only)."""

__all__ = ["LATENT_STREAM", "NOISE_STREAM", "TEST_STREAM", "normal", "philox", "uniform"]


def philox(
    seed: torch.Tensor, step: torch.Tensor, num_counters: int, *, stream: int = NOISE_STREAM, impl: str = "auto"
) -> torch.Tensor:
    """The integers of Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (i, step, stream, 0).

    Args:
        seed: int64, any shape; all 64 bits are the key.
        step: int64, broadcastable with ``seed``; the low 32 bits count.
        num_counters: how many counters i = 0 … num_counters - 1.
        stream: which independent sequence, 0 … 2**32 - 1.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        int64 [*shape, num_counters, 4], each in 0 … 2**32 - 1.

    Raises:
        ValueError: a wrong dtype, device or count.
    """
    _check(seed, step, num_counters, stream, "num_counters")
    if resolve(impl, seed.device) == "triton":
        from free_kernels.philox import kernel

        return kernel.philox(seed, step, num_counters, stream)
    radius_words, angle_words = reference.philox_pairs(seed, step, num_counters, stream)
    # [2, *shape, n] twice -> [*shape, n, 4] in the generator's own order
    return torch.stack((radius_words, angle_words), dim=-1).movedim(0, -2).flatten(-2)


def normal(
    seed: torch.Tensor,
    step: torch.Tensor,
    numel: int,
    *,
    stream: int = NOISE_STREAM,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> torch.Tensor:
    """Standard normal numbers: element e is lane ``e % 4`` of counter ``e // 4`` (Box-Muller, two pairs a counter).

    32-bit uniforms reach |z| = 6.76.

    Args:
        seed, step, stream: as in :func:`philox`.
        numel: how many numbers, e = 0 … numel - 1.
        dtype: of the numbers.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``dtype`` [*shape, numel].

    Raises:
        ValueError: a wrong dtype, device or count.
    """
    _check(seed, step, numel, stream, "numel")
    if resolve(impl, seed.device, dtype=dtype) == "triton":
        from free_kernels.philox import kernel

        return kernel.normal(seed, step, numel, stream, dtype)
    return reference.normal(seed, step, numel, stream, dtype)


def uniform(
    seed: torch.Tensor,
    step: torch.Tensor,
    *,
    stream: int = TEST_STREAM,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> torch.Tensor:
    """One uniform number in (0, 1] for each (seed, step), from the first word of counter 0; smallest 2**-33.

    Returns:
        ``dtype`` [*shape].

    Raises:
        ValueError: a wrong dtype or device.
    """
    _check(seed, step, 1, stream, "numel")
    if resolve(impl, seed.device, dtype=dtype) == "triton":
        from free_kernels.philox import kernel

        return kernel.uniform(seed, step, stream, dtype)
    return reference.uniform(seed, step, stream, dtype)


def _check(seed: torch.Tensor, step: torch.Tensor, count: int, stream: int, count_name: str) -> None:
    check_index("seed", seed, seed.shape, seed.device)
    check_index("step", step, step.shape, seed.device)
    if not 1 <= count <= MAX_ELEMENTS:
        raise ValueError(f"{count_name} is {count}; allowed is 1 … 2**34")
    try:
        rows = torch.broadcast_shapes(seed.shape, step.shape).numel()
    except RuntimeError:
        raise ValueError(f"step has shape {tuple(step.shape)}; it must broadcast with seed's {tuple(seed.shape)}") from None
    if rows * count > MAX_ELEMENTS:
        raise ValueError(f"{count_name} is {count} for {rows} seeds: more numbers than the {MAX_ELEMENTS} allowed")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream is {stream}; allowed is 0 … 2**32 - 1")
