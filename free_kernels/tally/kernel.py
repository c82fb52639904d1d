"""The account in one Triton launch: a program a sample, and a program a step.

A step's program gathers what the samples did at it, in their order, so that nothing is added by two programs at once and the
sums come out to the same bit on every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import check_programs, eager, on_device

MAX_SAMPLES = 256
"""Samples that a step's program looks at at a time."""


@triton.jit
def tests_of(advance_ptr, rejected_ptr, sample, mask):
    """int64: how many drafts of each sample were accepted, and how many tested; zeros where masked out."""
    advance = tl.load(advance_ptr + sample, mask=mask, other=0)
    rejected = tl.load(rejected_ptr + sample, mask=mask, other=0).to(tl.int64)
    accepted = tl.maximum(advance - 1, 0)
    return accepted, tl.maximum(advance - 1 + rejected, 0)


@triton.jit
def tally_kernel(
    progress_ptr,  # int64 [4, N]
    by_step_ptr,  # float64 [S, 3]
    index_ptr,  # int64 [B]
    step_ptr,  # int64 [B]
    length_ptr,  # int64 [B]
    advance_ptr,  # int64 [B]
    rejected_ptr,  # uint8 [B]
    squared_norm_ptr,  # float32 [B, DRAFTS]; not read if there are none
    next_step_ptr,  # int64 [B]
    state_finite_ptr,  # uint8 [B]
    batch,
    samples,
    drafts,
    num_steps,
    COLUMNS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SAMPLE_TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)

    # the program's sample
    live = program < batch
    row = tl.where(live, program, 0)
    first = tl.load(step_ptr + row)
    _, own_tests = tests_of(advance_ptr, rejected_ptr, row, live)
    column = tl.arange(0, COLUMNS)
    of_sample = column < tl.minimum(own_tests, drafts)
    squares = tl.load(squared_norm_ptr + row * drafts + column, mask=of_sample, other=0.0)
    # NaN compares false
    broken = tl.min(tl.where(squares < float("inf"), num_steps, first + column), axis=0)
    at = progress_ptr + tl.load(index_ptr + row)
    next_step = tl.load(next_step_ptr + row)
    rounds = tl.load(at + samples, mask=live, other=0) + tl.where(tl.load(length_ptr + row) > 0, 1, 0)
    sound = tl.where(tl.load(state_finite_ptr + row) != 0, num_steps, next_step - 1)
    model_broke = tl.minimum(tl.load(at + 2 * samples, mask=live, other=0), sound)
    drafter_broke = tl.minimum(tl.load(at + 3 * samples, mask=live, other=0), broken)
    tl.store(at, next_step, mask=live)
    tl.store(at + samples, rounds, mask=live)
    tl.store(at + 2 * samples, model_broke, mask=live)
    tl.store(at + 3 * samples, drafter_broke, mask=live)

    # the program's step, of all samples
    tests = tl.full((), 0, tl.int32)
    accepts = tl.full((), 0, tl.int32)
    deltas = tl.full((), 0.0, tl.float64)
    for tile in range(SAMPLE_TILES):
        sample = tile * SAMPLES + tl.arange(0, SAMPLES)
        there = sample < batch
        accepted, tested = tests_of(advance_ptr, rejected_ptr, sample, there)
        place = program - tl.load(step_ptr + sample, mask=there, other=0)
        here = (place >= 0) & (place < tl.minimum(tested, drafts))
        square = tl.load(squared_norm_ptr + sample * drafts + place, mask=here, other=0.0)
        tests += tl.sum(here.to(tl.int32), axis=0)
        accepts += tl.sum((here & (place < accepted)).to(tl.int32), axis=0)
        deltas += tl.sum(tl.sqrt(square.to(tl.float64)), axis=0)
    of_step = program < num_steps
    entry = by_step_ptr + program * 3
    tl.store(entry, tl.load(entry, mask=of_step, other=0.0) + tests, mask=of_step)
    tl.store(entry + 1, tl.load(entry + 1, mask=of_step, other=0.0) + accepts, mask=of_step)
    tl.store(entry + 2, tl.load(entry + 2, mask=of_step, other=0.0) + deltas, mask=of_step)


def tally(
    progress: torch.Tensor,
    by_step: torch.Tensor,
    index: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    advance: torch.Tensor,
    rejected: torch.Tensor,
    squared_norm: torch.Tensor,
    next_step: torch.Tensor,
    state_finite: torch.Tensor,
) -> None:
    """Writes ``progress`` and ``by_step``."""
    call = _tally if eager(progress, by_step, index, squared_norm) else _tally_op
    call(progress, by_step, index, step, length, advance, rejected, squared_norm, next_step, state_finite)


def _tally(
    progress: torch.Tensor,
    by_step: torch.Tensor,
    index: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    advance: torch.Tensor,
    rejected: torch.Tensor,
    squared_norm: torch.Tensor,
    next_step: torch.Tensor,
    state_finite: torch.Tensor,
) -> None:
    batch, drafts = squared_norm.shape
    num_steps = by_step.shape[0]
    samples = min(triton.next_power_of_2(batch), MAX_SAMPLES)
    with on_device(progress):
        tally_kernel[(check_programs("index", max(batch, num_steps)),)](
            progress,
            by_step,
            index.contiguous(),
            step.contiguous(),
            length.contiguous(),
            advance.contiguous(),
            rejected.contiguous().view(torch.uint8),
            squared_norm.contiguous() if drafts else by_step,
            next_step.contiguous(),
            state_finite.contiguous().view(torch.uint8),
            batch,
            progress.shape[1],
            drafts,
            num_steps,
            COLUMNS=triton.next_power_of_2(max(drafts, 1)),
            SAMPLES=samples,
            SAMPLE_TILES=triton.cdiv(batch, samples),
        )


_tally_op = torch.library.custom_op(
    "free_kernels::tally",
    _tally,
    mutates_args=("progress", "by_step"),
    schema="(Tensor(a!) progress, Tensor(b!) by_step, Tensor index, Tensor step, Tensor length, Tensor advance, "
    "Tensor rejected, Tensor squared_norm, Tensor next_step, Tensor state_finite) -> ()",
)


@_tally_op.register_fake
def _(*_: object) -> None:
    return None
