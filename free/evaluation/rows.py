"""One row a measurement: what was measured, on what, by which command, at which revision."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def append_row(path: Path, values: dict[str, Any], measured_on: dict[str, Any] | None = None) -> dict[str, Any]:
    """Append ``values``, and what they were measured on, to a JSON-lines file.

    Args:
        path: the file; it is made if it is not there, its folder is not.
        values: JSON-ready, without NaN.
        measured_on: :func:`environment` as it was when a long run began; asked now if left out.

    Returns:
        The row.

    Raises:
        OSError: the file cannot be written.
        ValueError: a value that JSON has no word for.
    """
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    row = {"time": time, **(environment() if measured_on is None else measured_on), **values}
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    # one unbuffered write: a run that is killed leaves no half line, and two runs that share a file do not mix theirs
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file, oldest first; none if it is not there.

    Raises:
        ValueError: a line that is not a JSON object, named.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{str(path)!r} holds no JSON object in line {number}")
        rows.append(row)
    return rows


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
    """The commit, marked where files differ from it; outside a checkout ``$FREE_REVISION``, if somebody set it, or None."""
    try:
        # an installed package may lie inside somebody else's checkout, whose commit says nothing about it
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return os.environ.get("FREE_REVISION")
        commit = _git("rev-parse", "HEAD")
        # rows that this run has written itself are no difference
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FREE_REVISION")
    return f"{commit}-modified" if changed else commit


def command() -> str:
    """The command line, without the paths of this machine."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        package = program.parent
        words = ["python", "-m", ".".join(package.relative_to(ROOT).parts) if package.is_relative_to(ROOT) else package.name]
    elif program.is_relative_to(ROOT) and program.suffix == ".py":
        words = ["python", "-m", ".".join(program.relative_to(ROOT).with_suffix("").parts)]
    else:
        words = [program.name]
    inside = (word.replace(f"{ROOT}/", "") for word in sys.argv[1:])
    # of a file elsewhere on this machine the name is kept
    return shlex.join([*words, *(re.sub(r"(^|[=:])/(?:[^/]+/)*", r"\1", word) for word in inside)])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
