"""The console command, as a shell sees it and as a function."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import free
from free.cli import main
from free.demo.run import few_threads
from free.training.config import add_arguments

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_command_is_installed_under_its_own_name() -> None:
    command = Path(sys.executable).with_name("free-dit")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"free-dit {free.__version__}"
    assert done.stderr == ""


@pytest.mark.parametrize("verb", ["", "demo", "compare", "train-drafter", "sample", "evaluate", "check"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*filter(None, [verb]), "--help"])
    assert exit_.value.code == 0
    assert "usage: free-dit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["dream"], "invalid choice: 'dream'"),
        (["demo", "--steps", "0"], "is no int of 1 or more"),
        (["demo", "--steps", "many"], "is no int of 1 or more"),
        (["demo", "--window", "0"], "is no int of 1 or more"),
        (["demo", "--window", "wide"], "is no int of 1 or more"),
        (["demo", "--unknown"], "unrecognized arguments: --unknown"),
        (["train-drafter"], "the following arguments are required: --output_dir"),
        (["compare", "--windows", "0"], "is no int of 1 or more"),
        (["compare", "--windows"], "expected at least one argument"),
        (["compare", "--drafters"], "expected at least one argument"),
        (["compare", "--samples", "0"], "is no int of 1 or more"),
        (["compare", "--guidance-scales", "high"], "invalid float value"),
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
        (["--steps", "1001"], "num_inference_steps is 1001; allowed is an int, 1 … 1000"),
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
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["demo", "--steps", "20", "--output", str(picture)]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "CPU, 1 thread of 2, as the model is tiny" in printed
    lines = printed.splitlines()
    header = next(line.split() for line in lines if line.strip().startswith("sampler"))
    assert header == ["sampler", "rounds", "efficiency", "forwards", "seconds", "speed-up", "recognised"]
    ancestral = next(line.split() for line in lines if line.strip().startswith("ancestral"))
    assert ancestral[1:4] == ["20.0", "1.00", "20.0"]
    speculative = next(line.split() for line in lines if line.strip().startswith("speculative, gains"))
    # on a busy machine the automatic window may be 1 throughout
    assert 1 <= float(speculative[2]) <= 20
    assert float(speculative[3]) >= 1
    learned = next(line.split() for line in lines if line.strip().startswith("speculative, learned"))
    assert 1 <= float(learned[2]) <= 20
    assert "W=auto" in printed
    assert str(picture) in printed
    assert picture.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["digits.png"]


def test_a_tiny_model_has_one_thread_and_others_have_all() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), few_threads(torch.nn.Linear(2, 2)):
            1 // (torch.get_num_threads() - 1)
        assert torch.get_num_threads() == 2
        with few_threads(torch.nn.Linear(4000, 4000, device="meta")) as said:
            assert torch.get_num_threads() == 2
        assert said == "2 threads"
    finally:
        torch.set_num_threads(before)


def test_compare_prints_a_table_and_writes_rows_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, results = tmp_path / "compare.png", tmp_path / "rows.jsonl"
    arguments = ["compare", "--windows", "2", "3", "--steps", "8", "--samples", "2", "--output", str(figure)]
    assert main([*arguments, "--results", str(results)]) == 0
    printed = capsys.readouterr().out
    assert "model digits, 2 samples" in printed
    assert str(figure) in printed
    assert str(results) in printed
    assert figure.read_bytes().startswith(PNG)
    assert len(results.read_text().splitlines()) == 4
    assert main([*arguments, "--results", str(results), "--resume"]) == 0
    assert capsys.readouterr().out == printed
    assert len(results.read_text().splitlines()) == 4


def test_compare_draws_samplers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, results = tmp_path / "samplers.png", tmp_path / "rows.jsonl"
    arguments = [
        "compare",
        "--samplers",
        "2m-sde:6",
        "2m-ode:4",
        "--data",
        "digits",
        "--samples",
        "4",
        "--drafters",
        "gains",
    ]
    assert main([*arguments, "--guidance-scales", "1", "--output", str(figure), "--results", str(results)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("step by step") == printed.count("deterministic") == 1
    assert printed.count("gains, W=8") == 1
    assert figure.read_bytes().startswith(PNG)
    assert len(results.read_text().splitlines()) == 3


@pytest.mark.slow
def test_compare_is_interrupted_and_resumed(tmp_path: Path) -> None:
    figure, results = tmp_path / "compare.png", tmp_path / "rows.jsonl"
    # many configurations, so that the run is under way for long after its first row, however busy the machine
    windows, count = list("2345678"), 14
    command = [sys.executable, "-m", "free.cli", "compare", "--windows", *windows, "--steps", "100", "--samples", "2",
               "--output", str(figure), "--results", str(results)]  # fmt: skip
    # what a shell runs in the background inherits that interrupts are ignored
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard) as process:
        while process.poll() is None and not (results.exists() and results.read_text()):  # it is made, then written
            time.sleep(0.02)
        # Python drops an interrupt that falls into a destructor, and dies of a second one while it shuts down
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
        _, error = process.communicate()
    assert process.returncode == 130
    assert error.endswith("free-dit: interrupted\n")
    before = results.read_text()
    assert 1 <= len(before.splitlines()) < count
    assert before.endswith("\n")
    assert not figure.exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    after = results.read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == count
    assert len([line for line in done.stdout.splitlines() if line.strip().startswith(("hold-x0", "gains"))]) == count
    assert figure.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafters", "hold"], "drafter is 'hold'; known are 'hold-x0', 'hold-output'"),
        (["--model", "no-such-folder"], "no model in 'no-such-folder'"),
        (["--guidance-scales", "0.5"], "guidance_scales holds 0.5; allowed is 1"),
        (["--steps", "1001"], "num_inference_steps is 1001; allowed is an int, 1 … 1000"),
        (["--output", "no/such/folder/x.png"], "no/such/folder"),
        (["--results", "no/such/folder/x.jsonl"], "no/such/folder"),
        (["--variance", "learned"], "model has no learned-variance channels"),
        (["--budget", "0.1"], "budget is 0.1, but nothing is relaxed; allowed is None, or a relaxation above 0"),
        (["--uncertainty", "residual"], "uncertainty is 'residual', but nothing is relaxed"),
        (["--relaxation", "1", "--budget", "1.5"], "budget is 1.5; allowed is a total variation"),
        (["--relaxation", "1", "--uncertainty", "learned"], "uncertainty is 'learned': model has no learned-variance"),
        (["--data", "photos"], "data is 'photos'; allowed are 'digits' or a .npz file"),
        (["--samplers", "2m-side:15", "--data", "digits"], "sampler '2m-side:15' is unknown; known are 'ddpm'"),
        (["--samplers", "ddpm:50", "--steps", "50", "--data", "digits"], "steps is given with samplers"),
        (["--samplers", "ddpm:50"], "samplers are judged by real data, and data is None"),
    ],
)
def test_compare_refuses_with_exit_code_1_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("free-dit: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--train-steps", "5"], "train_steps is 5, but nothing is trained; give retrain too"),
        (["evaluate", "samples", "digits", "--device", "cpu"], "device is 'cpu', which is Inception's; give weights too"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_options_of_training_are_written_either_way() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    one, other = ["--output_dir", "a", "--no-use_ema"], ["--output-dir", "a", "--no-use-ema"]
    assert parser.parse_args(one) == parser.parse_args(other)
    assert parser.parse_args(other).use_ema is False
