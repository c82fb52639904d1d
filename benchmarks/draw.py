"""Latency curves from the rows: ``python -m benchmarks.draw``. Needs matplotlib.

One figure for each device that has rows, ``results/kernels-<device>.png``; the newest row of each measurement counts.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, read_rows

_STYLES = {"triton": ("C0", "o"), "compile": ("C1", "s"), "eager": ("C3", "^")}


def main() -> int:
    rows = [row for row in read_rows("kernels") if row["benchmark"] == "kernel"]
    if not rows:
        print("no rows yet: run `pytest benchmarks/test_kernels.py` first", file=sys.stderr)
        return 1
    for device in sorted({row["device"] for row in rows}):
        print(draw(device, [row for row in rows if row["device"] == device]).name)
    return 0


def draw(device: str, rows: list[dict[str, Any]], results: Path = RESULTS) -> Path:
    """One panel an operation: microseconds over the elements B x W x D, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    newest = {(row["operation"], row["implementation"], row["batch"], row["window"], row["numel"]): row for row in rows}
    operations = list(dict.fromkeys(key[0] for key in newest))
    columns = -(-len(operations) // 2)
    figure, panels = plt.subplots(
        2, columns, figsize=(3.2 * columns, 6.2), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(operations) :]:
        panel.axis("off")
    for panel, operation in zip(panels.flat, operations, strict=False):
        for implementation, (color, marker) in _STYLES.items():
            chosen = [row for key, row in newest.items() if key[:2] == (operation, implementation)]
            if not chosen:
                continue
            chosen.sort(key=_elements)
            elements = [_elements(row) for row in chosen]
            panel.plot(elements, [row["microseconds_median"] for row in chosen], color=color, marker=marker,
                       label=implementation)  # fmt: skip
            graphs = [row.get("microseconds_in_a_graph_median") for row in chosen]
            if all(graphs):
                panel.plot(
                    elements, graphs, color=color, marker=marker, mfc="none", ls="--", label=f"{implementation}, graph"
                )
            floors = [row.get("microseconds_of_the_bytes") for row in chosen]
            if implementation == "triton" and all(floors):
                panel.plot(elements, floors, color="0.4", ls=":", label="bytes at copy bandwidth")
        panel.set(title=operation, xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    figure.supxlabel("B × W × D")
    figure.supylabel("median, µs")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(f"{device}; bfloat16 outputs, guidance")
    path = results / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _elements(row: dict[str, Any]) -> int:
    return int(row["batch"] * row["window"] * row["numel"])


if __name__ == "__main__":
    sys.exit(main())
