"""Relaxed acceptance in Triton, in float64: a launch for tau and one for what it cost, one program a sample.

Triton has no normal tail that is accurate far out and runs everywhere, so the closed forms are written in Mills' ratio
m(x) = Phi(-x) / exp(-x²/2), which is smooth and needs no logarithm: with d = |delta|,

    G(s) = E[exp(s log_ratio); log_ratio < 0] = exp(-d²/8) m((s - 1/2) d)

and every difference of two of them is as exact as the two ratios are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import check_programs, eager, on_device, rows_of
from free_kernels.verify.kernel import log_uniforms

MAX_COLUMNS = 128
"""Tests that a program holds at a time."""


@triton.jit
def mills(x):
    """Phi(-x) / exp(-x²/2) of float64 x >= 0, to 3e-16 of itself.

    (1 + x) m(x) as a polynomial in (x - 5.5) / (x + 5.5), which takes x >= 0 to [-1, 1): interpolated at the 25 Chebyshev
    nodes with 60 digits.
    """
    t = (x - 5.5) / (x + 5.5)
    p = t * 2.6289644802251484e-11 + 3.6918051806484896e-10
    p = p * t - 3.4948506962235546e-10
    p = p * t - 4.550151090313197e-09
    p = p * t + 3.583657192793475e-09
    p = p * t + 3.4193429631665895e-08
    p = p * t - 3.9407277563046036e-08
    p = p * t - 2.1354162740530068e-07
    p = p * t + 4.459248510368885e-07
    p = p * t + 1.0582537345773514e-06
    p = p * t - 4.692523878124555e-06
    p = p * t - 4.841099236048294e-07
    p = p * t + 3.8858315971931995e-05
    p = p * t - 9.055982768998746e-05
    p = p * t - 8.147073828586967e-05
    p = p * t + 0.00115871351060121
    p = p * t - 0.004252400937281442
    p = p * t + 0.010221481356132604
    p = p * t - 0.018229966318691174
    p = p * t + 0.024305078466741337
    p = p * t - 0.021413634567731123
    p = p * t + 0.0022150251247763536
    p = p * t + 0.03618652602924563
    p = p * t - 0.08833898904448781
    p = p * t + 0.45722751116333127
    return p / (1.0 + x)


@triton.jit
def tilted(power, norm, falls):
    """G(power) of |delta| = ``norm``, given ``falls`` = exp(-norm²/8)."""
    x = (power - 0.5) * norm
    tail = falls * mills(tl.abs(x))
    grows = (power * (power - 1.0)) * (0.5 * norm * norm)  # at most 0 where it is used
    return tl.where(x < 0, tl.exp(tl.minimum(grows, 0.0)) - tail, tail)


@triton.jit
def at_least_zero(value):
    """NaN stays NaN."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def excess_acceptance(tau, norm, falls):
    """G(tau) - G(1)."""
    return at_least_zero(tilted(tau, norm, falls) - tilted(1.0, norm, falls))


@triton.jit
def divergence(tau, norm, falls):
    """The bound of the divergence, in the order of the reference."""
    at_tau = tilted(tau, norm, falls)
    between = tilted(tau + 1.0, norm, falls)
    slope = (tau - 0.5) * norm * norm * at_tau - norm * (falls * 0.3989422804014327)
    first = at_tau - tilted(1.0, norm, falls)
    second = (tilted(2.0 * tau, norm, falls) - between) - (between - tilted(2.0, norm, falls))
    third = (tilted(3.0 * tau, norm, falls) - tilted(3.0, norm, falls)) - 3.0 * (
        tilted(2.0 * tau + 1.0, norm, falls) - tilted(tau + 2.0, norm, falls)
    )
    return at_least_zero((tau - 1.0) * slope - first + (second + third) * 0.5)


