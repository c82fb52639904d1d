"""What an argument must be, said in one voice: its name, what was given, what is allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch

F = TypeVar("F", bound=Callable[..., Any])


def on_cpu(function: F) -> F:
    """Run ``function`` with the CPU as torch's default device, whatever default the caller has set."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return cast(F, wrapped)


def without_gradients(function: F) -> F:
    """Run ``function`` without autograd and outside the caller's ``inference_mode``: tensors made in inference mode cannot
    be written to outside it later.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, wrapped)


def is_int(value: Any) -> bool:
    """A Python, numpy or torch integer, and no bool."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.dtype != torch.bool and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_count(name: str, count: Any, most: int | None = None, *, least: int = 1, why: str = "") -> int:
    """``count`` as an int of ``least`` … ``most``.

    Args:
        name: of the argument.
        count: what was given; an integer of any kind.
        most: None is no bound.
        least: the other bound.
        why: a few words on the bound, for the message.
    """
    allowed = (f"{least} or more" if most is None else f"{least} … {most}") + (f", {why}" if why else "")
    if not is_int(count) or count < least or (most is not None and count > most):
        raise ValueError(f"{name} is {count!r}; allowed is an int, {allowed}")
    return int(count)


def check_number(name: str, value: Any, allowed: str, least: float, most: float = float("inf")) -> float:
    """``value`` as a finite float of ``least`` … ``most``, which the message describes as ``allowed``."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not np.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; allowed is {allowed}")
    return float(value)


def check_labels(class_labels: Any) -> torch.Tensor:
    """Class labels as an int64 tensor, of one number or one a sample."""
    try:
        labels = torch.as_tensor(class_labels, device=None if isinstance(class_labels, torch.Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        labels = None
    if labels is None:
        raise ValueError(f"class_labels is {class_labels!r}; allowed are integers, one a sample")
    if not labels.numel():
        raise ValueError("class_labels is empty; allowed is one label a sample, or None")
    if labels.dim() > 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"class_labels has dtype {labels.dtype} and shape {tuple(labels.shape)}; allowed are integers, one a sample"
        )
    return labels.long()
