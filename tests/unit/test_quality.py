"""Distances of samples from real data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg

from free.evaluation.quality import HIDDEN_UNITS, Judge, frechet_distance, load_data


def blobs(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of images [1, 3, 4] around two centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    centres = torch.linspace(-1, 1, 12).view(1, 3, 4) * (2 * labels - 1).view(-1, 1, 1, 1)
    return centres + shift + 0.5 * scale * torch.randn(count, 1, 3, 4, generator=generator), labels


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(*blobs(800, 0))


def test_distances_against_their_definitions(judge: Judge) -> None:
    samples, _ = blobs(60, 1, shift=0.4)
    quality = judge(samples)
    x, y = samples.flatten(1).double(), judge.reference.double()
    across = torch.stack([(x - other).norm(dim=1).mean() for other in y]).mean()
    within = [sum((row - other).norm() for other in rows) / (len(rows) - 1) for rows in (x, y) for row in rows]
    expected = 2 * across - torch.stack(within[:60]).mean() - torch.stack(within[60:]).mean()
    assert quality.energy_distance == pytest.approx((expected / torch.stack(within[60:]).mean()).item(), rel=1e-4)

    hidden = np.maximum(x.numpy() @ judge.network.coefs_[0] + judge.network.intercepts_[0], 0)
    assert hidden.shape == (60, HIDDEN_UNITS)
    other = np.maximum(y.numpy() @ judge.network.coefs_[0] + judge.network.intercepts_[0], 0)
    first, second = np.cov(hidden.T), np.cov(other.T)
    root = np.sqrt(np.maximum(linalg.eigvals(first @ second).real, 0)).sum()
    expected = ((hidden.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * root
    assert quality.frechet_distance == pytest.approx(expected / np.trace(second), rel=1e-3)


def test_real_images_are_near_and_worse_ones_are_farther(judge: Judge) -> None:
    real, near, far = (judge(blobs(200, 2, shift)[0]) for shift in (0.0, 0.3, 0.6))
    blurred = judge(blobs(200, 2, scale=0.3)[0])
    assert abs(real.energy_distance) < 4 * real.energy_error
    for worse in (near, blurred):
        assert worse.energy_distance > real.energy_distance + 4 * worse.energy_error
        assert worse.frechet_distance > real.frechet_distance + worse.frechet_error
    assert far.energy_distance > near.energy_distance
    assert far.frechet_distance > near.frechet_distance
    assert 0.5 < real.frechet_floor / real.frechet_distance < 2
    # many samples leave less of a bias
    assert judge(blobs(400, 2)[0]).frechet_floor < real.frechet_floor


def test_the_errors_are_those_of_repeated_sampling(judge: Judge) -> None:
    repeated = [judge(blobs(100, seed, shift=0.3)[0]) for seed in range(3, 63)]
    for name in ("energy", "frechet"):
        spread = np.std([getattr(quality, f"{name}_distance") for quality in repeated], ddof=1)
        stated = np.mean([getattr(quality, f"{name}_error") for quality in repeated])
        assert stated == pytest.approx(spread, rel=0.5)


def test_the_same_data_make_the_same_judge(judge: Judge) -> None:
    samples, _ = blobs(40, 5)
    again = Judge(*blobs(800, 0))
    assert again.fingerprint == judge.fingerprint
    assert again(samples) == judge(samples)
    assert Judge(*blobs(800, 1)).fingerprint != judge.fingerprint


def test_frechet_distance_of_gaussians() -> None:
    generator = np.random.default_rng(0)
    mean, factor = generator.normal(size=5), generator.normal(size=(5, 5))
    covariance = factor @ factor.T
    assert frechet_distance((mean, covariance), (mean, covariance)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance((mean, covariance), (mean + 2, covariance)) == pytest.approx(20)
    # four times the covariance is twice the root
    assert frechet_distance((mean, covariance), (mean, 4 * covariance)) == pytest.approx(np.trace(covariance))


def test_data_from_a_file(tmp_path: Path) -> None:
    images, labels = blobs(8, 0)
    np.savez(tmp_path / "real.npz", images=images.numpy(), labels=labels.numpy())
    loaded = load_data(str(tmp_path / "real.npz"))
    assert torch.equal(loaded[0], images)
    assert torch.equal(loaded[1], labels)
    assert load_data("digits")[0].shape == (1797, 1, 8, 8)
    np.savez(tmp_path / "other.npz", images=images.numpy())
    with pytest.raises(ValueError, match="lacks labels"):
        load_data(str(tmp_path / "other.npz"))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(8, 3), torch.zeros(7), r"labels of shape \(7,\); allowed are floating images"),
        (torch.zeros(8, 3, dtype=torch.uint8), torch.zeros(8), r"dtype torch\.uint8, and labels"),
        (torch.full((8, 3), torch.nan), torch.arange(8) % 2, "data holds NaN or infinity"),
        (torch.zeros(8, 3), torch.zeros(8), r"data has 1 classes, of \[8\] images; allowed are 2 or more, of 4 each"),
        (torch.zeros(8, 3), torch.tensor([0] * 7 + [1]), r"data has 2 classes, of \[7, 1\] images"),
    ],
)
def test_data_that_cannot_be(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judge(images, labels)


@pytest.mark.parametrize("samples", [torch.zeros(2, 1, 3, 4), torch.zeros(5, 1, 4, 3), torch.zeros(5, 12)])
def test_samples_that_cannot_be_judged(judge: Judge, samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"samples have shape .*; allowed is \(3 or more, \(1, 3, 4\)\)"):
        judge(samples)
