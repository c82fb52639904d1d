"""The linear drafter: its two ends, its bands, its files, its refusals, and what calibration makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import free
from free import HoldOutput, HoldX0, LinearDrafter, ReverseProcess, Situation
from free.drafters.linear import Bands
from free_kernels import Proposal
from tests.analytic import GaussianTarget, rotation
from tests.unit.helpers import GaussianModel, Recorder

STEPS = 12
IMAGE = (2, 6, 4)


def linear(
    weight: torch.Tensor, sample_shape: tuple[int, ...] = IMAGE, process: ReverseProcess | None = None
) -> LinearDrafter:
    process = process or ReverseProcess.ddpm(len(weight))
    return LinearDrafter(weight, process.timestep, sample_shape, (1, 3) if weight.dim() == 3 else ())


def random_weight(bands: int = 4, steps: int = STEPS) -> torch.Tensor:
    return 2 * torch.rand(steps, 3, bands, generator=torch.Generator().manual_seed(1)) - 0.5


class Comparing(HoldX0):
    """hold-x0 that keeps what other drafters propose in its situations."""

    def __init__(self, *others: Callable[[Situation], Proposal]) -> None:
        self.others = others
        self.rounds: list[list[Proposal]] = []

    def propose(self, situation: Situation) -> Proposal:
        self.rounds.append([other(situation) for other in self.others])
        return super().propose(situation)


def compare(
    *others: Callable[[Situation], Proposal],
    sample_shape: tuple[int, ...] = IMAGE,
    window: int = 5,
    process: ReverseProcess | None = None,
) -> list[list[Proposal]]:
    """What the drafters propose in every round of one run of three samples."""
    comparing = Comparing(*others)
    free.speculative_sample(
        GaussianModel(),
        comparing,
        shape=sample_shape,
        process=process or ReverseProcess.ddpm(STEPS),
        window=window,
        seed=[3, 4, 5],
    )
    assert len(comparing.rounds) > 2
    return comparing.rounds


def assert_same(rounds: list[list[Proposal]]) -> None:
    for first, second in rounds:
        # columns of a window beyond the last step mean nothing, and are alike all the same
        torch.testing.assert_close(second.states, first.states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second.draft_output, first.draft_output, atol=2e-4, rtol=2e-4)


# --- the proposal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize(("sample_shape", "bands"), [(IMAGE, 4), (IMAGE, 1), ((3, 5, 5), 16), ((7,), 1), ((4, 3), 1)])
@pytest.mark.parametrize(("w", "hold"), [(1.0, HoldX0), (0.0, HoldOutput)])
def test_the_ends_are_the_hold_drafters(
    w: float, hold: type[free.Drafter], sample_shape: tuple[int, ...], bands: int, clip: float | None
) -> None:
    process = ReverseProcess.ddpm(STEPS, clip_sample=clip is not None, clip_sample_range=clip or 1.0)
    drafter = linear(torch.full((STEPS, 3, bands), w), sample_shape, process)
    assert_same(compare(hold().propose, drafter.propose, sample_shape=sample_shape, process=process))


@pytest.mark.parametrize("window", [1, 2, 8])
def test_the_path_in_frequencies_is_that_of_drafting_step_by_step(window: int) -> None:
    drafter = linear(random_weight())
    rounds = compare(lambda situation: super(LinearDrafter, drafter).propose(situation), drafter.propose, window=window)
    assert_same(rounds)
    assert rounds[0][1].draft_output.shape == (3, window - 1, 48)


def test_a_step_is_blended_by_its_own_step_and_age_of_the_anchor() -> None:
    """One coefficient is 0, all others 1: only the drafts it belongs to differ from hold-x0's."""
    weight = torch.ones(STEPS, 3, 1)
    weight[7, 1] = 0.0
    drafter, seen = linear(weight, (5,)), 0

    def differing(situation: Situation) -> Proposal:
        nonlocal seen
        ours, theirs = drafter.propose(situation), HoldX0().propose(situation)
        for j in range(situation.window - 1):
            step = (situation.step + j).clamp(max=STEPS - 1)
            age = step - situation.anchor(step).step
            before = (situation.step + torch.arange(j + 1)[:, None] == 7).any(0)  # a path that left it stays away
            blended = (step == 7) & (age >= 1) & (age < 3)
            same = torch.isclose(ours.draft_output[:, j], theirs.draft_output[:, j], atol=1e-4).all(-1)
            assert bool((same | before).all())
            assert not bool((same & blended).any())
            seen += int(blended.sum())
        return theirs

    compare(differing, sample_shape=(5,))
    assert seen > 0


