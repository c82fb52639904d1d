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
from free.processes import ReverseProcess
from free.targets import Target, TargetOutput
from free_kernels import Proposal, Span, Verification, acceptance, relaxed_cost, relaxed_tau
from free_kernels.relaxation.reference import divergence, excess_acceptance, relaxed_acceptance

__all__ = [
    "UNCERTAINTIES",
    "DraftedSteps",
    "Ledger",
    "Relaxation",
    "Uncertainty",
    "divergence",
    "excess_acceptance",
    "relaxed_acceptance",
]

UNCERTAINTIES = ("learned", "residual")


@dataclass(frozen=True)
class DraftedSteps:
    """The W-1 drafted steps of a window of B samples before any is tested: what an uncertainty may be read from.

    The state of column j+1 was made with the noise of column j. The uncertainty of column j must be a function of columns
    <= j only: one that looked further would bias the law in a way that the certificate does not count.
    """

    step: torch.Tensor
    """int64 [B, W-1]."""
    length: torch.Tensor
    """int64 [B]: states of each window that count, the exact last one included."""
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
    fared: torch.Tensor
    """float64 [B, 2]: :attr:`free_kernels.RelaxedCost.rejection` of the sample's earlier tests."""
    process: ReverseProcess
    sample_shape: tuple[int, ...]

    @property
    def timestep(self) -> torch.Tensor:
        """[B, W-1], what the network is told."""
        return self.process.timestep[self.step]

    @property
    def testable(self) -> torch.Tensor:
        """bool [B, W-1]: the columns within the sample's window; nothing is tested in the others, whose values mean
        nothing."""
        return torch.arange(self.step.shape[1], device=self.step.device) < self.length[:, None] - 1

    @property
    def rejection(self) -> torch.Tensor:
        """float64 [B]: mean probability that an exact test rejects, 1 - 2 Phi(-|delta| / 2), over the sample's earlier
        tests, each window weighing half as much as the next; 0 before any."""
        return self.fared[:, 0] / self.fared[:, 1].clamp(min=torch.finfo(torch.float64).tiny)


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

    def tau(
        self,
        drafted: DraftedSteps,
        squared_norm: torch.Tensor | None = None,
        spent: torch.Tensor | None = None,
        impl: str = "auto",
    ) -> torch.Tensor:
        """float32 [B, W-1] in [0, 1].

        Args:
            drafted: the window.
            squared_norm: |delta|² [B, W-1]; without it there is no budget.
            spent: of the ledger, likewise.
            impl: of the operation.

        Raises:
            ValueError: a callable uncertainty of a wrong type or shape, or with values outside [0, 1].
        """
        budget = None if squared_norm is None else self.budget
        uncertainty = self._uncertainty_of(drafted)
        return relaxed_tau(uncertainty, self.strength, squared_norm=squared_norm, spent=spent, budget=budget, impl=impl)

    def _uncertainty_of(self, drafted: DraftedSteps) -> torch.Tensor:
        """Float [B, W-1]."""
        if callable(self.uncertainty):
            return _checked(self.uncertainty(drafted), drafted.testable)
        if self.uncertainty == "learned":
            ends = drafted.process.relative_log_variance
            assert drafted.variance_share is not None
            assert ends is not None
            low, high = ends[drafted.step].unbind(-1)  # [B, W-1] each
            return torch.lerp(low, high, drafted.variance_share).sigmoid()
        return drafted.rejection[:, None].expand(drafted.step.shape)


@dataclass
class Ledger:
    """What relaxation has cost each of B live samples, and how their drafts have fared."""

    spent: torch.Tensor
    """float64 [B, 3], of :class:`free_kernels.RelaxedCost`."""
    rejection: torch.Tensor
    """float64 [B, 2], likewise."""

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Ledger:
        return cls(*(torch.zeros(batch, columns, dtype=torch.float64, device=device) for columns in (3, 2)))

    def tau(
        self, relaxation: Relaxation, situation: Situation, proposal: Proposal, output: TargetOutput, covered: Span
    ) -> torch.Tensor:
        """tau of each drafted step, float32 [B, W-1], within the budget.

        Args:
            relaxation: the caller's.
            situation: what the window was drafted from.
            proposal: the window.
            output: the target at its states, [B, W, D].
            covered: its steps, and how many of its states count.
        """
        drafts, process = situation.window - 1, situation.process
        states, target_output = proposal.states[:, :drafts], output.output[:, :drafts]
        unconditional = None if output.unconditional is None else output.unconditional[:, :drafts]
        drafted = DraftedSteps(
            covered.steps[:, :drafts],
            covered.length,
            states,
            target_output,
            unconditional,
            proposal.draft_output,
            None if output.variance_share is None else output.variance_share[:, :drafts],
            self.rejection,
            process,
            situation.sample_shape,
        )
        if relaxation.budget is None or not drafts:
            return relaxation.tau(drafted, impl=situation.impl)
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
        return relaxation.tau(drafted, squared_norm, self.spent, situation.impl)

    def settle(
        self,
        tau: torch.Tensor,
        verification: Verification,
        seed: torch.Tensor,
        step: torch.Tensor,
        uniforms: torch.Tensor | None = None,
        impl: str = "auto",
    ) -> Ledger:
        """With a window's tests entered: those up to the first rejection, which are the ones that decided.

        Args:
            tau: float32 [B, W-1].
            verification: of the window.
            seed, step: int64 [B], of the verification.
            uniforms: likewise.
            impl: of the operation.
        """
        cost = relaxed_cost(
            verification.squared_norm,
            verification.log_ratio,
            tau,
            verification.advance,
            verification.rejected,
            seed,
            step,
            self.spent,
            self.rejection,
            uniforms=uniforms,
            impl=impl,
        )
        return Ledger(*cost)


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
