"""What a window teaches of the gains, in Triton: its frequencies, the sums of its pairs by band, and the sums as of each
column, a launch each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.gains import Scales
from free_kernels.launch import check_programs, eager, on_device, rows_of
from free_kernels.patches import Patches
from free_kernels.patches_kernel import load_square, padded, patch_offsets, to_frequencies
from free_kernels.posterior.kernel import load_column, load_guided
from free_kernels.table import StepTable

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_TILE = 4096
"""Numbers that a program compares with the bands at a time."""
_MOST_CHUNKS = 16
"""Programs that share the numbers of a group, so that a lone sample keeps more of the device busy."""


@triton.jit
def frequencies_kernel(
    state_ptr,  # float [B, W, D], strides state_batch, state_column
    output_ptr,  # float [B, W, D], strides output_batch, output_column
    unconditional_ptr,  # float [B, W, D], strides unconditional_batch, unconditional_column; not read unless GUIDED
    step_ptr,  # int64 [B]
    x0_state_ptr,  # float [S]
    x0_model_ptr,  # float [S]
    signal_ptr,  # float [S]
    mixing_ptr,  # float [M, M]
    rows_ptr,  # float [P, P]
    columns_ptr,  # float [Q, Q]
    order_ptr,  # int64 [D]
    states_out_ptr,  # float32 [B, W, D]
    x0_out_ptr,  # float32 [B, W, D]
    state_batch,
    state_column,
    output_batch,
    output_column,
    unconditional_batch,
    unconditional_column,
    window,
    numel,
    num_steps,
    guidance_scale,
    GUIDED: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    patches = numel // (M * P * Q)
    mixed = tl.program_id(0) % M
    patch = tl.program_id(0) // M % patches
    column = (tl.program_id(0) // M // patches % window).to(tl.int64)
    sample = (tl.program_id(0) // M // patches // window).to(tl.int64)
    step = tl.minimum(tl.maximum(tl.load(step_ptr + sample) + column, 0), num_steps - 1)
    inside, mask = patch_offsets(P, Q, ROWS, COLUMNS)
    rows, columns = load_square(rows_ptr, P, ROWS), load_square(columns_ptr, Q, COLUMNS)
    x0_state, x0_model = load_column(x0_state_ptr, step), load_column(x0_model_ptr, step)

    states = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    x0 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for channel in range(M):
        order = tl.load(order_ptr + (patch * M + channel) * (P * Q) + inside, mask=mask, other=0)
        state = tl.load(state_ptr + sample * state_batch + column * state_column + order, mask=mask, other=0.0)
        state = state.to(tl.float32)
        output = load_guided(
            output_ptr + sample * output_batch + column * output_column,
            unconditional_ptr + sample * unconditional_batch + column * unconditional_column,
            order,
            mask,
            guidance_scale,
            GUIDED,
        )
        part = load_column(mixing_ptr + mixed * M, channel)
        states += part * state
        x0 += part * (x0_state * state + x0_model * output)
    row = (sample * window + column) * numel + (patch * M + mixed) * (P * Q)
    states = to_frequencies(states / load_column(signal_ptr, step), rows, columns)
    tl.store(states_out_ptr + row + inside, states, mask=mask)
    tl.store(x0_out_ptr + row + inside, to_frequencies(x0, rows, columns), mask=mask)


@triton.jit
def pairs_kernel(
    states_ptr,  # float32 [B, W, D], frequencies
    x0_ptr,  # float32 [B, W, D], frequencies
    known_states_ptr,  # float32 [B, A, D]
    known_x0_ptr,  # float32 [B, A, D]
    step_ptr,  # int64 [B]
    known_step_ptr,  # int64 [B]
    noise_ratio_ptr,  # float [S]
    band_ptr,  # int64 [M * P * Q]
    pairs_ptr,  # float32 [B, W, 2, CHUNKS, 2, G * K]: answered, size
    window,
    anchors,
    numel,
    num_steps,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BANDS: tl.constexpr,
):
    group = tl.program_id(0) % GROUPS
    chunk = tl.program_id(0) // GROUPS % CHUNKS
    kind = tl.program_id(0) // (GROUPS * CHUNKS) % 2
    column = tl.program_id(0) // (2 * GROUPS * CHUNKS) % window
    sample = (tl.program_id(0) // (2 * GROUPS * CHUNKS) // window).to(tl.int64)
    first_step = tl.load(step_ptr + sample)
    step = tl.minimum(first_step + column, num_steps - 1)
    before = tl.minimum(tl.maximum(first_step + column - tl.load(known_step_ptr + sample), 0), anchors - 1)
    one_before = tl.maximum(column - 1, 0)
    row = (sample * window + column) * numel
    # what it is held against: another state of the step in the last window, or the state one column before
    if kind == 0:
        states_before_ptr, x0_before_ptr = known_states_ptr, known_x0_ptr
        row_before = (sample * anchors + before) * numel
        shrunk = 1.0
    else:
        states_before_ptr, x0_before_ptr = states_ptr, x0_ptr
        row_before = (sample * window + one_before) * numel
        step_before = tl.minimum(first_step + one_before, num_steps - 1)
        ratio = load_column(noise_ratio_ptr, step) / load_column(noise_ratio_ptr, step_before)
        shrunk = ratio * ratio

    of_group = numel // GROUPS
    bands = tl.arange(0, BANDS)[None, :]
    answered = tl.zeros([BANDS], dtype=tl.float32)
    size = tl.zeros([BANDS], dtype=tl.float32)
    for block in range(BLOCKS):
        at = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        mask = at < of_group
        band = tl.load(band_ptr + at % PATCH, mask=mask, other=-1).to(tl.int32)
        at = at.to(tl.int64) + group * of_group
        state_before = tl.load(states_before_ptr + row_before + at, mask=mask, other=0.0)
        x0_before = tl.load(x0_before_ptr + row_before + at, mask=mask, other=0.0)
        answer = tl.load(x0_ptr + row + at, mask=mask, other=0.0) - x0_before
        state = tl.load(states_ptr + row + at, mask=mask, other=0.0)
        innovation = state - (x0_before + shrunk * (state_before - x0_before))
        member = band[:, None] == bands
        answered += tl.sum(tl.where(member, (answer * innovation)[:, None], 0.0), axis=0)
        size += tl.sum(tl.where(member, (innovation * innovation)[:, None], 0.0), axis=0)
    out = pairs_ptr + ((((sample * window + column) * 2 + kind) * CHUNKS + chunk) * 2 * GROUPS + group) * K
    out += tl.arange(0, BANDS)
    tl.store(out, answered, mask=tl.arange(0, BANDS) < K)
    tl.store(out + GROUPS * K, size, mask=tl.arange(0, BANDS) < K)


@triton.jit
def sums_kernel(
    pairs_ptr,  # float32 [B, W, 2, CHUNKS, 2, BANDS]: answered, size
    known_sums_ptr,  # float32 [B, A, 2, 2, BANDS]
    step_ptr,  # int64 [B]
    length_ptr,  # int64 [B]
    known_step_ptr,  # int64 [B]
    known_length_ptr,  # int64 [B]
    noise_ratio_ptr,  # float [S]
    sums_ptr,  # float32 [B, W, 2, 2, BANDS]
    anchors,
    num_steps,
    kept_again,
    kept_next,
    WINDOW: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BANDS: tl.constexpr,
    PADDED: tl.constexpr,
):
    sample = (tl.program_id(0) // 2).to(tl.int64)
    kind = tl.program_id(0) % 2
    bands = tl.arange(0, PADDED)
    mask = bands < BANDS
    chunk = tl.arange(0, CHUNKS_PADDED)[:, None]
    parts = chunk * (2 * BANDS) + bands[None, :]
    of_parts = (chunk < CHUNKS) & mask[None, :]
    first_step = tl.load(step_ptr + sample)
    length = tl.load(length_ptr + sample)
    since = first_step - tl.load(known_step_ptr + sample)
    known_length = tl.load(known_length_ptr + sample)
    kept = tl.where(kind == 0, kept_again, kept_next)
    # as of the last settled step: what lies beyond has seen the noise of steps to be drafted
    settled = tl.minimum(tl.maximum(since - 1, 0), anchors - 1)
    settled_row = known_sums_ptr + ((sample * anchors + settled) * 2 + kind) * 2 * BANDS
    answered = tl.load(settled_row + bands, mask=mask, other=0.0)
    unanswered = tl.load(settled_row + BANDS + bands, mask=mask, other=0.0)
    for column in range(WINDOW):
        row = ((sample * WINDOW + column) * 2 + kind) * 2 * BANDS
        noise_ratio = load_column(noise_ratio_ptr, tl.minimum(first_step + column, num_steps - 1))
        again = tl.where((since + column < known_length) & (first_step > 0), 1, 0)
        counts = tl.where(kind == 0, again, tl.where(column > 0, 1, 0))
        counts = tl.where(column < length, counts, 0)
        taught = tl.sum(tl.load(pairs_ptr + row * CHUNKS + parts, mask=of_parts, other=0.0), axis=0)
        size = tl.sum(tl.load(pairs_ptr + row * CHUNKS + BANDS + parts, mask=of_parts, other=0.0), axis=0)
        missed = (size - taught) / noise_ratio
        whole = tl.sum(size, axis=0) + TINY
        taught, missed = taught / whole, missed / whole
        # what was not evaluated, or overflowed, teaches nothing
        taught = tl.where(tl.abs(taught) < float("inf"), taught, 0.0)
        missed = tl.where(tl.abs(missed) < float("inf"), missed, 0.0)
        answered = tl.where(counts > 0, kept * answered + taught, answered)
        unanswered = tl.where(counts > 0, kept * unanswered + missed, unanswered)
        tl.store(sums_ptr + row + bands, answered, mask=mask)
        tl.store(sums_ptr + row + BANDS + bands, unanswered, mask=mask)


def learn_gains(
    states: torch.Tensor,
    outputs: torch.Tensor,
    step: torch.Tensor,
    length: torch.Tensor,
    known_states: torch.Tensor,
    known_x0: torch.Tensor,
    known_sums: torch.Tensor,
    known_step: torch.Tensor,
    known_length: torch.Tensor,
    table: StepTable,
    scales: Scales,
    patches: Patches,
    forgetting: tuple[float, float],
    unconditional_outputs: torch.Tensor | None,
    guidance_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frequencies of states and x0 [B, W, D], and sums [B, W, 2, 2, bands]; float32."""
    call = _learn_gains if eager(states, outputs, known_states) else _learn_gains_op
    return call(
        states,
        outputs,
        unconditional_outputs,
        [step, length, known_step, known_length],
        [known_states, known_x0, known_sums],
        [table.x0_state_coef, table.x0_model_coef, *scales],
        [patches.mixing, patches.rows, patches.columns, patches.order, patches.band, patches.share],
        patches.groups,
        list(forgetting),
        guidance_scale,
    )


