"""The operations of :mod:`free_kernels` on the inputs of a round, and the bytes that each has to move.

``python -m benchmarks.operations`` runs each once on a GPU, at three shapes, for a checker of memory to look on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

import free_kernels
from free import ReverseProcess
from free.drafters.gains import Gains
from free.drafters.patches import patches_of
from free_kernels import Knowledge, Patches, Scales, StepTable

GUIDANCE = 1.5
STEPS = 250
ONCE = ((3, 5, 1156), (1, 8, 4096), (16, 16, 65536))
"""Shapes (B, W, D): one that no block divides, a small and a large one."""

Call = Callable[[str], Any]
"""An operation as a function of ``impl``."""


class Round:
    """B samples with windows of W states of D numbers each, at steps of their own.

    bfloat16 network outputs with guidance, as a guided DiT returns them: two halves of one batch. Drafts stand at |delta| of
    0.3, where windows are accepted about half way, and the last window reached into this one's first half.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.shape = self.batch, self.window, self.numel = shape
        self.rows = self.batch * self.numel
        """Numbers in one column of the windows."""
        self.generator = torch.Generator(device).manual_seed(0)
        self.process = ReverseProcess.ddpm(STEPS).to(device)
        self.table: StepTable = self.process.table
        self.seed = torch.arange(self.batch, device=device)  # [B]
        self.step = 40 + 3 * torch.arange(self.batch, device=device)  # [B]
        self.length = torch.full_like(self.step, self.window)
        self.steps = (self.step[:, None] + torch.arange(self.window, device=device)).clamp(max=STEPS - 1)  # [B, W]
        self.states = self.random(*shape)
        self.outputs, self.unconditional = self.random(2, *shape).bfloat16()  # [B, W, D]

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator, device=self.generator.device)

    @property
    def guided(self) -> dict[str, Any]:
        return {"unconditional_output": self.unconditional, "guidance_scale": GUIDANCE}

    @property
    def guided_first(self) -> dict[str, Any]:
        """Of the first column alone."""
        return {**self.guided, "unconditional_output": self.unconditional[:, 0]}

    @cached_property
    def combined(self) -> torch.Tensor:
        """Float32 [B, W, D]."""
        return free_kernels.guided(self.outputs, self.unconditional, GUIDANCE, torch.float32)

    @cached_property
    def apart(self) -> torch.Tensor:
        """Directions [B, W, D] of any length."""
        return self.random(*self.shape)

    @cached_property
    def draft(self) -> torch.Tensor:
        """[B, W-1, D]."""
        scale = 0.3 * (self.table.std / self.table.model_coef)[self.steps][..., None]
        return (self.combined + scale * self.apart / self.apart.norm(dim=-1, keepdim=True))[:, :-1]

    @cached_property
    def scales(self) -> Scales:
        return Scales(self.process.signal, self.process.noise_ratio)

    @cached_property
    def patches(self) -> Patches:
        """Of four channels, as latents have them."""
        side = math.isqrt(self.numel // 4)
        return patches_of((4, side, side), self.step.device)

    @property
    def behind(self) -> int:
        """How many steps before this window the last one began."""
        return self.window // 2

    @cached_property
    def known(self) -> Knowledge:
        """What the last window taught."""
        sums = self.random(self.batch, self.window, 2, 2, self.patches.bands).abs()
        return Knowledge(self.random(*self.shape), self.random(*self.shape), sums)

    @cached_property
    def verification(self) -> free_kernels.Verification:
        return free_kernels.verify(
            self.states, self.outputs, self.draft, self.seed, self.step, self.length, self.table, **self.guided
        )


def normal(given: Round) -> tuple[Call, int]:
    return (
        lambda impl: free_kernels.normal(given.seed[:, None], given.steps, given.numel, impl=impl),
        4 * given.window * given.rows,
    )


def posterior(given: Round) -> tuple[Call, int]:
    state, output, guided = given.states[:, 0], given.outputs[:, 0], given.guided_first
    return (
        lambda impl: free_kernels.posterior(state, output, given.seed, given.step, given.table, **guided, impl=impl),
        (4 + 2 + 2 + 4) * given.rows,
    )


def posterior_with_memory(given: Round) -> tuple[Call, int]:
    sigma = torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)  # of flow matching
    levels = (1 - sigma, sigma, sigma[:-1].float())
    table = ReverseProcess.from_levels(*levels, "flow_prediction", order=2).to(given.step.device).table
    state, output, x0 = given.states[:, 0], given.outputs[:, 0], given.apart[:, 0]
    guided = given.guided_first
    return (
        lambda impl: free_kernels.posterior_with_memory(
            state, output, x0, given.seed, given.step, table, **guided, impl=impl
        ),
        (4 + 2 + 2 + 4 + 4 + 4) * given.rows,
    )


