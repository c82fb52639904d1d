"""What a run did, added up where the samples are and read by the host, which need not wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from free.sampling.statistics import SamplingStatistics
from free.sampling.window import Live, Round
from free.windows import Known
from free_kernels import tally


class Account:
    """What the statistics are made of, added up where the samples are: a round is entered without asking the device."""

    def __init__(self, num_steps: int, seed: torch.Tensor) -> None:
        self.num_steps = num_steps
        self.memory = torch.zeros(7 * len(seed) + 3 * num_steps, dtype=torch.int64, device=seed.device)
        """int64 [7 B + 3 S]: all of it, so that one copy takes it to the host."""
        self.progress, self.by_step, self.spent = _parts(self.memory, num_steps, torch.float64)
        self.reset()

    def reset(self) -> None:
        """Nothing was done yet."""
        self.memory.zero_()
        self.progress[2:].fill_(self.num_steps)

    def begin_anew(self, index: torch.Tensor) -> None:
        """Of the samples at ``index`` (int64 [N]) nothing was done yet: others have taken their places."""
        self.progress[:2, index] = 0
        self.progress[2:, index] = self.num_steps
        self.spent[index] = 0

    def add(self, live: Live, done: Round) -> None:
        """Enter a round that brought the samples to ``live``."""
        verification = done.verification
        tally(
            self.progress,
            self.by_step,
            live.index,
            done.step,
            done.length,
            verification.advance,
            verification.rejected,
            verification.squared_norm,
            live.step,
            done.finite,
            impl=done.situation.impl,
        )
        if live.ledger is not None:
            self.spent[live.index] = live.ledger.spent

    def report_to(self, stats: SamplingStatistics) -> None:
        """Tell the statistics what was added up; waits for the device."""
        stats.rounds = self.progress[1].cpu().numpy()
        tested, accepted, stats.delta_sum = self.by_step.cpu().numpy().T
        stats.tested, stats.accepted = tested.astype(np.int64), accepted.astype(np.int64)
        stats.excess_acceptance, stats.divergence, saved = self.spent.cpu().numpy().T
        stats.saved_rejections = saved.astype(np.int64)

    def add_step(self, step: torch.Tensor, state: torch.Tensor) -> None:
        """Enter that the ancestral sampler brought all samples to ``step`` [B] and ``state`` [B, D]."""
        finite = (state.abs() < float("inf")).all(-1)  # NaN compares false
        self.progress[0] = step
        self.progress[2] = torch.where(finite, self.progress[2], torch.minimum(self.progress[2], step - 1))


class Report:
    """An account on its way to the host, which waits for it only when it reads it."""

    def __init__(self, account: Account) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._num_steps, self._memory = account.num_steps, _sent(account.memory)
        if account.memory.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Known:
        progress, by_step, _ = self._arrived_parts()
        tested, accepted, _ = by_step.T
        return Known(progress[0], progress[1], progress[2:], tested, accepted)

    def spent(self) -> np.ndarray:
        """float64 [B, 3]: each sample's excess acceptance, divergence and saved rejections."""
        spent: np.ndarray = self._arrived_parts()[2]
        return spent

    def _arrived_parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return _parts(self._memory.numpy(), self._num_steps, np.float64)


def _parts(memory: Any, num_steps: int, float64: Any) -> tuple[Any, Any, Any]:
    """What an account's memory, a tensor's or an array's, holds of B samples.

    - int64 [4, B]: each sample's step, its rounds, and the first step at which the model, and at which the drafter, was not
      finite (S where none was);
    - float64 [S, 3]: tests, accepted drafts, sum of |delta| over the tests;
    - float64 [B, 3]: each sample's excess acceptance, divergence and saved rejections.
    """
    by_sample = len(memory) - 3 * num_steps
    first, last = by_sample // 7 * 4, by_sample // 7 * 4 + 3 * num_steps
    by_step, spent = memory[first:last].view(float64), memory[last:].view(float64)
    return memory[:first].reshape(4, -1), by_step.reshape(-1, 3), spent.reshape(-1, 3)


def _sent(values: torch.Tensor) -> torch.Tensor:
    """A copy on the host; from CUDA it arrives later, and nobody waits."""
    if values.device.type != "cuda":
        return values.clone()
    return torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
