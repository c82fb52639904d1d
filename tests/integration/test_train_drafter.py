"""Training runs as a shell starts them: end to end, killed and resumed, on two processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

import free
import free.demo
from free.cli import main
from free.training import DrafterTrainingConfig, train_drafter

WEIGHTS = "diffusion_pytorch_model.safetensors"

# each rank leaves the weights that it ended with
RANK = """
import sys
from safetensors.torch import save_file
from free.cli import _parser
from free.training import DrafterTrainingConfig
from free.training.loop import _Run

arguments = vars(_parser().parse_args(["train-drafter", *sys.argv[2:]]))
run = _Run(DrafterTrainingConfig(**{name: value for name, value in arguments.items() if name != "run"}), None)
run.train()
save_file(run.drafter.state_dict(), f"{sys.argv[1]}/rank-{run.accelerator.process_index}.safetensors")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a tiny DiT of digits in ``dit``."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    model.save_pretrained(tmp_path / "dit")
    return tmp_path


def words(folder: Path, output: str, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": folder / "dit",
        "output_dir": folder / output,
        "dataset": "digits",
        "num_inference_steps": 10,
        "window": 4,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_samples": 2,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_a_drafter_is_trained_and_used_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "drafter"
    assert main(["train-drafter", *words(folder, "drafter")]) == 0
    printed = capsys.readouterr().out
    assert "step 4: predicted efficiency S=10 " in printed
    assert printed.endswith(f"drafter: {output}\n")
    assert {path.name for path in output.iterdir()} == {"checkpoint-2", "checkpoint-4", "config.json", "logs", WEIGHTS}
    assert list(output.glob("logs/drafter/events*"))
    assert not [path for path in output.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".pth")]

    drafter = free.FeatureDrafter.from_pretrained(output)
    model = DiTTransformer2DModel.from_pretrained(folder / "dit").eval()
    result = free.speculative_sample(model, drafter, class_labels=[1, 2], num_inference_steps=10, seed=0)
    assert torch.isfinite(result.samples).all()
    arguments = ["compare", "--model", str(folder / "dit"), "--drafters", str(output), "--windows", "3", "--steps", "6"]
    arguments += ["--samples", "1", "--output", str(folder / "x.png"), "--results", str(folder / "x.jsonl")]
    assert main(arguments) == 0
    assert "drafter" in (folder / "x.jsonl").read_text()


def test_the_demo_takes_a_trained_drafter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free.FeatureDrafter.from_target(free.demo.load_digits_dit()).save_pretrained(tmp_path / "mine")
    assert main(["demo", "--steps", "8", "--drafter", str(tmp_path / "mine"), "--output", str(tmp_path / "x.png")]) == 0
    assert "speculative, mine" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_bit(folder: Path) -> None:
    steps = {"max_train_steps": 60, "checkpointing_steps": 5, "validation_steps": 20}
    command = [sys.executable, "-m", "free.cli", "train-drafter", *words(folder, "killed", **steps)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (folder / "killed" / "checkpoint-5").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error
    assert not (folder / "killed" / WEIGHTS).exists()
    assert main(["train-drafter", *words(folder, "killed", **steps, resume_from_checkpoint="latest")]) == 0
    assert main(["train-drafter", *words(folder, "whole", **steps)]) == 0
    assert (folder / "killed" / WEIGHTS).read_bytes() == (folder / "whole" / WEIGHTS).read_bytes()
    for name in ("training.safetensors", "process-0.safetensors"):
        one, other = (folder / run / "checkpoint-60" / name for run in ("killed", "whole"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_two_processes_train_one_drafter(folder: Path) -> None:
    script = folder / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    ranks = []
    for rank in range(2):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **world, "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(script), str(folder), *words(folder, "two")]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    one, other = (load_file(folder / f"rank-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    checkpoint = {path.name for path in (folder / "two" / "checkpoint-4").iterdir()}
    assert {"process-0.safetensors", "process-1.safetensors"} < checkpoint

    assert main(["train-drafter", *words(folder, "one")]) == 0
    alone = load_file(folder / "one" / WEIGHTS)
    together = load_file(folder / "two" / WEIGHTS)
    assert any(not torch.equal(value, together[name]) for name, value in alone.items())


def test_a_run_that_cannot_be_is_exit_code_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"pretrained_model_name_or_path": "no-such-folder"}, "no model in 'no-such-folder'"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001; allowed is an int, 1 … 1000"),
        ({"dataset": "photos"}, "the data's samples have shape (3, 32, 32); the model's have (1, 8, 8)"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint is 'nowhere'"),
        ({"window": 1}, "window is 1; allowed is 2 or more"),
    ):
        assert main(["train-drafter", *words(folder, "drafter", **changes)]) == 1
        assert message in capsys.readouterr().err
    assert not (folder / "drafter").exists()


def test_the_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"training needs tensorboard: pip install 'free-dit\[train\]'"):
        train_drafter(DrafterTrainingConfig(output_dir=str(folder / "drafter"), dataset="digits"))
