"""Random numbers: integers and uniforms to the bit, normals to float32's accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from free_kernels import normal, philox, uniform
from tests.kernels.helpers import SEEDS


def test_known_answers(device: torch.device) -> None:
    """The vectors of the generator's authors for Philox4x32-10 that a counter (i, step, stream, 0) can express."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(zero, zero, 1, impl="triton")[0].tolist() == expected


@pytest.mark.parametrize(("count", "stream"), [(1, 0), (7, 1), (300, 2**32 - 1)])
def test_integers_equal_the_reference(device: torch.device, count: int, stream: int) -> None:
    step = torch.tensor([0, 999, 2**31, 2**32 + 5])
    got = philox(SEEDS[:, None].to(device), step.to(device), count, stream=stream, impl="triton")
    assert torch.equal(got.cpu(), philox(SEEDS[:, None], step, count, stream=stream, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_uniforms_equal_the_reference(device: torch.device, dtype: torch.dtype) -> None:
    step = torch.arange(100)
    got = uniform(SEEDS[:, None].to(device), step.to(device), dtype=dtype, impl="triton").cpu()
    expected = uniform(SEEDS[:, None], step, dtype=dtype, impl="reference")
    assert got.shape == (len(SEEDS), 100)
    assert got.dtype == dtype
    assert got.min() > 0
    if dtype == torch.float32:
        assert torch.equal(got, expected)
    # the interpreter cuts bfloat16 off where a GPU rounds it
    assert ((got.double() - expected.double()).abs() <= 2 * torch.finfo(dtype).eps * expected.double()).all()


def test_normals_are_as_accurate_as_torch(device: torch.device) -> None:
    seed, step = torch.arange(8)[:, None], torch.tensor([3])
    got = normal(seed.to(device), step.to(device), 4099, impl="triton").cpu().double()
    exact = normal(seed, step, 4099, dtype=torch.float64, impl="reference")
    plain = normal(seed, step, 4099, impl="reference").double()
    assert got.shape == exact.shape
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (got - exact).square().mean().sqrt() <= (plain - exact).square().mean().sqrt()


@pytest.mark.parametrize(
    ("numel", "dtype"),
    [(1, torch.float32), (5, torch.float32), (257, torch.float16), (1025, torch.bfloat16), (1025, torch.float32)],
)
def test_normals_of_any_size_and_dtype(device: torch.device, numel: int, dtype: torch.dtype) -> None:
    seed = SEEDS[:3]
    got = normal(seed.to(device), torch.zeros_like(seed).to(device), numel, stream=2, dtype=dtype, impl="triton").cpu()
    exact = normal(seed, torch.zeros_like(seed), numel, stream=2, dtype=torch.float64, impl="reference")
    assert got.dtype == dtype
    assert got.shape == (3, numel)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=3e-5)


def test_scalar_empty_and_expanded_seeds(device: torch.device) -> None:
    scalar, step = torch.tensor(9, device=device), torch.tensor(4, device=device)
    rows = normal(scalar.expand(3), step.expand(3), 10, impl="triton")
    assert torch.equal(normal(scalar, step, 10, impl="triton"), rows[2])
    empty = scalar.new_empty(0)
    assert normal(empty, empty, 10, impl="triton").shape == (0, 10)
    assert uniform(empty, empty, impl="triton").shape == (0,)
    assert philox(empty, empty, 2, impl="triton").shape == (0, 2, 4)


def test_extreme_words(device: torch.device) -> None:
    """Box-Muller at the ends of its words: the largest radius, the smallest, and the angles where a sign flips."""
    from tests.kernels.probes import box_muller_kernel  # compiled, or interpreted, as the device asks

    words = torch.tensor([0, 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 2**8, 2**32 - 1])
    radius_word, angle_word = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    pairs = torch.empty(2, len(radius_word), device=device)
    box_muller_kernel[(1,)](radius_word.to(device), angle_word.to(device), pairs, len(radius_word), BLOCK=128)
    radius = (-2 * ((radius_word.double() + 0.5) / 2**32).float().double().log()).sqrt()
    angle = angle_word.double() * (2 * math.pi / 2**32)
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()))
    torch.testing.assert_close(pairs.cpu().double(), exact, rtol=0, atol=1.5e-6)
    assert pairs.abs().max() < 6.8
