"""The samplers on the Triton kernels equal the samplers on the reference."""

from __future__ import annotations

import pytest
import torch

import free
from tests.analytic import GaussianTarget

STEPS = 14


def run(
    device: torch.device,
    impl: str,
    drafter: str = "hold-x0",
    window: int = 4,
    clip: bool = False,
    relaxation: free.Relaxation | None = None,
) -> free.SamplingOutput:
    return free.speculative_sample(
        GaussianTarget.example(),
        drafter,
        process=free.ReverseProcess.ddpm(STEPS, clip_sample=clip),
        latents=torch.zeros(3, 6, device=device) + 0.5,
        seed=[3, -4, 2**50],
        window=window,
        relaxation=relaxation,
        impl=impl,
    )


@pytest.mark.parametrize(("drafter", "clip"), [("hold-x0", False), ("hold-output", True)])
def test_speculative_sampler_equals_the_reference(device: torch.device, drafter: str, clip: bool) -> None:
    got = run(device, "triton", drafter, clip=clip)
    expected = run(torch.device("cpu"), "reference", drafter, clip=clip)
    assert got.stats.rounds.tolist() == expected.stats.rounds.tolist()
    assert got.stats.accepted.tolist() == expected.stats.accepted.tolist()
    assert 0 < got.stats.accepted.sum() < got.stats.tested.sum()  # both branches were taken
    torch.testing.assert_close(got.samples.cpu(), expected.samples, rtol=1e-4, atol=1e-4)


def test_a_relaxed_run_equals_the_reference(device: torch.device) -> None:
    relaxation = free.Relaxation(2.0, "residual", budget=0.4)
    got = run(device, "triton", "hold-output", relaxation=relaxation)
    expected = run(torch.device("cpu"), "reference", "hold-output", relaxation=relaxation)
    for name in ("rounds", "tested", "accepted"):
        assert getattr(got.stats, name).tolist() == getattr(expected.stats, name).tolist(), name
    for name in ("delta_sum", "excess_acceptance", "divergence"):
        assert getattr(got.stats, name) == pytest.approx(getattr(expected.stats, name), rel=1e-4, abs=1e-9), name
    assert (expected.stats.excess_acceptance > 0).all()
    assert (expected.stats.excess_acceptance <= 0.4).all()
    torch.testing.assert_close(got.samples.cpu(), expected.samples, rtol=1e-4, atol=1e-4)


def test_window_of_one_is_the_ancestral_sampler_to_the_bit(device: torch.device) -> None:
    arguments = {"process": free.ReverseProcess.ddpm(6), "latents": torch.ones(1, 6, device=device), "seed": 5}
    one = free.speculative_sample(GaussianTarget.example(), window=1, impl="triton", **arguments)
    ancestral = free.ancestral_sample(GaussianTarget.example(), impl="triton", **arguments)
    assert torch.equal(one.samples, ancestral.samples)


def test_a_drafter_that_equals_the_target_is_always_accepted(device: torch.device) -> None:
    """Elementwise model, so that its outputs do not depend on the batch: then the two samplers agree to the bit."""
    arguments = {"process": free.ReverseProcess.ddpm(8), "latents": torch.ones(2, 5, device=device), "seed": [5, 6]}

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return 0.5 * x

    fast = free.speculative_sample(model, model, window=3, impl="triton", **arguments)
    slow = free.ancestral_sample(model, impl="triton", **arguments)
    assert torch.equal(fast.samples, slow.samples)
    assert fast.stats.rounds.tolist() == [3, 3]


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu() -> None:
    automatic, chosen = (run(torch.device("cuda"), impl) for impl in ("auto", "triton"))
    assert torch.equal(automatic.samples, chosen.samples)
