"""Philox4x32-10 in numpy on the host and in plain torch elsewhere, on 64-bit words that hold 32 bits each."""

from __future__ import annotations

import math

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
    if seed.device.type != "cpu":
        return _pairs_on_device(seed, step, num_counters, stream)
    # numpy on the host: its calls cost a fifth of torch's
    shape, axes = (*seed.shape, num_counters), (1,) * seed.dim()
    multipliers, weyl = (np.array(pair, np.uint64).reshape(2, *axes, 1) for pair in (MULTIPLIERS, WEYL))
    key = seed.numpy().view(np.uint64)[..., None]
    rounds = np.arange(ROUNDS, dtype=np.uint64).reshape(-1, 1, *axes, 1)
    keys = np.stack((key & MASK, key >> np.uint64(32))) + rounds * weyl & MASK  # [rounds, 2, *shape, 1]
    even, odd = np.empty((2, 2, *shape), np.uint64)
    even[0], even[1] = np.arange(num_counters, dtype=np.uint64), stream
    odd[0], odd[1] = step.numpy().view(np.uint64)[..., None] & MASK, 0
    product = np.empty_like(even)
    for i in range(ROUNDS):
        swapped = np.multiply(even, multipliers, out=product)[::-1]
        np.right_shift(swapped, np.uint64(32), out=even)
        even ^= odd
        even ^= keys[i]
        np.bitwise_and(swapped, MASK, out=odd)
    return torch.from_numpy(even.view(np.int64)), torch.from_numpy(odd.view(np.int64))


def _pairs_on_device(
    seed: torch.Tensor, step: torch.Tensor, num_counters: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch's signed words: the low 64 bits of a product are right though it wraps."""
    low, high, word1 = seed[..., None] & MASK, seed[..., None] >> 32 & MASK, step[..., None] & MASK
    word0 = torch.arange(num_counters, device=seed.device)
    word2, word3 = torch.full_like(word1, stream), torch.zeros_like(word1)
    for i in range(ROUNDS):
        product0, product2 = word0 * MULTIPLIERS[0], word2 * MULTIPLIERS[1]
        word0 = (product2 >> 32 ^ word1 ^ low + i * WEYL[0]) & MASK
        word2 = (product0 >> 32 ^ word3 ^ high + i * WEYL[1]) & MASK
        word1, word3 = product2 & MASK, product0 & MASK
    return torch.stack((word0, word2)), torch.stack((word1, word3))


def normal(seed: torch.Tensor, step: torch.Tensor, numel: int, stream: int, dtype: torch.dtype) -> torch.Tensor:
    """Box-Muller: words 0 and 2 give the radius, words 1 and 3 the angle. [*shape, numel]."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    radius_words, angle_words = philox_pairs(seed, step, -(-numel // 4), stream)
    radius = _open_unit(radius_words, compute).log_().mul_(-2.0).sqrt_()  # [2, *shape, n]
    angle = angle_words.to(compute).mul_(2.0 * math.pi / 2**32)
    if torch.compiler.is_compiling():  # a compiler makes it one kernel, and takes no views to write into
        return (
            torch.stack((angle.cos() * radius, angle.sin() * radius), -1).movedim(0, -2).flatten(-3)[..., :numel].to(dtype)
        )
    numbers = radius.new_empty(*radius.shape[1:], 2, 2)
    by_pair = numbers.movedim(-2, 0)  # [2, *shape, n, 2]
    torch.mul(angle.cos(), radius, out=by_pair[..., 0])
    torch.mul(angle.sin_(), radius, out=by_pair[..., 1])
    return numbers.flatten(-3)[..., :numel].to(dtype)


def uniform(seed: torch.Tensor, step: torch.Tensor, stream: int, dtype: torch.dtype) -> torch.Tensor:
    """[*shape], in (0, 1]."""
    words, _ = philox_pairs(seed, step, 1, stream)
    return _open_unit(words[0, ..., 0], torch.float64).to(dtype)


def _open_unit(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """32-bit words to (0, 1]; never 0, so that its logarithm is finite."""
    return words.to(dtype).add_(0.5).mul_(2.0**-32)
