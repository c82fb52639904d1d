"""What W states split over several processes would gain, projected from forwards of fewer states on one: a projection, and
no measurement.

A round of W states over R devices is taken to last T(ceil(W / R)), and an exchange over a link of a stated speed
(``docs/scale.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.end_to_end import BENCHMARK, FORWARD
from benchmarks.record import Record, newest
from free.data.images import PATCH

GPUS = (2, 4, 8)
LINK = 50e9
"""Bytes a second from one GPU to another: of a PCIe 5.0 slot with 16 lanes, nearly; NVLink has several times as much."""
LATENCY = 40e-6
"""Seconds that an exchange takes however little there is to exchange."""
NUMEL = 3 * PATCH**2
"""Numbers a sample of the models that are trained for the end-to-end part."""
_OUTPUT_BYTES = 2 * 2  # bfloat16, and both halves of the guidance
_STATE_BYTES = 4


def exchange_bytes(states: int, batch: int, numel: int, output_bytes: int = _OUTPUT_BYTES) -> int:
    """Of a round: the outputs of all states once, and the settled state of each sample once."""
    return states * numel * output_bytes + batch * numel * _STATE_BYTES


def project(record: Record, models: Sequence[str], batches: Sequence[int], windows: Sequence[int]) -> None:
    """Of each trained model: efficiency x T(1) / (T(W / n) + the exchange), drafting and verification left out."""
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
    exchange = exchange_bytes(key["batch"] * key["window"], key["batch"], NUMEL) / LINK + 2 * LATENCY
    record.write(
        **key,
        drafter=drafter,
        parallel_efficiency=efficiencies[drafter],
        seconds_one_state=measured[1],
        seconds_of_share=measured[share],
        seconds_of_exchange=exchange,
        link_bytes_per_second=LINK,
        link_latency=LATENCY,
        projected_speedup=efficiencies[drafter] * measured[1] / (measured[share] + exchange),
        is_projection="not measured: T(W / n) of one GPU and a link of the stated speed, drafting and verification left out",
    )
