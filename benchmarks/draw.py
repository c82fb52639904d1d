"""Figures, and the README's measured tables, from the rows: ``python -m benchmarks.draw``. Needs matplotlib.

``results/kernels-<device>.png`` and, of GPUs, ``results/gpu-<what>-<device>.png`` for each device that has rows, and
``results/quality-<model>.png``, ``results/samplers-<model>.png``, ``results/compare-photo_dit.png`` and
``results/policies.png``; the newest row of each measurement counts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import draw_gpu, figure_path
from benchmarks.policies import report as policies
from benchmarks.readme import of_enough, quality_path, write_blocks
from benchmarks.rows import REMOVED, RESULTS, read_rows
from benchmarks.samplers import drawn, figure
from free.evaluation.pareto import draw_samplers
from free.evaluation.report import draw as draw_compared
from free.evaluation.report import draw_quality

TESTBED = "photo_dit"
_LEFT_OUT = (*REMOVED, "photo_drafter_50:sweeps=0")
"""Of the testbed's figure, whose legend is read at a glance; the table has them."""
_STYLES = {"triton": ("C0", "o"), "compile": ("C1", "s"), "eager": ("C3", "^")}


def main() -> int:
    for name, figures in (("kernels", lambda device, rows: [draw(device, rows)]), ("gpu", draw_gpu)):
        rows = read_rows(name)
        if not rows:
            print(f"no rows in {name}.jsonl yet", file=sys.stderr)
        for device in sorted({row["device"] for row in rows}):
            for path in figures(device, [row for row in rows if row["device"] == device]):
                print(path.name)
    compared = [row for row in read_rows("compare") if row["model"] == TESTBED and row["drafter"] not in _LEFT_OUT]
    if compared:
        draw_compared(compared, RESULTS / f"compare-{TESTBED}.png")
        print(f"compare-{TESTBED}.png")
    of_quality = of_enough(read_rows("quality"))
    for model in dict.fromkeys(row["model"] for row in of_quality):
        draw_quality([row for row in of_quality if row["model"] == model], quality_path(model))
        print(quality_path(model).name)
    pareto = read_rows("pareto")
    for model in dict.fromkeys(row["model"] for row in pareto):
        draw_samplers(drawn(pareto, model), figure(model))
        print(figure(model).name)
    of_policies = read_rows("policies")
    if policies.measured(of_policies):
        policies.draw(of_policies)
        print(policies.FIGURE)
    write_blocks()
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
    path = figure_path("kernels", device, results)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _elements(row: dict[str, Any]) -> int:
    return int(row["batch"] * row["window"] * row["numel"])


if __name__ == "__main__":
    sys.exit(main())
