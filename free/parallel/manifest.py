"""What a folder of samples was asked for: one configuration, by which another one is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from free.drafters import Drafter
from free.parallel.shards import ShardFolder, StorageError
from free.targets import DiTTarget, Target
from free.targets.loading import digest, fingerprint

NAME = "manifest.json"
_FORMAT = "free-dit samples, 1"


class OtherConfigurationError(ValueError):
    """The folder holds samples of another configuration, or something else. Nothing was touched."""

    exit_code = 3


def agree(folder: ShardFolder, configuration: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Write the configuration into an empty folder, or see that the folder's is the same.

    Args:
        folder: of the samples.
        configuration: JSON-ready; all that decides what the samples are.
        notes: JSON-ready; kept beside it by who comes first, compared with nothing.

    Raises:
        OtherConfigurationError: it is another, and which values differ.
        StorageError: the folder cannot be written or read.
    """
    text = json.dumps({"format": _FORMAT, "hash": _hash(configuration), "configuration": configuration, **notes}, indent=1)
    if folder.publish(NAME, (text + "\n").encode()):
        return
    path = folder.root / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs = found["configuration"] if found["format"] == _FORMAT else None
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        theirs = None
    if not isinstance(theirs, dict):
        raise OtherConfigurationError(f"output_dir {str(folder.root)!r} holds a {NAME} of another kind; give another folder")
    if _hash(theirs) == _hash(configuration):
        return
    ours = json.loads(json.dumps(configuration))
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    differ = "; ".join(f"{name} is {ours.get(name)!r} here and {theirs.get(name)!r} there" for name in names)
    raise OtherConfigurationError(f"output_dir {str(folder.root)!r} holds samples of another configuration: {differ}")


def _hash(configuration: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def model_fingerprint(target: Target) -> str:
    """Of a target: a DiT's by its configuration and weights, another's by its class and its model's weights."""
    if isinstance(target, DiTTarget):
        return fingerprint(target)
    model = target.model if target.module is None else target.module
    return f"{type(target).__name__} {_described(model)}"


def drafter_fingerprint(drafter: Drafter) -> str:
    """Of a drafter: its name, its public numbers and words, and what it learned."""
    return f"{drafter.name} {_described(drafter)}"


def _described(value: Any) -> str:
    tensors: list[torch.Tensor] = []
    words = "\n".join(_words(value, tensors, ()))
    return digest(tensors, words)


def _words(value: Any, tensors: list[torch.Tensor], above: tuple[int, ...]) -> Iterator[str]:
    """What a thing is, in words; the tensors that belong to it are added to ``tensors``."""
    if id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, (type(None), bool, int, float, str)):
        yield repr(value)
    elif isinstance(value, torch.Tensor):
        tensors.append(value)
        yield "tensor"
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _words(entry, tensors, above)
    elif isinstance(value, (torch.nn.Module, Target, Drafter)):
        yield type(value).__qualname__
        if isinstance(value, torch.nn.Module):
            state = value.state_dict()
            tensors.extend(state[name] for name in sorted(state))
        for name, entry in sorted(vars(value).items()):
            if not name.startswith("_") and name != "runs":
                yield name
                yield from _words(entry, tensors, above)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield repr(name)
            yield from _words(entry, tensors, above)
    else:
        yield getattr(value, "__qualname__", type(value).__qualname__)
