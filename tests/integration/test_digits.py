"""The main job on the model that ships with the package: real data, guidance, the published settings."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free.demo import load_digits_dit
from free.demo.run import recognised

LABELS = torch.arange(10)


@pytest.fixture(scope="module")
def digits_dit() -> DiTTransformer2DModel:
    return load_digits_dit()


@pytest.fixture(scope="module")
def drawn(digits_dit: DiTTransformer2DModel) -> free.SamplingOutput:
    """One sample of each class, S=250, W=8, guidance 1.5."""
    return free.speculative_sample(
        digits_dit, class_labels=LABELS, guidance_scale=1.5, num_inference_steps=250, window=8, seed=0
    )


def test_the_model_is_small_and_ready(digits_dit: DiTTransformer2DModel) -> None:
    assert not digits_dit.training
    assert digits_dit.dtype == torch.float32
    assert digits_dit.config.num_embeds_ada_norm == 10
    assert free.as_target(digits_dit).sample_shape == (1, 8, 8)


def test_far_fewer_rounds(drawn: free.SamplingOutput) -> None:
    assert drawn.stats.steps == 250
    assert drawn.stats.parallel_efficiency >= 4.5
    assert drawn.stats.efficiency_per_sample.max() <= 8


def test_the_samples_are_digits_of_their_class(drawn: free.SamplingOutput) -> None:
    assert drawn.samples.shape == (10, 1, 8, 8)
    assert recognised(drawn.samples, LABELS).float().mean() >= 0.7
    # and the classifier does tell classes apart
    assert recognised(drawn.samples, (LABELS + 1) % 10).float().mean() <= 0.3


def test_holding_the_output_is_exact_too_and_slower(digits_dit: DiTTransformer2DModel, drawn: free.SamplingOutput) -> None:
    labels = LABELS[:4]
    out = free.speculative_sample(
        digits_dit, "hold-output", class_labels=labels, guidance_scale=1.5, num_inference_steps=250, window=8, seed=0
    )
    assert 1.5 < out.stats.parallel_efficiency < drawn.stats.efficiency_per_sample[:4].mean()
    assert recognised(out.samples, labels).sum() >= 2


def test_a_folder_without_weights(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match=r"no digits DiT in .*`free-dit demo --retrain` makes them"):
        load_digits_dit(tmp_path)
