"""Philox4x32-10 in plain torch (and numpy), on int64 arrays that hold 32-bit words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox_pairs(
    seed: torch.Tensor, step: torch.Tensor, num_counters: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The words 0 and 2, and the words 1 and 3, of each counter: two int64 tensors [2, *shape, num_counters]."""
    seed, step = torch.broadcast_tensors(seed, step)
    device = seed.device
    seed, step = seed.unsqueeze(-1), step.unsqueeze(-1)
    # the same lines serve numpy arrays, where a call costs a fifth of torch's, and tensors on a device
    if device.type == "cpu":
        words = _rounds(seed.numpy(), step.numpy(), np.arange(num_counters), np.arange(ROUNDS), stream)
        word0, word1, word2, word3 = (torch.from_numpy(word) for word in words)
    else:
        counters, rounds = torch.arange(num_counters, device=device), torch.arange(ROUNDS, device=device)
        word0, word1, word2, word3 = _rounds(seed, step, counters, rounds, stream)
    return torch.stack((word0, word2)), torch.stack((word1, word3))


def _rounds(seed: Any, step: Any, element: Any, rounds: Any, stream: int) -> tuple[Any, Any, Any, Any]:
    """Words 0 … 3 of counter (element, step, stream, 0) under key (low, high half of seed)."""
    low_keys = (seed[..., None] + rounds * WEYL[0]) & MASK  # [*shape, 1, rounds]
    high_keys = ((seed[..., None] >> 32) + rounds * WEYL[1]) & MASK
    word0, word1, word2, word3 = element, step & MASK, stream, 0
    for i in range(ROUNDS):
        # the low 64 bits of the product are right though int64 wraps; the mask undoes the signed shift
        product0, product2 = word0 * MULTIPLIERS[0], word2 * MULTIPLIERS[1]
        word0 = ((product2 >> 32) & MASK) ^ word1 ^ low_keys[..., i]
        word1 = product2 & MASK
        word2 = ((product0 >> 32) & MASK) ^ word3 ^ high_keys[..., i]
        word3 = product0 & MASK
    return word0, word1, word2, word3


def normal(seed: torch.Tensor, step: torch.Tensor, numel: int, stream: int, dtype: torch.dtype) -> torch.Tensor:
    """Box-Muller: words 0 and 2 give the radius, words 1 and 3 the angle. [*shape, numel]."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    radius_words, angle_words = philox_pairs(seed, step, -(-numel // 4), stream)
    radius = _open_unit(radius_words, compute).log_().mul_(-2.0).sqrt_()  # [2, *shape, n]
    angle = angle_words.to(compute).mul_(2.0 * math.pi / 2**32)
    pairs = torch.stack((angle.cos(), angle.sin()), dim=-1).mul_(radius.unsqueeze(-1))  # [2, *shape, n, 2]
    return pairs.movedim(0, -2).flatten(-3)[..., :numel].to(dtype)


def uniform(seed: torch.Tensor, step: torch.Tensor, stream: int, dtype: torch.dtype) -> torch.Tensor:
    """[*shape], in (0, 1]."""
    words, _ = philox_pairs(seed, step, 1, stream)
    return _open_unit(words[0, ..., 0], torch.float64).to(dtype)


def _open_unit(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """32-bit words to (0, 1]; never 0, so that its logarithm is finite."""
    return words.to(dtype).add_(0.5).mul_(2.0**-32)
