"""Kernels that only tests launch. Imported inside tests, once it is clear whether Triton compiles or interprets."""

import triton
import triton.language as tl

from free_kernels.philox.kernel import box_muller


@triton.jit
def box_muller_kernel(
    radius_word_ptr,  # int64 [N]
    angle_word_ptr,  # int64 [N]
    pair_ptr,  # float32 [2, N]
    numel,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < numel
    radius_word = tl.load(radius_word_ptr + offsets, mask=mask, other=0).to(tl.uint32)
    angle_word = tl.load(angle_word_ptr + offsets, mask=mask, other=0).to(tl.uint32)
    cosine, sine = box_muller(radius_word, angle_word)
    tl.store(pair_ptr + offsets, cosine, mask=mask)
    tl.store(pair_ptr + numel + offsets, sine, mask=mask)


@triton.jit
def spilling_kernel(
    values_ptr,  # float32 [BLOCK]
    out_ptr,  # float32 [BLOCK]
    BLOCK: tl.constexpr,
):
    """Holds all its values at once: many more than fit the registers it is given."""
    offsets = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offsets)
    tl.store(out_ptr + offsets, values * tl.sum(values, axis=0))
