"""Philox4x32-10 in plain torch, on int64 tensors that hold 32-bit words."""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox_pairs(
    seed: torch.Tensor, step: torch.Tensor, num_counters: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The words 0 and 2, and the words 1 and 3, of each counter: two int64 tensors [2, *shape, num_counters].

    The two lanes of a Feistel round go through every instruction together, which halves the launches.
    """
    seed, step = torch.broadcast_tensors(seed, step)
    device = seed.device
    lane = (2,) + (1,) * (seed.dim() + 1)
    multiplier = torch.tensor(MULTIPLIERS, device=device).view(lane)
    weyl = torch.tensor(WEYL, device=device).view(lane)
    rounds = torch.arange(ROUNDS, device=device).view(ROUNDS, *(1,) * len(lane))
    key = torch.stack((seed & MASK, (seed >> 32) & MASK)).unsqueeze(-1)  # [2, *shape, 1]
    keys = (key + rounds * weyl) & MASK  # [rounds, 2, *shape, 1]

    element = torch.arange(num_counters, device=device).expand(*seed.shape, num_counters)
    even = torch.stack((element, torch.full_like(element, stream)))  # words 0, 2: [2, *shape, n]
    odd = torch.zeros_like(even)  # words 1, 3
    odd[0] = (step & MASK).unsqueeze(-1)
    for round_key in keys.unbind():
        product = even * multiplier  # the low 64 bits are right though int64 wraps
        high = (product >> 32).flip(0)
        even = high.bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(MASK)
        odd = product.bitwise_and_(MASK).flip(0)
    return even, odd


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
