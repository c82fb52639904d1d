"""Dataclasses of tensors, and of such dataclasses, as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch

from free.targets.base import has_rows

T = TypeVar("T")


def map_tensors(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """The same with every tensor changed; of a conditioning those with a row a sample, the rest is kept."""
    result: Any = value
    if isinstance(value, torch.Tensor):
        result = change(value)
    elif isinstance(value, dict):
        result = {name: change(entry) if has_rows(entry) else entry for name, entry in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        result = type(value)(*(map_tensors(getattr(value, entry.name), change) for entry in fields(value)))
    return result


def assign(into: Any, value: Any) -> None:
    """Write every tensor into its counterpart, where a window may have more columns than are written."""
    if into is value:
        return
    if isinstance(into, torch.Tensor):
        into[tuple(slice(size) for size in value.shape)].copy_(value)
    elif isinstance(into, dict):
        for name, entry in into.items():
            if has_rows(entry):
                assign(entry, value[name])
    elif is_dataclass(into):
        for entry in fields(into):
            assign(getattr(into, entry.name), getattr(value, entry.name))
    elif value is not None:
        raise TypeError(f"{type(value).__name__} has no counterpart to be written into")