def _learn_gains(
    states: torch.Tensor,
    outputs: torch.Tensor,
    unconditional_outputs: torch.Tensor | None,
    index: list[torch.Tensor],
    known: list[torch.Tensor],
    coefficients: list[torch.Tensor],
    cut: list[torch.Tensor],
    groups: int,
    forgetting: list[float],
    guidance_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, window, numel = states.shape
    states, outputs = rows_of(states), rows_of(outputs)
    unconditional = outputs if unconditional_outputs is None else rows_of(unconditional_outputs)
    known_states, known_x0, known_sums = (values.contiguous() for values in known)
    step, length, known_step, known_length = (values.contiguous() for values in index)
    x0_state, x0_model, signal, noise_ratio = (column.contiguous() for column in coefficients)
    mixing, rows, columns, order, band, share = (values.contiguous() for values in cut)
    channels, height, width, bands = mixing.shape[0], rows.shape[0], columns.shape[0], share.shape[0]
    anchors, num_steps = known_states.shape[1], signal.shape[0]
    new_states = torch.empty(batch, window, numel, dtype=torch.float32, device=states.device)
    new_x0 = torch.empty_like(new_states)
    block = max(16, _TILE // triton.next_power_of_2(bands))
    blocks = triton.cdiv(numel // groups, block)
    of_chunk = triton.cdiv(blocks, _MOST_CHUNKS)
    chunks = triton.cdiv(blocks, of_chunk)
    pairs = torch.empty(batch, window, 2, chunks, 2, groups * bands, dtype=torch.float32, device=states.device)
    sums = pairs.new_empty(batch, window, 2, 2, groups * bands)
    check_programs("states", batch * window * max(numel // (height * width), 2 * groups * chunks))
    with on_device(states):
        frequencies_kernel[(batch * window * (numel // (height * width)),)](
            states,
            outputs,
            unconditional,
            step,
            x0_state,
            x0_model,
            signal,
            mixing,
            rows,
            columns,
            order,
            new_states,
            new_x0,
            *states.stride()[:2],
            *outputs.stride()[:2],
            *unconditional.stride()[:2],
            window,
            numel,
            num_steps,
            float(guidance_scale),
            GUIDED=unconditional_outputs is not None,
            M=channels,
            P=height,
            Q=width,
            ROWS=padded(height),
            COLUMNS=padded(width),
            enable_fp_fusion=False,
            num_warps=8,
        )
        pairs_kernel[(batch * window * 2 * chunks * groups,)](
            new_states,
            new_x0,
            known_states,
            known_x0,
            step,
            known_step,
            noise_ratio,
            band,
            pairs,
            window,
            anchors,
            numel,
            num_steps,
            CHUNKS=chunks,
            GROUPS=groups,
            K=bands,
            PATCH=channels * height * width,
            BLOCKS=of_chunk,
            BLOCK=block,
            BANDS=triton.next_power_of_2(bands),
            enable_fp_fusion=False,
        )
        sums_kernel[(2 * batch,)](
            pairs,
            known_sums,
            step,
            length,
            known_step,
            known_length,
            noise_ratio,
            sums,
            anchors,
            num_steps,
            float(forgetting[0]),
            float(forgetting[1]),
            WINDOW=window,
            CHUNKS=chunks,
            CHUNKS_PADDED=triton.next_power_of_2(chunks),
            BANDS=groups * bands,
            PADDED=triton.next_power_of_2(groups * bands),
            enable_fp_fusion=False,
        )
    return new_states, new_x0, sums


_learn_gains_op = torch.library.custom_op(
    "free_kernels::learn_gains",
    _learn_gains,
    mutates_args=(),
    schema="(Tensor states, Tensor outputs, Tensor? unconditional_outputs, Tensor[] index, Tensor[] known, "
    "Tensor[] coefficients, Tensor[] cut, int groups, float[] forgetting, float guidance_scale) -> (Tensor, Tensor, Tensor)",
)


@_learn_gains_op.register_fake
def _(
    states: torch.Tensor,
    outputs: torch.Tensor,
    unconditional_outputs: torch.Tensor | None,
    index: list[torch.Tensor],
    known: list[torch.Tensor],
    coefficients: list[torch.Tensor],
    cut: list[torch.Tensor],
    groups: int,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bands = cut[-1].shape[0]
    window = states.shape[:2]
    values = states.new_empty(states.shape, dtype=torch.float32)
    return values, torch.empty_like(values), values.new_empty(*window, 2, 2, groups * bands)
