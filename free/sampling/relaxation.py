"""Uncertainty-guided relaxation: more drafts are accepted where the target is unsure, at a certified distance from exact.

A drafted step is accepted iff ``log u <= tau * log_ratio``, ``tau = exp(-strength * uncertainty)`` in [0, 1]; tau = 1 is the
exact test. The formula is our own. What a run may differ from an exact one by follows in closed form from |delta| and tau
of its tests; ``docs/relaxation.md`` derives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from free.drafters import Situation
from free.processes import ReverseProcess, learned_log_variance
from free.targets import Target, TargetOutput
from free_kernels import Proposal, Verification, acceptance

UNCERTAINTIES = ("learned", "residual")


@dataclass(frozen=True)
class DraftedSteps:
    """The W-1 drafted steps of a window of B samples before any is tested: what an uncertainty may be read from.

    The state of column j+1 was made with the noise of column j. The uncertainty of column j must be a function of columns
    <= j only: one that looked further would bias the law in a way that the certificate does not count.
    """

    step: torch.Tensor
    """int64 [B, W-1]."""
    timestep: torch.Tensor
    """[B, W-1], what the network is told."""
    testable: torch.Tensor
    """bool [B, W-1]: the columns within the sample's window; nothing is tested in the others, whose values mean nothing."""
    states: torch.Tensor
    """float32 [B, W-1, D]: the drafted state that each step starts from."""
    target_output: torch.Tensor
    """[B, W-1, D], as the network gave it; conditional half under guidance."""
    unconditional_output: torch.Tensor | None
    """[B, W-1, D] under guidance, else None."""
    draft_output: torch.Tensor
    """float32 [B, W-1, D]: the guess of the guided output; of a process of second order, of the effective one."""
    variance_share: torch.Tensor | None
    """float32 [B, W-1], of :class:`free.TargetOutput`, for ``"learned"`` only."""
    rejection: torch.Tensor
    """float64 [B]: mean probability that an exact test rejects, 1 - 2 Phi(-|delta| / 2), over the sample's earlier tests,
    each window weighing half as much as the next; 0 before any."""
    process: ReverseProcess
    sample_shape: tuple[int, ...]


Uncertainty = Callable[[DraftedSteps], torch.Tensor]


@dataclass(frozen=True)
class Relaxation:
    """How far acceptance is relaxed, by what, and how much of it at most.

    ``tau = exp(-strength * uncertainty)``, with an uncertainty in [0, 1] for each sample and step:

    - ``"learned"``: ``v / (v + std²)``, v the variance that the target predicts for the step (its learned-variance
      channels, log variances averaged over the sample), std² the process's own. It is 1/2 where they agree.
    - ``"residual"``: :attr:`DraftedSteps.rejection`, the rate at which exact tests would have rejected the sample's drafts
      of late. Needs no learned variance.
    - a callable ``uncertainty(drafted: DraftedSteps) -> float [B, W-1]``. That its values are in [0, 1] is checked in every
      round, for which a GPU is waited for.

    Neither of the two depends on the scale of the data or on the number of its dimensions, so a strength means the same on
    every model.

    Args:
        strength: 0 (exact) or more; at strength s no tau is below exp(-s).
        uncertainty: see above.
        budget: the most that a sample may spend, 0 … 1: the sum over its tests of ``E[a_tau] - E[a_1]``, which bounds the
            total variation. A test that would exceed it is exact, and so are those after it in its window. None is no bound.

    Raises:
        ValueError: a strength or budget out of range, or an uncertainty that is none of these.
    """

    strength: float
    uncertainty: str | Uncertainty = "learned"
    budget: float | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.strength) or not 0 <= self.strength < math.inf:
            raise ValueError(f"strength is {self.strength!r}; allowed is a finite number, 0 (exact) or more")
        if self.budget is not None and (not _is_number(self.budget) or not 0 <= self.budget <= 1):
            raise ValueError(f"budget is {self.budget!r}; allowed is a total variation, 0 … 1, or None")
        if not callable(self.uncertainty) and self.uncertainty not in UNCERTAINTIES:
            known = ", ".join(map(repr, UNCERTAINTIES))
            raise ValueError(f"uncertainty is {self.uncertainty!r}; known are {known} or a callable")

    @property
    def spendable(self) -> float:
        """The most excess acceptance of a sample: 0 if exact, infinity without a budget."""
        if not self.strength:
            return 0.0
        return math.inf if self.budget is None else self.budget

    @property
    def capturable(self) -> bool:
        """Whether tau is made without asking the device: the values of a callable are checked."""
        return not callable(self.uncertainty)

    def check(self, target: Target, process: ReverseProcess) -> None:
        """Raise a ValueError if the uncertainty cannot be read from this target under this process."""
        if self.uncertainty != "learned":
            return
        try:
            target.check_learned_variance()
        except ValueError as error:
            raise ValueError(f"uncertainty is 'learned': {error}; 'residual' fits every model") from None
        if process.log_variance_range is None:
            raise ValueError(
                "uncertainty is 'learned': process has no log_variance_range, between which a learned variance lies; "
                "allowed is one that has, as ReverseProcess.ddpm makes it"
            )

    def capture(self, target: Target) -> AbstractContextManager[None]:
        """The context in which the target returns what the uncertainty is read from."""
        return target.capture_variance() if self.uncertainty == "learned" else nullcontext()

    def tau(self, drafted: DraftedSteps) -> torch.Tensor:
        """float32 [B, W-1] in [0, 1].

        Raises:
            ValueError: a callable uncertainty of a wrong type or shape, or with values outside [0, 1].
        """
        if callable(self.uncertainty):
            uncertainty = _checked(self.uncertainty(drafted), drafted.testable)
        elif self.uncertainty == "learned":
            assert drafted.variance_share is not None
            log_variance = learned_log_variance(drafted.variance_share, drafted.process, drafted.step)
            uncertainty = torch.sigmoid(log_variance - 2 * drafted.process.std[drafted.step].log())
        else:
            uncertainty = drafted.rejection[:, None].expand(drafted.step.shape)
        # where the uncertainty is not a number the test is exact: NaN would reject every draft
        return torch.exp(-self.strength * uncertainty).nan_to_num_(nan=1.0).float()


