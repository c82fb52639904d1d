"""The benchmarks' rows: ``results/<name>.jsonl``, one row a measurement (see :mod:`free.evaluation.rows`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from free.evaluation import rows

RESULTS = Path(__file__).resolve().parent / "results"
REMOVED = ("linear-50", "linear-250", "photo_drafter_250:sweeps=0", "photo_drafter_250_w8")
"""Drafters and weights that the package had and has no more: rows stay, pages and figures speak of those that it has."""


def write_row(
    name: str, values: dict[str, Any], results: Path = RESULTS, measured_on: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Append ``values`` and what they were measured on to ``results/<name>.jsonl``; returns the row.

    ``measured_on`` is :func:`free.evaluation.rows.environment` of a long run, asked once.
    """
    results.mkdir(exist_ok=True)
    return rows.append_row(results / f"{name}.jsonl", values, measured_on)


def read_rows(name: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of ``results/<name>.jsonl``, oldest first."""
    return rows.read_rows(results / f"{name}.jsonl")


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Lines of as many cells each, as a page shows them."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (header, ["---"] * len(header), *lines))
