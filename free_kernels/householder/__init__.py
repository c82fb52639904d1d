"""Reflection of the noise at the hyperplane orthogonal to the difference of the means."""

from __future__ import annotations

import torch

from free_kernels.checks import check_values
from free_kernels.dispatch import resolve
from free_kernels.householder import reference

__all__ = ["householder"]


def householder(
    noise: torch.Tensor, delta: torch.Tensor, inner: torch.Tensor, squared_norm: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """``z - 2 e <e, z>`` with ``e = delta / |delta|`` (FREE, arXiv 2511.20390, supplement B).

    No second reduction: <z, delta> and |delta|² come from the acceptance ratio.

    Args:
        noise: z [N, D], float.
        delta: [N, D], float.
        inner: <z, delta> [N], float.
        squared_norm: |delta|² [N], float.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        The reflected noise [N, D], float32 (float64 if ``noise`` is); a row whose |delta|² is 0 or not finite is
        returned as it is.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, named.
    """
    check_values("noise", noise, (None, None), noise.device)
    check_values("delta", delta, noise.shape, noise.device)
    check_values("inner", inner, noise.shape[:1], noise.device)
    check_values("squared_norm", squared_norm, noise.shape[:1], noise.device)
    if resolve(impl, noise.device, noise=noise, delta=delta, inner=inner, squared_norm=squared_norm) == "triton":
        from free_kernels.householder import kernel

        return kernel.householder(noise, delta, inner, squared_norm)
    return reference.householder(noise, delta, inner, squared_norm)
