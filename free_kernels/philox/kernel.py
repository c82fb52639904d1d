"""Philox4x32-10 and Box-Muller in Triton. The other kernels draw their noise from the helpers here.

A block of elements is laid out as counters x 4 lanes, so that every counter is computed once and all of its words are used.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from free_kernels.launch import block_size, check_programs, eager, on_device

ROUNDS = tl.constexpr(10)
MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
UNIFORM_BLOCK = 128


@triton.jit
def philox_words(seed, counter, step, STREAM: tl.constexpr):
    """Words 0 … 3 (uint32) of counter (counter, step, STREAM, 0) under the key ``seed`` (int64).

    Scalars stay scalars until a round mixes them with a block, which saves a round and a half.
    """
    low_key = seed.to(tl.uint32)
    high_key = (seed >> 32).to(tl.uint32)
    word0 = counter.to(tl.uint32)
    word1 = step.to(tl.uint32)
    word2 = low_key * 0 + STREAM
    word3 = low_key * 0
    for _ in tl.static_range(ROUNDS):
        product0 = word0.to(tl.uint64) * MULTIPLIER_0
        product2 = word2.to(tl.uint64) * MULTIPLIER_1
        word0 = (product2 >> 32).to(tl.uint32) ^ word1 ^ low_key
        word1 = product2.to(tl.uint32)
        word2 = (product0 >> 32).to(tl.uint32) ^ word3 ^ high_key
        word3 = product0.to(tl.uint32)
        low_key += WEYL_0
        high_key += WEYL_1
    return word0, word1, word2, word3


@triton.jit
def minus_two_log(value, SHIFT: tl.constexpr):
    """-2 log(value * 2**-SHIFT) for positive normal float32, to 2 units in the last place."""
    # value = 2**exponent * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); near 1 the exponent is 0 and nothing cancels
    bits = value.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    exponent = ((bits >> 23) - SHIFT).to(tl.float32)
    f = ((bits & 0x007FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    # minimax polynomial of -2 log(1 + f) / f, relative error 2.7e-8
    series = tl.fma(f, -0.1744471937417984, 0.28733691573143005)
    series = tl.fma(f, series, -0.2990453243255615)
    series = tl.fma(f, series, 0.33124786615371704)
    series = tl.fma(f, series, -0.39913666248321533)
    series = tl.fma(f, series, 0.5000414848327637)
    series = tl.fma(f, series, -0.6666837334632874)
    series = tl.fma(f, series, 0.9999997615814209)
    series = tl.fma(f, series, -2.0)
    return tl.fma(exponent, -1.3862943611198906, f * series)


@triton.jit
def box_muller(radius_word, angle_word):
    """Two independent standard normal numbers from two uint32 words: radius times cosine and sine of the angle."""
    radius = tl.sqrt(minus_two_log(radius_word.to(tl.float32) + 0.5, 32))
    # angle = pi * half_turns + pi/2 * t, t in [-1, 1): reduced in integers, so without error; a half turn flips both signs
    doubled = angle_word << 1
    t = doubled.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    flip = (angle_word ^ doubled) & 0x80000000
    radius = (radius.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    # minimax polynomials of cos(pi/2 t) and sin(pi/2 t) / t in t², absolute error 2.2e-10 and 6.7e-9
    square = t * t
    cosine = tl.fma(square, -2.3824917661841027e-05, 0.0009177248575724661)
    cosine = tl.fma(square, cosine, -0.02086268924176693)
    cosine = tl.fma(square, cosine, 0.2536693215370178)
    cosine = tl.fma(square, cosine, -1.2337005138397217)
    cosine = tl.fma(square, cosine, 1.0)
    sine = tl.fma(square, 0.0001516785123385489, -0.004674157593399286)
    sine = tl.fma(square, sine, 0.07968992739915848)
    sine = tl.fma(square, sine, -0.6459637880325317)
    sine = tl.fma(square, sine, 1.5707963705062866)
    return radius * cosine, radius * (sine * t)


@triton.jit
def normals(seed, first_counter, step, STREAM: tl.constexpr, COUNTERS: tl.constexpr):
    """Standard normal numbers [COUNTERS, 4] of counters ``first_counter`` on; ``seed`` and ``step`` are int64 scalars."""
    counter = first_counter.to(tl.uint32) + tl.arange(0, COUNTERS).to(tl.uint32)
    word0, word1, word2, word3 = philox_words(seed, counter, step, STREAM)
    lane0, lane1 = box_muller(word0, word1)
    lane2, lane3 = box_muller(word2, word3)
    return tl.reshape(tl.join(tl.join(lane0, lane2), tl.join(lane1, lane3)), (COUNTERS, 4))


@triton.jit
def open_uniform_scaled(word):
    """2**33 u for u in (0, 1] from a uint32 word, rounded once to float32 as the reference rounds u."""
    return (word.to(tl.int64) * 2 + 1).to(tl.float32)


@triton.jit
def block_offsets(COUNTERS: tl.constexpr):
    """int32 [COUNTERS, 4]: the elements of a block."""
    return tl.arange(0, COUNTERS)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def philox_kernel(
    seed_ptr,  # int64 [N]
    step_ptr,  # int64 [N]
    out_ptr,  # int64 [N, num_counters, 4]
    num_counters,
    STREAM: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    chunks = (num_counters + COUNTERS - 1) // COUNTERS
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * COUNTERS
    counter = first.to(tl.uint32) + tl.arange(0, COUNTERS).to(tl.uint32)
    word0, word1, word2, word3 = philox_words(tl.load(seed_ptr + row), counter, tl.load(step_ptr + row), STREAM)
    index = tl.arange(0, COUNTERS)
    mask = index < tl.minimum(num_counters - first, COUNTERS).to(tl.int32)
    at = out_ptr + (row * num_counters + first) * 4 + index * 4
    tl.store(at, word0.to(tl.int64), mask=mask)
    tl.store(at + 1, word1.to(tl.int64), mask=mask)
    tl.store(at + 2, word2.to(tl.int64), mask=mask)
    tl.store(at + 3, word3.to(tl.int64), mask=mask)


@triton.jit
def normal_kernel(
    seed_ptr,  # int64 [N]
    step_ptr,  # int64 [N]
    out_ptr,  # float [N, numel]
    numel,
    STREAM: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    chunks = (numel + COUNTERS * 4 - 1) // (COUNTERS * 4)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * COUNTERS
    value = normals(tl.load(seed_ptr + row), first, tl.load(step_ptr + row), STREAM, COUNTERS)
    offsets = block_offsets(COUNTERS)
    mask = offsets < tl.minimum(numel - first * 4, COUNTERS * 4).to(tl.int32)
    tl.store(out_ptr + row * numel + first * 4 + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def uniform_kernel(
    seed_ptr,  # int64 [N]
    step_ptr,  # int64 [N]
    out_ptr,  # float [N]
    rows,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    seed = tl.load(seed_ptr + row, mask=mask, other=0)
    step = tl.load(step_ptr + row, mask=mask, other=0)
    word, _, _, _ = philox_words(seed, step * 0, step, STREAM)
    value = open_uniform_scaled(word) * 1.1641532182693481e-10
    tl.store(out_ptr + row, value.to(out_ptr.dtype.element_ty), mask=mask)


def philox(seed: torch.Tensor, step: torch.Tensor, num_counters: int, stream: int) -> torch.Tensor:
    """int64 [*shape, num_counters, 4]."""
    return (_philox if eager(seed, step) else _philox_op)(seed, step, num_counters, stream)


def normal(seed: torch.Tensor, step: torch.Tensor, numel: int, stream: int, dtype: torch.dtype) -> torch.Tensor:
    """``dtype`` [*shape, numel]."""
    return (_normal if eager(seed, step) else _normal_op)(seed, step, numel, stream, dtype)


def uniform(seed: torch.Tensor, step: torch.Tensor, stream: int, dtype: torch.dtype) -> torch.Tensor:
    """``dtype`` [*shape]."""
    return (_uniform if eager(seed, step) else _uniform_op)(seed, step, stream, dtype)


def _flat(seed: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Size]:
    seed, step = torch.broadcast_tensors(seed, step)
    return seed.reshape(-1).contiguous(), step.reshape(-1).contiguous(), seed.shape


def _philox(seed: torch.Tensor, step: torch.Tensor, num_counters: int, stream: int) -> torch.Tensor:
    seed, step, shape = _flat(seed, step)
    out = torch.empty(*shape, num_counters, 4, dtype=torch.int64, device=seed.device)
    if out.numel():
        counters = block_size(num_counters * 4) // 4
        grid = check_programs("seed", len(seed) * triton.cdiv(num_counters, counters))
        with on_device(seed):
            philox_kernel[(grid,)](seed, step, out, num_counters, STREAM=stream, COUNTERS=counters, enable_fp_fusion=False)
    return out


def _normal(seed: torch.Tensor, step: torch.Tensor, numel: int, stream: int, dtype: torch.dtype) -> torch.Tensor:
    seed, step, shape = _flat(seed, step)
    out = torch.empty(*shape, numel, dtype=dtype, device=seed.device)
    if out.numel():
        block = block_size(numel)
        grid = check_programs("seed", len(seed) * triton.cdiv(numel, block))
        with on_device(seed):
            normal_kernel[(grid,)](seed, step, out, numel, STREAM=stream, COUNTERS=block // 4, enable_fp_fusion=False)
    return out


def _uniform(seed: torch.Tensor, step: torch.Tensor, stream: int, dtype: torch.dtype) -> torch.Tensor:
    seed, step, shape = _flat(seed, step)
    out = torch.empty(shape, dtype=dtype, device=seed.device)
    if out.numel():
        grid = triton.cdiv(out.numel(), UNIFORM_BLOCK)
        with on_device(seed):
            uniform_kernel[(grid,)](seed, step, out, out.numel(), STREAM=stream, BLOCK=UNIFORM_BLOCK, enable_fp_fusion=False)
    return out


_philox_op = torch.library.custom_op(
    "free_kernels::philox",
    _philox,
    mutates_args=(),
    schema="(Tensor seed, Tensor step, SymInt num_counters, int stream) -> Tensor",
)
_normal_op = torch.library.custom_op(
    "free_kernels::normal",
    _normal,
    mutates_args=(),
    schema="(Tensor seed, Tensor step, SymInt numel, int stream, ScalarType dtype) -> Tensor",
)
_uniform_op = torch.library.custom_op(
    "free_kernels::uniform",
    _uniform,
    mutates_args=(),
    schema="(Tensor seed, Tensor step, int stream, ScalarType dtype) -> Tensor",
)


@_philox_op.register_fake
def _(seed: torch.Tensor, step: torch.Tensor, num_counters: int, stream: int) -> torch.Tensor:
    shape = torch.broadcast_shapes(seed.shape, step.shape)
    return seed.new_empty(*shape, num_counters, 4)


@_normal_op.register_fake
def _(seed: torch.Tensor, step: torch.Tensor, numel: int, stream: int, dtype: torch.dtype) -> torch.Tensor:
    return seed.new_empty(*torch.broadcast_shapes(seed.shape, step.shape), numel, dtype=dtype)


@_uniform_op.register_fake
def _(seed: torch.Tensor, step: torch.Tensor, stream: int, dtype: torch.dtype) -> torch.Tensor:
    return seed.new_empty(torch.broadcast_shapes(seed.shape, step.shape), dtype=dtype)
