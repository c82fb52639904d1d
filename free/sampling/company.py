"""Whether a request may join others in a batch, or use what was prepared for another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from free.sampling.likeness import alike
from free.sampling.request import Request
from free.targets.base import has_rows


def own(request: Request) -> Request:
    """A copy with tensors of its own, as the caller may write to those it passed."""
    conditioning = {name: value.clone() if has_rows(value) else value for name, value in request.conditioning.items()}
    latents = None if request.latents is None else request.latents.clone()
    return replace(request, conditioning=conditioning, latents=latents)


def _same(value: Any, other: Any) -> bool:
    """Whether both, which have no rows, say the same; a number or an array becomes another tensor in each request."""
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return (value.shape, value.dtype) == (other.shape, other.dtype) and torch.equal(value, other)
    return value is other or alike(value) == alike(other)


def check_alike(request: Request, others: Request, whose: str) -> None:
    """Raise a ValueError unless a request is of the kind of ``others``, which the message calls ``whose``."""
    if request.sample_shape != others.sample_shape:
        raise ValueError(f"latents are of samples {request.sample_shape}; those of {whose} are {others.sample_shape}")
    if request.seed.device != others.seed.device:
        raise ValueError(
            f"latents or conditioning are on {request.seed.device}; those of {whose} are on {others.seed.device}"
        )
    given, expected = request.conditioning, others.conditioning
    if set(given) != set(expected):
        raise ValueError(f"conditioning has {sorted(given)}; that of {whose} has {sorted(expected)}")
    for name, value in given.items():
        other = expected[name]
        if has_rows(value) and has_rows(other):
            if (value.shape, value.dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"conditioning {name!r} has shape {tuple(value.shape)} and dtype {value.dtype}; that of {whose} has "
                    f"{tuple(other.shape)} and {other.dtype}"
                )
        elif not _same(value, other):
            raise ValueError(
                f"conditioning {name!r} is {value!r:.60}, which has no row a sample and so is the same for all; that of "
                f"{whose} is {other!r:.60}"
            )
