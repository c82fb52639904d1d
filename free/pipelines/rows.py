"""Tensors that know which state of the round each of their rows is of.

A pipeline is written for B samples. While it is shown n states it goes on computing with what it prepared for its samples:
prompt embeddings, image latents, masks. Latents, timesteps and network outputs carry the layout of their round, and a plain
tensor with a row a sample that meets them is indexed, so that each state meets the row of its own sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from free.pipelines.errors import UnsupportedPipelineError


@dataclass(eq=False)
class Layout:
    """What the n states of a round are."""

    number: int
    """Of the round, counted from 0."""
    sample: torch.Tensor
    """int64 [n]: which of the pipeline's B samples each state belongs to."""
    row: torch.Tensor
    """int64 [n]: which of the rows that the pipeline has prepared each state meets; its sample's, if that has one."""
    batch: int
    """Rows that the pipeline has prepared: B, or as many a sample as its window has states."""
    timestep: torch.Tensor
    """[n]: the scheduler's timestep of each state."""
    shown: torch.Tensor
    """[]: the one of them that stands for all where the pipeline makes a number of it."""
    taken_over: Callable[[], None]
    """Told when rows of an earlier round are carried into this one, which needs a row of every sample."""
    final: bool = False
    """Whether these are the samples, one row each, from which on tensors are plain again."""

    def __len__(self) -> int:
        return len(self.sample)

    def index(self, groups: int, inner: int) -> torch.Tensor:
        """int64 [groups * n * inner]: the rows of a tensor [groups * batch * inner, ...] that belong to the states."""
        device = self.row.device
        group = self.batch * torch.arange(groups, device=device)[:, None, None]
        return ((group + self.row[:, None]) * inner + torch.arange(inner, device=device)).flatten()


class Rows(torch.Tensor):
    """A row a state, [groups * n * inner, ...]: groups are the halves of guidance, inner the frames that became rows."""

    place: Layout
    inner_rows: int

    @classmethod
    def of(cls, values: torch.Tensor, layout: Layout, inner: int = 1) -> Rows:
        rows = values.as_subclass(cls)
        rows.place, rows.inner_rows = layout, inner
        return rows

    @property
    def groups(self) -> int:
        return len(plain(self)) // (len(self.place) * self.inner_rows)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


class Timestep(torch.Tensor):
    """A round's timestep as a pipeline's loop sees it, or what it made of that alone: one that stands for one a state.

    What a pipeline makes of it, by arithmetic or from a table, is made of each state's own, and what it expands to a vector
    has each state's in it. What decides must have one answer for all states.
    """

    place: Layout
    each: torch.Tensor
    """Each state's: [n] of a number in whatever shape, else [n, *shape]."""

    @classmethod
    def of(cls, shown: torch.Tensor, each: torch.Tensor, layout: Layout) -> Timestep:
        timestep = shown.as_subclass(cls)
        timestep.place, timestep.each = layout, each
        return timestep

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


def plain(values: torch.Tensor) -> torch.Tensor:
    """The same without what it knows of its rows."""
    return values.as_subclass(torch.Tensor) if isinstance(values, (Rows, Timestep)) else values


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)


