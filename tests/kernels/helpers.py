"""Cases for the kernels, and how close to float64 a kernel must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from free import ReverseProcess
from free_kernels import StepTable

SEEDS = torch.tensor([1, -5, 2**45 + 17, 2**63 - 1, -(2**63), 0, 2**32 + 1, 77])


def table(steps: int = 20, clip: bool = False, memory: bool = False) -> StepTable:
    process = ReverseProcess.ddpm(steps, clip_sample=clip).table
    # of a random sign and size, with a step in between that has none
    gain = normal(steps, seed=99) / process.x0_model_coef
    gain[0] = gain[steps // 2] = 0
    return process._replace(memory_gain=gain if memory else None)


def on(device: torch.device, process: StepTable) -> StepTable:
    gain = None if process.memory_gain is None else process.memory_gain.to(device)
    return StepTable(*(column.to(device) for column in process.columns), process.clip_range, gain)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other strides; the memory between them is NaN."""
    poison = torch.full_like(values, torch.nan)
    if layout == "contiguous":
        return values.contiguous()
    if layout == "half of a batch":  # as a network returns the two halves under guidance
        return torch.cat((poison, values))[len(values) :]
    if layout == "half of the channels":  # as a network with a learned variance returns its output
        return torch.cat((values, poison), dim=-1)[..., : values.shape[-1]]
    if layout == "part of a window":
        return torch.cat((values, poison), dim=1)[:, : values.shape[1]]
    if layout == "last axis strided":
        return torch.stack((values, poison), dim=-1)[..., 0]
    raise AssertionError(layout)


LAYOUTS = ("half of a batch", "half of the channels", "part of a window", "last axis strided")


def assert_accurate(got: Sequence[torch.Tensor], single: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
    """``got`` is as near to the float64 results as plain torch in float32 is, up to a factor of 4 and 1e-6 of the scale."""
    assert len(got) == len(single) == len(exact)
    for mine, plain, right in zip(got, single, exact, strict=True):
        mine, plain = mine.detach().cpu(), plain.cpu()
        assert mine.shape == right.shape
        assert mine.dtype == plain.dtype
        if not right.dtype.is_floating_point:
            assert torch.equal(mine, right)
            continue
        finite = torch.isfinite(right)
        assert torch.equal(torch.isfinite(mine), finite)
        if finite.any():
            mine, plain, right = (values.double()[finite] for values in (mine, plain, right))
            allowed = 4 * (plain - right).abs().max() + 1e-6 * right.abs().max() + 1e-30
            assert (mine - right).abs().max() <= allowed
