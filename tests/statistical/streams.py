"""What randomness is made of: the streams of one key, and the keys of one seed."""

from __future__ import annotations

import torch

import free
from free_kernels import LATENT_STREAM, NOISE_STREAM, TEST_STREAM, normal, uniform
from tests.analytic import GaussianTarget
from tests.statistical import laws
from tests.statistical.laws import PValues, bonferroni, chi2_p, normal_p, spearman_p, unit

ROWS = 100_000
DIM = 6


def streams() -> PValues:
    """The noise, the tests' uniforms and the latents: laws, and independence across elements, steps, seeds and streams."""
    seed = torch.arange(ROWS) + 2**41
    step = torch.arange(3)
    noise = normal(seed[:, None], step, DIM, stream=NOISE_STREAM)  # [B, 3, D]
    test = uniform(seed[:, None], step, stream=TEST_STREAM)  # [B, 3]
    latent = normal(seed, torch.zeros_like(seed), DIM, stream=LATENT_STREAM)
    first = noise[:, 0]

    def against_test(values: torch.Tensor) -> float:
        return spearman_p(test[:, 0], values)

    return {
        "u: uniform": laws.uniform_p(test[:, 0]),
        "z: normal": bonferroni([normal_p(column) for column in first.T]),
        "z: |z|²": chi2_p(first.double().square().sum(-1), DIM),
        "latents: normal": bonferroni([normal_p(column) for column in latent.T]),
        "u against z": bonferroni([against_test(column) for column in first.T]),
        "u against |z| of one element": bonferroni([against_test(column.abs()) for column in first.T]),
        "u against |z|²": against_test(first.square().sum(-1)),
        "u against z of the next step": bonferroni([against_test(column) for column in noise[:, 1].T]),
        "u against u of the next step": against_test(test[:, 1]),
        "u against latents": bonferroni([against_test(column) for column in latent.T]),
        "z against z of the next step": _independent_p(first, noise[:, 1]),
        "z against z two steps on": _independent_p(first, noise[:, 2]),
        "z against latents": _independent_p(first, latent),
        "z against z of the next seed": _independent_p(first[:-1], first[1:]),
        "elements of z": laws.moments_p(first)["x_i x_j"],
    }


def _independent_p(first: torch.Tensor, second: torch.Tensor) -> float:
    """The second along the first is N(0, 1), and so is the product of each pair of elements in the mean."""
    first, second = first.double(), second.double()
    products = first.T @ second / len(first) ** 0.5
    pairs = [laws.z_score_p(float(value)) for value in products.flatten()]
    return bonferroni([normal_p((unit(first) * second).sum(-1)), bonferroni(pairs)])


def keys_of_a_seed(first: int = 0) -> PValues:
    """Samples of seeds in a row, some of each: all of them are independent, in a batch and from one seed to the next."""
    seeds, rows, model, process = 20, 64, GaussianTarget.example(DIM), free.ReverseProcess.ddpm(4)
    outputs = [
        free.speculative_sample(
            model, shape=(DIM,), process=process, num_samples=rows, seed=seed, window=2, return_trajectory=True
        )
        for seed in range(first, first + seeds)
    ]
    trajectory = torch.cat([output.trajectory for output in outputs])
    latents, whitened = trajectory[:, 0], laws.whiten(trajectory[:, -1], *model.chain_moments(process))
    return {
        **{f"samples: {name}": value for name, value in laws.moments_p(whitened).items()},
        "latents: normal": normal_p(latents),
        "samples against all others, to two seeds on": laws.lags_p(whitened[None], 2 * rows),
        "latents against all others, to two seeds on": laws.lags_p(latents[None], 2 * rows),
    }