@triton.jit
def relaxed_tau_kernel(
    uncertainty_ptr,  # float [B, N], strides uncertainty_row, uncertainty_column
    squared_norm_ptr,  # float [B, N]; not read unless BOUNDED
    spent_ptr,  # float64 [B, 3]; not read unless BOUNDED
    tau_ptr,  # float32 [B, N]
    uncertainty_row,
    uncertainty_column,
    drafts,
    strength: tl.float64,
    budget: tl.float64,
    BOUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    uncertainty_row_ptr = uncertainty_ptr + sample * uncertainty_row
    spent = tl.full((), 0.0, tl.float64)
    if BOUNDED:
        spent += tl.load(spent_ptr + sample * 3)
    for tile in range(TILES):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < drafts
        uncertainty = tl.load(uncertainty_row_ptr + column * uncertainty_column, mask=mask, other=0.0).to(tl.float64)
        # where the uncertainty is not a number the test is exact: NaN would reject every draft
        tau = tl.where(uncertainty == uncertainty, tl.exp(-strength * uncertainty), 1.0).to(tl.float32)
        if BOUNDED:
            square = tl.load(squared_norm_ptr + sample * drafts + column, mask=mask, other=0.0).to(tl.float64)
            excess = excess_acceptance(tau.to(tl.float64), tl.sqrt(square), tl.exp(square * -0.125))
            tau = tl.where(spent + tl.cumsum(excess, axis=0) <= budget, tau, 1.0)  # NaN compares false, so it is exact
            spent += tl.sum(excess, axis=0)
        tl.store(tau_ptr + sample * drafts + column, tau, mask=mask)


@triton.jit
def relaxed_cost_kernel(
    squared_norm_ptr,  # float [B, N]
    log_ratio_ptr,  # float [B, N]
    tau_ptr,  # float32 [B, N]
    uniform_ptr,  # float [B, >= N], rows uniform_row apart; not read unless HAS_UNIFORMS
    advance_ptr,  # int64 [B]
    rejected_ptr,  # uint8 [B]
    seed_ptr,  # int64 [B]
    step_ptr,  # int64 [B]
    spent_ptr,  # float64 [B, 3]
    rejection_ptr,  # float64 [B, 2]
    next_spent_ptr,  # float64 [B, 3]
    next_rejection_ptr,  # float64 [B, 2]
    uniform_row,
    drafts,
    HAS_UNIFORMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    accepts = tl.load(advance_ptr + sample) - 1
    tests = accepts + tl.load(rejected_ptr + sample).to(tl.int64)
    tests = tl.maximum(tl.minimum(tests, drafts), 0)
    seed = tl.load(seed_ptr + sample)
    first_step = tl.load(step_ptr + sample)
    excesses = tl.full((), 0.0, tl.float64)
    divergences = tl.full((), 0.0, tl.float64)
    saves = tl.full((), 0.0, tl.float64)
    rejections = tl.full((), 0.0, tl.float64)
    for tile in range(TILES):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        tested = column < tests
        at = sample * drafts + column
        square = tl.load(squared_norm_ptr + at, mask=tested, other=0.0).to(tl.float64)
        tau = tl.load(tau_ptr + at, mask=tested, other=1.0).to(tl.float64)
        norm, falls = tl.sqrt(square), tl.exp(square * -0.125)
        # what was not tested is a tau of 1 at no distance, which costs exactly nothing and is never rejected
        excesses += tl.sum(excess_acceptance(tau, norm, falls), axis=0)
        divergences += tl.sum(divergence(tau, norm, falls), axis=0)
        rejections += tl.sum(tl.where(tested, 1.0 - 2.0 * tilted(1.0, norm, falls), 0.0), axis=0)
        # a test is saved where it was relaxed and accepted, and an exact one of the same u rejects
        log_ratio = tl.load(log_ratio_ptr + at, mask=tested, other=0.0).to(tl.float32)
        step = first_step + column
        log_u = log_uniforms(uniform_ptr + sample * uniform_row, column, tested, seed, step, HAS_UNIFORMS)
        relaxed = tl.where((column < accepts) & (tau < 1.0), 1.0, 0.0)
        saves += tl.sum(tl.where(log_u <= log_ratio, 0.0, relaxed).to(tl.float64), axis=0)
    at = sample * 3
    tl.store(next_spent_ptr + at, tl.load(spent_ptr + at) + excesses)
    tl.store(next_spent_ptr + at + 1, tl.load(spent_ptr + at + 1) + divergences)
    tl.store(next_spent_ptr + at + 2, tl.load(spent_ptr + at + 2) + saves)
    at = sample * 2
    tl.store(next_rejection_ptr + at, tl.load(rejection_ptr + at) * 0.5 + rejections)
    tl.store(next_rejection_ptr + at + 1, tl.load(rejection_ptr + at + 1) * 0.5 + tests)


def relaxed_tau(
    uncertainty: torch.Tensor,
    strength: float,
    squared_norm: torch.Tensor | None,
    spent: torch.Tensor | None,
    budget: float | None,
) -> torch.Tensor:
    """float32 [B, W-1]."""
    call = _relaxed_tau if eager(uncertainty) else _relaxed_tau_op
    return call(uncertainty, strength, squared_norm, spent, budget)


def relaxed_cost(
    squared_norm: torch.Tensor,
    log_ratio: torch.Tensor,
    tau: torch.Tensor,
    advance: torch.Tensor,
    rejected: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    spent: torch.Tensor,
    rejection: torch.Tensor,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """spent and rejection, float64 [B, 3] and [B, 2]."""
    call = _relaxed_cost if eager(squared_norm, tau) else _relaxed_cost_op
    return call(squared_norm, log_ratio, tau, advance, rejected, seed, step, spent, rejection, uniforms)


def _tiles(drafts: int) -> dict[str, int]:
    columns = min(triton.next_power_of_2(max(drafts, 1)), MAX_COLUMNS)
    return {"COLUMNS": columns, "TILES": triton.cdiv(drafts, columns)}


def _relaxed_tau(
    uncertainty: torch.Tensor,
    strength: float,
    squared_norm: torch.Tensor | None,
    spent: torch.Tensor | None,
    budget: float | None,
) -> torch.Tensor:
    batch, drafts = uncertainty.shape
    tau = torch.empty(batch, drafts, dtype=torch.float32, device=uncertainty.device)
    if not drafts:
        return tau
    bounded = budget is not None
    squares = tau if squared_norm is None else squared_norm.contiguous()
    sums = tau if spent is None else spent.contiguous()
    with on_device(uncertainty):
        relaxed_tau_kernel[(check_programs("uncertainty", batch),)](
            uncertainty,
            squares,
            sums,
            tau,
            *uncertainty.stride(),
            drafts,
            float(strength),
            float(budget or 0.0),
            BOUNDED=bounded,
            **_tiles(drafts),
            enable_fp_fusion=False,
        )
    return tau


def _relaxed_cost(
    squared_norm: torch.Tensor,
    log_ratio: torch.Tensor,
    tau: torch.Tensor,
    advance: torch.Tensor,
    rejected: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    spent: torch.Tensor,
    rejection: torch.Tensor,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, drafts = squared_norm.shape
    if not drafts:  # nothing is tested: it is not read
        uniforms = None
    tests = spent if uniforms is None else rows_of(uniforms)
    spent, rejection = spent.contiguous(), rejection.contiguous()
    next_spent, next_rejection = torch.empty_like(spent), torch.empty_like(rejection)
    with on_device(spent):
        relaxed_cost_kernel[(check_programs("squared_norm", batch),)](
            squared_norm.contiguous() if drafts else spent,
            log_ratio.contiguous() if drafts else spent,
            tau.contiguous() if drafts else spent,
            tests,
            advance.contiguous(),
            rejected.contiguous().view(torch.uint8),
            seed.contiguous(),
            step.contiguous(),
            spent,
            rejection,
            next_spent,
            next_rejection,
            tests.stride(0),
            drafts,
            HAS_UNIFORMS=uniforms is not None,
            **_tiles(drafts),
            enable_fp_fusion=False,
        )
    return next_spent, next_rejection


_relaxed_tau_op = torch.library.custom_op(
    "free_kernels::relaxed_tau",
    _relaxed_tau,
    mutates_args=(),
    schema="(Tensor uncertainty, float strength, Tensor? squared_norm, Tensor? spent, float? budget) -> Tensor",
)
_relaxed_cost_op = torch.library.custom_op(
    "free_kernels::relaxed_cost",
    _relaxed_cost,
    mutates_args=(),
    schema="(Tensor squared_norm, Tensor log_ratio, Tensor tau, Tensor advance, Tensor rejected, Tensor seed, Tensor step, "
    "Tensor spent, Tensor rejection, Tensor? uniforms) -> (Tensor, Tensor)",
)


@_relaxed_tau_op.register_fake
def _(uncertainty: torch.Tensor, *_: object) -> torch.Tensor:
    return uncertainty.new_empty(uncertainty.shape, dtype=torch.float32)


@_relaxed_cost_op.register_fake
def _(squared_norm: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch = squared_norm.shape[0]
    return squared_norm.new_empty(batch, 3, dtype=torch.float64), squared_norm.new_empty(batch, 2, dtype=torch.float64)
