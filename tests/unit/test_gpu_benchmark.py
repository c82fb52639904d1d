"""The GPU benchmark, dry: it runs at toy size, its bound is arithmetic, and the README says what the rows say."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import free
from benchmarks import end_to_end, gpu, readme
from benchmarks.bound import bound_of_window, least_seconds
from benchmarks.figures import draw_gpu
from benchmarks.record import OUT_OF_TIME, Record, newest
from benchmarks.rows import read_rows


@pytest.fixture
def _no_compiler() -> Iterator[None]:
    # what torch.compile makes is torch's business, and takes its time
    with torch.compiler.set_stance("force_eager"):
        yield


def toy_record(folder: Path, **options: Any) -> Record:
    return Record("gpu-toy", **{"toy": True, "resume": False, "minutes": 5.0, "results": folder, **options})


# --- the run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_no_compiler")
def test_every_part_runs_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr("benchmarks.end_to_end._RUNS", 1)
    committed = read_rows("gpu")
    assert gpu.main(["--toy", "--results", str(tmp_path)]) == 0
    rows = read_rows("gpu-toy", tmp_path)
    assert read_rows("gpu") == committed
    assert not (tmp_path / "gpu.jsonl").exists()
    assert all(row["toy"] for row in rows)
    measured = [row for row in rows if "skipped" not in row]
    assert {row["benchmark"] for row in measured} == {
        "forward", "share of a round", "end to end", "end to end, by implementation", "forward in the sampler's run",
        "bound", "projection",
    }  # fmt: skip
    if not torch.cuda.is_available():
        assert {row["skipped"] for row in rows if "skipped" in row} == {"captured needs CUDA"}
    for batch, window in itertools.product((1, 2), ("auto", 2, 4)):
        row = newest(rows, benchmark="end to end", sampler="speculative", batch=batch, window=window)
        assert row is not None
        assert row["speedup"].keys() >= {"eager", "compiled"}
    assert newest(rows, benchmark="bound", batch=2)["bound"] >= 1
    assert len(draw_gpu("Some Device", rows, tmp_path)) == 3
    # what is there is not measured again
    again = toy_record(tmp_path, resume=True)
    gpu.run(gpu.TOY, ["windows", "share", "end-to-end"], again, torch.device("cpu"), tmp_path / "none")
    assert again.rows == []


def test_what_there_was_no_time_for_is_said_and_taken_up_again(tmp_path: Path) -> None:
    record = toy_record(tmp_path, minutes=0.0)
    gpu.run(gpu.TOY, ["windows", "share"], record, torch.device("cpu"), tmp_path)
    assert record.rows
    assert {row["skipped"] for row in record.rows} == {OUT_OF_TIME}
    assert toy_record(tmp_path, resume=True).known(benchmark="forward") is None


def test_without_a_gpu_only_a_dry_run_is_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert "--toy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_done_once_is_left_out_of_the_seconds() -> None:
    stats = free.SamplingStatistics(4, 2, "hold-x0", np.full(2, 3))
    stats.total_seconds, stats.seconds = 6.0, {"round": 2.0, "recording": 2.5, "measuring": 1.0}
    assert end_to_end._per_sample([stats]) == pytest.approx(1.25)


def test_the_first_runs_parts_are_those_that_it_is_told_of(tmp_path: Path) -> None:
    script = Path(gpu.__file__).with_name("first_gpu.sh")
    refused = subprocess.run(["bash", str(script), "nonsense", str(tmp_path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    parts = refused.stderr.split("one of: ")[1].split()
    table = script.with_name("README.md").read_text(encoding="utf-8")
    assert parts == re.findall(r"^\| \d \| `(\w+)` \|", table, re.MULTILINE)
    assert not list(tmp_path.iterdir())


# --- the bound ----------------------------------------------------------------------------------------------------------


def test_the_bound_of_a_window_is_what_it_saves_over_what_it_costs() -> None:
    assert bound_of_window(6.0, 8, {1: 1.0, 8: 3.0}) == pytest.approx(2.0)
    assert bound_of_window(6.0, 16, {1: 1.0, 4: 2.0, 8: 3.0}) == pytest.approx(6 / 5)  # on the line of the last two


def test_the_least_seconds_of_certain_drafts() -> None:
    seconds = {1: 1.0, 2: 1.5, 4: 2.0}
    assert least_seconds(np.ones(8), seconds) == pytest.approx(4.0)  # two windows of 4
    assert least_seconds(np.zeros(8), seconds) == pytest.approx(8.0)  # no draft is accepted: eight windows of 1
    assert least_seconds(np.ones(5), {1: 1.0, 4: 2.0}) == pytest.approx(3.0)


def test_the_least_seconds_is_what_the_best_of_all_choices_takes() -> None:
    acceptance, seconds = np.array([0.9, 0.4, 0.7, 0.0]), {1: 1.0, 2: 1.4, 4: 1.9}

    def expected(choice: tuple[int, ...], step: int = 0) -> float:
        if step == 4:
            return 0.0
        total, reached = seconds[choice[step]], 1.0
        width = min(choice[step], 4 - step)
        for settled in range(1, width + 1):
            further = acceptance[step + settled - 1] if settled < width else 0.0
            total += reached * (1 - further) * expected(choice, step + settled)
            reached *= further
        return total

    best = min(expected(choice) for choice in itertools.product(seconds, repeat=4))
    assert least_seconds(acceptance, seconds) == pytest.approx(best)


# --- the README ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_the_pages_numbers_are_those_of_the_rows(name: str) -> None:
    page, block = readme.BLOCKS[name]
    _, between, _ = readme.split(page.read_text(encoding="utf-8"), name)
    assert between == block(readme.committed_rows()), "run `python -m benchmarks.readme`"


def test_exact_relaxed_and_fewer_steps_stand_side_by_side() -> None:
    common = {
        "device": "CPU",
        "model": "digits",
        "guidance_scale": 1.0,
        "samples": 400,
        "drafter": "hold-x0",
        "uncertainty": None,
    }
    common |= {"energy_distance": 0.5, "energy_error": 0.01, "frechet_distance": 0.25, "frechet_error": 0.02}
    common |= {"rounds": 40.0, "parallel_efficiency": 6.25, "total_variation_bound": 0.0, "steps": 250, "strength": 0.0}
    exact, ancestral = (
        {**common, "window": 8},
        {**common, "window": 1, "steps": 10, "rounds": 10.0, "parallel_efficiency": 1.0},
    )
    relaxed = {**exact, "strength": 2.0, "uncertainty": "learned", "total_variation_bound": 0.375, "rounds": 32.0}
    text = readme.relaxation({"quality": [ancestral, relaxed, exact]})
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| exact, hold-x0, W=8 | 250 | 40.0 | 6.25 | 0 | 0.5000 ± 0.0100 | 0.2500 ± 0.0200 |",
        "| relaxed by 2 (learned) | 250 | 32.0 | 6.25 | 0.38 | 0.5000 ± 0.0100 | 0.2500 ± 0.0200 |",
        "| ancestral | 10 | 10.0 | 1.00 | 0 | 0.5000 ± 0.0100 | 0.2500 ± 0.0200 |",
    ]
    assert readme.relaxation({"quality": []}) == "\n"


def test_without_gpu_rows_the_readme_says_so() -> None:
    skipped = {"benchmark": "forward", "device": "Some GPU", "skipped": "out of memory"}
    text = readme.performance({"gpu": [skipped], "sampler": [], "compare": []})
    assert "No rows of a GPU are there yet" in text
    assert "|" not in text


def test_gpu_rows_are_reported_with_device_batch_and_baseline() -> None:
    common = {"device": "Some GPU", "torch": "2", "model": "DiT-XL/2", "batch": 4, "steps": 250, "guidance_scale": 1.5}
    common |= {"dtype": "bfloat16", "drafter": "gains", "window": 8, "implementation": "compiled and captured"}
    old = {**common, "benchmark": "end to end", "sampler": "speculative", "parallel_efficiency": 5.0}
    old |= {"seconds_per_sample": 0.5, "speedup": {"eager": 9.0, "compiled and captured": 2.0}}
    new = {**old, "speedup": {"diffusers' pipeline": 10.5, "eager": 9.5, "compiled and captured": 2.5}}
    bound = {"device": "Some GPU", "benchmark": "bound", "model": "DiT-XL/2", "batch": 4, "bound": 2.75}
    forwards = [{**common, "benchmark": "forward", "window": w, "seconds_median": 0.002 * w**0.5} for w in (1, 16)]
    share = {**common, "benchmark": "share of a round", "seconds_round": 0.01, "share_draft": 0.1, "share_outside": 0.02}
    projection = {**common, "benchmark": "projection", "batch": 1, "gpus": 4, "projected_speedup": 4.25}
    projection |= {"link_bytes_per_second": 50e9}
    ways = [
        {
            **old,
            "sampler": sampler,
            "benchmark": benchmark,
            "implementation": way,
            "window": 8,
            "seconds_per_sample": seconds,
        }
        for sampler, benchmark, way, seconds in (
            ("ancestral", "end to end", "eager", 2.5),
            ("ancestral", "end to end", "compiled and captured", 1.25),
            ("speculative", "end to end, by implementation", "eager", 0.75),
        )
    ]
    rows = [old, new, bound, *forwards, share, projection, *ways]
    text = readme.performance({"gpu": rows, "sampler": [], "compare": []})
    assert "| DiT-XL/2 | 4 | ancestral | 2.5 | - | - | 1.25 |" in text
    assert "| DiT-XL/2 | 4 | speculative | 0.75 | - | - | 0.5 |" in text
    assert "| DiT-XL/2 | 4 | gains | 8 | 5.00 | 0.5 | 10.50x | 9.50x | 2.50x | 2.75x |" in text
    assert "2.00x" not in text
    assert "| DiT-XL/2 | 4 | 2.00 | - | - | 4.00 | - | - |" in text
    assert "| DiT-XL/2 | 4 | gains | 8 | 10.00 | 10.0% | 2.0% |" in text
    assert "A projection, not a measurement" in text
    assert "over a link of 50 GB/s" in text
    assert "| DiT-XL/2 | 1 | gains | 8 | 4 | 4.25x |" in text
    assert text.count("Some GPU") >= 3
    assert "No rows" not in text


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="the page lacks"):
        readme.split("# nothing\n", "performance")
