"""Samplers by name, and what ``free-dit compare --samplers`` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler

import free
import free.evaluation.compare
from free import ReverseProcess
from free.evaluation.compare import compare
from free.evaluation.quality import Judge, load_data
from free.evaluation.samplers import SAMPLERS, sampler_of
from free.targets.loading import load_target

pytestmark = pytest.mark.filterwarnings("error::UserWarning:free")

TRAINED = (1 / (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0) - 1).sqrt().log()
"""Of noise over signal, at each time of a DiT's training."""

PNG = b"\x89PNG\r\n\x1a\n"


def same(first: ReverseProcess, second: ReverseProcess) -> bool:
    return first.fingerprint() == second.fingerprint()


# --- words --------------------------------------------------------------------------------------------------------------


def test_words_stand_for_processes() -> None:
    assert same(sampler_of("ddpm:20").process(), ReverseProcess.ddpm(20))
    assert same(sampler_of("ddim:20").process(), ReverseProcess.ddpm(20, eta=0))
    karras = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    assert same(sampler_of("2m-sde-karras:15").process(), ReverseProcess.from_scheduler(karras, 15))
    half = ReverseProcess.from_scheduler(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 15, eta=0.5)
    assert same(sampler_of("2m-sde:15:eta=0.5").process(), half)
    for name in SAMPLERS:
        sampler = sampler_of(f"{name}:12")
        assert sampler.word == f"{name}:12"
        assert sampler.process().num_steps == 12
        assert sampler.deterministic == (name == "ddim" or "ode" in name)


def test_a_word_says_what_is_not_usual() -> None:
    assert sampler_of("2m-sde:15:guidance=1.5:eta=1").word == "2m-sde:15"
    assert sampler_of("2m-sde:15:guidance=1.5").guidance_scale == 1.5
    assert sampler_of("ddpm:15:eta=0.25").word == "ddpm:15:eta=0.25"
    assert sampler_of("2m-sde:15:eta=0").deterministic


def test_an_ode_is_diffusers_own(dit: DiTTransformer2DModel) -> None:
    scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")
    scheduler.set_timesteps(10)
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, state = torch.tensor([1, 3]), noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = dit(state, timestep=timestep.expand(2), class_labels=labels).sample
            state = scheduler.step(output, timestep, state).prev_sample
    process = sampler_of("2m-ode:10").process()
    ours = free.ancestral_sample(dit, class_labels=labels, process=process, latents=noise, guidance_scale=1.0).samples
    torch.testing.assert_close(ours, state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "order"), [("flow", 1), ("flow-2m-sde", 2)])
def test_levels_of_flow_matching_are_another_scale_of_the_same_state(name: str, order: int) -> None:
    """x = (1 - sigma) x0 + sigma eps, over its standard deviation for unit data, is what a network of noise sees."""
    ours = sampler_of(f"{name}:12").process()
    ratio = -ours.x0_model_coef.double()  # noise over signal
    sigma = torch.cat((ratio / (1 + ratio), torch.zeros(1, dtype=torch.float64)))
    even = sigma / (3 - 2 * sigma)  # the shift undone
    torch.testing.assert_close(even.diff(), even.diff().mean().expand(12), atol=1e-6, rtol=0.0)
    flow = ReverseProcess.from_levels(1 - sigma, sigma, 1000 * sigma[:-1], "flow_prediction", order=order)
    scale = ((1 - sigma).square() + sigma.square()).sqrt().float()
    torch.testing.assert_close(ours.std * scale[1:], flow.std, atol=1e-5, rtol=1e-3)
    # the part of the mean that is not x0's
    torch.testing.assert_close(ours.clip_state_coef * scale[1:] / scale[:-1], flow.clip_state_coef, atol=1e-5, rtol=1e-3)
    if order == 2:
        torch.testing.assert_close(ours.memory, flow.memory, atol=1e-5, rtol=1e-3)
    # the network is told the time at which it was trained with that much noise
    at = np.interp(ours.timestep.numpy(), np.arange(1000), TRAINED.numpy())
    np.testing.assert_allclose(at, ratio.log().numpy(), atol=1e-3)


