"""The noise and the uniforms of the steps at hand, where they are stored: the kernels make their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from free.sampling.tensors import map_tensors
from free_kernels import NOISE_STREAM, TEST_STREAM, normal, uniform

# noise is drawn some steps ahead while that is little: a call costs more than its numbers when they are few
_STEPS_AHEAD = 32
_NUMBERS_AHEAD = 2**16


@dataclass
class NoiseWindow:
    """The noise and the test uniforms of the steps that each sample has reached, so that none is drawn twice.

    A ring of a fixed number of steps, the widest window's at least: step k of a sample is in slot k % capacity.
    """

    noise: torch.Tensor
    """float32 [B, capacity, D]."""
    uniforms: torch.Tensor
    """float32 [B, capacity]."""
    drawn: torch.Tensor
    """int64 [B]: steps below this one are in the ring, or were."""

    @classmethod
    def empty(cls, seed: torch.Tensor, widest: int, numel: int, batch: int | None = None) -> NoiseWindow:
        """Of samples that are, or will be, among ``batch`` of them; left out, they are all."""
        affordable = _NUMBERS_AHEAD // ((batch or len(seed)) * numel)
        capacity = max(widest, min(_STEPS_AHEAD, affordable))
        noise = torch.empty(len(seed), capacity, numel, dtype=torch.float32, device=seed.device)
        return cls(noise, torch.empty_like(noise[..., 0]), torch.zeros_like(seed))

    def reach(self, seed: torch.Tensor, step: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """z and u of steps ``step`` … ``step + window - 1`` of each sample: [B, W, D] and [B, W]."""
        batch, capacity, _ = self.noise.shape
        if bool((step + window > self.drawn).any()):
            self._draw(seed, step)
        slots = (step[:, None] + torch.arange(window, device=step.device)) % capacity
        row = torch.arange(batch, device=step.device)[:, None]
        return self.noise[row, slots], self.uniforms[row, slots]

    def keep(self, rows: torch.Tensor) -> NoiseWindow:
        return map_tensors(self, lambda values: values[rows])

    def _draw(self, seed: torch.Tensor, step: torch.Tensor) -> None:
        """Fill the ring up to its capacity from ``step`` on."""
        capacity = self.noise.shape[1]
        steps = step[:, None] + torch.arange(capacity, device=step.device)  # [B, capacity]
        row, column = (steps >= self.drawn[:, None]).nonzero(as_tuple=True)
        keys, steps = seed[row], steps[row, column]
        self.noise[row, steps % capacity] = normal(keys, steps, self.noise.shape[2], stream=NOISE_STREAM)
        self.uniforms[row, steps % capacity] = uniform(keys, steps, stream=TEST_STREAM)
        self.drawn = step + capacity