def householder(given: Round) -> tuple[Call, int]:
    noise, delta = given.states.flatten(0, 1), given.apart.flatten(0, 1)
    inner, squared_norm = (noise * delta).sum(-1), delta.square().sum(-1)
    return (
        lambda impl: free_kernels.householder(noise, delta, inner, squared_norm, impl=impl),
        (4 + 4 + 4) * given.window * given.rows,
    )


def acceptance(given: Round) -> tuple[Call, int]:
    draft = given.combined
    return (
        lambda impl: free_kernels.acceptance(
            given.states, given.outputs, draft, given.seed, given.step, given.table, **given.guided, impl=impl
        ),
        (2 + 2 + 4) * given.window * given.rows,
    )


def acceptance_from_means(given: Round) -> tuple[Call, int]:
    proposal, target, drafted = (values.flatten(0, 1) for values in (given.states, given.combined, given.apart))
    std = torch.ones(len(proposal), device=proposal.device)
    return (
        lambda impl: free_kernels.acceptance_from_means(proposal, target, drafted, std, impl=impl),
        (4 + 4 + 4) * given.window * given.rows,
    )


def propose(given: Round) -> tuple[Call, int]:
    anchored = {"unconditional_anchor_outputs": given.unconditional, "guidance_scale": GUIDANCE}
    anchors = (given.states, given.outputs, given.step, given.length)
    return (
        lambda impl: free_kernels.propose(
            given.states[:, 0], given.seed, given.step, given.window, *anchors, given.table, **anchored, impl=impl
        ),
        (4 + (given.window - 1) * (4 + 2 + 2) + (2 * given.window - 1) * 4) * given.rows,
    )


def verify(given: Round, noise: torch.Tensor | None = None) -> tuple[Call, int]:
    window = (given.states, given.outputs, given.draft, given.seed, given.step, given.length, given.table)
    return (
        lambda impl: free_kernels.verify(*window, **given.guided, noise=noise, impl=impl),
        ((given.window - 1) * (2 + 2 + 4) + (4 + 2 + 2 + 4)) * given.rows,
    )


def verify_stored_noise(given: Round) -> tuple[Call, int]:
    """The other way out where philox's arithmetic, not memory, is the limit: read what propose has drawn."""
    call, moved = verify(given, free_kernels.normal(given.seed[:, None], given.steps, given.numel))
    return call, moved + 4 * given.window * given.rows


def learn_gains(given: Round) -> tuple[Call, int]:
    guided = {"unconditional_outputs": given.unconditional, "guidance_scale": GUIDANCE}
    window = (given.states, given.outputs, given.step, given.length)
    before = (*given.known, given.step - given.behind, given.length, given.table, given.scales, given.patches)
    again = given.window - given.behind  # columns whose step the last window reached too
    sums = 4 * given.batch * (given.window + 1) * 4 * given.patches.bands
    return (
        lambda impl: free_kernels.learn_gains(*window, *before, forgetting=Gains.forgetting, **guided, impl=impl),
        (given.window * (4 + 2 + 2 + 4 + 4) + again * (4 + 4)) * given.rows + sums,
    )


