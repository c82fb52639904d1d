"""A sampler that is made once: what it draws, what it refuses, and what it leaves to a call."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import free
from free_kernels import NOISE_STREAM, normal

SHAPE = (6, 3)
PROCESS = free.ReverseProcess.ddpm(12, 100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
OBSERVATION = torch.linspace(-1, 1, 4)[None]


class Network(nn.Module):
    """Each row of the batch by itself, in float64, so that it does not matter which others there are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4))
        self.calls = 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        pull = torch.tanh(x.double().cumsum(1) + observation.double()[:, None, : x.shape[-1]])
        return (0.6 * x.double() + self.scale.double() * pull * timestep[:, None, None] / 100).float()


@pytest.fixture
def network() -> Network:
    return Network().eval()


def make(network: Any, **options: Any) -> free.Sampler:
    return free.Sampler(network, **{"shape": SHAPE, "process": PROCESS, "window": 4, **options})


@pytest.mark.parametrize("drafter", ["gains", "hold-x0"])
@pytest.mark.parametrize("window", [1, 4])
def test_it_draws_what_the_samplers_draw(network: Network, drafter: str, window: int) -> None:
    policy = make(network, drafter=drafter, window=window)
    common: dict[str, Any] = {"shape": SHAPE, "process": PROCESS, "seed": 5}
    for observation in (OBSERVATION, -OBSERVATION):
        conditioning = {"observation": observation}
        expected = free.speculative_sample(network, drafter, window=window, conditioning=conditioning, **common)
        assert torch.equal(policy(conditioning, seed=5), expected.samples)
        assert policy.stats is not None
        assert policy.stats.rounds.tolist() == expected.stats.rounds.tolist()


