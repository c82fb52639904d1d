"""What W states split over several GPUs would gain, projected from forwards of fewer states on one: nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.end_to_end import BENCHMARK, FORWARD
from benchmarks.record import Record, newest

GPUS = (2, 4, 8)


def project(record: Record, models: Sequence[str], batches: Sequence[int], windows: Sequence[int]) -> None:
    """Of each trained model: efficiency x T(1) / T(W / n), as if talking to each other cost the GPUs nothing."""
    rows = record.all()
    for model in models:
        for batch in batches:
            for window in windows:
                for gpus in (gpus for gpus in GPUS if gpus <= window):
                    key = {"benchmark": "projection", "model": model, "batch": batch, "window": window, "gpus": gpus}
                    _project(record, rows, key)


def _project(record: Record, rows: list[dict[str, Any]], key: dict[str, Any]) -> None:
    group = {"model": key["model"], "batch": key["batch"]}
    measured = {
        width: row["seconds_median"]
        for width in (1, key["window"] // key["gpus"])
        if (row := newest(rows, benchmark=FORWARD, window=width, **group)) and "seconds_median" in row
    }
    efficiencies = {
        row["drafter"]: row["parallel_efficiency"]
        for row in rows
        if row["benchmark"] == BENCHMARK
        and all(row.get(name) == value for name, value in {**group, "window": key["window"]}.items())
        and "parallel_efficiency" in row
    }
    share = key["window"] // key["gpus"]
    if share not in measured or 1 not in measured or not efficiencies:
        record.skip("needs T(W) and efficiency of the end-to-end part", **key)
        return
    drafter = max(efficiencies, key=efficiencies.__getitem__)
    record.write(
        **key,
        drafter=drafter,
        parallel_efficiency=efficiencies[drafter],
        seconds_one_state=measured[1],
        seconds_of_share=measured[share],
        projected_speedup=efficiencies[drafter] * measured[1] / measured[share],
        is_projection="not measured: T(W / n) of one GPU, communication left out",
    )