def gain_correction(given: Round) -> tuple[Call, int]:
    before = (*given.known, given.step - given.behind, given.length, given.table, given.scales, given.patches)
    anchors = min(given.window - given.behind, given.window - 1)  # different ones
    sums = 4 * given.batch * anchors * 4 * given.patches.bands
    return (
        lambda impl: free_kernels.gain_correction(given.states, given.step, *before, ridge=Gains.ridge, impl=impl),
        ((given.window - 1) * (4 + 4) + anchors * (4 + 4)) * given.rows + sums,
    )


def finite(given: Round) -> tuple[Call, int]:
    state = given.states[:, 0]
    return (
        lambda impl: free_kernels.finite(
            given.outputs, given.length, state, unconditional_output=given.unconditional, impl=impl
        ),
        (given.window * (2 + 2) + 4) * given.rows,
    )


def span(given: Round) -> tuple[Call, int]:
    reach = given.step.new_full((STEPS,), STEPS - 1)
    return (
        lambda impl: free_kernels.span(given.step, reach, given.window, impl=impl),
        8 * given.batch * (2 + 2 + 2 * given.window),
    )


def tally(given: Round) -> tuple[Call, int]:
    progress = torch.zeros(4, given.batch, dtype=torch.int64, device=given.step.device)
    by_step = torch.zeros(STEPS, 3, dtype=torch.float64, device=given.step.device)
    found, sound = given.verification, torch.ones_like(given.step, dtype=torch.bool)
    entered = (given.seed, given.step, given.length, found.advance, found.rejected, found.squared_norm)
    reached = given.step + found.advance
    drafts = given.batch * (given.window - 1)
    return (
        lambda impl: free_kernels.tally(progress, by_step, *entered, reached, sound, impl=impl),
        (5 * 8 + 2 + 2 * 4 * 8) * given.batch + (4 + 2 * 3 * 8) * drafts,
    )


def relaxed_tau(given: Round) -> tuple[Call, int]:
    uncertainty = given.random(given.batch, given.window - 1).sigmoid()
    spent = torch.zeros(given.batch, 3, dtype=torch.float64, device=uncertainty.device)
    budget = {"squared_norm": given.verification.squared_norm, "spent": spent, "budget": 1.0}
    return (
        lambda impl: free_kernels.relaxed_tau(uncertainty, 2.0, **budget, impl=impl),
        given.batch * ((given.window - 1) * (4 + 4 + 4) + 3 * 8),
    )


def relaxed_cost(given: Round) -> tuple[Call, int]:
    found, tau = given.verification, torch.full((given.batch, given.window - 1), 0.9, device=given.step.device)
    spent, rejection = (torch.zeros(given.batch, many, dtype=torch.float64, device=tau.device) for many in (3, 2))
    tests = (found.squared_norm, found.log_ratio, tau, found.advance, found.rejected)
    return (
        lambda impl: free_kernels.relaxed_cost(*tests, given.seed, given.step, spent, rejection, impl=impl),
        given.batch * ((given.window - 1) * (4 + 4 + 4) + 3 * 8 + 1 + 2 * (3 + 2) * 8),
    )


OPERATIONS: dict[str, Callable[[Round], tuple[Call, int]]] = {
    make.__name__: make
    for make in (
        normal,
        posterior,
        posterior_with_memory,
        householder,
        acceptance,
        acceptance_from_means,
        propose,
        verify,
        verify_stored_noise,
        learn_gains,
        gain_correction,
        finite,
        span,
        tally,
        relaxed_tau,
        relaxed_cost,
    )
}
"""Each makes, of a round, the call and how many bytes it has to move: inputs once, results once."""


def main(shapes: Sequence[tuple[int, int, int]] = ONCE) -> int:
    """Every operation once at each shape: the kernels on a GPU, the reference elsewhere."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape in shapes:
        for name, make in OPERATIONS.items():
            make(Round(shape, device))[0]("auto")
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(name, shape, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
