"""What a long benchmark writes as it goes: which rows are there already, and how much of its time is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, read_rows, write_row
from free.evaluation.rows import environment

OUT_OF_TIME = "no time left in this part; --resume takes it up again"


class Record:
    """The rows of one run.

    Args:
        name: of the file.
        toy: whether the rows are of a dry run, and are marked so.
        resume: leave out what rows of earlier runs on this device hold.
        minutes: of a part.
        results: where the file lies.
    """

    def __init__(self, name: str, *, toy: bool, resume: bool, minutes: float, results: Path = RESULTS) -> None:
        self.name, self.toy, self.resume, self.minutes, self.results = name, toy, resume, minutes, results
        self.measured_on = environment()
        self.rows: list[dict[str, Any]] = []
        """Of this run."""
        self.begin()

    def begin(self) -> None:
        """A part begins: its time is counted from here."""
        self._end = time.perf_counter() + 60 * self.minutes

    @property
    def out_of_time(self) -> bool:
        return time.perf_counter() > self._end

    def write(self, **values: Any) -> dict[str, Any]:
        """Append a row, and print it."""
        row = write_row(self.name, {**values, "toy": True} if self.toy else values, self.results, self.measured_on)
        self.rows.append(row)
        print("  ".join(f"{name} {_short(value)}" for name, value in values.items()), flush=True)
        return row

    def skip(self, reason: str, **key: Any) -> None:
        """A row that says why there is no measurement."""
        self.write(**key, skipped=reason)

    def known(self, **key: Any) -> dict[str, Any] | None:
        """The newest row with these values, of this run or, with ``resume``, of any; what was left out for want of time is
        not known."""
        return newest(self.all() if self.resume else self.rows, **key)

    def all(self) -> list[dict[str, Any]]:
        """Rows of this and earlier runs on this device, oldest first."""
        return [row for row in read_rows(self.name, self.results) if row["device"] == self.measured_on["device"]]


def newest(rows: Sequence[dict[str, Any]], **key: Any) -> dict[str, Any] | None:
    """The last row that has all these values, and was not left out for want of time."""
    return next((row for row in reversed(rows) if matches(row, **key) and row.get("skipped") != OUT_OF_TIME), None)


def matches(row: dict[str, Any], **key: Any) -> bool:
    """Whether the row has all these values."""
    return all(row.get(name) == value for name, value in key.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