def test_all_is_measured_and_planned_at_making(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make(network, window="auto", conditioning={"observation": OBSERVATION})

    def measured_again(*_: Any, **__: Any) -> None:
        raise AssertionError("a call measures nothing")

    monkeypatch.setattr("free.sampling.planning.round_seconds", measured_again)
    first = policy({"observation": OBSERVATION}, seed=1)
    assert torch.equal(first, policy({"observation": OBSERVATION.numpy()}, seed=1))
    assert not torch.equal(first, policy({"observation": OBSERVATION}, seed=2))


def test_what_a_call_returns_is_the_callers(network: Network) -> None:
    policy = make(network, shift=2)
    first = policy({"observation": OBSERVATION}, seed=1)
    kept = first.clone()
    first.fill_(float("nan"))
    assert torch.isfinite(policy({"observation": OBSERVATION}, seed=2)).all()
    policy.reset()
    assert torch.equal(policy({"observation": OBSERVATION}, seed=1), kept)


def test_a_sampler_made_in_inference_mode_serves_outside(network: Network) -> None:
    given = {"observation": OBSERVATION}
    with torch.inference_mode():
        policy = make(network, shift=2, conditioning=given)
        first = policy(given, seed=1)
    second = policy(given, seed=2)
    outside = make(network, shift=2)
    assert torch.equal(outside(given, seed=1), first)
    assert torch.equal(outside(given, seed=2), second)


def test_latents_and_generators(network: Network) -> None:
    policy = make(network)
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {"shape": SHAPE, "process": PROCESS, "conditioning": {"observation": OBSERVATION}}
    for given in ({"latents": latents, "seed": 3}, {"generator": torch.Generator().manual_seed(4)}):
        expected = free.speculative_sample(network, "hold-x0", window=4, **common, **given).samples
        if "generator" in given:
            given["generator"].manual_seed(4)
        assert torch.equal(policy({"observation": OBSERVATION}, **given), expected)


# --- a warm start -------------------------------------------------------------------------------------------------------


class Anchors(free.HoldX0):
    """hold-x0 that keeps the x0 that the first window's drafts lean on."""

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []

    def propose(self, situation: free.Situation) -> Any:
        if not situation.step.any():
            self.first.append(situation.anchor(situation.step).x0(situation.process))
        return super().propose(situation)


def test_the_last_sample_moved_on_is_what_the_first_drafts_lean_on(network: Network) -> None:
    drafter = Anchors()
    policy = make(network, drafter=drafter, shift=2, conditioning={"observation": OBSERVATION})
    drafter.first.clear()
    samples = [policy({"observation": OBSERVATION}, seed=seed) for seed in (1, 2, 1, 3)]
    policy.reset()
    policy({"observation": OBSERVATION}, seed=4)
    warm = [torch.cat((sample[:, 2:], sample[:, -1:], sample[:, -1:]), 1).flatten(1) for sample in samples]
    zero = torch.zeros(1, 18)
    # the third call's seed was the first one's, which the second sample knows of
    for got, expected in zip(drafter.first, (zero, warm[0], zero, warm[2], zero), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_statistics_of_a_warm_call_know_whom_it_has_heard(network: Network) -> None:
    policy = make(network, shift=0, conditioning={"observation": OBSERVATION})
    heard = []
    for seed in (1, 2, 3, 1):
        policy({"observation": OBSERVATION}, seed=seed)
        heard.append(policy.stats.keys)
    assert heard == [{1}, {1, 2}, {1, 2, 3}, {1}]


def test_a_call_that_failed_leaves_no_sample_of_forgotten_seeds(network: Network) -> None:
    policy = make(network, shift=0)
    for seed in (1, 2):
        policy({"observation": OBSERVATION}, seed=seed)
    with torch.no_grad():
        network.scale.fill_(float("nan"))
    with pytest.raises(free.NonFiniteOutputError):
        policy({"observation": OBSERVATION}, seed=1)
    with torch.no_grad():
        network.scale.fill_(0.4)
    cold = policy({"observation": OBSERVATION}, seed=2)
    policy.reset()
    assert torch.equal(policy({"observation": OBSERVATION}, seed=2), cold)


# --- known entries ------------------------------------------------------------------------------------------------------


def masks() -> dict[str, torch.Tensor]:
    rows, scattered = (torch.zeros(SHAPE, dtype=torch.bool) for _ in range(2))
    rows[0], rows[-1] = True, True
    scattered[0], scattered[3, 1] = True, True
    return {"rows": rows, "scattered": scattered}


@pytest.mark.parametrize("name", ["rows", "scattered"])
def test_known_entries_are_no_part_of_the_chain(network: Network, name: str) -> None:
    """Step by step it is the loop of diffusion policies: known entries put in before each forward, noise on the others."""
    mask = masks()[name]
    known = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    observation = OBSERVATION.expand(2, -1)
    seed = torch.tensor([3, 8])
    place = (~mask).flatten().nonzero()[:, 0]
    state = normal(seed, torch.zeros_like(seed), len(place), stream=2)
    for k in range(PROCESS.num_steps):
        whole = known.flatten(1).clone()
        whole[:, place] = state
        output = network(whole.view(2, *SHAPE), PROCESS.timestep[k].expand(2), observation).flatten(1)[:, place]
        x0 = (PROCESS.x0_state_coef[k] * state + PROCESS.x0_model_coef[k] * output).clamp(-1, 1)
        noise = normal(seed, torch.full_like(seed, k), len(place), stream=NOISE_STREAM)
        mean = PROCESS.clip_state_coef[k] * state + PROCESS.clip_x0_coef[k] * x0
        state = mean + PROCESS.std[k] * noise
    expected = known.flatten(1).clone()
    expected[:, place] = state

    conditioning = {"observation": observation, "known": known}
    drawn = make(network, window=1, known=mask)(conditioning, seed=[3, 8])
    torch.testing.assert_close(drawn.flatten(1), expected, rtol=1e-5, atol=1e-5)
    policy = make(network, known=mask, shift=1)
    for seeds in ([3, 8], [4, 9]):
        whole = policy(conditioning, seed=seeds)
        assert torch.equal(whole[:, mask], known[:, mask])
        assert policy.stats is not None
        assert policy.stats.rounds.max() < PROCESS.num_steps


def test_bad_masks_and_known_values(network: Network) -> None:
    mask = masks()["rows"]
    with pytest.raises(ValueError, match=r"known has shape \(6, 3\); shape is \(6, 2\)"):
        make(network, known=mask, shape=(6, 2))
    for bad, match in ((mask.float(), "allowed is a bool tensor"), (torch.ones_like(mask), "leaves something to sample")):
        with pytest.raises(ValueError, match=match):
            make(network, known=bad)
    policy = make(network, known=mask)
    for known, match in (
        (None, "'known' has type NoneType"),
        (torch.zeros(1, 5, 3), r"'known' has shape \(1, 5, 3\); allowed is a floating tensor \(samples, 6, 3\)"),
        (torch.zeros(2, *SHAPE), "'known' has 2 rows; the rest of the conditioning has 1"),
    ):
        with pytest.raises(ValueError, match=match):
            policy({"observation": OBSERVATION, "known": known}, seed=1)


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"observation": OBSERVATION[:, :3]},
            r"'observation' has shape \(1, 3\) and dtype torch.float32; that of the samples",
        ),
        ({"observation": OBSERVATION.double()}, "dtype torch.float64; that of the samples"),
        ({"observation": OBSERVATION.repeat(2, 1)}, "num_samples speaks of 1, conditioning speaks of 2"),
        ({"observation": OBSERVATION * float("nan")}, "'observation' holds NaN or infinity"),
        ({"observation": np.array([[1.0, 2.0, np.inf, 0.0]])}, "'observation' holds NaN or infinity"),
        ({"observation": 3.0}, "'observation' is 3.0, which has no row a sample"),
        (
            {"image": OBSERVATION},
            r"conditioning has \['image'\]; that of the samples that it was made for has \['observation'\]",
        ),
        ({}, r"conditioning has \[\]"),
        (OBSERVATION, "conditioning is a Tensor; allowed is a dict"),
    ],
)
def test_observations_unlike_those_at_making(network: Network, given: Any, match: str) -> None:
    policy = make(network, conditioning={"observation": OBSERVATION})
    calls = network.calls
    with pytest.raises(ValueError, match=match):
        policy(given, seed=1)
    assert network.calls == calls, "the network was asked before the error"
    assert torch.isfinite(policy({"observation": OBSERVATION}, seed=1)).all()


