"""What docs/scale.md says was measured of a window over processes, from the rows of :mod:`benchmarks.parallel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rows import markdown_table

Row = dict[str, Any]

BENCHMARK = "a window over processes"
PROJECTION = "projection of a window over processes"


def scale(rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: seconds a sample of processes and of one, and what more of them would do."""
    measured = _newest([row for row in rows["parallel"] if row["benchmark"] == BENCHMARK])
    # an earlier way to take drafting and verification apart gave less than nothing
    sound = [row for row in rows["parallel"] if row["benchmark"] == PROJECTION and row["seconds_of_rest"] > 0]
    projected = _newest(sound)
    if not measured:
        return "\n"
    first = measured[0]
    lines = [
        (
            row["drafter"],
            row["window"],
            row["processes"],
            f"{row['rounds']:.0f}",
            f"{row['seconds_one_thread_median']:.2f}",
            f"{row['seconds_as_many_threads_median']:.2f} ({row['speedup_of_threads']:.2f}x)",
            f"{row['seconds_median']:.2f} (**{row['speedup']:.2f}x**)",
        )
        for row in measured
    ]
    parts = [
        f"Seconds a sample on {first['device']}, each process on a core of its own, over gloo: {first['model']} (3072 "
        f"numbers a sample), S = {first['steps']}, guidance {first['guidance_scale']}, medians of "
        "repeats in which other processes left the machine alone; speed-ups over one process of one thread, "
        "by threads within a forward and by processes over the window:",
        markdown_table(("drafter", "W", "processes", "rounds", "one thread", "as many threads", "as many processes"), lines),
        "A projection, not a measurement: seconds of a round on one such core over those on R, each with its share of the "
        "states, drafting and verification on each, and an exchange as it was measured between two processes:",
        markdown_table(
            ("drafter", "W", "R", "target, ms", "drafting and verification, ms", "exchange, ms", "projected"),
            [
                (
                    row["drafter"],
                    row["window"],
                    row["processes"],
                    *(f"{1e3 * row[f'seconds_of_{part}']:.1f}" for part in ("share", "rest", "exchange")),
                    f"{row['projected_speedup']:.2f}x",
                )
                for row in projected
            ],
        ),
    ]
    return "\n" + "\n\n".join(parts) + "\n\n"


def _newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each drafter, window and number of processes."""
    latest = {(row["drafter"], row["window"], row["processes"]): row for row in rows}
    return [latest[key] for key in sorted(latest)]
