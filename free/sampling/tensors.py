"""Dataclasses of tensors, and of such dataclasses, as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def append(value: T, more: T) -> T:
    """The rows of ``value``, then those of ``more``: of a conditioning the tensors with a row a sample, the rest is kept.

    Windows of ``more`` may have more columns than those of ``value``, which are left out.

    Raises:
        TypeError: the two are not alike.
    """
    result: Any = value
    if isinstance(value, torch.Tensor) and isinstance(more, torch.Tensor):
        columns = (slice(None), *map(slice, value.shape[1:]))
        result = torch.cat((value, more[columns].to(value)))
    elif isinstance(value, dict) and isinstance(more, dict):
        result = {name: append(entry, more[name]) if has_rows(entry) else entry for name, entry in value.items()}
    elif is_dataclass(value) and not isinstance(value, type) and type(value) is type(more):
        result = type(value)(*(append(getattr(value, entry.name), getattr(more, entry.name)) for entry in fields(value)))
    elif value is not None or more is not None:
        raise TypeError(f"a {type(more).__name__} cannot follow a {type(value).__name__}: both are of the same samples")
    return result


def assign(into: Any, value: Any) -> None:
    """Write every tensor into its counterpart, where a window may have more columns than are written.

    No tensor of ``value`` may share memory with another one's counterpart: the order is not told.
    """
    together: dict[tuple[bool, torch.dtype, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for place, tensor in _counterparts(into, value):
        # one launch writes tensors of one dtype that lie in memory as what they are written from
        alike = place.stride() == tensor.stride() and place.is_contiguous()
        places, tensors = together.setdefault((alike, place.dtype, tensor.dtype), ([], []))
        places.append(place)
        tensors.append(tensor)
    for (alike, *_), (places, tensors) in together.items():
        if alike:
            torch._foreach_copy_(places, tensors)
        else:
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)


def _counterparts(into: Any, value: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of ``value`` with the part of ``into`` that it is to be written to."""
    if into is value:
        return
    if isinstance(into, torch.Tensor):
        yield into[tuple(slice(size) for size in value.shape)], value
    elif isinstance(into, dict):
        for name, entry in into.items():
            if has_rows(entry):
                yield from _counterparts(entry, value[name])
    elif is_dataclass(into):
        for entry in fields(into):
            yield from _counterparts(getattr(into, entry.name), getattr(value, entry.name))
    elif value is not None:
        raise TypeError(f"{type(value).__name__} has no counterpart to be written into")
