"""The console command, as a shell sees it and as a function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import free
from free.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_command_is_installed_under_its_own_name() -> None:
    command = Path(sys.executable).with_name("free-dit")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"free-dit {free.__version__}"
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert "usage: free-dit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["dream"], "invalid choice: 'dream'"),
        (["demo", "--steps", "0"], "0 is not 1 or more"),
        (["demo", "--steps", "many"], "invalid"),
        (["demo", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1001"], "num_inference_steps is 1001; allowed is 1 … 1000"),
        (["--drafter", "hold"], "drafter is 'hold'; known are 'hold-x0', 'hold-output'"),
        (["--output", "no/such/folder/x.png"], "no/such/folder"),
        (["--weights", "no-such-folder"], "no digits DiT in 'no-such-folder'"),
        (["--guidance-scale", "0.5"], "guidance_scale is 0.5; allowed is 1"),
    ],
)
def test_a_wrong_argument_is_exit_code_1_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "4", *arguments]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("free-dit: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not list(tmp_path.iterdir())


def test_demo_prints_a_table_and_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "digits.png"
    assert main(["demo", "--steps", "20", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    header = next(line.split() for line in lines if line.strip().startswith("sampler"))
    assert header == ["sampler", "rounds", "efficiency", "forwards", "seconds", "speed-up", "recognised"]
    ancestral = next(line.split() for line in lines if line.strip().startswith("ancestral"))
    assert ancestral[1:4] == ["20.0", "1.00", "20.0"]
    speculative = next(line.split() for line in lines if line.strip().startswith("speculative, hold-x0"))
    assert 20 / 8 <= float(speculative[2]) < 20
    assert float(speculative[3]) > 1
    assert str(picture) in printed
    assert picture.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["digits.png"]