def test_other_bad_calls(network: Network) -> None:
    policy = make(network, conditioning={"observation": OBSERVATION})
    for options, match in (
        ({"seed": [1, 2]}, "num_samples speaks of 1, seed speaks of 2"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"latents": torch.zeros(1, 5, 3)}, "latents has shape"),
        ({"latents": torch.zeros(2, *SHAPE)}, "num_samples speaks of 1, latents speaks of 2"),
        ({"seed": 1, "generator": torch.Generator()}, "both given"),
    ):
        with pytest.raises(ValueError, match=match):
            policy({"observation": OBSERVATION}, **options)
    network.train()
    with pytest.raises(ValueError, match="train mode"):
        policy({"observation": OBSERVATION}, seed=1)


def test_bad_making(network: Network) -> None:
    for options, match in (
        ({"window": 0}, "window is 0"),
        ({"shape": ()}, "shape is"),
        ({"shift": -1}, "shift is -1"),
        ({"shift": 6, "conditioning": {"observation": OBSERVATION}}, "shift is 6; allowed is an int, 0 … 5"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"capture": True, "conditioning": {"observation": OBSERVATION}}, "a graph needs CUDA"),
    ):
        with pytest.raises(ValueError, match=match):
            make(network, **options)
    with pytest.raises(ValueError, match="train mode"):
        make(network.train())


def test_a_plan_of_the_same_seeds_statistics_is_refused(network: Network) -> None:
    common: dict[str, Any] = {"shape": SHAPE, "process": PROCESS, "conditioning": {"observation": OBSERVATION}}
    stats = free.speculative_sample(network, window=4, seed=9, **common).stats
    policy = make(network, window=free.plan_window(network, statistics=stats, **common))
    with pytest.raises(ValueError, match="samples of the same seed"):
        policy({"observation": OBSERVATION}, seed=9)
    assert torch.isfinite(policy({"observation": OBSERVATION}, seed=10)).all()


def test_threads_take_turns(network: Network) -> None:
    policy = make(network, conditioning={"observation": OBSERVATION})
    expected = {seed: policy({"observation": OBSERVATION}, seed=seed) for seed in range(8)}
    drawn: dict[int, torch.Tensor] = {}

    def draw(seeds: range) -> None:
        for seed in seeds:
            drawn[seed] = policy({"observation": OBSERVATION}, seed=seed)

    threads = [threading.Thread(target=draw, args=(range(first, 8, 2),)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(drawn[seed], expected[seed]) for seed in range(8))