def test_it_leans_on_no_anchor_but_those_of_the_situation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    anchor = Situation.anchor

    def watched(self: Situation, step: torch.Tensor) -> free.Anchor:
        asked.append(step)
        found = anchor(self, step)
        assert bool((found.step <= step).all())
        return found

    monkeypatch.setattr(Situation, "anchor", watched)
    free.speculative_sample(GaussianModel(), linear(random_weight()), shape=IMAGE, num_inference_steps=STEPS, seed=1)
    assert asked


def test_anchors_of_several_steps_are_those_of_each() -> None:
    def check(situation: Situation) -> Proposal:
        steps = (situation.step[:, None] + torch.arange(4)).clamp(max=STEPS - 1)
        together = situation.anchor(steps)
        for j in range(4):
            one = situation.anchor(steps[:, j])
            for name in ("step", "state", "output"):
                assert torch.equal(getattr(together, name)[:, j], getattr(one, name))
        return HoldX0().propose(situation)

    compare(check)


def test_one_drafter_serves_two_processes_of_the_same_steps() -> None:
    drafter = linear(random_weight())
    for variance in ("posterior", "beta", "posterior"):
        process = ReverseProcess.ddpm(STEPS, variance=variance)
        assert_same(
            compare(lambda situation: super(LinearDrafter, drafter).propose(situation), drafter.propose, process=process)
        )


