"""The hold drafts in Triton: one launch drafts a whole window, its element's state never leaving the registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import check_programs, eager, on_device, rows_of
from free_kernels.philox.kernel import block_offsets
from free_kernels.posterior.kernel import effective_output, load_column, load_guided, load_noise, mean_columns, step_mean
from free_kernels.table import StepTable

MAX_BLOCK = 1024
"""Elements of a program: more of them, held through the whole walk, do not fit the registers everywhere."""
MIN_BLOCK = 256
"""Fewer of them are the same work a thread on no more processors."""


def block_of(numel: int) -> int:
    """Elements that a program walks with. Each goes alone, so that no bit depends on it: a small sample is spread out."""
    return MIN_BLOCK if numel < 2**15 else MAX_BLOCK


@triton.jit
def propose_kernel(
    state_ptr,  # float [B, D], rows state_row apart
    anchor_state_ptr,  # float [B, A, D], strides anchor_state_batch, anchor_state_column; not read unless HOLD_X0
    anchor_output_ptr,  # float [B, A, D], strides anchor_output_batch, anchor_output_column
    unconditional_ptr,  # float [B, A, D], strides unconditional_batch, unconditional_column; not read unless GUIDED
    noise_ptr,  # float [B, >= DRAFTS, D], strides noise_batch, noise_column; not read unless HAS_NOISE
    correction_ptr,  # float [B, >= DRAFTS, D], strides correction_batch, correction_column; not read unless HAS_CORRECTION
    previous_ptr,  # float [B, D], rows previous_row apart: x0 at the step before; not read unless MEMORY
    seed_ptr,  # int64 [B]
    step_ptr,  # int64 [B]
    anchor_step_ptr,  # int64 [B]
    anchor_length_ptr,  # int64 [B]
    state_coef_ptr,  # float [S], of the mean: clip_state_coef where CLIP
    model_coef_ptr,  # float [S], of the mean: clip_x0_coef where CLIP
    std_ptr,  # float [S]
    x0_state_ptr,  # float [S]
    x0_model_ptr,  # float [S]
    memory_gain_ptr,  # float [S]; not read unless MEMORY
    states_ptr,  # float32 [B, DRAFTS + 1, D]
    drafted_ptr,  # float32 [B, DRAFTS, D]
    state_row,
    anchor_state_batch,
    anchor_state_column,
    anchor_output_batch,
    anchor_output_column,
    unconditional_batch,
    unconditional_column,
    noise_batch,
    noise_column,
    correction_batch,
    correction_column,
    previous_row,
    anchors,
    numel,
    num_steps,
    guidance_scale,
    clip_range,
    DRAFTS: tl.constexpr,
    HOLD_X0: tl.constexpr,
    GUIDED: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    MEMORY: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    BLOCK: tl.constexpr = COUNTERS * 4
    chunks = (numel + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    offsets = block_offsets(COUNTERS)
    mask = offsets < tl.minimum(numel - start, BLOCK).to(tl.int32)
    seed = tl.load(seed_ptr + sample)
    first_step = tl.load(step_ptr + sample)
    anchor_step = tl.load(anchor_step_ptr + sample)
    last_anchor = tl.minimum(tl.load(anchor_length_ptr + sample), anchors) - 1

    current = tl.load(state_ptr + sample * state_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
    states_row = states_ptr + sample * (DRAFTS + 1) * numel + start
    drafted_row = drafted_ptr + sample * DRAFTS * numel + start
    noise_row = noise_ptr + sample * noise_batch + start
    correction_row = correction_ptr + sample * correction_batch + start
    tl.store(states_row + offsets, current, mask=mask)
    x0 = current
    if MEMORY:
        x0 = tl.load(previous_ptr + sample * previous_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
    for j in range(DRAFTS):
        step = tl.minimum(tl.maximum(first_step + j, 0), num_steps - 1)
        # the latest evaluation at this step or before: a later one has seen this step's noise
        anchor = tl.maximum(tl.minimum(step - anchor_step, last_anchor), 0)
        output = load_guided(
            anchor_output_ptr + sample * anchor_output_batch + anchor * anchor_output_column + start,
            unconditional_ptr + sample * unconditional_batch + anchor * unconditional_column + start,
            offsets,
            mask,
            guidance_scale,
            GUIDED,
        )
        x0_state = load_column(x0_state_ptr, step)
        x0_model = load_column(x0_model_ptr, step)
        if HOLD_X0:
            known = tl.minimum(tl.maximum(anchor_step + anchor, 0), num_steps - 1)
            anchor_state = tl.load(
                anchor_state_ptr + sample * anchor_state_batch + anchor * anchor_state_column + start + offsets,
                mask=mask,
                other=0.0,
            ).to(tl.float32)
            held = load_column(x0_state_ptr, known) * anchor_state + load_column(x0_model_ptr, known) * output
            output = (held - x0_state * current) / x0_model
        noise = load_noise(noise_row, offsets, mask, seed, start, step, HAS_NOISE, COUNTERS)
        if HAS_CORRECTION:  # read here and not before the noise is made, which takes the most registers
            output += tl.load(correction_row + offsets, mask=mask, other=0.0).to(tl.float32)
            correction_row += correction_column
        if MEMORY:
            output, x0 = effective_output(output, current, x0, load_column(memory_gain_ptr, step), x0_state, x0_model)
        noise_row += noise_column
        mean = step_mean(
            current,
            output,
            load_column(state_coef_ptr, step),
            load_column(model_coef_ptr, step),
            x0_state,
            x0_model,
            clip_range,
            CLIP,
        )
        current = mean + load_column(std_ptr, step) * noise
        tl.store(drafted_row + offsets, output, mask=mask)
        drafted_row += numel
        states_row += numel
        tl.store(states_row + offsets, current, mask=mask)


def propose(
    state: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    window: int,
    anchor_states: torch.Tensor,
    anchor_outputs: torch.Tensor,
    anchor_step: torch.Tensor,
    anchor_length: torch.Tensor,
    table: StepTable,
    draft: str,
    unconditional_anchor_outputs: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    correction: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """states [B, W, D] and draft_output [B, W-1, D], float32."""
    call = _propose if eager(state, anchor_states, anchor_outputs) else _propose_op
    return call(
        state,
        seed,
        step,
        window,
        anchor_states,
        anchor_outputs,
        anchor_step,
        anchor_length,
        list(mean_columns(table)),
        table.clip_range,
        draft,
        unconditional_anchor_outputs,
        guidance_scale,
        noise,
        correction,
        previous_x0,
    )


def _propose(
    state: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    window: int,
    anchor_states: torch.Tensor,
    anchor_outputs: torch.Tensor,
    anchor_step: torch.Tensor,
    anchor_length: torch.Tensor,
    columns: list[torch.Tensor],
    clip_range: float | None,
    draft: str,
    unconditional_anchor_outputs: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    correction: torch.Tensor | None,
    previous_x0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, numel = state.shape
    state, anchor_states, outputs = rows_of(state), rows_of(anchor_states), rows_of(anchor_outputs)
    unconditional = outputs if unconditional_anchor_outputs is None else rows_of(unconditional_anchor_outputs)
    if window == 1:  # drafts nothing: neither is read
        noise = correction = None
    stored = outputs if noise is None else rows_of(noise)
    corrections = outputs if correction is None else rows_of(correction)
    previous = state if previous_x0 is None else rows_of(previous_x0)
    states = torch.empty(batch, window, numel, dtype=torch.float32, device=state.device)
    drafted = torch.empty(batch, window - 1, numel, dtype=torch.float32, device=state.device)
    # x0 is held through the walk too
    block = block_of(numel) if previous_x0 is None else min(block_of(numel), MAX_BLOCK // 2)
    grid = check_programs("state", batch * triton.cdiv(numel, block))
    with on_device(state):
        propose_kernel[(grid,)](
            state,
            anchor_states,
            outputs,
            unconditional,
            stored,
            corrections,
            previous,
            seed.contiguous(),
            step.contiguous(),
            anchor_step.contiguous(),
            anchor_length.contiguous(),
            *columns[:5],
            columns[-1],
            states,
            drafted if window > 1 else states,
            state.stride(0),
            *anchor_states.stride()[:2],
            *outputs.stride()[:2],
            *unconditional.stride()[:2],
            *stored.stride()[:2],
            *corrections.stride()[:2],
            previous.stride(0),
            anchor_states.shape[1],
            numel,
            columns[0].shape[0],
            float(guidance_scale),
            float(clip_range or 0.0),
            DRAFTS=window - 1,
            HOLD_X0=draft == "hold-x0",
            GUIDED=unconditional_anchor_outputs is not None,
            CLIP=clip_range is not None,
            HAS_NOISE=noise is not None,
            HAS_CORRECTION=correction is not None,
            MEMORY=previous_x0 is not None,
            COUNTERS=block // 4,
            num_warps=min(block // 128, 4),  # of small blocks, a counter of four elements a thread
            enable_fp_fusion=False,
        )
    return states, drafted


_propose_op = torch.library.custom_op(
    "free_kernels::propose",
    _propose,
    mutates_args=(),
    schema="(Tensor state, Tensor seed, Tensor step, int window, Tensor anchor_states, Tensor anchor_outputs, "
    "Tensor anchor_step, Tensor anchor_length, Tensor[] columns, float? clip_range, str draft, "
    "Tensor? unconditional_anchor_outputs, float guidance_scale, Tensor? noise, Tensor? correction, "
    "Tensor? previous_x0) -> (Tensor, Tensor)",
)


@_propose_op.register_fake
def _(
    state: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, window: int, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, numel = state.shape
    return (
        state.new_empty(batch, window, numel, dtype=torch.float32),
        state.new_empty(batch, window - 1, numel, dtype=torch.float32),
    )
