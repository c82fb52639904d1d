"""The policies' benchmark, as far as it needs no simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from benchmarks.policies import demonstrations, evaluation, report, training
from benchmarks.policies.__main__ import WEIGHTS
from benchmarks.policies.episodes import TASKS, chunk_seed, seen
from benchmarks.policies.network import HORIZON, PolicyDiT
from benchmarks.policies.samplers import BASELINE, Sampler

COMPARED = (BASELINE, Sampler("DDPM", 100), Sampler("DDPM", 100, "gains", 16))


def _demonstrations(folder: Path) -> None:
    """Of each task two paths, of 20 and 17 steps; actions count the steps of all."""
    lengths = np.array([20, 17])
    steps = int(lengths.sum())
    for task in TASKS:
        np.savez(
            folder / f"{task}.npz",
            observation=np.random.default_rng(0).standard_normal((steps, 39)).astype(np.float32),
            action=np.arange(steps, dtype=np.float32)[:, None].repeat(4, 1) / 100,
            episode=np.arange(2).repeat(lengths),
        )


def test_chunks_lie_within_their_paths(tmp_path: Path) -> None:
    _demonstrations(tmp_path)
    data = demonstrations.load(tmp_path)
    begins = (100 * data.chunk[:, 0, 0]).round().int().tolist()
    assert begins == [0, 1, 2, 3, 4, 20, 21] * len(TASKS)
    assert torch.allclose(data.chunk[:, -1, 0] - data.chunk[:, 0, 0], torch.tensor((HORIZON - 1) / 100))


def test_a_policy_sees_both_frames_the_goal_and_the_task() -> None:
    observation = np.arange(78.0).reshape(2, 39)
    frames = seen(observation, TASKS[1])
    assert frames.shape == (2, 2, 24)
    assert frames.dtype == np.float32
    assert (frames[:, 0, :18] == observation[:, 18:36]).all()  # the frame before
    assert (frames[:, 1, :18] == observation[:, :18]).all()
    assert (frames[:, :, 18:21] == observation[:, None, 36:]).all()
    assert (frames[:, :, 21:] == [0, 1, 0]).all()


def test_no_two_chunks_share_a_seed() -> None:
    seeds = [chunk_seed(seed, episode, call) for seed in (2, 3) for episode in range(100) for call in range(25)]
    assert len(set(seeds)) == len(seeds)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _demonstrations(tmp_path)
    data = demonstrations.load(tmp_path)
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(training, "_KEEP_EVERY", 2)
    with torch.random.fork_rng(devices=[]):
        whole = training.train(data, tmp_path / "whole", 5)
        keep = training._keep

        def stop(*arguments: Any) -> None:
            keep(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "_keep", stop)
        with pytest.raises(KeyboardInterrupt):
            training.train(data, tmp_path / "stopped", 5)
        monkeypatch.setattr(training, "_keep", keep)
        taken_up = training.train(data, tmp_path / "stopped", 5)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, taken_up.state_dict()[name]), name
    assert not torch.equal(whole.leave.weight, torch.zeros_like(whole.leave.weight))


def test_the_committed_policy_draws_chunks_by_every_sampler() -> None:
    network = PolicyDiT.load(WEIGHTS)
    assert not network.training
    assert sum(parameter.numel() for parameter in network.parameters()) < 1.5e6
    observation = network.mean[None]
    for sampler in (Sampler("diffusers DDIM", 10), Sampler("2M SDE", 15, "gains", 8), Sampler("DDPM", 100, "gains", 16)):
        drawn = sampler.of(network)(observation.repeat(2, 1, 1), [1, 2])
        assert drawn.chunks.shape == (2, 16, 4)
        assert drawn.chunks.isfinite().all()
        assert drawn.rounds <= sampler.steps
        assert drawn.evaluations >= drawn.rounds


def test_intervals_are_wilsons() -> None:
    low, high = evaluation.interval(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)  # by the formula, z = 1.95996
    assert evaluation.interval(100, 100)[1] == 1


def test_table_and_figure_come_from_the_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for task in TASKS[:2]:
        for sampler in COMPARED:
            row = {"device": "some device", "threads": 1, "benchmark": report.SUCCESS, "task": task, "episodes": 100}
            row |= {"most_steps": 200, "executed": 8, "success": 0.9, "success_low": 0.83, "success_high": 0.94}
            rows.append(row | sampler.key)
    assert not report.measured(rows)
    for run, milliseconds in ((1, 70.0), (2, 50.0)):
        for factor, sampler in enumerate(COMPARED, 1):
            row = {"device": "some device", "threads": 1, "benchmark": report.TIME, "run": run, "runs": 60, "rounds": 9.0}
            row |= {"milliseconds_median": milliseconds / factor, "hertz": 20.0, "over_diffusers": float(factor)}
            rows.append(row | {"evaluations": 140.0, "parameters": 1_219_408} | sampler.key)
    assert report.measured(rows)
    text = report.table(rows)
    assert f"| {BASELINE.method} | 100 | - | - | 9.0 | 140 | 50.0 | 20 | 1.00x | 90 (83–94) | 90 (83–94) |" in text
    assert "| DDPM | 100 | gains | 16 | 9.0 | 140 | 16.7 | 20 | 3.00x |" in text
    report.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
