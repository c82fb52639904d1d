"""What a run did, added up where the samples are and read by the host, which need not wait."""

from __future__ import annotations

import numpy as np
import torch

from free.sampling.statistics import SamplingStatistics
from free.sampling.window import Live, Round
from free.windows import Known


class Account:
    """What the statistics are made of, added up where the samples are: a round is entered without asking the device."""

    def __init__(self, num_steps: int, seed: torch.Tensor) -> None:
        self.num_steps = num_steps
        self.progress = torch.zeros(4, len(seed), dtype=torch.int64, device=seed.device)
        """int64 [4, B]: each sample's step, its rounds, and the first step at which the model, and at which the drafter, was
        not finite (S where none was).
        """
        self.by_step = torch.zeros(num_steps, 3, dtype=torch.float64, device=seed.device)
        """float64 [S, 3]: tests, accepted drafts, sum of |delta| over the tests."""
        self.spent = torch.zeros(len(seed), 3, dtype=torch.float64, device=seed.device)
        """float64 [B, 3]: each sample's excess acceptance, divergence and saved rejections."""
        self.reset()

    def reset(self) -> None:
        """Nothing was done yet."""
        self.progress[:2].zero_()
        self.progress[2:].fill_(self.num_steps)
        self.by_step.zero_()
        self.spent.zero_()

    def add(self, live: Live, done: Round) -> None:
        """Enter a round that brought the samples to ``live``."""
        advance, rejected = done.verification.advance, done.verification.rejected
        _, rounds, model_broke, drafter_broke = self.progress[:, live.index].unbind()
        finite = torch.isfinite(live.state).all(-1)
        model_broke = torch.where(finite, model_broke, torch.minimum(model_broke, live.step - 1))
        squared_norm = done.verification.squared_norm.double()  # [B, W-1]
        if squared_norm.shape[1]:
            column = torch.arange(squared_norm.shape[1], device=advance.device)
            steps = (done.step[:, None] + column).clamp_(max=self.num_steps - 1)  # [B, W-1]
            accepted = column < (advance - 1)[:, None]
            tested = column < (advance - 1 + rejected)[:, None]
            delta = torch.where(tested, squared_norm.sqrt(), 0.0)
            entries = torch.stack((tested.double(), accepted.double(), delta), -1)
            self.by_step.index_add_(0, steps.flatten(), entries.flatten(0, 1))
            broken = torch.where(torch.isfinite(delta), self.num_steps, steps).amin(-1)
            drafter_broke = torch.minimum(drafter_broke, broken)
        self.progress[:, live.index] = torch.stack((live.step, rounds + (done.length > 0), model_broke, drafter_broke))
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
        finite = torch.isfinite(state).all(-1)
        self.progress[0] = step
        self.progress[2] = torch.where(finite, self.progress[2], torch.minimum(self.progress[2], step - 1))


class Report:
    """An account on its way to the host, which waits for it only when it reads it."""

    def __init__(self, account: Account) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._progress, self._by_step = _sent(account.progress), _sent(account.by_step)
        if account.progress.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Known:
        if self._arrived is not None:
            self._arrived.synchronize()
        progress = self._progress.numpy()
        tested, accepted, _ = self._by_step.numpy().T
        return Known(progress[0], progress[1], progress[2:], tested, accepted)


def _sent(values: torch.Tensor) -> torch.Tensor:
    """A copy on the host; from CUDA it arrives later, and nobody waits."""
    if values.device.type != "cuda":
        return values.clone()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
