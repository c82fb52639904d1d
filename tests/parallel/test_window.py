"""A window over 2, 3 and 4 processes: the samples of one, to the bit, and an end for all where one comes to one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.parallel.cases import DRAWN, EVERYWHERE, draw
from tests.parallel.worker import GROUPS, SIZE, TIMEOUT

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0
"""Seconds for all that the processes do; it takes a few, and each wait within ends by itself."""

Results = list[dict[str, Any]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """Of each process; the last one has killed itself at the end. Where pytest runs in several processes, one of them
    starts these.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if hasattr(request.config, "workerinput") else base
    found = base / "of-all-processes.json"
    with FileLock(base / "of-all-processes.lock"):
        if not found.exists():
            found.write_text(json.dumps(run(tmp_path_factory.mktemp("processes"))), encoding="utf-8")
    return json.loads(found.read_text(encoding="utf-8"))


def run(folder: Path) -> Results:
    command = [sys.executable, "-m", "tests.parallel.worker"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, stderr=(folder / f"stderr-{rank}").open("w"))
        for rank in range(SIZE)
    ]
    try:
        for process in processes:
            process.wait(PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [(folder / f"stderr-{rank}").read_text() for rank in range(SIZE)]
    found = []
    for rank in range(SIZE):
        file = folder / f"{'survivors' if rank < SIZE - 1 else 'results'}-{rank}.json"
        assert file.exists(), said
        found.append(json.loads(file.read_text(encoding="utf-8")))
    assert [process.returncode for process in processes] == [0] * (SIZE - 1) + [-signal.SIGKILL], said
    return found


def of_all(results: Results, name: str, size: int = SIZE) -> list[Any]:
    """A case's result on each process of the group."""
    return [results[rank][f"{name}@{size}"] for rank in GROUPS[size]]


@pytest.mark.parametrize("name", DRAWN)
def test_samples_are_those_of_one_process(results: Results, name: str) -> None:
    expected = json.loads(json.dumps(draw(name)))
    for size in GROUPS if name in EVERYWHERE else (3,):
        for result in of_all(results, name, size):
            assert result == expected


def test_samples_end_one_by_one() -> None:
    assert len(set(draw("uneven")["rounds"])) > 1


@pytest.mark.parametrize("name", ["auto", "auto again", "auto, shared key", "plan"])
def test_windows_that_are_chosen_are_the_same_on_all(results: Results, name: str) -> None:
    first, *others = of_all(results, name, 3)
    assert "error" not in first, first
    assert first["samples"]
    assert all(other == first for other in others)


@pytest.mark.parametrize("size", GROUPS)
def test_bytes_of_a_round(results: Results, size: int) -> None:
    """The outputs once, padded to a share each, and what was settled once; beside them little."""
    window, numel, rounds = 8, 64, 3
    share = -(-window // size)
    outputs = size * (share * numel * 4 + 16)  # and a checksum
    # the state, steps and flag of one sample, two numbers a drafted step, each tensor up to a multiple of 16 bytes
    settled = numel * 4 + 16 + 16 + 2 * 32
    words = size * 16 + 8
    for received in of_all(results, "bytes", size):
        assert received["outputs"] == rounds * outputs
        assert received["settled"] == rounds * settled
        call = size * 2 * 16 + size * 32 * 8  # where it begins and ends, and the digests of what is asked
        assert received["words"] == rounds * words + call


def test_an_axis_of_a_mesh(results: Results) -> None:
    expected = json.loads(json.dumps(draw("uneven")))
    assert all(result == expected for result in of_all(results, "mesh"))


def test_groups_that_are_none(results: Results) -> None:
    for result in of_all(results, "mesh of two axes"):
        assert result["message"].startswith("group is a mesh of axes ('window', 'tensor'); allowed is one of one axis")
    for result in of_all(results, "not a member")[2:]:
        assert result["message"].startswith("group is a group without this process; allowed is a ProcessGroup")


def test_nan_of_one_process_is_everybodys(results: Results) -> None:
    first, *others = of_all(results, "NaN")
    assert first["error"] == "NonFiniteOutputError"
    assert first["message"].startswith("model returned NaN or infinity at step")
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("raises", 2, "ValueError: no luck"),
        ("interrupted", 0, "KeyboardInterrupt: "),
        ("callback", 1, "ValueError: no luck"),
        ("settles 0", 0, "ValueError: no luck"),
        ("settles 3", 3, "ValueError: no luck"),
    ],
)
def test_who_raises_takes_the_others_along(results: Results, name: str, rank: int, message: str) -> None:
    ended = of_all(results, name)
    assert f"{ended[rank]['error']}: {ended[rank]['message']}" == message
    for other in ended[:rank] + ended[rank + 1 :]:
        assert other == {"error": "RankError", "message": f"rank {rank} has raised {message}"}


def test_drafts_that_differ_decide_nothing(results: Results) -> None:
    for result in of_all(results, "whim"):
        assert result["error"] == "RankError"
        assert "have drafted different states from the same evaluations" in result["message"]


def test_a_call_after_all_those(results: Results) -> None:
    first, *others = of_all(results, "afterwards")
    assert isinstance(first, list), first
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seed", "seed is not the same on all ranks: [1, 2] on rank 0, [1, 3] on rank 2; all ranks must make the same call"),
        ("window", "window is not the same on all ranks: 4 on rank 0, 5 on rank 2; all ranks must make the same call"),
        ("weights", "model or its weights is not the same on all ranks: Weighted "),
        ("drafter", "drafter is not the same on all ranks: hold-x0 "),
        ("process", "process is not the same on all ranks: bytes "),
        ("latents", "latents is not the same on all ranks: Tensor "),
        ("call", "call is not the same on all ranks: ('compile', 'features', 'impl', 'relaxation', 'window') on rank 0"),
    ],
)
def test_unlike_calls_end_before_any_work(results: Results, name: str, message: str) -> None:
    first, *others = of_all(results, f"unlike {name}")
    assert first["error"] == "ValueError"
    assert first["message"].startswith(message)
    assert all(other == first for other in others)


def test_a_process_that_is_killed_ends_the_others(results: Results) -> None:
    for rank in range(SIZE - 1):
        ended = results[rank][f"killed@{SIZE}"]
        assert ended["error"] == "RankError"
        assert f"rank {rank} of {SIZE} has lost the others while" in ended["message"]
        assert "a process has ended" in ended["message"]
    assert TIMEOUT < PATIENCE
