"""Acceptance ratios in Triton: partial sums of each chunk of each step, then one program a row that adds them up.

No atomics: the sums come out in the same order, and so to the same bit, on every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import block_size, check_programs, chunks_of, eager, on_device, rows_of
from free_kernels.philox.kernel import block_offsets
from free_kernels.posterior.kernel import clamp, effective_output, load_column, load_guided, load_noise, mean_columns
from free_kernels.table import StepTable

FINISH_ROWS = 64


@triton.jit
def mean_difference(state, target, draft, scale, x0_state, x0_model, clip_range, CLIP: tl.constexpr):
    """delta = (draft_mean - target_mean) / std, ``scale`` being the second coefficient of the mean over std."""
    if CLIP:
        draft = clamp(x0_state * state + x0_model * draft, clip_range)
        target = clamp(x0_state * state + x0_model * target, clip_range)
    return scale * (draft - target)


@triton.jit
def x0_before(
    state_row,
    target_row,
    unconditional_row,
    previous_row,
    state_column,
    target_column,
    unconditional_column,
    x0_state_ptr,
    x0_model_ptr,
    column,
    step,
    offsets,
    mask,
    guidance_scale,
    GUIDED: tl.constexpr,
):
    """The target's estimate of x0 at the step before: from the column before, or ``previous_row`` at the window's first.

    The rows are of this column; only one of the two sources is read.
    """
    inside = mask & (offsets >= tl.where(column > 0, 0, 2**30))
    first = mask & (offsets >= tl.where(column > 0, 2**30, 0))
    known = tl.maximum(step - 1, 0)
    state = tl.load(state_row - state_column + offsets, mask=inside, other=0.0).to(tl.float32)
    output = load_guided(
        target_row - target_column, unconditional_row - unconditional_column, offsets, inside, guidance_scale, GUIDED
    )
    x0 = load_column(x0_state_ptr, known) * state + load_column(x0_model_ptr, known) * output
    return x0 + tl.load(previous_row + offsets, mask=first, other=0.0).to(tl.float32)


@triton.jit
def partial_sums_kernel(
    state_ptr,  # float [B, >= N, D], strides state_batch, state_column; not read unless CLIP or MEMORY
    target_ptr,  # float [B, >= N, D], strides target_batch, target_column
    unconditional_ptr,  # float [B, >= N, D], strides unconditional_batch, unconditional_column; not read unless GUIDED
    draft_ptr,  # float [B, N, D], strides draft_batch, draft_column
    noise_ptr,  # float [B, >= N, D], strides noise_batch, noise_column; not read unless HAS_NOISE
    previous_ptr,  # float [B, D], rows previous_row apart: x0 at the step before; not read unless MEMORY
    seed_ptr,  # int64 [B]
    step_ptr,  # int64 [B]
    model_coef_ptr,  # float [S], of the mean: clip_x0_coef where CLIP
    std_ptr,  # float [S]
    x0_state_ptr,  # float [S]
    x0_model_ptr,  # float [S]
    memory_gain_ptr,  # float [S]; not read unless MEMORY
    inner_ptr,  # float32 [B, N, CHUNKS]
    squared_ptr,  # float32 [B, N, CHUNKS]
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
    previous_row,
    columns,
    numel,
    num_steps,
    guidance_scale,
    clip_range,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    GUIDED: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    MEMORY: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    BLOCK: tl.constexpr = COUNTERS * 4
    chunk = (tl.program_id(0) % CHUNKS).to(tl.int64)
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    sample = row // columns
    column = row % columns
    step = tl.minimum(tl.maximum(tl.load(step_ptr + sample) + column, 0), num_steps - 1)
    seed = tl.load(seed_ptr + sample)
    scale = load_column(model_coef_ptr, step) / load_column(std_ptr, step)
    x0_state = load_column(x0_state_ptr, step)
    x0_model = load_column(x0_model_ptr, step)
    state_row = state_ptr + sample * state_batch + column * state_column
    target_row = target_ptr + sample * target_batch + column * target_column
    unconditional_row = unconditional_ptr + sample * unconditional_batch + column * unconditional_column
    draft_row = draft_ptr + sample * draft_batch + column * draft_column
    noise_row = noise_ptr + sample * noise_batch + column * noise_column

    offsets = block_offsets(COUNTERS)
    inner = tl.full((COUNTERS, 4), 0.0, tl.float32)
    squared = tl.full((COUNTERS, 4), 0.0, tl.float32)
    for tile in range(TILES):
        start = (chunk * TILES + tile) * BLOCK
        mask = offsets < tl.maximum(tl.minimum(numel - start, BLOCK), 0).to(tl.int32)
        draft = tl.load(draft_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
        target = load_guided(target_row + start, unconditional_row + start, offsets, mask, guidance_scale, GUIDED)
        state = draft
        if CLIP or MEMORY:
            state = tl.load(state_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
        if MEMORY:
            before = x0_before(
                state_row + start,
                target_row + start,
                unconditional_row + start,
                previous_ptr + sample * previous_row + start,
                state_column,
                target_column,
                unconditional_column,
                x0_state_ptr,
                x0_model_ptr,
                column,
                step,
                offsets,
                mask,
                guidance_scale,
                GUIDED,
            )
            target, _ = effective_output(target, state, before, load_column(memory_gain_ptr, step), x0_state, x0_model)
        noise = load_noise(noise_row + start, offsets, mask, seed, start, step, HAS_NOISE, COUNTERS)
        delta = mean_difference(state, target, draft, scale, x0_state, x0_model, clip_range, CLIP)
        inner = tl.fma(noise, delta, inner)
        squared = tl.fma(delta, delta, squared)
    at = row * CHUNKS + chunk
    tl.store(inner_ptr + at, tl.sum(tl.sum(inner, axis=1), axis=0))
    tl.store(squared_ptr + at, tl.sum(tl.sum(squared, axis=1), axis=0))


@triton.jit
def partial_sums_from_means_kernel(
    proposal_ptr,  # float [N, D], rows proposal_row apart
    target_ptr,  # float [N, D], rows target_row apart
    draft_ptr,  # float [N, D], rows draft_row apart
    std_ptr,  # float [N]
    inner_ptr,  # float32 [N, CHUNKS]
    squared_ptr,  # float32 [N, CHUNKS]
    proposal_row,
    target_row,
    draft_row,
    numel,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = (tl.program_id(0) % CHUNKS).to(tl.int64)
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    std = tl.load(std_ptr + row).to(tl.float32)
    offsets = tl.arange(0, BLOCK)
    inner = tl.full((BLOCK,), 0.0, tl.float32)
    squared = tl.full((BLOCK,), 0.0, tl.float32)
    for tile in range(TILES):
        start = (chunk * TILES + tile) * BLOCK
        mask = offsets < tl.maximum(tl.minimum(numel - start, BLOCK), 0).to(tl.int32)
        proposal = tl.load(proposal_ptr + row * proposal_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + row * target_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
        draft = tl.load(draft_ptr + row * draft_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
        delta = tl.where(mask, (draft - target) / std, 0.0)
        noise = tl.where(mask, (proposal - draft) / std, 0.0)
        inner = tl.fma(noise, delta, inner)
        squared = tl.fma(delta, delta, squared)
    at = row * CHUNKS + chunk
    tl.store(inner_ptr + at, tl.sum(inner, axis=0))
    tl.store(squared_ptr + at, tl.sum(squared, axis=0))


@triton.jit
def load_sums(inner_ptr, squared_ptr, rows, valid, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr):
    """(<z, delta>, |delta|²) of some rows, from the partial sums of all their chunks; zeros where not valid."""
    chunk = tl.arange(0, CHUNKS_PADDED)
    at = rows[:, None] * CHUNKS + chunk[None, :]
    mask = valid[:, None] & (chunk[None, :] < CHUNKS)
    inner = tl.sum(tl.load(inner_ptr + at, mask=mask, other=0.0), axis=1)
    return inner, tl.sum(tl.load(squared_ptr + at, mask=mask, other=0.0), axis=1)


@triton.jit
def finish_kernel(
    inner_ptr,  # float32 [N, CHUNKS]
    squared_ptr,  # float32 [N, CHUNKS]
    log_ratio_out_ptr,  # float32 [N]
    inner_out_ptr,  # float32 [N]
    squared_out_ptr,  # float32 [N]
    num_rows,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    inner, squared = load_sums(inner_ptr, squared_ptr, rows, valid, CHUNKS, CHUNKS_PADDED)
    tl.store(log_ratio_out_ptr + rows, -inner - squared * 0.5, mask=valid)
    tl.store(inner_out_ptr + rows, inner, mask=valid)
    tl.store(squared_out_ptr + rows, squared, mask=valid)


def partial_sums(
    state: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    columns: list[torch.Tensor],
    clip_range: float | None,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> torch.Tensor:
    """float32 [2, B, N, chunks]: partial <z, delta> and |delta|² of the N drafted columns; the other tensors may have more.

    Every tensor's last axis is contiguous; ``seed`` and ``step`` are contiguous.
    """
    batch, drafts, numel = draft_output.shape
    chunks, tiles = chunks_of(numel)
    block = block_size(numel)
    partials = torch.empty(2, batch, drafts, chunks, dtype=torch.float32, device=draft_output.device)
    unconditional = target_output if unconditional_output is None else unconditional_output
    stored = target_output if noise is None else noise
    previous = target_output if previous_x0 is None else previous_x0
    grid = check_programs("draft_output", batch * drafts * chunks)
    with on_device(draft_output):
        partial_sums_kernel[(grid,)](
            state,
            target_output,
            unconditional,
            draft_output,
            stored,
            previous,
            seed,
            step,
            *columns[1:5],
            columns[-1],
            partials[0],
            partials[1],
            *state.stride()[:2],
            *target_output.stride()[:2],
            *unconditional.stride()[:2],
            *draft_output.stride()[:2],
            *stored.stride()[:2],
            previous.stride(0),
            drafts,
            numel,
            columns[0].shape[0],
            float(guidance_scale),
            float(clip_range or 0.0),
            CHUNKS=chunks,
            TILES=tiles,
            GUIDED=unconditional_output is not None,
            CLIP=clip_range is not None,
            HAS_NOISE=noise is not None,
            MEMORY=previous_x0 is not None,
            COUNTERS=block // 4,
            enable_fp_fusion=False,
        )
    return partials


def acceptance(
    state: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_ratio, inner and squared_norm, float32 [B, N] each."""
    call = _acceptance if eager(state, target_output, draft_output) else _acceptance_op
    return call(
        state,
        target_output,
        draft_output,
        seed,
        step,
        list(mean_columns(table)),
        table.clip_range,
        unconditional_output,
        guidance_scale,
        noise,
        previous_x0,
    )


