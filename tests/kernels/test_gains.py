"""What a window teaches of the gains, and what they add to its drafts, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from free import ReverseProcess
from free.drafters.patches import each_number, rings
from free_kernels import Patches, Scales, gain_correction, learn_gains
from tests.kernels import helpers
from tests.kernels.helpers import assert_accurate, laid_out, on

# colours, channels apart in several patches, three axes; then numbers for bands
SHAPES = [(3, 4, 8), (2, 2, 40), (1, 2, 3, 4), (5, 9)]
STEPS = 20


def cut(shape: tuple[int, ...], device: torch.device) -> Patches:
    return each_number(shape, device) if shape == SHAPES[-1] else rings(shape, device)


def arguments(
    shape: tuple[int, ...], clip: bool, dtype: torch.dtype, halves: torch.dtype, window: int = 4
) -> dict[str, Any]:
    """A window of each of three samples, at steps of their own, after one of four columns; one of them just begins."""
    process = ReverseProcess.ddpm(STEPS, clip_sample=clip)
    numel, batch, anchors = torch.Size(shape).numel(), 3, 4
    bands = cut(shape, torch.device("cpu")).bands
    step = torch.tensor([0, 7, 17])
    known = [helpers.normal(batch, anchors, numel, seed=i).to(dtype) for i in range(2)]
    return {
        "states": helpers.normal(batch, window, numel, seed=2).to(dtype),
        "outputs": helpers.normal(batch, window, numel, seed=3).to(halves),
        "step": step,
        "length": torch.tensor([3, 2, 3]),
        "known_states": known[0],
        "known_x0": known[1],
        "known_sums": helpers.normal(batch, anchors, 2, 2, bands, seed=4).abs().to(dtype),
        "known_step": (step - torch.tensor([0, 2, 1])),
        "known_length": torch.tensor([1, 4, 3]),
        "table": process.table,
        "scales": Scales(process.signal, process.noise_ratio),
        "patches": shape,
        "unconditional_outputs": helpers.normal(batch, window, numel, seed=5).to(halves),
    }


def moved(given: dict[str, Any], device: torch.device, layout: str) -> dict[str, Any]:
    result = dict(given)
    for name, value in given.items():
        if name in ("states", "outputs", "unconditional_outputs", "path"):
            result[name] = laid_out(value.to(device), layout)
        elif isinstance(value, torch.Tensor):
            result[name] = value.to(device)
    result["table"] = on(device, given["table"])
    result["scales"] = Scales(*(column.to(device) for column in given["scales"]))
    result["patches"] = cut(given["patches"], device)
    return result


@pytest.mark.parametrize("layout", ["contiguous", "half of the channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_window_teaches(device: torch.device, shape: tuple[int, ...], layout: str) -> None:
    for halves in (torch.float32, torch.bfloat16):
        given = arguments(shape, False, torch.float32, halves)
        given["outputs"][1, 2:] = torch.nan  # beyond its length: what was not evaluated
        common: dict[str, Any] = {"forgetting": (0.7, 0.85), "guidance_scale": 1.5}
        got = learn_gains(**moved(given, device, layout), **common, impl="triton")
        cpu = moved(given, torch.device("cpu"), "contiguous")
        exact = {n: v.double() if n in ("states", "known_states", "known_x0", "known_sums") else v for n, v in cpu.items()}
        assert_accurate(
            got, learn_gains(**cpu, **common, impl="reference"), learn_gains(**exact, **common, impl="reference")
        )


@pytest.mark.parametrize("kind", ["plain", "clipped", "second order"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_gains_add_to_the_drafts(device: torch.device, shape: tuple[int, ...], kind: str) -> None:
    given = arguments(shape, kind == "clipped", torch.float32, torch.float32)
    if kind == "second order":
        given["table"] = given["table"]._replace(memory_gain=0.5 / given["table"].x0_model_coef)
    for name in ("outputs", "unconditional_outputs", "length"):
        del given[name]
    given["path"] = given.pop("states")
    given["known_sums"][2, :, :, 1] *= -1  # gains at their upper bound
    given["known_sums"][1, :, 0] = 0  # of which nothing is known
    got = gain_correction(**moved(given, device, "part of a window"), ridge=0.01, impl="triton")
    cpu = moved(given, torch.device("cpu"), "contiguous")
    exact = {n: v.double() if n in ("path", "known_states", "known_x0", "known_sums") else v for n, v in cpu.items()}
    plain, right = (gain_correction(**values, ridge=0.01, impl="reference") for values in (cpu, exact))
    assert_accurate([got], [plain], [right])