# --- the bands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_shape", [(1, 8, 8), (3, 5, 9), (4, 1, 6)])
@pytest.mark.parametrize("count", [2, 4, 16])
def test_the_bands_are_an_orthonormal_partition(sample_shape: tuple[int, ...], count: int) -> None:
    bands = Bands(sample_shape, count)
    numel = len(bands.index)
    transform = bands.forward(torch.eye(numel)).double()  # rows are the frequencies of each unit sample
    torch.testing.assert_close(transform @ transform.T, torch.eye(numel).double(), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(bands.inverse(bands.forward(torch.eye(numel))), torch.eye(numel), atol=1e-5, rtol=0.0)
    projections = [transform @ torch.diag((bands.index == b).double()) @ transform.T for b in range(count)]
    torch.testing.assert_close(sum(projections), torch.eye(numel).double(), atol=1e-5, rtol=0.0)
    for b, projection in enumerate(projections):
        torch.testing.assert_close(projection @ projection, projection, atol=1e-5, rtol=0.0)
        for other in projections[:b]:
            assert (projection @ other).abs().max() < 1e-5


def test_the_first_band_is_the_mean_and_the_last_the_finest() -> None:
    bands = Bands((1, 8, 8), 8)
    flat, checkered = torch.ones(8, 8), (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    for image, band in ((flat, 0), (checkered, 7)):
        frequencies = bands.forward(image.flatten())
        share = frequencies.square()[bands.index == band].sum() / frequencies.square().sum()
        assert share > 0.85


# --- its files ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    drafter = linear(random_weight())
    drafter.save_pretrained(tmp_path / "a" / "b")
    loaded = LinearDrafter.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(loaded.weight, drafter.weight)
    assert torch.equal(loaded.timestep, drafter.timestep)
    assert (loaded.sample_shape, loaded.gap_edges) == (IMAGE, (1, 3))
    assert (loaded.num_steps, loaded.num_bands) == (STEPS, 4)
    common: dict[str, Any] = {"shape": IMAGE, "num_inference_steps": STEPS, "seed": 7, "num_samples": 3}
    first, second = (free.speculative_sample(GaussianModel(), one, **common) for one in (drafter, loaded))
    assert torch.equal(first.samples, second.samples)
    assert first.stats.drafter == "linear"
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["config.json", "linear_drafter.safetensors"]


def change(**values: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return changed


def rewrite(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes()))


WEIGHTS = "linear_drafter.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"no config.json in '.*'"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"no linear_drafter.safetensors in '.*'"),
        (rewrite("config.json", lambda content: content[:20]), r"config.json' is corrupt or truncated"),
        (rewrite("config.json", lambda content: b"\xff\xfe\xfa"), r"config.json' is corrupt or truncated"),
        (rewrite("config.json", lambda content: b"[]"), r"config.json' has format \[\]"),
        (rewrite(WEIGHTS, lambda content: content[:-8]), r"safetensors' is corrupt or truncated"),
        (rewrite(WEIGHTS, lambda content: content[:5]), r"safetensors' is corrupt or truncated"),
        (rewrite(WEIGHTS, lambda content: b"x" * len(content)), r"safetensors' is corrupt or truncated"),
        (rewrite(WEIGHTS, lambda content: content.replace(b"weight", b"weighs")), r"holds no tensor 'weight'"),
        (change(format="other"), r"has format 'other'; allowed is 'free-dit linear drafter, 1'"),
        (change(num_steps=13), r"holds weight of shape \(12, 3, 4\); config.json says \(13, 3, 4\)"),
        (change(num_bands=5), r"holds weight of shape \(12, 3, 4\); config.json says \(12, 3, 5\)"),
        (change(num_bands="4"), r"has num_bands '4'; allowed is a int"),
        (change(gap_edges=[1]), r"holds weight of shape \(12, 3, 4\); config.json says \(12, 2, 4\)"),
        (change(gap_edges=[3, 1]), r"gap_edges is \(3, 1\); allowed are ascending ints"),
        (change(sample_shape=[2, 0, 4]), r"sample_shape is \(2, 0, 4\); allowed are positive ints"),
        (change(sample_shape=[48]), r"weight has 4 bands; samples of shape \(48,\) have 1"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    linear(random_weight()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        LinearDrafter.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json in '.*nowhere'"):
        LinearDrafter.from_pretrained(tmp_path / "nowhere")


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "edges", "message"),
    [
        (torch.ones(11, 4), (), r"weight has shape \(11, 1, 4\); allowed is \(12, 1, bands\)"),
        (torch.ones(12, 2, 4), (1, 3), r"weight has shape \(12, 2, 4\); allowed is \(12, 3, bands\)"),
        (torch.ones(12), (), r"weight has shape \(12,\)"),
        (torch.ones(12, 0), (), r"weight has shape \(12, 1, 0\)"),
        (torch.full((12, 4), float("nan")), (), r"not finite floats"),
        (torch.ones(12, 4, dtype=torch.int64), (), r"weight \(torch.int64\)"),
        (torch.ones(12, 2, 4), (0,), r"gap_edges is \(0,\)"),
        (torch.ones(12, 2, 4), (1.5,), r"gap_edges is \(1.5,\)"),
    ],
)
def test_coefficients_that_do_not_fit(weight: torch.Tensor, edges: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearDrafter(weight, ReverseProcess.ddpm(12).timestep, IMAGE, edges)


def test_timesteps_that_are_no_row() -> None:
    with pytest.raises(ValueError, match=r"timestep has shape \(2, 6\)"):
        LinearDrafter(torch.ones(12, 1), torch.zeros(2, 6), IMAGE)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"process": ReverseProcess.ddpm(13)}, r"fitted to a process of 12 steps; this one has 13"),
        (
            {"process": ReverseProcess.ddpm(STEPS, timestep_spacing="leading")},
            r"fitted to timestep 999 at step 0; this process has 913 there",
        ),
        ({"shape": (1, 6, 4)}, r"fitted to samples of shape \(2, 6, 4\); the target's are \(1, 6, 4\)"),
        ({"shape": (48,)}, r"fitted to samples of shape \(2, 6, 4\); the target's are \(48,\)"),
    ],
)
def test_another_process_or_shape_is_refused_before_any_evaluation(asked: dict[str, Any], message: str) -> None:
    model, drafter = Recorder(), linear(random_weight())
    common: dict[str, Any] = {"shape": IMAGE, "process": ReverseProcess.ddpm(STEPS), "seed": 1}
    with pytest.raises(ValueError, match=message):
        free.speculative_sample(model, drafter, **(common | asked))
    assert not model.timesteps
    free.speculative_sample(model, drafter, **common)
    with pytest.raises(ValueError, match=message):  # and also once it has served its own
        free.speculative_sample(model, drafter, **(common | asked))


