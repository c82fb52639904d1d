"""Numbers that are equal where what they are of is, in any process: tensors by their bits, calls by their arguments."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from free.drafters import Drafter
from free.parallel.packing import as_bytes
from free.sampling.request import Request
from free.targets import Target
from free.version import __version__
from free.windows import WindowPlan

_AT_ONCE = 2**22
"""Words of 4 bytes that a checksum looks at in one go: weights are large."""
_KEPT = 2**18
"""Words of those whose factors are kept for the next round."""
_LONG = 160
"""Characters of a description."""
_ODD = -7046029254386353131  # 2^64 over the golden ratio
_OWN = ("ranks", "runs", "training")
"""Attributes of targets and drafters that are each process's own, or say nothing."""
_CHECKSUMS = WeakIdKeyDictionary()
"""Of tensors that were looked at before: (version, address, checksum)."""


def checksum(*tensors: torch.Tensor) -> torch.Tensor:
    """int64, of the tensors' bits: on their device, which is not asked, and the same in any order of summation.

    Each word is multiplied by an odd number of its place, and all are added modulo 2^64: one word that differs always
    changes the sum, and several do but for one case in about 2^60.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        for words in _words(tensor).split(_AT_ONCE):
            odd = _odd if len(words) > _KEPT else _odd_once
            total = total * 3 + (words * odd(len(words), words.device)).sum()
    return total


def _odd(count: int, device: torch.device) -> torch.Tensor:
    """int64 [N]: an odd number for each place."""
    return torch.arange(1, count + 1, device=device) * _ODD | 1


_odd_once = functools.lru_cache(maxsize=8)(_odd)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """int32 [N], or uint8 where the bytes do not come in fours."""
    content = as_bytes(tensor)
    return content.view(torch.int32) if len(content) % 4 == 0 else content


def _checksum_of_weight(tensor: torch.Tensor) -> int:
    """Looked at again only after it was written to or replaced."""
    if hasattr(tensor, "__tensor_flatten__"):  # made of others, as sharded and quantised weights are
        parts = [_checksum_of_weight(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return hash(tuple(parts))
    if tensor.is_meta:  # offloaded
        return 0
    version = None if tensor.is_inference() else tensor._version
    known = _CHECKSUMS.get(tensor)
    if version is None or known is None or known[:2] != (version, tensor.data_ptr()):
        known = _CHECKSUMS[tensor] = version, tensor.data_ptr(), int(checksum(tensor))
    return known[2]


def terms_of(request: Request, drafter: Drafter | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What processes must be asked alike, by the names that a caller knows."""
    target = request.target
    return {
        "call": tuple(sorted(settings)),
        "software": (torch.__version__, __version__),
        "device": request.seed.device.type,
        "model or its weights": target,
        "process": request.process.fingerprint(),
        "number of samples": request.batch,
        "shape": request.sample_shape,
        "guidance_scale": request.guidance_scale,
        "conditioning": request.conditioning,
        "latents": request.latents,
        "seed": request.keys,
        "drafter": drafter,
        **settings,
    }


def digest(value: Any) -> int:
    """63 bits, equal for values that say the same in any process."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in _parts(value, ()):
        hashed.update(part.encode() + b"\0")
    return int.from_bytes(hashed.digest(), "little") >> 1


def describe(value: Any) -> str:
    """For a message: numbers and words themselves, of other things the kind and the digest."""
    if value is None or isinstance(value, (bool, int, float, str, tuple, list)):
        said = repr(value)
        return said if len(said) < _LONG else f"{said[:_LONG]} … {digest(value):016x}"
    kind = value.name if isinstance(value, Drafter) else type(value.model if isinstance(value, Target) else value).__name__
    return f"{kind} {digest(value):016x}"


def _parts(value: Any, above: tuple[int, ...]) -> Iterator[str]:
    """All that a value says, word by word."""
    if id(value) in above:
        yield "one of those above"
        return
    above = (*above, id(value))
    yield type(value).__qualname__
    if isinstance(value, torch.device):
        yield value.type  # each process has a device of its own
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum, torch.dtype)):
        yield repr(value)
    elif isinstance(value, torch.Tensor):
        yield repr((tuple(value.shape), value.dtype, _checksum_of_weight(value)))
    elif isinstance(value, np.ndarray):
        yield repr((value.shape, value.dtype, value.tobytes()))
    else:
        for inner in _within(value):
            yield from _parts(inner, above)


def _within(value: Any) -> Iterator[Any]:
    """The parts of what is made of others; of an object that nothing is known of the public tensors and modules alone, as
    the rest may be its process's own.
    """
    if isinstance(value, Mapping):
        yield from (part for item in value.items() for part in item)
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, (set, frozenset)):
        yield from sorted(map(repr, value))
    elif isinstance(value, WindowPlan):
        yield value.windows
    elif isinstance(value, torch.nn.Module):
        yield from value.state_dict(keep_vars=True).items()
        yield from _public(value) if isinstance(value, Drafter) else ()
    elif isinstance(value, (Target, Drafter)):
        yield from _public(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in fields(value))
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif hasattr(value, "__qualname__"):  # functions, methods and classes
        yield f"{value.__module__}.{value.__qualname__}"
        yield getattr(value, "__self__", None)
    else:
        yield from (item for item in _public(value) if isinstance(item[1], (torch.Tensor, torch.nn.Module)))


def _public(value: Any) -> Iterator[tuple[str, Any]]:
    """Attributes by name; what begins with an underscore an object made for itself."""
    held = getattr(value, "__dict__", {})
    yield from ((name, held[name]) for name in sorted(held) if not name.startswith("_") and name not in _OWN)
