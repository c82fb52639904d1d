"""What the benchmarks write and draw. Their timings are not tested: a timing is a measurement, not an assertion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import free

pytest.importorskip("matplotlib")

from benchmarks.draw import draw
from benchmarks.rows import read_rows, write_row
from benchmarks.test_kernels import OPERATIONS, SHAPES
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
