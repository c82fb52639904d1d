"""What learned gains add to held drafts, in Triton: one launch for a whole window, in which each mixed channel of each patch
walks on its own. Where channels are mixed another launch adds up what they have for each number.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.gains import NEVER_ABOVE, Scales
from free_kernels.launch import block_size, check_programs, eager, on_device, rows_of
from free_kernels.patches import Patches
from free_kernels.patches_kernel import load_square, padded, patch_offsets, to_frequencies, to_numbers
from free_kernels.posterior.kernel import load_column
from free_kernels.table import StepTable

LEAST = tl.constexpr(1 / NEVER_ABOVE - 1)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def gain_correction_kernel(
    path_ptr,  # float [B, >= DRAFTS, D], strides path_batch, path_column
    states_ptr,  # float32 [B, A, D], frequencies
    x0_ptr,  # float32 [B, A, D], frequencies
    sums_ptr,  # float32 [B, A, 2, 2, bands]
    step_ptr,  # int64 [B]
    known_step_ptr,  # int64 [B]
    known_length_ptr,  # int64 [B]
    state_coef_ptr,  # float [S], of the mean: clip_state_coef where CLIP
    model_coef_ptr,  # float [S], of the mean: clip_x0_coef where CLIP
    x0_state_ptr,  # float [S]
    x0_model_ptr,  # float [S]
    signal_ptr,  # float [S]
    noise_ratio_ptr,  # float [S]
    memory_gain_ptr,  # float [S]; not read unless MEMORY
    mixing_ptr,  # float [M, M]
    rows_ptr,  # float [P, P]
    columns_ptr,  # float [Q, Q]
    order_ptr,  # int64 [D]
    band_ptr,  # int64 [M * P * Q]
    share_ptr,  # float [K]
    added_ptr,  # float32 [B, DRAFTS, D]: the correction, or if M > 1 its parts, patch after patch
    path_batch,
    path_column,
    anchors,
    numel,
    num_steps,
    ridge,
    DRAFTS: tl.constexpr,
    CLIP: tl.constexpr,
    MEMORY: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BANDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    patches = numel // (M * P * Q)
    mixed = tl.program_id(0) % M
    patch = tl.program_id(0) // M % patches
    sample = (tl.program_id(0) // M // patches).to(tl.int64)
    inside, mask = patch_offsets(P, Q, ROWS, COLUMNS)
    of_patch = patch * (M * P * Q) + inside
    of_channel = of_patch + mixed * (P * Q)
    all_bands = tl.arange(0, BANDS)
    rows, columns = load_square(rows_ptr, P, ROWS), load_square(columns_ptr, Q, COLUMNS)
    first_step = tl.load(step_ptr + sample)
    known_step = tl.load(known_step_ptr + sample)
    last_anchor = tl.minimum(tl.load(known_length_ptr + sample), anchors) - 1

    band = tl.load(band_ptr + mixed * (P * Q) + inside, mask=mask, other=0).to(tl.int32)
    share = tl.load(share_ptr + band, mask=mask, other=0.0).to(tl.float32) * ridge / GROUPS
    band += patch // (patches // GROUPS) * K
    departure = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    previous = departure
    path_row = path_ptr + sample * path_batch
    added_row = added_ptr + sample * DRAFTS * numel
    for j in range(DRAFTS):
        step = tl.minimum(tl.maximum(first_step + j, 0), num_steps - 1)
        # the latest evaluation at this step or before: a later one has seen this step's noise
        anchor = tl.maximum(tl.minimum(step - known_step, last_anchor), 0)
        known = tl.minimum(tl.maximum(known_step + anchor, 0), num_steps - 1)
        column = sample * anchors + anchor
        signal, noise_ratio = load_column(signal_ptr, step), load_column(noise_ratio_ptr, step)

        kind = tl.where(known < step, 1, 0)
        sums_row = sums_ptr + (column * 2 + kind) * (2 * GROUPS * K)
        unanswered_row = sums_row + GROUPS * K
        whole = all_bands < GROUPS * K
        answered = tl.load(sums_row + band, mask=mask, other=0.0)
        answered += share * tl.sum(tl.load(sums_row + all_bands, mask=whole, other=0.0), axis=0)
        answered = tl.where(answered < 0.0, 0.0, answered)
        unanswered = tl.load(unanswered_row + band, mask=mask, other=0.0) * noise_ratio
        unanswered += share * tl.sum(tl.load(unanswered_row + all_bands, mask=whole, other=0.0) * noise_ratio, axis=0)
        unanswered = tl.where(unanswered < answered * LEAST, answered * LEAST, unanswered)
        gain = answered / (answered + unanswered + TINY)

        if M > 1:
            numbers = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            for channel in range(M):
                order = tl.load(order_ptr + of_patch + channel * (P * Q), mask=mask, other=0)
                value = tl.load(path_row + order, mask=mask, other=0.0).to(tl.float32)
                numbers += load_column(mixing_ptr + mixed * M, channel) * value
        else:
            order = tl.load(order_ptr + of_patch, mask=mask, other=0)
            numbers = tl.load(path_row + order, mask=mask, other=0.0).to(tl.float32)
        x0 = tl.load(x0_ptr + column * numel + of_channel, mask=mask, other=0.0)
        state = tl.load(states_ptr + column * numel + of_channel, mask=mask, other=0.0)
        ratio = noise_ratio / load_column(noise_ratio_ptr, known)
        innovation = (to_frequencies(numbers, rows, columns) + departure) / signal
        added = gain * (innovation - (x0 + ratio * ratio * (state - x0)))

        x0_model = load_column(x0_model_ptr, step)
        slope, x0_coef = load_column(state_coef_ptr, step), load_column(model_coef_ptr, step)
        if not CLIP:
            x0_coef = x0_coef / x0_model
            slope = slope - x0_coef * load_column(x0_state_ptr, step)
        effective = added
        if MEMORY:
            effective += load_column(memory_gain_ptr, step) * x0_model * (added - previous)
            previous = added
        departure = slope * departure + x0_coef * effective
        numbers = to_numbers(added, rows, columns) / x0_model
        if M > 1:  # the other channels' programs have their parts of each number
            tl.store(added_row + of_channel, numbers, mask=mask)
        else:
            tl.store(added_row + tl.load(order_ptr + of_patch, mask=mask, other=0), numbers, mask=mask)
        path_row += path_column
        added_row += numel


@triton.jit
def unmix_kernel(
    added_ptr,  # float32 [B * DRAFTS, D], patch after patch, channels mixed
    mixing_ptr,  # float [M, M]
    order_ptr,  # int64 [D]
    correction_ptr,  # float32 [B * DRAFTS, D]
    numel,
    M: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (numel + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * numel
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    channel = at // PATCH % M
    numbers = tl.zeros([BLOCK], dtype=tl.float32)
    for mixed in range(M):
        part = tl.load(mixing_ptr + mixed * M + channel, mask=mask, other=0.0).to(tl.float32)
        numbers += part * tl.load(added_ptr + row + at + (mixed - channel) * PATCH, mask=mask, other=0.0)
    tl.store(correction_ptr + row + tl.load(order_ptr + at, mask=mask, other=0), numbers, mask=mask)


def gain_correction(
    path: torch.Tensor,
    step: torch.Tensor,
    known_states: torch.Tensor,
    known_x0: torch.Tensor,
    known_sums: torch.Tensor,
    known_step: torch.Tensor,
    known_length: torch.Tensor,
    table: StepTable,
    scales: Scales,
    patches: Patches,
    ridge: float,
) -> torch.Tensor:
    """The correction [B, W-1, D], float32."""
    call = _gain_correction if eager(path, known_states) else _gain_correction_op
    clips = table.clip_range is not None
    ends = (table.clip_state_coef, table.clip_x0_coef) if clips else (table.state_coef, table.model_coef)
    return call(
        path,
        [step, known_step, known_length],
        [known_states, known_x0, known_sums],
        [*ends, table.x0_state_coef, table.x0_model_coef, *scales],
        table.memory_gain,
        [patches.mixing, patches.rows, patches.columns, patches.order, patches.band, patches.share],
        patches.groups,
        clips,
        ridge,
    )


def _gain_correction(
    path: torch.Tensor,
    index: list[torch.Tensor],
    known: list[torch.Tensor],
    coefficients: list[torch.Tensor],
    memory_gain: torch.Tensor | None,
    cut: list[torch.Tensor],
    groups: int,
    clips: bool,
    ridge: float,
) -> torch.Tensor:
    batch, window, numel = path.shape
    path = rows_of(path)
    channels, height, width = (matrix.shape[0] for matrix in cut[:3])
    bands = cut[-1].shape[0]
    correction = torch.empty(batch, window - 1, numel, dtype=torch.float32, device=path.device)
    added = correction if channels == 1 else torch.empty_like(correction)
    cut = [values.contiguous() for values in cut]
    grid = check_programs("path", batch * (numel // (height * width)))
    with on_device(path):
        gain_correction_kernel[(grid,)](
            path,
            *(values.contiguous() for values in known),
            *(values.contiguous() for values in index),
            *(column.contiguous() for column in coefficients),
            (coefficients[0] if memory_gain is None else memory_gain).contiguous(),
            *cut,
            added,
            *path.stride()[:2],
            known[0].shape[1],
            numel,
            coefficients[0].shape[0],
            float(ridge),
            DRAFTS=window - 1,
            CLIP=clips,
            MEMORY=memory_gain is not None,
            GROUPS=groups,
            K=bands,
            M=channels,
            P=height,
            Q=width,
            BANDS=triton.next_power_of_2(groups * bands),
            ROWS=padded(height),
            COLUMNS=padded(width),
            enable_fp_fusion=False,
            num_warps=8,
        )
        if channels > 1:
            block = block_size(numel)
            unmix_kernel[(check_programs("path", batch * (window - 1) * triton.cdiv(numel, block)),)](
                added,
                cut[0],
                cut[3],
                correction,
                numel,
                M=channels,
                PATCH=height * width,
                BLOCK=block,
                enable_fp_fusion=False,
            )
    return correction


_gain_correction_op = torch.library.custom_op(
    "free_kernels::gain_correction",
    _gain_correction,
    mutates_args=(),
    schema="(Tensor path, Tensor[] index, Tensor[] known, Tensor[] coefficients, Tensor? memory_gain, Tensor[] cut, "
    "int groups, bool clips, float ridge) -> Tensor",
)


@_gain_correction_op.register_fake
def _(path: torch.Tensor, *_: object) -> torch.Tensor:
    batch, window, numel = path.shape
    return path.new_empty(batch, window - 1, numel, dtype=torch.float32)