@dataclass
class Ledger:
    """What relaxation has cost each of B live samples, and how their drafts have fared."""

    spent: torch.Tensor
    """float64 [B, 3]: sums over the tests of :func:`excess_acceptance` and of :func:`divergence`, and how many accepted what
    an exact test of the same noise and uniform would have rejected."""
    rejection: torch.Tensor
    """float64 [B, 2]: sum over the tests of the probability that an exact test rejects, and their number, halved with every
    window."""

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Ledger:
        spent, rejection = torch.zeros(batch, 5, dtype=torch.float64, device=device).split((3, 2), -1)
        return cls(spent, rejection)

    def tau(
        self, relaxation: Relaxation, situation: Situation, proposal: Proposal, output: TargetOutput, length: torch.Tensor
    ) -> torch.Tensor:
        """tau of each drafted step, float32 [B, W-1], within the budget.

        Args:
            relaxation: the caller's.
            situation: what the window was drafted from.
            proposal: the window.
            output: the target at its states, [B, W, D].
            length: int64 [B], states that count.
        """
        drafts, process = situation.window - 1, situation.process
        column = torch.arange(drafts, device=length.device)
        step = (situation.step[:, None] + column).clamp(max=process.num_steps - 1)  # [B, W-1]
        states, target_output = proposal.states[:, :drafts], output.output[:, :drafts]
        unconditional = None if output.unconditional is None else output.unconditional[:, :drafts]
        drafted = DraftedSteps(
            step,
            process.timestep[step],
            column < length[:, None] - 1,
            states,
            target_output,
            unconditional,
            proposal.draft_output,
            None if output.variance_share is None else output.variance_share[:, :drafts],
            self.rejection[:, 0] / self.rejection[:, 1].clamp(min=torch.finfo(torch.float64).tiny),
            process,
            situation.sample_shape,
        )
        tau = relaxation.tau(drafted)
        if relaxation.budget is None or not drafts:
            return tau
        squared_norm = acceptance(
            states,
            target_output,
            proposal.draft_output,
            situation.seed,
            situation.step,
            process.table,
            unconditional_output=unconditional,
            guidance_scale=situation.guidance_scale,
            noise=None if situation.noise is None else situation.noise[:, :drafts],
            previous_x0=situation.x0,
            impl=situation.impl,
        ).squared_norm
        would_spend = self.spent[:, :1] + excess_acceptance(squared_norm, tau).cumsum(-1)
        return torch.where(would_spend <= relaxation.budget, tau, 1.0)  # NaN compares false, so it is exact

    def settle(self, tau: torch.Tensor, verification: Verification, uniforms: torch.Tensor) -> Ledger:
        """With a window's tests entered: those up to the first rejection, which are the ones that decided.

        Args:
            tau: float32 [B, W-1].
            verification: of the window.
            uniforms: float32 [B, W-1], or more columns: what the tests were decided by.
        """
        squared_norm = verification.squared_norm.double()
        column = torch.arange(squared_norm.shape[1], device=squared_norm.device)
        tested = column < (verification.advance - 1 + verification.rejected)[:, None]  # [B, W-1]
        accepted = column < (verification.advance - 1)[:, None]
        would_reject = ~(uniforms[:, : len(column)].log() <= verification.log_ratio)
        saved = (accepted & would_reject & (tau < 1)).double()
        cost = torch.stack((excess_acceptance(squared_norm, tau), divergence(squared_norm, tau), saved), -1)
        rejects = torch.special.erf((squared_norm / 8).sqrt())
        fared = torch.stack((rejects, torch.ones_like(rejects)), -1)
        spent, rejection = (torch.where(tested[..., None], values, 0.0).sum(1) for values in (cost, fared))
        return Ledger(self.spent + spent, self.rejection / 2 + rejection)


