"""When two calls may share a recorded CUDA graph, and which tensors a recording reads."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdRef

from free.drafters import Drafter
from free.targets import Target

_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
_SEQUENCES = (list, tuple)
_LEAVES = (*_PLAIN, type, ModuleType, FunctionType, MethodType)


def alike(value: Any) -> Hashable:
    """Equal for values that are the same to a graph, which has baked in numbers and addresses.

    Numbers and words are equal by value, tensors by their place, modules by identity and by where their weights are.
    Drafters and targets are compared by their public attributes; private ones are what an object has made for itself. A
    drafter that is put together of numbers, other drafters and models is like another of the same parts; one that holds more
    is only like itself, as what it holds may be what it has learned. The result keeps no model and no drafter alive.
    """
    return _alike(value, ())


def _alike(value: Any, above: tuple[int, ...]) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if id(value) in above:
        return "one of those above"
    above = (*above, id(value))
    if isinstance(value, torch.Tensor):
        return place(value), _content(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, torch.nn.Module):
        if isinstance(value, Drafter):
            return _identity(value), weights(value), _attributes(value, above), *map(settings, value.children())
        return _identity(value), weights(value), settings(value)
    if isinstance(value, Target):
        return who_is(value, above), weights(value.module), settings(value.module)
    if isinstance(value, Drafter):
        who = _identity(type(value)) if all(map(_is_part, vars(value).values())) else _identity(value)
        return who, value.name, _attributes(value, above)
    if isinstance(value, Mapping):
        return tuple((_alike(name, above), _alike(entry, above)) for name, entry in value.items())
    if isinstance(value, _SEQUENCES):
        return tuple(_alike(entry, above) for entry in value)
    if is_dataclass(value) and not isinstance(value, type):
        return _identity(type(value)), *(_alike(getattr(value, field.name), above) for field in fields(value))
    compiled = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled is not None:  # each call compiles anew what is the same
        return "compiled", _alike(compiled, above)
    if isinstance(value, MethodType):  # each look at one is another object
        return _identity(value.__func__), _alike(value.__self__, above)
    return _identity(value)


def who_is(target: Target, above: tuple[int, ...] = ()) -> Hashable:
    """A target as :func:`alike` sees it, wherever its model's weights are."""
    model = _alike(target.model, above) if target.module is None else _identity(target.model)
    return _identity(type(target)), model, _attributes(target, above, target.model, target.module)


def _attributes(value: Any, above: tuple[int, ...], *left_out: Any) -> tuple[Hashable, ...]:
    """The public ones, described, but for those that are said elsewhere."""
    return tuple(
        (name, _alike(entry, above))
        for name, entry in vars(value).items()
        if not name.startswith("_") and not any(entry is one for one in left_out if one is not None)
    )


def _is_part(value: Any) -> bool:
    """Whether it says all of itself in :func:`alike`."""
    if isinstance(value, Mapping):
        value = (*value, *value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_is_part, value))
    return isinstance(value, (*_PLAIN, Drafter, Target))


def _identity(value: Any) -> Hashable:
    """Equal for one and the same object, also when another has its address; never for what cannot be referred to weakly."""
    try:
        return WeakIdRef(value)
    except TypeError:
        return object()


def place(tensor: torch.Tensor) -> Hashable:
    """Where a tensor's numbers are, and how they are to be read."""
    if hasattr(tensor, "__tensor_flatten__"):  # made of others, as quantised weights are
        return tuple(place(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr()


def weights(module: torch.nn.Module | None) -> tuple[Hashable, ...]:
    """Where a module's parameters and buffers are, in their order: a graph reads them there."""
    return () if module is None else tuple(map(place, chain(module.parameters(), module.buffers())))


def _content(tensor: torch.Tensor) -> bytes:
    """What a tensor on the host holds, as a graph reads a copy on the device that was made before; of others nothing."""
    if tensor.device.type != "cpu" or type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
        return b""
    return hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


_OF_TORCH = frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def settings(module: torch.nn.Module | None) -> Hashable:
    """What a module's forward may follow beside weights, as far as it can be seen, of each submodule: numbers, words and
    flags (an adapter that is on, and how strongly), objects by who they are (an attention processor), hooks of others, and
    forwards put in place of the class's.
    """
    return () if module is None else tuple(map(_settings, module.modules()))


def _settings(module: torch.nn.Module) -> Hashable:
    own = ((name, value) for name, value in vars(module).items() if name not in _OF_TORCH)
    hooks = (hook for name in _HOOKS for hook in vars(module)[name].values())
    # the package's hooks come and go with each run
    foreign = (hook for hook in hooks if not str(getattr(hook, "__module__", None)).startswith("free."))
    return (
        _who(type(module)),
        *((name, _setting(value, (id(module),))) for name, value in own if not isinstance(value, torch.nn.Module)),
        *map(_who, foreign),
    )


def _setting(value: Any, above: tuple[int, ...]) -> Hashable:
    """A submodule's attribute; what holds others is described by what it holds."""
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, torch.Tensor):
        return place(value)
    if id(value) in above:
        return "one of those above"
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return tuple((_setting(name, above), _setting(entry, above)) for name, entry in value.items())
    if isinstance(value, (*_SEQUENCES, set, frozenset)):
        said = [_setting(entry, above) for entry in value]
        return tuple(said) if isinstance(value, _SEQUENCES) else frozenset(said)
    return _who(value)


def _who(value: Any) -> Hashable:
    """The object itself, which its module keeps alive."""
    compiled = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        return "compiled", _who(compiled)
    if isinstance(value, MethodType):
        return _who(value.__func__), _who(value.__self__)
    try:
        return WeakIdRef(value)
    except TypeError:
        return type(value), id(value)


def tensors_of(*values: Any) -> dict[Hashable, torch.Tensor]:
    """All tensors that can be reached from ``values``, by their places: through containers, dataclasses, modules, targets
    and drafters, private attributes included, and through whatever else a drafter holds. What a model or a target knows
    beside modules and tensors is left alone: it may be whoever trains it.
    """
    found: dict[Hashable, torch.Tensor] = {}
    seen: dict[int, Any] = {}
    left: list[tuple[Any, bool]] = [(value, True) for value in values]
    while left:
        value, into_others = left.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value  # an id counts for as long as its owner is there
        within: Iterable[Any] = ()
        if isinstance(value, torch.Tensor):
            found[place(value)] = value.detach()
        elif isinstance(value, Mapping):
            within = value.values()
        elif isinstance(value, (*_SEQUENCES, set, frozenset)):
            within = value
        elif isinstance(value, (torch.nn.Module, Target)):
            within, into_others = vars(value).values(), isinstance(value, Drafter)
        elif is_dataclass(value):
            within = (getattr(value, field.name) for field in fields(value))
        elif into_others:
            within = getattr(value, "__dict__", {}).values()
        left += [(entry, into_others) for entry in within]
    return found
