"""Philox4x32-10 against an implementation of its own, and the normal and uniform numbers made of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from free_kernels import LATENT_STREAM, NOISE_STREAM, TEST_STREAM, normal, philox, uniform
from tests.statistical.laws import BUDGET, bonferroni, normal_p, spread_p, uniform_p, z_score_p

SEEDS = [0, 1, -1, 7, 2**31, 2**32 - 1, 2**32, 2**40 + 12345, -(2**40) - 3, 2**63 - 1, -(2**63)]


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Ten rounds as Salmon et al. (SC 2011) write them, on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def words(seed: int, step: int, stream: int, element: int) -> list[int]:
    key = seed % 2**64
    return philox4x32((element, step % 2**32, stream, 0), (key % 2**32, key >> 32))


# kat_vectors of Random123, philox4x32 10
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_tests_own_philox_has_the_known_answers(counter: str, key: str, answer: str) -> None:
    def parse(text: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in text.split())

    assert philox4x32(parse(counter), parse(key)) == list(parse(answer))


def test_the_one_known_answer_that_the_interface_reaches() -> None:
    zero = torch.tensor(0)
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(zero, zero, 1, stream=0).tolist() == [expected]


@pytest.mark.parametrize("stream", [NOISE_STREAM, TEST_STREAM, LATENT_STREAM, 2**32 - 1])
def test_integers(stream: int) -> None:
    steps = [0, 1, 249, 2**31, 2**32 - 1]
    seed, step = torch.tensor(SEEDS)[:, None], torch.tensor(steps)
    result = philox(seed, step, 3, stream=stream)
    assert result.dtype == torch.int64
    assert result.tolist() == [[[words(s, k, stream, i) for i in range(3)] for k in steps] for s in SEEDS]


def test_normals_are_box_muller_of_the_integers() -> None:
    seed, step = torch.tensor(SEEDS)[:, None], torch.arange(4)
    drawn = philox(seed, step, 3).double()  # [..., 3, 4]
    radius = (-2 * ((drawn[..., ::2] + 0.5) / 2**32).log()).sqrt()
    angle = 2 * math.pi * drawn[..., 1::2] / 2**32
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-3)[..., :11]
    torch.testing.assert_close(normal(seed, step, 11, dtype=torch.float64), expected, atol=1e-13, rtol=1e-13)
    # float32 rounds the radius' uniform and the angle: an absolute error of a few ulp of 2 pi
    torch.testing.assert_close(normal(seed, step, 11), expected.float(), atol=5e-6, rtol=1e-6)


def test_uniforms_are_the_first_word() -> None:
    seed, step = torch.tensor(SEEDS)[:, None], torch.arange(4)
    expected = (philox(seed, step, 1, stream=TEST_STREAM)[..., 0, 0].double() + 0.5) / 2**32
    assert torch.equal(uniform(seed, step, stream=TEST_STREAM, dtype=torch.float64), expected)
    drawn = uniform(seed, step, stream=TEST_STREAM)
    assert torch.equal(drawn, expected.float())
    assert ((drawn > 0) & (drawn <= 1)).all()


@pytest.mark.parametrize(("seed", "element", "value"), [(142301, 4 * 316 + 1, 6.135001), (356792, 4 * 310 + 1, -6.286146)])
def test_normals_reach_beyond_six(seed: int, element: int, value: float) -> None:
    """Found by a search of 4e8 counters at step 7; the words of their radii are 28 and 10 of 2**32."""
    drawn = normal(torch.tensor(seed), torch.tensor(7), element + 1)
    assert drawn[element].item() == pytest.approx(value, abs=1e-5)


def test_the_farthest_normal_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    reference = importlib.import_module("free_kernels.philox.reference")
    ends = torch.tensor([[[0], [2**32 - 1]], [[2**32 - 1], [0]]])  # [2, 2 seeds, 1 counter]
    monkeypatch.setattr(reference, "philox_pairs", lambda *_: (ends, torch.zeros_like(ends)))
    for dtype in (torch.float32, torch.float64):
        drawn = reference.normal(torch.zeros(2), torch.zeros(2), 4, 0, dtype)
        assert torch.isfinite(drawn).all()
        assert drawn.max().item() == pytest.approx(math.sqrt(-2 * math.log(2**-33)), abs=1e-4)


@pytest.mark.parametrize("base", [0, 2**41, -(2**45)])
@pytest.mark.parametrize("stream", [NOISE_STREAM, LATENT_STREAM])
def test_law_of_the_normals(base: int, stream: int) -> None:
    """4e5 numbers: moments, tails and Kolmogorov-Smirnov."""
    drawn = normal(torch.arange(2000)[:, None] + base, torch.arange(20), 10, stream=stream).double().flatten()
    count = len(drawn)
    p_values = {
        "normal": normal_p(drawn),
        "mean": z_score_p(float(drawn.mean()) * math.sqrt(count)),
        "variance": spread_p(drawn),
        # variances of x³ and x⁴ are 15 and 96
        "third moment": z_score_p(float(drawn.pow(3).mean()) * math.sqrt(count / 15)),
        "fourth moment": z_score_p(float(drawn.pow(4).mean() - 3) * math.sqrt(count / 96)),
    }
    for bound in (2.0, 3.0, 4.0):
        for side, beyond in (("above", drawn > bound), ("below", drawn < -bound)):
            tail = stats.binomtest(int(beyond.sum()), count, stats.norm.sf(bound))
            p_values[f"{side} {bound}"] = tail.pvalue
    assert min(p_values.values()) >= BUDGET, p_values


@pytest.mark.parametrize("base", [0, 2**41, -(2**45)])
def test_law_of_the_uniforms(base: int) -> None:
    drawn = uniform(torch.arange(5000)[:, None] + base, torch.arange(20), stream=TEST_STREAM)
    assert uniform_p(drawn) >= BUDGET
    # small ones decide the rarest acceptances
    rare = stats.binomtest(int((drawn < 1e-3).sum()), drawn.numel(), 1e-3).pvalue
    assert rare >= BUDGET


def test_nothing_repeats() -> None:
    """Every (seed, step, stream, counter) has words of its own: 5e4 blocks of 128 bits collide with probability 4e-30."""
    seed = torch.tensor([0, 1, 2**32, -1, -(2**32)])[:, None]
    blocks = [philox(seed, torch.arange(50), 50, stream=stream).reshape(-1, 4) for stream in range(4)]
    assert len(np.unique(torch.cat(blocks).numpy(), axis=0)) == 4 * seed.numel() * 50 * 50


def test_streams_and_neighbouring_seeds_are_uncorrelated() -> None:
    """Correlation of 1e5 pairs: 1e-6 is 4.9 standard errors, 0.015."""
    seed = torch.arange(10_000)
    step = torch.zeros_like(seed)
    noise = normal(seed, step, 10).double()
    others = {
        "latents": normal(seed, step, 10, stream=LATENT_STREAM),
        "test stream": normal(seed, step, 10, stream=TEST_STREAM),
        "next step": normal(seed, step + 1, 10),
        "next seed": normal(seed + 1, step, 10),
        "seed + 2**32": normal(seed + 2**32, step, 10),
        "negated seed": normal(-seed - 1, step, 10),
        "next element": noise.roll(1, -1),
    }
    scale = math.sqrt(noise.numel())
    p_values = [z_score_p(float((noise * other).sum()) / scale) for other in others.values()]
    assert bonferroni(p_values) >= BUDGET, dict(zip(others, p_values, strict=True))


def test_words_elsewhere_are_those_of_the_host() -> None:
    from free_kernels.philox.reference import _pairs_on_device, philox_pairs

    seed, step = torch.tensor(SEEDS)[:, None], torch.tensor([0, 5, 2**31 + 3])
    elsewhere = _pairs_on_device(*torch.broadcast_tensors(seed, step), 9, LATENT_STREAM)
    for of_host, of_device in zip(philox_pairs(seed, step, 9, LATENT_STREAM), elsewhere, strict=True):
        assert torch.equal(of_host, of_device)
