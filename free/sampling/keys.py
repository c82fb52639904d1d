"""The keys that noise is a function of, and how one follows from another.

A key is 64 bits, signed. What may share no noise with a seed's own sample has a key hashed from it by numpy's SeedSequence,
under words of its own. They all stand here, so that one can see that no two are alike: one word is a sample of a
batch, two are a pilot or a label, three a later chain of a call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch

from free.checks import is_int

_PILOT = 0x70696C6F  # "pilo", then 1
_LABEL = 0x6C61626C  # "labl", after the sample's number, which is never as large as "pilo"
_LATER_LOOP = 0x6C6F6F70  # "loop", then 1 and the loop's number


def seed_count(seed: Any) -> int | None:
    """How many samples a seed speaks of: None for one integer, or none at all."""
    if seed is None or is_int(seed):
        return None
    try:
        return len(seed)
    except TypeError:
        raise ValueError(f"seed is {seed!r}; allowed is an int, or one int a sample") from None


def check_seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[int]:
    """One 64-bit key a sample, as signed integers."""
    if seed is not None and generator is not None:
        raise ValueError("seed and generator are both given; give one of them")
    if seed is None:
        generators: list[Any] = list(generator) if isinstance(generator, (list, tuple)) else [generator] * batch
        for one in generators:
            if one is not None and not isinstance(one, torch.Generator):
                raise ValueError(f"generator holds a {type(one).__name__}; allowed are torch.Generator, one or one a sample")
        return [
            int(torch.randint(2**63 - 1, (), generator=one, device=one.device if one is not None else "cpu"))
            for one in generators
        ]
    if is_int(seed):
        return sample_keys(_check_seed(seed), range(batch))
    return _signed([_check_seed(key) for key in cast("Sequence[int]", seed)])


def sample_keys(seed: int, samples: Iterable[int]) -> list[int]:
    """The keys, signed 64 bits, that samples of these numbers have under an int seed, however many others are drawn.

    The first key is the seed itself, so that ``seed=7`` and ``seed=[7]`` agree; the others are shared with no other seed.
    """

    return _signed([seed if i == 0 else _derived(seed % 2**64, (i,)) for i in samples])


def keys_of_loop(keys: Sequence[int], loop: int) -> list[int]:
    """The keys that samples of these have in the ``loop``-th chain (0 is the first) of a call that runs several.

    A later chain may depend on what an earlier one made, so that the noise of that one is not new to it.
    """
    return list(keys) if loop == 0 else _signed([_derived(key % 2**64, (_LATER_LOOP, 1, loop)) for key in keys])


def pilot_keys(keys: Sequence[int]) -> list[int]:
    """The keys of a pilot of samples of these, each row's another one, also where two share a key."""
    return _signed([_derived((key % 2**64, row), (_PILOT, 1)) for row, key in enumerate(keys)])


def keys_of_states(states: torch.Tensor) -> list[int]:
    """Keys of initial states [B, D]: the same for the same state, whatever else is in the batch; of equal states the second,
    third … have keys of their own.
    """
    keys, seen = [], dict[bytes, int]()
    for row in states.cpu().contiguous():
        content = row.numpy().tobytes()
        seen[content] = seen.get(content, -1) + 1
        digest = hashlib.sha256(content + seen[content].to_bytes(8, "little")).digest()
        keys.append(int.from_bytes(digest[:8], "little", signed=True))
    return keys


def uniform_label(seed: int, sample: int, classes: int) -> int:
    """A label, 0 … ``classes - 1``, that follows from the seed and the sample's number, as its key does."""
    return _derived(seed % 2**64, (sample, _LABEL)) % classes


def _derived(entropy: int | tuple[int, ...], words: tuple[int, ...]) -> int:
    """64 bits that other words make of nothing, but by a chance of one in 2^64."""
    return int(np.random.SeedSequence(entropy, spawn_key=words).generate_state(1, np.uint64)[0])


def _signed(keys: Sequence[int]) -> list[int]:
    """The same 64 bits as int64 has them."""
    return [(key + 2**63) % 2**64 - 2**63 for key in keys]


def _check_seed(key: Any) -> int:
    if not is_int(key):
        raise ValueError(f"seed holds {key!r}; allowed are ints, one a sample")
    return int(key)
