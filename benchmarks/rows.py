"""One row a measurement: what was measured, on what, by which command, at which revision."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def write_row(name: str, values: dict[str, Any], results: Path = RESULTS) -> dict[str, Any]:
    """Append ``values`` and what they were measured on to ``results/<name>.jsonl``; returns the row."""
    row = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **environment(), **values}
    results.mkdir(exist_ok=True)
    with (results / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return row


def read_rows(name: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of ``results/<name>.jsonl``, oldest first."""
    path = results / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def environment() -> dict[str, Any]:
    """Device, versions, revision and command."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "cuda": torch.version.cuda,
        "revision": revision(),
        "command": command(),
    }


def device_name() -> str:
    """The GPU's name, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{models[0]}, {len(models)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def revision() -> str | None:
    """The commit, marked where files differ from it; None outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        # rows that this run has written itself are no difference
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-modified" if changed else commit


def command() -> str:
    """The command line, without the paths of this machine."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif program.is_relative_to(ROOT):
        words = ["python", "-m", ".".join(program.relative_to(ROOT).with_suffix("").parts)]
    else:
        words = [program.name]
    return shlex.join([*words, *(word.replace(f"{ROOT}/", "") for word in sys.argv[1:])])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
