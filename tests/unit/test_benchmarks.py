"""What the benchmarks write and draw. Their timings are not tested: a timing is a measurement, not an assertion."""

from __future__ import annotations

import json
from inspect import isfunction, signature
from pathlib import Path
from typing import Any

import pytest
import torch

import free
import free_kernels

pytest.importorskip("matplotlib")

from benchmarks import samplers
from benchmarks.draw import draw
from benchmarks.operations import OPERATIONS, Round
from benchmarks.rows import read_rows, write_row
from benchmarks.test_kernels import SHAPES
from free.sampling.request import Options, check_request
from tests.analytic import GaussianTarget


def test_rows_are_appended_with_what_they_were_measured_on(tmp_path: Path) -> None:
    first = write_row("kind", {"microseconds": 1.5}, tmp_path)
    second = write_row("kind", {"microseconds": 2.5}, tmp_path)
    assert read_rows("kind", tmp_path) == [first, second]
    assert {"time", "device", "torch", "triton", "diffusers", "revision", "command"} <= set(first)
    assert str(Path.home()) not in json.dumps(first)


def test_a_row_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_row("kind", {"microseconds": float("nan")}, tmp_path)


def test_no_rows_yet(tmp_path: Path) -> None:
    assert read_rows("kind", tmp_path) == []


def test_every_operation_is_measured() -> None:
    """Those that take an implementation; of the random numbers, the ones that a round draws."""
    public = (getattr(free_kernels, name) for name in free_kernels.__all__)
    operations = {call.__name__ for call in public if isfunction(call) and "impl" in signature(call).parameters}
    assert operations - {"philox", "uniform"} == set(OPERATIONS) - {"verify_stored_noise"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_measured_on_a_round_of_its_own(operation: str) -> None:
    call, size = OPERATIONS[operation](Round((2, 4, 1024), torch.device("cpu")))
    call("reference")
    assert size > 0


@pytest.mark.parametrize("on_gpu", [False, True])
def test_latency_curves_are_drawn(tmp_path: Path, on_gpu: bool) -> None:
    rows = []
    for operation in OPERATIONS:
        for implementation in ("triton", "eager", "compile") if on_gpu else ("eager", "compile"):
            for batch, window, numel in SHAPES:
                row = {"operation": operation, "implementation": implementation, "microseconds_median": 10.0 + numel}
                row |= {"batch": batch, "window": window, "numel": numel}
                if on_gpu:
                    row |= {"microseconds_in_a_graph_median": 5.0 + numel, "microseconds_of_the_bytes": 1.0 + numel}
                rows.append(row)
    path = draw("Some Device, 2 cores", rows, tmp_path)
    assert path.name == "kernels-some-device-2-cores.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picard_iteration_without_tolerance_is_the_step_by_step_sampler() -> None:
    """And with one it takes fewer rounds and is off by about as much."""
    from benchmarks.picard import picard_sample

    model = GaussianTarget.example(6)
    common: dict[str, Any] = {"shape": (6,), "process": free.ReverseProcess.ddpm(40), "seed": [1, 2, 3]}
    exact = free.ancestral_sample(model, **common).samples
    request = check_request(model, Options(**common))
    samples, rounds = picard_sample(request, 5, 0.0)
    torch.testing.assert_close(samples, exact, atol=1e-5, rtol=0.0)
    near, fewer = picard_sample(request, 5, 0.1)
    assert (fewer < rounds).all()
    assert 1e-4 < (near - exact).square().mean().sqrt() < 0.3


def sampler_row(sampler: str, rounds: float, distance: float, **given: Any) -> dict[str, Any]:
    usual = {
        "time": "1", "model": "digits", "guidance_scale": 1.0, "samples": 300, "window": 1, "drafter": "ancestral",
        "steps": int(sampler.split(":")[1]), "frechet_error": 0.1, "frechet_floor": 0.5, "energy_error": 0.01,
        "parallel_efficiency": 2.0, "standard_error": 0.1,
    }  # fmt: skip
    row = {"sampler": sampler, "rounds": rounds, "frechet_distance": distance, "energy_distance": distance / 10}
    return {**row, **usual, **given}


def test_samplers_are_shown_at_the_distance_of_most_samples() -> None:
    gains = {"drafter": "gains", "window": 8}
    rows = [
        sampler_row("2m-sde:15", 15, 9.0, samples=1000),  # measured again
        sampler_row("2m-sde:15", 15, 2.0, samples=1000),
        sampler_row("2m-sde:15", 15, 3.0),
        sampler_row("2m-ode:10", 10, 4.0, samples=1000),
        sampler_row("ddpm:20", 20, 5.0),
        sampler_row("ddpm:20", 20, 6.0, samples=20),  # too few for a distance
        sampler_row("2m-sde:15", 7.5, 8.0, samples=20, **gains),
        sampler_row("2m-sde:15", 7.0, 7.0, samples=48, **gains),
    ]
    told = [(row["sampler"], row["window"], row["rounds"], row["frechet_distance"], row["samples"]) for row in
            samplers.drawn(rows, "digits")]  # fmt: skip
    assert told == [
        ("2m-sde:15", 1, 15, 2.0, 1000),
        ("2m-sde:15", 8, 7.0, 2.0, 1000),
        ("2m-ode:10", 1, 10, 4.0, 1000),
    ]
    page = samplers.samplers({"pareto": rows})
    assert "| DPM-Solver++ 2M SDE | 15 | 7.0 ± 0.4 | - | 2.0000 ± 0.1000 | 0.2000 ± 0.0100 |" in page
    first, second = page.index("guidance 1, 1000 samples"), page.index("guidance 1, 300 samples")
    assert first < page.index("2.0000 ± ") < second < page.index("| DDPM | 20 |") < page.index("3.0000 ± ")
    assert "9.0000" not in page
    assert "6.0000" not in page
    assert samplers.fewer_steps({"pareto": rows}) == "\n"  # of another model
    photos = [{**row, "model": "photo_dit"} for row in rows]
    lines = [line for line in samplers.fewer_steps({"pareto": photos}).splitlines() if "DPM" in line]
    assert lines == ["| DPM-Solver++ 2M SDE, S=15, **speculated** | 7.0 | 2.000 ± 0.100 | 200.0 ± 10.0 |"]
