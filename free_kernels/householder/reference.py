"""Householder reflection in plain torch."""

from __future__ import annotations

import torch

from free_kernels.posterior.reference import compute_dtype


def householder(noise: torch.Tensor, delta: torch.Tensor, inner: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    dtype = compute_dtype(noise)
    # a draft that is not finite was rejected whatever the noise: the noise itself is then an exact draw
    reflects = (squared_norm > 0) & torch.isfinite(squared_norm) & torch.isfinite(inner)
    twice = torch.where(reflects, 2 * inner.to(dtype) / squared_norm.to(dtype), 0.0).unsqueeze(-1)
    delta = torch.where(reflects.unsqueeze(-1), delta.to(dtype), 0.0)
    return noise.to(dtype) - twice * delta
