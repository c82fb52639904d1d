"""What a speculative run did to its noise, seen round by round: for an exact one, the noise of each step is still N(0, I).

The innovation of a settled step is ``(x[k+1] - target_mean(x[k])) / std[k]``, with the target's answers as the run had them.
Given all before, it is N(0, I), whatever the drafts were; so is its part along any direction that the past determines, above
all along delta, where the draft was off: a biased coupling shows there first. Random directions miss almost everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from free.evaluation import bounds
from free.sampling.request import Request
from free.sampling.window import Live, Proposed, Round
from free_kernels import effective_output, guided, posterior

_LEAST_DELTA = 1e-6


@dataclass
class Innovations:
    """Gathers the innovations of the samples of one request at a time; nothing is kept that grows with D."""

    numel: int
    """D."""
    along: list[torch.Tensor] = field(default_factory=list)
    """float64 [N] each: parts along delta, of steps whose draft was tested and off."""
    across: list[torch.Tensor] = field(default_factory=list)
    """float64 [N] each: of the same steps, along a direction orthogonal to it."""
    squares: list[torch.Tensor] = field(default_factory=list)
    """float64 [N] each: |z|² of all steps with noise."""
    following: list[torch.Tensor] = field(default_factory=list)
    """float64 [N] each: parts along the innovation of the step before."""
    steps: int = 0
    """With noise, of all samples."""
    tested: int = 0
    accepted: int = 0
    expected: float = 0.0
    """Acceptances, by eq. 40 of FREE (arXiv 2511.20390): 2 Phi(-|delta| / 2) each."""
    variance: float = 0.0
    off: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """float64 [D]: sum of the differences between draft and target mean."""
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """float64 [D]: of all innovations."""
    _last: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def begin(self, request: Request) -> None:
        """Before the first round of a request."""
        self._last = torch.zeros(request.batch, self.numel, dtype=torch.float64, device=request.seed.device)
        if not self.sums.dim():
            self.sums, self.off = torch.zeros_like(self._last[0]), torch.zeros_like(self._last[0])

    def see(self, request: Request, proposed: Proposed, live: Live, done: Round) -> torch.Tensor:
        """A settled round.

        Args:
            request: of the run.
            proposed: the round's first half.
            live: the samples after it.
            done: the round.

        Returns:
            float32 [B, W, D], the target's guided answers, of which the settled steps' count.
        """
        index, last = live.index, live.last
        states, (advance, rejected) = done.states, (done.verification.advance, done.verification.rejected)
        output = guided(last.output, last.unconditional, request.guidance_scale, torch.float32)
        x0 = proposed.situation.x0
        for j in range(states.shape[1]):
            row = (j < advance).nonzero()[:, 0]
            if not len(row):
                break
            step = done.step[row] + j
            answer = output[row, j]
            if x0 is not None:
                effective, x0_here = effective_output(states[row, j], answer, x0[row], step, request.process.table)
                answer, x0 = effective, x0.clone().index_copy(0, row, x0_here)
            ends = advance[row] == j + 1
            inside = states[:, min(j + 1, states.shape[1] - 1)]
            after = torch.where(ends[:, None], done.verification.next_state[row], inside[row])
            tested = j < proposed.span.length[row] - 1
            draft = proposed.proposal.draft_output[row, j] if j < states.shape[1] - 1 else answer
            accepted = tested & ~(ends & rejected[row])
            self._settled(request, index[row], step, states[row, j], answer, draft, after, tested, accepted)
        return output

    def _settled(
        self,
        request: Request,
        sample: torch.Tensor,
        step: torch.Tensor,
        state: torch.Tensor,
        answer: torch.Tensor,
        draft: torch.Tensor,
        after: torch.Tensor,
        tested: torch.Tensor,
        accepted: torch.Tensor,
    ) -> None:
        """Steps that were settled, [N] and [N, D]; the draft of one that was not tested is anything."""
        std = request.process.std[step].double()[:, None]
        mean = _mean(request, state, answer, step)
        noisy = std[:, 0] > 0
        z = (after.double() - mean)[noisy] / std[noisy]  # [N', D]
        delta = ((_mean(request, state, draft, step) - mean)[noisy] / std[noisy]) * tested[noisy, None]
        norm = delta.norm(dim=-1)
        moved = norm > _LEAST_DELTA
        direction = delta[moved] / norm[moved, None]
        self.along.append((z[moved] * direction).sum(-1).cpu())
        if self.numel > 1:
            self.across.append((z[moved] * _orthogonal(direction)).sum(-1).cpu())
        self.squares.append(z.square().sum(-1).cpu())
        before = self._last[sample[noisy]]
        length = before.norm(dim=-1)
        self.following.append(((z * before).sum(-1)[length > 0] / length[length > 0]).cpu())
        self._last[sample[noisy]] = z
        self.sums += z.sum(0)
        self.off += (delta * std[noisy]).sum(0)
        self.steps += len(z)
        tested, accepted = tested[noisy], accepted[noisy]
        chance = torch.special.erfc(norm[tested] / 8**0.5)
        self.tested += int(tested.sum())
        self.accepted += int(accepted.sum())
        self.expected += float(chance.sum())
        self.variance += float((chance * (1 - chance)).sum())

    def p_values(self) -> dict[str, float]:
        """Bounds by what was tested."""
        along, across, squares, following = (
            torch.cat(parts) if parts else torch.zeros(0)
            for parts in (self.along, self.across, self.squares, self.following)
        )
        return {
            "along delta": bounds.distribution_p(along, bounds.normal_cdf),
            "across delta": bounds.distribution_p(across, bounds.normal_cdf),
            "norm": bounds.distribution_p(squares, bounds.chi2_cdf(self.numel)),
            "scale": bounds.scale_p(float(squares.sum()), self.steps * self.numel),
            "elements": bounds.mean_p(self.sums.cpu(), self.steps),
            "along the last noise": bounds.distribution_p(following, bounds.normal_cdf),
            "acceptance": bounds.success_p(self.accepted, self.expected, self.variance),
        }


def _mean(request: Request, state: torch.Tensor, output: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """float64 [N, D] of x[k+1], by the table; ``output`` is the effective one of a process of second order."""
    zeros = torch.zeros_like(state, dtype=torch.float64)
    table = request.process.table._replace(memory_gain=None)
    return posterior(state.double(), output.double(), torch.zeros_like(step), step, table, noise=zeros, impl="reference")


def _orthogonal(direction: torch.Tensor) -> torch.Tensor:
    """For unit vectors [N, D], D 2 or more, a unit vector each that is orthogonal to it."""
    axis = torch.zeros_like(direction)
    axis.scatter_(1, direction.abs().argmin(1, keepdim=True), 1.0)  # the axis that it has least of
    rest = axis - (axis * direction).sum(-1, keepdim=True) * direction
    return rest / rest.norm(dim=-1, keepdim=True)
