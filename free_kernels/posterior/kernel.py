"""The ancestral update in Triton, and the elementwise helpers that the other kernels build on."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import block_size, check_programs, eager, on_device, rows_of
from free_kernels.philox import NOISE_STREAM
from free_kernels.philox.kernel import block_offsets, normals
from free_kernels.table import StepTable

NOISE = tl.constexpr(NOISE_STREAM)


@triton.jit
def load_guided(row_ptr, unconditional_row_ptr, offsets, mask, guidance_scale, GUIDED: tl.constexpr):
    """A network output as float32, its two halves combined under guidance."""
    value = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        unconditional = tl.load(unconditional_row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        value = unconditional + guidance_scale * (value - unconditional)
    return value


@triton.jit
def load_noise(noise_row_ptr, offsets, mask, seed, first_element, step, HAS_NOISE: tl.constexpr, COUNTERS: tl.constexpr):
    """z as float32 [COUNTERS, 4]: read if it is stored, else made from seed and step; ``first_element`` is int64."""
    if HAS_NOISE:
        return tl.load(noise_row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        return normals(seed, first_element // 4, step, NOISE, COUNTERS)


@triton.jit
def clamp(value, limit):
    """To ±limit; NaN stays NaN."""
    return tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))


@triton.jit
def step_mean(state, output, state_coef, model_coef, x0_state, x0_model, clip_range, CLIP: tl.constexpr):
    """Mean of x[k+1]; with CLIP the first two coefficients are those of the state and of the clamped x0."""
    if CLIP:
        output = clamp(x0_state * state + x0_model * output, clip_range)
    return state_coef * state + model_coef * output


@triton.jit
def load_column(column_ptr, step):
    """One coefficient as float32."""
    return tl.load(column_ptr + step).to(tl.float32)


@triton.jit
def effective_output(output, state, previous_x0, memory_gain, x0_state, x0_model):
    """The output of a process of second order as it stands in the mean, and the estimate of x0."""
    x0 = x0_state * state + x0_model * output
    return output + memory_gain * (x0 - previous_x0), x0


@triton.jit
def posterior_kernel(
    state_ptr,  # float [B, D], rows state_row apart
    output_ptr,  # float [B, D], rows output_row apart
    unconditional_ptr,  # float [B, D], rows unconditional_row apart; not read unless GUIDED
    noise_ptr,  # float [B, D], rows noise_row apart; not read unless HAS_NOISE
    previous_ptr,  # float [B, D], rows previous_row apart: x0 at the step before; not read unless MEMORY
    seed_ptr,  # int64 [B]
    step_ptr,  # int64 [B]
    state_coef_ptr,  # float [S], of the mean: clip_state_coef where CLIP
    model_coef_ptr,  # float [S], of the mean: clip_x0_coef where CLIP
    std_ptr,  # float [S]
    x0_state_ptr,  # float [S]
    x0_model_ptr,  # float [S]
    memory_gain_ptr,  # float [S]; not read unless MEMORY
    out_ptr,  # float32 [B, D]
    x0_ptr,  # float32 [B, D]; not written unless MEMORY
    state_row,
    output_row,
    unconditional_row,
    noise_row,
    previous_row,
    numel,
    num_steps,
    guidance_scale,
    clip_range,
    GUIDED: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    MEMORY: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    BLOCK: tl.constexpr = COUNTERS * 4
    chunks = (numel + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    offsets = block_offsets(COUNTERS)
    mask = offsets < tl.minimum(numel - start, BLOCK).to(tl.int32)
    step = tl.minimum(tl.maximum(tl.load(step_ptr + row), 0), num_steps - 1)

    state = tl.load(state_ptr + row * state_row + start + offsets, mask=mask, other=0.0).to(tl.float32)
    output = load_guided(
        output_ptr + row * output_row + start,
        unconditional_ptr + row * unconditional_row + start,
        offsets,
        mask,
        guidance_scale,
        GUIDED,
    )
    noise = load_noise(
        noise_ptr + row * noise_row + start, offsets, mask, tl.load(seed_ptr + row), start, step, HAS_NOISE, COUNTERS
    )
    x0_state = load_column(x0_state_ptr, step)
    x0_model = load_column(x0_model_ptr, step)
    if MEMORY:
        previous_row_ptr = previous_ptr + row * previous_row + start
        previous_x0 = tl.load(previous_row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        output, x0 = effective_output(output, state, previous_x0, load_column(memory_gain_ptr, step), x0_state, x0_model)
        tl.store(x0_ptr + row * numel + start + offsets, x0, mask=mask)
    mean = step_mean(
        state,
        output,
        load_column(state_coef_ptr, step),
        load_column(model_coef_ptr, step),
        x0_state,
        x0_model,
        clip_range,
        CLIP,
    )
    tl.store(out_ptr + row * numel + start + offsets, mean + load_column(std_ptr, step) * noise, mask=mask)


def mean_columns(table: StepTable) -> tuple[torch.Tensor, ...]:
    """What the kernels read: the two coefficients of the mean (the clipped form's where the table clips), std, x0's two, and
    where there is one the memory's gain.
    """
    clips = table.clip_range is not None
    columns: tuple[torch.Tensor, ...] = (
        table.clip_state_coef if clips else table.state_coef,
        table.clip_x0_coef if clips else table.model_coef,
        table.std,
        table.x0_state_coef,
        table.x0_model_coef,
    )
    if table.memory_gain is not None:
        columns = (*columns, table.memory_gain)
    return tuple(column.contiguous() for column in columns)


def posterior(
    state: torch.Tensor,
    output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """float32 [B, D]."""
    call = _posterior if eager(state, output) else _posterior_op
    columns = list(mean_columns(table))
    return call(state, output, seed, step, columns, table.clip_range, unconditional_output, guidance_scale, noise)


def posterior_with_memory(
    state: torch.Tensor,
    output: torch.Tensor,
    previous_x0: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next state and the estimate of x0, float32 [B, D] each."""
    call = _posterior_with_memory if eager(state, output) else _posterior_with_memory_op
    columns = list(mean_columns(table))
    return call(state, output, previous_x0, seed, step, columns, unconditional_output, guidance_scale, noise)


def _posterior(
    state: torch.Tensor,
    output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    columns: list[torch.Tensor],
    clip_range: float | None,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    return _launch(state, output, None, seed, step, columns, clip_range, unconditional_output, guidance_scale, noise)[0]


def _posterior_with_memory(
    state: torch.Tensor,
    output: torch.Tensor,
    previous_x0: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    columns: list[torch.Tensor],
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(state, output, previous_x0, seed, step, columns, None, unconditional_output, guidance_scale, noise)


def _launch(
    state: torch.Tensor,
    output: torch.Tensor,
    previous_x0: torch.Tensor | None,
    seed: torch.Tensor,
    step: torch.Tensor,
    columns: list[torch.Tensor],
    clip_range: float | None,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next state, and the estimate of x0 where there is one before it."""
    batch, numel = state.shape
    state, output = rows_of(state), rows_of(output)
    unconditional = output if unconditional_output is None else rows_of(unconditional_output)
    stored = output if noise is None else rows_of(noise)
    previous = state if previous_x0 is None else rows_of(previous_x0)
    out = torch.empty(batch, numel, dtype=torch.float32, device=state.device)
    x0 = out if previous_x0 is None else torch.empty_like(out)
    block = block_size(numel)
    grid = check_programs("state", batch * triton.cdiv(numel, block))
    with on_device(state):
        posterior_kernel[(grid,)](
            state,
            output,
            unconditional,
            stored,
            previous,
            seed.contiguous(),
            step.contiguous(),
            *columns[:5],
            columns[-1],
            out,
            x0,
            state.stride(0),
            output.stride(0),
            unconditional.stride(0),
            stored.stride(0),
            previous.stride(0),
            numel,
            columns[0].shape[0],
            float(guidance_scale),
            float(clip_range or 0.0),
            GUIDED=unconditional_output is not None,
            CLIP=clip_range is not None,
            HAS_NOISE=noise is not None,
            MEMORY=previous_x0 is not None,
            COUNTERS=block // 4,
            enable_fp_fusion=False,
        )
    return out, x0


_posterior_op = torch.library.custom_op(
    "free_kernels::posterior",
    _posterior,
    mutates_args=(),
    schema="(Tensor state, Tensor output, Tensor seed, Tensor step, Tensor[] columns, float? clip_range, "
    "Tensor? unconditional_output, float guidance_scale, Tensor? noise) -> Tensor",
)
_posterior_with_memory_op = torch.library.custom_op(
    "free_kernels::posterior_with_memory",
    _posterior_with_memory,
    mutates_args=(),
    schema="(Tensor state, Tensor output, Tensor previous_x0, Tensor seed, Tensor step, Tensor[] columns, "
    "Tensor? unconditional_output, float guidance_scale, Tensor? noise) -> (Tensor, Tensor)",
)


@_posterior_op.register_fake
def _(state: torch.Tensor, *_: object) -> torch.Tensor:
    return state.new_empty(state.shape, dtype=torch.float32)


@_posterior_with_memory_op.register_fake
def _(state: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return state.new_empty(state.shape, dtype=torch.float32), state.new_empty(state.shape, dtype=torch.float32)