def test_a_target_that_knows_another_shape_is_refused(dit: Any) -> None:
    with pytest.raises(ValueError, match=r"fitted to samples of shape \(2, 6, 4\); the target's are \(2, 8, 8\)"):
        linear(random_weight()).check(free.as_target(dit))


# --- calibration --------------------------------------------------------------------------------------------------------


def ill_conditioned() -> GaussianTarget:
    """Variances from 1e-3 to 2: most of it is known of some directions and little of others, at every step."""
    return GaussianTarget(torch.linspace(-1.0, 0.8, 16), torch.logspace(-3, 0.3, 16), rotation(16, 5))


FIT: dict[str, Any] = {"shape": (16,), "num_inference_steps": 30, "num_trajectories": 24, "window": 6}


def test_calibration_pays_on_an_analytic_target() -> None:
    drafter = free.calibrate(ill_conditioned(), **FIT)
    assert (drafter.num_steps, drafter.num_bands, drafter.sample_shape) == (30, 1, (16,))
    common: dict[str, Any] = {"shape": (16,), "num_inference_steps": 30, "window": 6, "seed": list(range(900, 1000))}
    hold, fitted = (free.speculative_sample(ill_conditioned(), one, **common).stats for one in ("hold-x0", drafter))
    assert fitted.acceptance_rate > hold.acceptance_rate
    assert fitted.parallel_efficiency > hold.parallel_efficiency


def test_calibration_is_a_function_of_its_seed() -> None:
    first, second, other = (free.calibrate(ill_conditioned(), **FIT, seed=seed).weight for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_calibration_finds_the_blend_that_is_there() -> None:
    """The output of this target does not depend on the state: an anchor of the same step knows all of it."""

    def constant(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 0.3)

    drafter = free.calibrate(constant, shape=(1, 4, 4), num_inference_steps=20, num_trajectories=100, window=4)
    assert drafter.num_bands == 4
    # the pull to hold-x0 leaves a third at most; at the ends such anchors are few, or hold-x0 is far off
    assert drafter.weight[6:-3, 0].abs().max() < 0.4


def test_what_was_never_drafted_stays_hold_x0() -> None:
    drafter = free.calibrate(GaussianModel(), shape=(4,), num_inference_steps=2, num_trajectories=2, window=2)
    assert torch.equal(drafter.weight[:, 2], torch.ones(2, 1))


def test_calibration_of_a_guided_dit_with_labels_in_turn(dit: Any) -> None:
    drafter = free.calibrate(
        dit, class_labels=[1, 2, 3], guidance_scale=1.5, num_inference_steps=6, num_trajectories=4, window=4
    )
    out = free.speculative_sample(dit, drafter, class_labels=[1, 2], guidance_scale=1.5, num_inference_steps=6, seed=1)
    assert torch.isfinite(drafter.weight).all()
    assert torch.isfinite(out.samples).all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"window": 1}, r"window is 1; allowed is an int, 2 or more"),
        ({"num_trajectories": 0}, r"num_trajectories is 0; allowed is an int, 1 or more"),
        ({"num_bands": 0}, r"num_bands is 0; allowed is an int, 1 or more"),
        ({"num_bands": 2}, r"num_bands is 2; samples of shape \(16,\) have 1"),
        ({"guidance_scale": 0.5}, r"guidance_scale is 0.5"),
        ({"num_inference_steps": 1001}, r"num_inference_steps is 1001; allowed is an int, 1 … 1000"),
        ({"seed": "one"}, r"seed"),
    ],
)
def test_wrong_arguments_of_calibrate(asked: dict[str, Any], message: str) -> None:
    model = Recorder()
    with pytest.raises(ValueError, match=message):
        free.calibrate(model, **(FIT | asked))
    assert not model.timesteps


def test_nan_ends_calibration() -> None:
    def broken(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.where((timestep < 500).view(-1, 1), torch.nan, x)

    with pytest.raises(free.NonFiniteOutputError, match=r"model returned NaN or infinity at step 15 \(timestep"):
        free.calibrate(broken, **FIT)