def change_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Nested lists, tuples, dicts and outputs of diffusers with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value) and isinstance(value, dict):
        entries = {entry.name: change_tensors(getattr(value, entry.name), change) for entry in fields(value)}
        return type(value)(**entries)
    if isinstance(value, dict):
        return {name: change_tensors(entry, change) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        changed = [change_tensors(entry, change) for entry in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value


def _methods(*names: str) -> set[Any]:
    """Those of a tensor, and the functions of the same name."""
    of_torch = {getattr(torch, name) for name in names if hasattr(torch, name)}
    return {getattr(torch.Tensor, name) for name in names if hasattr(torch.Tensor, name)} | of_torch


_COMPARISONS = _methods("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "lt", "le", "gt", "ge", "eq", "ne")
_ELEMENTWISE = _methods(
    "add", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "mul", "__rmul__", "div", "__truediv__", "__rtruediv__",
    "__rdiv__", "__floordiv__", "floor_divide", "pow", "__pow__", "__rpow__", "neg", "__neg__", "abs", "__abs__", "sqrt",
    "rsqrt", "square", "reciprocal", "exp", "log", "sin", "cos", "sigmoid", "clamp", "round", "floor", "ceil", "to", "type",
    "type_as", "float", "half", "bfloat16", "double", "long", "int", "clone", "detach", "contiguous", "cpu", "cuda",
)  # fmt: skip
"""Of a number each; others are asked state by state."""
_EXPANSIONS = _methods("expand", "repeat", "tile")
_SHAPES = _methods("__getitem__", "unsqueeze", "squeeze", "view", "reshape", "flatten", "ravel")
_ALONG_ROWS = _methods("cat", "concat", "chunk", "split", "tensor_split", "narrow", "repeat", "tile", "__getitem__")
"""Of these a result has a multiple of the states as its rows where it has rows of theirs at all."""
_ROW_BY_ROW = _methods("unbind", "select")
_RESHAPES = _methods("view", "reshape", "flatten", "unflatten")
_REPEATS = _methods("repeat_interleave")
_PERMUTES = _methods("permute", "transpose", "swapaxes", "movedim", "t")
_PERMUTES |= {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}

_SEVERAL = "the pipeline makes rows of the timestep, in which the states of a round differ; it cannot be speculated"


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of tensors of which some know their rows."""
    with torch._C.DisableTorchFunctionSubclass():
        rows = [values for values in tensors_in((args, kwargs)) if isinstance(values, Rows)]
        if not rows:
            return _of_timesteps(func, args, kwargs)
        # where rounds meet, the later one is under way
        leader = max(rows, key=lambda values: values.place.number)
        args, kwargs = change_tensors((args, kwargs), lambda values: _for(leader, values))
        result = func(*args, **kwargs)
        if not isinstance(result, (torch.Tensor, tuple, list)):
            return result
        first = args[0] if args else None
        return change_tensors(result, lambda values: _tag(values, func, first, leader, args))


def _for(leader: Rows, values: torch.Tensor) -> torch.Tensor:
    """A tensor that meets ``leader``, with a row for each of its."""
    if isinstance(values, Rows):
        return plain(values) if values.place is leader.place else _take_over(values, leader.place)
    if isinstance(values, Timestep):
        own = values.each
        if own.dim() > leader.dim():  # it has the axis of rows itself
            if values.shape[0] != 1 or values.dim() != leader.dim():
                raise UnsupportedPipelineError(_SEVERAL)
            own = own[:, 0]
        own = own.repeat(leader.groups, *(1,) * (own.dim() - 1)).repeat_interleave(leader.inner_rows, 0).to(leader.device)
        return own.view(-1, *(1,) * (leader.dim() - own.dim()), *own.shape[1:])
    if isinstance(values, torch.nn.Parameter) or values.dim() != leader.dim() or not values.dim():
        return values
    layout, groups = leader.place, leader.groups
    if values.shape[0] != groups * layout.batch * leader.inner_rows:
        return values
    return values[layout.index(groups, leader.inner_rows).to(values.device)]


def _take_over(earlier: Rows, layout: Layout) -> torch.Tensor:
    """Rows of an earlier round that depend on the sample only, for the states of this one."""
    layout.taken_over()
    sample, inner = earlier.place.sample, earlier.inner_rows
    values = plain(earlier).unflatten(0, (earlier.groups, len(sample), inner))
    first = (sample[:, None] == sample).int().argmax(1)  # [n]: the first row of the same sample
    if not torch.equal(values, values[:, first]):
        raise UnsupportedPipelineError(
            "the pipeline carries what it computed at a state into the next round, where other states follow; it cannot be "
            "speculated"
        )
    row = (layout.sample[:, None] == sample).int().argmax(1)
    missing = sample[row] != layout.sample
    if missing.any():
        raise UnsupportedPipelineError(
            f"the pipeline carries rows of an earlier round on, and sample {int(layout.sample[missing][0])} has none there"
        )
    return values[:, row].flatten(0, 2)


def _tag(values: Any, func: Callable[..., Any], first: Any, leader: Rows, args: tuple[Any, ...]) -> Any:
    """A result, which knows its rows if it has the states' rows."""
    lead, inner = len(plain(leader)), leader.inner_rows
    if not isinstance(values, torch.Tensor) or not values.dim() or leader.place.final:
        return values
    size, per_group = values.shape[0], len(leader.place) * inner
    if func in _ROW_BY_ROW or (func is torch.Tensor.__getitem__ and not _slices_rows(args[1])):
        fits = values.dim() == leader.dim() and size == lead
    elif func in _PERMUTES:
        fits = size == lead and _keeps_rows(first, values)
    elif func in _ALONG_ROWS:
        same_axes = values.dim() == leader.dim() or func is torch.Tensor.__getitem__
        fits = same_axes and size % per_group == 0 and size > 0
    elif func in _RESHAPES or func in _REPEATS:
        if size % lead == 0 and size >= lead:
            inner *= size // lead
        elif size and lead % size == 0 and inner % (lead // size) == 0:
            inner //= lead // size
        else:
            return values
        fits = True
    else:
        fits = size == lead
    return Rows.of(values, leader.place, inner) if fits else values


def _slices_rows(index: Any) -> bool:
    """Whether an index keeps the axis of rows: whole, or a slice of it."""
    head = index[0] if isinstance(index, tuple) and index else index
    return isinstance(head, slice) or head is Ellipsis


def _keeps_rows(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the first axis of a permuted view is still the first."""
    return before.shape[0] == after.shape[0] and before.stride(0) == after.stride(0)


def _of_timesteps(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` where no rows take part: of what the loop's timestep stands for.

    Raises:
        UnsupportedPipelineError: what decides, or is more than a number, would differ from state to state.
    """
    found = [values for values in tensors_in((args, kwargs)) if isinstance(values, Timestep)]
    layout, of_numbers = found[0].place, all(values.each.dim() == 1 for values in found)
    result = func(*change_tensors(args, plain), **change_tensors(kwargs, plain))
    decides = isinstance(result, bool) or func in _COMPARISONS
    if not isinstance(result, torch.Tensor) and not decides:
        return result
    number = isinstance(result, torch.Tensor) and result.numel() == 1
    if of_numbers and not decides:
        each = found[0].each
        if func in _EXPANSIONS and result.shape[0] % len(layout) == 0:
            each = each.repeat(result.shape[0] // len(layout))
            return Rows.of(each.view(-1, *(1,) * (result.dim() - 1)).expand(result.shape), layout)
        if number and func in _SHAPES and args[0] is found[0]:
            return Timestep.of(result, each, layout)
        if number and func in _ELEMENTWISE:
            each = func(*change_tensors(args, _each_of), **change_tensors(kwargs, _each_of))
            return Timestep.of(result, each.flatten(), layout)

    answers = [_at_state(func, args, kwargs, state) for state in range(len(layout))]
    if decides:
        same = all(answer == result if isinstance(result, bool) else torch.equal(answer, result) for answer in answers)
        if not same:
            raise UnsupportedPipelineError(
                "the pipeline decides by the timestep, and the states of a round differ in it; it cannot be speculated"
            )
        return result
    return Timestep.of(result, torch.stack([answer.reshape(()) if number else answer for answer in answers]), layout)


def _each_of(values: torch.Tensor) -> torch.Tensor:
    return values.each if isinstance(values, Timestep) else values


def _at_state(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], state: int) -> Any:
    """``func`` as the pipeline would have called it at one state of the round."""

    def own(values: torch.Tensor) -> torch.Tensor:
        return values.each[state].view(values.shape) if isinstance(values, Timestep) else values

    return func(*change_tensors(args, own), **change_tensors(kwargs, own))