def acceptance_from_means(
    proposal: torch.Tensor, target_mean: torch.Tensor, draft_mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_ratio, inner and squared_norm, float32 [N] each."""
    call = _acceptance_from_means if eager(proposal, target_mean, draft_mean) else _acceptance_from_means_op
    return call(proposal, target_mean, draft_mean, std)


def _acceptance(
    state: torch.Tensor,
    target_output: torch.Tensor,
    draft_output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    columns: list[torch.Tensor],
    clip_range: float | None,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    partials = partial_sums(
        rows_of(state),
        rows_of(target_output),
        rows_of(draft_output),
        seed.contiguous(),
        step.contiguous(),
        columns,
        clip_range,
        None if unconditional_output is None else rows_of(unconditional_output),
        guidance_scale,
        None if noise is None else rows_of(noise),
        None if previous_x0 is None else rows_of(previous_x0),
    )
    return _finish(partials, draft_output.shape[:2])


def _acceptance_from_means(
    proposal: torch.Tensor, target_mean: torch.Tensor, draft_mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, numel = proposal.shape
    proposal, target_mean, draft_mean = rows_of(proposal), rows_of(target_mean), rows_of(draft_mean)
    chunks, tiles = chunks_of(numel)
    partials = torch.empty(2, rows, chunks, dtype=torch.float32, device=proposal.device)
    grid = check_programs("proposal", rows * chunks)
    with on_device(proposal):
        partial_sums_from_means_kernel[(grid,)](
            proposal,
            target_mean,
            draft_mean,
            std.contiguous(),
            partials[0],
            partials[1],
            proposal.stride(0),
            target_mean.stride(0),
            draft_mean.stride(0),
            numel,
            CHUNKS=chunks,
            TILES=tiles,
            BLOCK=block_size(numel),
            enable_fp_fusion=False,
        )
    return _finish(partials, proposal.shape[:1])


def _finish(partials: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chunks, rows = partials.shape[-1], shape.numel()
    log_ratio, inner, squared_norm = (partials.new_empty(shape) for _ in range(3))
    with on_device(partials):
        finish_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            partials[0],
            partials[1],
            log_ratio,
            inner,
            squared_norm,
            rows,
            CHUNKS=chunks,
            CHUNKS_PADDED=triton.next_power_of_2(chunks),
            ROWS=FINISH_ROWS,
            enable_fp_fusion=False,
        )
    return log_ratio, inner, squared_norm


_acceptance_op = torch.library.custom_op(
    "free_kernels::acceptance",
    _acceptance,
    mutates_args=(),
    schema="(Tensor state, Tensor target_output, Tensor draft_output, Tensor seed, Tensor step, Tensor[] columns, "
    "float? clip_range, Tensor? unconditional_output, float guidance_scale, Tensor? noise, Tensor? previous_x0) "
    "-> (Tensor, Tensor, Tensor)",
)
_acceptance_from_means_op = torch.library.custom_op(
    "free_kernels::acceptance_from_means",
    _acceptance_from_means,
    mutates_args=(),
    schema="(Tensor proposal, Tensor target_mean, Tensor draft_mean, Tensor std) -> (Tensor, Tensor, Tensor)",
)


@_acceptance_op.register_fake
def _(state: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_ratio, inner, squared_norm = (state.new_empty(state.shape[:2], dtype=torch.float32) for _ in range(3))
    return log_ratio, inner, squared_norm


@_acceptance_from_means_op.register_fake
def _(proposal: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_ratio, inner, squared_norm = (proposal.new_empty(proposal.shape[:1], dtype=torch.float32) for _ in range(3))
    return log_ratio, inner, squared_norm