def relaxed_acceptance(squared_norm: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """``E[min(1, exp(tau * log_ratio))]`` of a draft that is |delta| off, float64.

    ``Phi(-d/2) + exp(tau (tau - 1) d²/2) Phi(d/2 - tau d)`` with d = |delta|; at tau = 1 FREE's eq. 40, ``2 Phi(-d/2)``.

    Args:
        squared_norm: |delta|², any shape.
        tau: in [0, 1], of a shape that goes with it.
    """
    squared_norm = squared_norm.double()
    return torch.special.ndtr(-squared_norm.sqrt() / 2) + _tilted(squared_norm, tau)


def excess_acceptance(squared_norm: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """``E[a_tau] - E[a_1]``, the total variation between the relaxed step and the exact one; exactly 0 at tau = 1.

    Arguments and result as of :func:`relaxed_acceptance`.
    """
    squared_norm = squared_norm.double()
    return (_tilted(squared_norm, tau) - _tilted(squared_norm, 1.0)).clamp_(min=0.0)


def divergence(squared_norm: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """A bound of the Kullback-Leibler divergence of the relaxed step from the exact one, in nats; exactly 0 at tau = 1.

    Of second order in 1 - tau, where :func:`excess_acceptance` is of first. Arguments and result as of
    :func:`relaxed_acceptance`.
    """
    squared_norm = squared_norm.double()
    tau = _double(tau)

    def tilted(power: torch.Tensor | float) -> torch.Tensor:
        return _tilted(squared_norm, power)

    # E[log_ratio exp(tau log_ratio); log_ratio < 0], the derivative of tilted(tau)
    normal_density = torch.exp(-squared_norm / 8) / math.sqrt(2 * math.pi)
    slope = (tau - 0.5) * squared_norm * tilted(tau) - squared_norm.sqrt() * normal_density
    # moments of what the density lacks on the target's side, as differences that are exactly 0 at tau = 1
    first = tilted(tau) - tilted(1.0)
    second = (tilted(2 * tau) - tilted(tau + 1)) - (tilted(tau + 1) - tilted(2.0))
    third = (tilted(3 * tau) - tilted(3.0)) - 3 * (tilted(2 * tau + 1) - tilted(tau + 2))
    return ((tau - 1) * slope - first + (second + third) / 2).clamp_(min=0.0)


def _tilted(squared_norm: torch.Tensor, power: torch.Tensor | float) -> torch.Tensor:
    """``E[exp(power * log_ratio); log_ratio < 0]``, log_ratio ~ N(-d²/2, d²); float64."""
    power = _double(power)
    log_tail = torch.special.log_ndtr((0.5 - power) * squared_norm.sqrt())
    return torch.exp(power * (power - 1) / 2 * squared_norm + log_tail)


def _double(value: torch.Tensor | float) -> torch.Tensor | float:
    """A number stays one: as a tensor it would have to be copied to the device, which a graph cannot record."""
    return value.double() if isinstance(value, torch.Tensor) else value


def _checked(uncertainty: object, testable: torch.Tensor) -> torch.Tensor:
    """What a caller's uncertainty returned."""
    expected = tuple(testable.shape)
    if not isinstance(uncertainty, torch.Tensor):
        raise ValueError(f"uncertainty returned a {type(uncertainty).__name__}; allowed is a tensor of shape {expected}")
    if tuple(uncertainty.shape) != expected or not uncertainty.is_floating_point():
        raise ValueError(
            f"uncertainty returned shape {tuple(uncertainty.shape)} and dtype {uncertainty.dtype}; allowed is a floating "
            f"tensor of shape {expected}, one for each drafted step"
        )
    outside = testable & ~((uncertainty >= 0) & (uncertainty <= 1))
    if outside.any():
        raise ValueError(f"uncertainty returned {uncertainty[outside][0].item()}; allowed is 0 … 1")
    return torch.where(testable, uncertainty, 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