def test_edm_keeps_to_the_levels_that_the_network_knows() -> None:
    process, half = sampler_of("edm:50").process(), sampler_of("edm:50:eta=0.5").process()
    raised = -process.x0_model_coef.double()  # noise over signal
    torch.testing.assert_close(raised / (-half.x0_model_coef), torch.full((50,), (1 + 2**0.5 - 1) / 1.4).double())
    at = np.interp(process.timestep.numpy(), np.arange(1000), TRAINED.numpy())
    np.testing.assert_allclose(at, raised.log().numpy(), atol=1e-3)
    assert process.timestep[0] < 999
    assert process.timestep[-1] > 0
    assert process.initial_std == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("2m-side:15", "sampler '2m-side:15' is unknown; known are 'ddpm', 'ddim'"),
        ("2m-sde", "sampler '2m-sde' has no number of steps; allowed is 2m-sde:S, S an int, 1 … 1000"),
        ("2m-sde:many", "sampler '2m-sde:many' has no number of steps"),
        ("2m-sde:0", "sampler '2m-sde:0' has no number of steps"),
        ("2m-sde:1001", "allowed is 2m-sde:S, S an int, 1 … 1000"),
        ("2m-sde:15:gains", "has the option 'gains'; allowed are eta=E and guidance=G, once each"),
        ("2m-sde:15:eta=1:eta=0", "has the option 'eta=0'; allowed are eta=E and guidance=G, once each"),
        ("2m-sde:15:eta=half", "has eta 'half'; allowed is a number"),
        ("2m-sde:15:eta=2", r"eta is 2\.0; allowed is 0"),
        ("2m-ode:15:eta=0.5", "has eta 0.5, but is deterministic; '2m-sde' takes it"),
        ("ddpm:15:guidance=0.5", r"has guidance 0\.5; allowed is 1 \(no guidance\) or more"),
        ("ddpm:15:guidance=nan", "has guidance nan; allowed is 1"),
    ],
)
def test_words_that_stand_for_nothing(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of(word)


# --- compared -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(dit: DiTTransformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a run of a second, away from the checkout and its results."""
    monkeypatch.chdir(tmp_path)
    dit.save_pretrained(tmp_path / "model")
    images = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "real.npz", images=images.numpy(), labels=np.arange(40) % 5)
    return {
        "model": tmp_path / "model",
        "samplers": ["ddpm:6", "2m-sde:5:guidance=1.5", "2m-ode:4"],
        "guidance_scales": [1.0],
        "drafters": ["gains"],
        "windows": [3],
        "data": str(tmp_path / "real.npz"),
        "samples": 5,
        "batch_size": 5,
        "output": tmp_path / "samplers.png",
        "results": tmp_path / "rows.jsonl",
        "progress": False,
    }


def test_samplers_are_drawn_step_by_step_and_speculated(small: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare(**small)
    told = [(row["sampler"], row["steps"], row["guidance_scale"], row["drafter"], row["window"]) for row in rows]
    assert told == [
        ("ddpm:6", 6, 1.0, "ancestral", 1),
        ("ddpm:6", 6, 1.0, "gains", 3),
        ("2m-sde:5", 5, 1.5, "ancestral", 1),
        ("2m-sde:5", 5, 1.5, "gains", 3),
        ("2m-ode:4", 4, 1.0, "ancestral", 1),
    ]
    judge, target = Judge(*load_data(small["data"])), load_target(small["model"])
    for row in rows:
        common: dict[str, Any] = {"class_labels": range(5), "seed": list(range(5)), "guidance_scale": row["guidance_scale"]}
        process = sampler_of(row["sampler"]).process()
        if row["window"] == 1:
            out = free.ancestral_sample(target, process=process, **common)
        else:
            out = free.speculative_sample(target, "gains", process=process, window=3, **common)
        assert row["rounds"] == pytest.approx(out.stats.rounds.mean())
        assert row["energy_distance"] == pytest.approx(judge(out.samples).energy_distance, rel=1e-3, abs=1e-5)
    printed = capsys.readouterr().out
    cells = [line.split() for line in printed.splitlines() if line.split()[:1] and line.split()[0] in {t[0] for t in told}]
    assert [line[0] for line in cells] == [row["sampler"] for row in rows]
    assert [line[-8] for line in cells] == [f"{row['rounds']:.1f}" for row in rows]
    assert small["output"].read_bytes().startswith(PNG)
    # a run that is taken up again measures what is new
    again = compare(**{**small, "samplers": [*small["samplers"], "2m-ode:5"]}, resume=True)
    assert again[:-1] == rows
    assert len(small["results"].read_text().splitlines()) == len(rows) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samplers": []}, "samplers is empty"),
        ({"samplers": ["ddpm"]}, "sampler 'ddpm' has no number of steps"),
        ({"samplers": ["2m-ode:4", "ddim:3"]}, r"drafters is \['gains'\], but every sampler is deterministic"),
        ({"steps": [50]}, "steps is given with samplers"),
        ({"variance": ["beta"]}, "variance is given with samplers"),
        ({"stochasticity": [0.8]}, "stochasticity is given with samplers"),
        ({"relaxation": [1.0]}, "relaxation is given with samplers"),
        ({"data": None}, "samplers are judged by real data, and data is None"),
        ({"drafters": ["hold"]}, "drafter is 'hold'; known are"),
    ],
)
def test_what_does_not_go_with_samplers(
    small: dict[str, Any], change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free.evaluation.compare, "measure", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        compare(**{**small, **change})


def test_deterministic_samplers_need_no_drafter(small: dict[str, Any]) -> None:
    rows = compare(**{**small, "samplers": ["2m-ode:4", "ddim:3"], "drafters": None, "windows": None})
    assert [(row["sampler"], row["drafter"], row["rounds"]) for row in rows] == [
        ("2m-ode:4", "ancestral", 4.0),
        ("ddim:3", "ancestral", 3.0),
    ]
