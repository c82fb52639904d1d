"""Verification of a whole window in two Triton launches.

The first reads both outputs once and leaves partial sums (``free_kernels.acceptance``). In the second every program adds up
its own sample's partial sums, in the same order as its siblings and so to the same decision, and writes its slice of the
next state: nothing is exchanged between programs, and the host is never asked.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.acceptance.kernel import load_sums, mean_difference, partial_sums, x0_before
from free_kernels.householder.kernel import can_reflect
from free_kernels.launch import block_size, check_programs, chunks_of, eager, on_device, rows_of
from free_kernels.philox import TEST_STREAM
from free_kernels.philox.kernel import block_offsets, minus_two_log, open_uniform_scaled, philox_words
from free_kernels.posterior.kernel import effective_output, load_column, load_guided, load_noise, mean_columns, step_mean
from free_kernels.table import StepTable

TEST = tl.constexpr(TEST_STREAM)
MAX_SUMS = 1024
"""Partial sums that a program holds at a time."""


@triton.jit
def log_uniforms(uniform_ptr, column, mask, seed, step, HAS_UNIFORMS: tl.constexpr):
    """log u of the tests of a sample's steps, float32: of what is read from its row, or of what philox makes.

    Whoever asks what another test of the same u had said must ask this, to agree with the test to the bit.
    """
    if HAS_UNIFORMS:
        u = tl.load(uniform_ptr + column, mask=mask, other=1.0).to(tl.float32)
        log_u = -0.5 * minus_two_log(u, 0)
    else:
        word, _, _, _ = philox_words(seed, seed * 0, step, TEST)
        log_u = -0.5 * minus_two_log(open_uniform_scaled(word), 33)
    return log_u


@triton.jit
def settle_kernel(
    state_ptr,  # float [B, W, D], strides state_batch, state_column
    target_ptr,  # float [B, W, D], strides target_batch, target_column
    unconditional_ptr,  # float [B, W, D], strides unconditional_batch, unconditional_column; not read unless GUIDED
    draft_ptr,  # float [B, W-1, D], strides draft_batch, draft_column; not read if W is 1
    noise_ptr,  # float [B, W, D], strides noise_batch, noise_column; not read unless HAS_NOISE
    uniform_ptr,  # float [B, >= W-1], rows uniform_row apart; not read unless HAS_UNIFORMS
    tau_ptr,  # float [B, >= W-1], rows tau_row apart; not read unless HAS_TAU
    previous_ptr,  # float [B, D], rows previous_row apart: x0 at the step before; not read unless MEMORY
    seed_ptr,  # int64 [B]
    step_ptr,  # int64 [B]
    length_ptr,  # int64 [B]
    state_coef_ptr,  # float [S], of the mean: clip_state_coef where CLIP
    model_coef_ptr,  # float [S], of the mean: clip_x0_coef where CLIP
    std_ptr,  # float [S]
    x0_state_ptr,  # float [S]
    x0_model_ptr,  # float [S]
    memory_gain_ptr,  # float [S]; not read unless MEMORY
    inner_ptr,  # float32 [B, W-1, CHUNKS]
    squared_ptr,  # float32 [B, W-1, CHUNKS]
    next_state_ptr,  # float32 [B, D]
    advance_ptr,  # int64 [B]
    rejected_ptr,  # uint8 [B]
    log_ratio_ptr,  # float32 [B, W-1]
    squared_norm_ptr,  # float32 [B, W-1]
    x0_ptr,  # float32 [B, D]; not written unless MEMORY
    state_batch,
    state_column,
    target_batch,
    target_column,
    unconditional_batch,
    unconditional_column,
    draft_batch,
    draft_column,
    noise_batch,
    noise_column,
    uniform_row,
    tau_row,
    previous_row,
    drafts,
    numel,
    num_steps,
    guidance_scale,
    clip_range,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    GUIDED: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_UNIFORMS: tl.constexpr,
    HAS_TAU: tl.constexpr,
    MEMORY: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    BLOCK: tl.constexpr = COUNTERS * 4
    blocks = (numel + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    seed = tl.load(seed_ptr + sample)
    first_step = tl.load(step_ptr + sample)
    length = tl.minimum(tl.maximum(tl.load(length_ptr + sample), 0), drafts + 1).to(tl.int32)

    # every program of a sample finds the same first rejection; u is looked at up to there only
    first = drafts + 1
    inner = 0.0
    squared_norm = 0.0
    for tile in range(ROW_TILES):
        column = tile * ROWS + tl.arange(0, ROWS)
        sums, squares = load_sums(inner_ptr, squared_ptr, sample * drafts + column, column < drafts, CHUNKS, CHUNKS_PADDED)
        log_ratio = -sums - squares * 0.5
        step_of = tl.minimum(tl.maximum(first_step + column, 0), num_steps - 1)
        log_u = log_uniforms(uniform_ptr + sample * uniform_row, column, column < drafts, seed, step_of, HAS_UNIFORMS)
        tempered = log_ratio
        if HAS_TAU:
            tempered *= tl.load(tau_ptr + sample * tau_row + column, mask=column < drafts, other=1.0).to(tl.float32)
        accepts = log_u <= tempered  # NaN compares false, so it rejects
        candidate = tl.min(tl.where(accepts | (column >= length - 1), drafts + 1, column), axis=0)
        inner = tl.where(candidate < first, tl.sum(tl.where(column == candidate, sums, 0.0), axis=0), inner)
        squared_norm = tl.where(candidate < first, tl.sum(tl.where(column == candidate, squares, 0.0), axis=0), squared_norm)
        first = tl.minimum(first, candidate)
        written = column < tl.where(block == 0, drafts, 0)  # by one of the sample's programs
        tl.store(log_ratio_ptr + sample * drafts + column, log_ratio, mask=written)
        tl.store(squared_norm_ptr + sample * drafts + column, squares, mask=written)

    rejected = first <= drafts
    last = tl.where(rejected, first, tl.maximum(length - 1, 0)).to(tl.int64)
    tl.store(advance_ptr + sample, tl.where(length > 0, last + 1, 0), mask=block == 0)
    tl.store(rejected_ptr + sample, rejected.to(tl.uint8), mask=block == 0)

    # the settled window's last step: a reflection, or the exact step
    start = block.to(tl.int64) * BLOCK
    offsets = block_offsets(COUNTERS)
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    mask = offsets < left
    step = tl.minimum(tl.maximum(first_step + last, 0), num_steps - 1)
    std = load_column(std_ptr, step)
    model_coef = load_column(model_coef_ptr, step)
    x0_state = load_column(x0_state_ptr, step)
    x0_model = load_column(x0_model_ptr, step)
    state_row = state_ptr + sample * state_batch + last * state_column + start
    state = tl.load(state_row + offsets, mask=mask, other=0.0).to(tl.float32)
    target = load_guided(
        target_ptr + sample * target_batch + last * target_column + start,
        unconditional_ptr + sample * unconditional_batch + last * unconditional_column + start,
        offsets,
        mask,
        guidance_scale,
        GUIDED,
    )
    if MEMORY:
        previous_start = previous_ptr + sample * previous_row + start
        before = x0_before(
            state_row,
            target_ptr + sample * target_batch + last * target_column + start,
            unconditional_ptr + sample * unconditional_batch + last * unconditional_column + start,
            previous_start,
            state_column,
            target_column,
            unconditional_column,
            x0_state_ptr,
            x0_model_ptr,
            last,
            step,
            offsets,
            mask,
            guidance_scale,
            GUIDED,
        )
        target, x0 = effective_output(target, state, before, load_column(memory_gain_ptr, step), x0_state, x0_model)
        x0 = tl.where(length > 0, x0, before)  # a finished sample's stays as it is
        tl.store(x0_ptr + sample * numel + start + offsets, x0, mask=mask)
    noise_row = noise_ptr + sample * noise_batch + last * noise_column + start
    noise = load_noise(noise_row, offsets, mask, seed, start, step, HAS_NOISE, COUNTERS)
    if ROW_TILES > 0:
        reflects = rejected & can_reflect(inner, squared_norm)
        draft_row = draft_ptr + sample * draft_batch + last * draft_column + start
        draft = tl.load(draft_row + offsets, mask=offsets < tl.where(reflects, left, 0), other=0.0).to(tl.float32)
        delta = mean_difference(state, target, draft, model_coef / std, x0_state, x0_model, clip_range, CLIP)
        noise = tl.where(reflects, noise - 2.0 * inner / squared_norm * delta, noise)
    mean = step_mean(state, target, load_column(state_coef_ptr, step), model_coef, x0_state, x0_model, clip_range, CLIP)
    next_state = tl.where(length > 0, mean + std * noise, state)
    tl.store(next_state_ptr + sample * numel + start + offsets, next_state, mask=mask)


def verify(
    states: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    tau: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """next_state [B, D], advance [B], rejected [B], log_ratio and squared_norm [B, W-1], and x0 [B, D] or [B, 0]."""
    call = _verify if eager(states, target_output, draft_output) else _verify_op
    return call(
        states,
        target_output,
        draft_output,
        seed,
        step,
        length,
        list(mean_columns(table)),
        table.clip_range,
        unconditional_output,
        guidance_scale,
        noise,
        uniforms,
        tau,
        previous_x0,
    )


def _verify(
    states: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    columns: list[torch.Tensor],
    clip_range: float | None,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    tau: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, window, numel = states.shape
    drafts = window - 1
    states, target = rows_of(states), rows_of(target_output)
    unconditional = None if unconditional_output is None else rows_of(unconditional_output)
    stored = None if noise is None else rows_of(noise)
    if not drafts:  # nothing is tested: neither is read
        uniforms = tau = None
    tests = target if uniforms is None else rows_of(uniforms)
    taus = target if tau is None else rows_of(tau)
    draft = rows_of(draft_output) if drafts else target
    previous = None if previous_x0 is None else rows_of(previous_x0)
    seed, step = seed.contiguous(), step.contiguous()
    chunks, _ = chunks_of(numel)
    chunks_padded = triton.next_power_of_2(chunks)
    rows = min(triton.next_power_of_2(max(drafts, 1)), MAX_SUMS // chunks_padded)

    next_state = torch.empty(batch, numel, dtype=torch.float32, device=states.device)
    advance = torch.empty(batch, dtype=torch.int64, device=states.device)
    rejected = torch.empty(batch, dtype=torch.uint8, device=states.device)
    log_ratio = torch.empty(batch, drafts, dtype=torch.float32, device=states.device)
    squared_norm = torch.empty_like(log_ratio)
    x0 = next_state.new_empty(batch, 0 if previous is None else numel)
    inner, squared = next_state, next_state
    if drafts:
        inner, squared = partial_sums(
            states, target, draft, seed, step, columns, clip_range, unconditional, guidance_scale, stored, previous
        ).unbind()
    block = block_size(numel)
    grid = check_programs("states", batch * triton.cdiv(numel, block))
    unconditional = target if unconditional is None else unconditional
    stored = target if stored is None else stored
    memory = previous is not None
    previous = target if previous is None else previous
    with on_device(states):
        settle_kernel[(grid,)](
            states,
            target,
            unconditional,
            draft,
            stored,
            tests,
            taus,
            previous,
            seed,
            step,
            length.contiguous(),
            *columns[:5],
            columns[-1],
            inner,
            squared,
            next_state,
            advance,
            rejected,
            log_ratio if drafts else next_state,
            squared_norm if drafts else next_state,
            x0 if memory else next_state,
            *states.stride()[:2],
            *target.stride()[:2],
            *unconditional.stride()[:2],
            *draft.stride()[:2],
            *stored.stride()[:2],
            tests.stride(0),
            taus.stride(0),
            previous.stride(0),
            drafts,
            numel,
            columns[0].shape[0],
            float(guidance_scale),
            float(clip_range or 0.0),
            CHUNKS=chunks,
            CHUNKS_PADDED=chunks_padded,
            ROWS=rows,
            ROW_TILES=triton.cdiv(drafts, rows),
            GUIDED=unconditional_output is not None,
            CLIP=clip_range is not None,
            HAS_NOISE=noise is not None,
            HAS_UNIFORMS=uniforms is not None,
            HAS_TAU=tau is not None,
            MEMORY=memory,
            COUNTERS=block // 4,
            enable_fp_fusion=False,
        )
    return next_state, advance, rejected.view(torch.bool), log_ratio, squared_norm, x0


_verify_op = torch.library.custom_op(
    "free_kernels::verify",
    _verify,
    mutates_args=(),
    schema="(Tensor states, Tensor target_output, Tensor draft_output, Tensor seed, Tensor step, Tensor length, "
    "Tensor[] columns, float? clip_range, Tensor? unconditional_output, float guidance_scale, Tensor? noise, "
    "Tensor? uniforms, Tensor? tau, Tensor? previous_x0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_verify_op.register_fake
def _(states: torch.Tensor, *others: object) -> tuple[torch.Tensor, ...]:
    batch, window, numel = states.shape
    return (
        states.new_empty(batch, numel, dtype=torch.float32),
        states.new_empty(batch, dtype=torch.int64),
        states.new_empty(batch, dtype=torch.bool),
        states.new_empty(batch, window - 1, dtype=torch.float32),
        states.new_empty(batch, window - 1, dtype=torch.float32),
        states.new_empty(batch, 0 if others[-1] is None else numel, dtype=torch.float32),
    )
