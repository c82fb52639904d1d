"""Figures of the rows of ``python -m benchmarks.gpu``, of one device each. Need matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import BENCHMARK, FORWARD
from benchmarks.latency import IMPLEMENTATIONS
from benchmarks.models import GUIDANCE
from benchmarks.record import matches
from benchmarks.rows import RESULTS

Rows = Sequence[dict[str, Any]]

_COLORS = ("C0", "C1", "C2", "C3", "C4")
_LINES = dict(zip(IMPLEMENTATIONS, (":", "--", "-.", "-"), strict=True))


def figure_path(kind: str, device: str, results: Path = RESULTS) -> Path:
    """``<kind>-<device>.png``."""
    return results / f"{kind}-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}.png"


def draw_gpu(device: str, rows: Rows, results: Path = RESULTS) -> list[Path]:
    """All figures that there are rows for."""
    kinds: dict[str, tuple[str, Callable[[Any, Rows], None], str, str]] = {
        "gpu-latency": ("forward", _latency, "W, states of a sample", "T(W), milliseconds"),
        "gpu-speedup": (BENCHMARK, _speedup, "batch", "speed-up over the best ancestral sampler"),
        "gpu-break-even": (FORWARD, _break_even, "W, states of a sample", "rounds saved, and T(W) / T(1)"),
    }
    paths = []
    for kind, (benchmark, panel, x, y) in kinds.items():
        if any(row["benchmark"] == benchmark and "skipped" not in row for row in rows):
            path = figure_path(kind, device, results)
            _draw(
                path, f"{device}; guidance {GUIDANCE}", benchmark, [row for row in rows if "skipped" not in row], panel, x, y
            )
            paths.append(path)
    return paths


def _draw(path: Path, title: str, benchmark: str, rows: Rows, panel: Callable[[Any, Rows], None], x: str, y: str) -> None:
    """A panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    models = list(dict.fromkeys(row["model"] for row in rows if row["benchmark"] == benchmark))
    figure, panels = plt.subplots(
        1, len(models), figsize=(2.5 + 3.0 * len(models), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels.flat, models, strict=True):
        panel(axes, [row for row in rows if row["model"] == model and row.get("guidance_scale", GUIDANCE) == GUIDANCE])
        axes.set(title=model)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside right upper")
    figure.supxlabel(x)
    figure.supylabel(y)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _latency(axes: Any, rows: Rows) -> None:
    """T(W) by batch (colour) and implementation (line)."""
    for color, batch in zip(_COLORS, _batches(rows, "forward"), strict=False):
        for implementation, line in _LINES.items():
            chosen = _by(rows, "window", benchmark="forward", batch=batch, implementation=implementation)
            if chosen:
                axes.plot(
                    list(chosen),
                    [1e3 * row["seconds_median"] for row in chosen.values()],
                    color=color,
                    ls=line,
                    label=f"batch {batch}, {implementation}",
                )


def _speedup(axes: Any, rows: Rows) -> None:
    """By batch, a line a window and the bound."""
    measured = [row for row in rows if matches(row, benchmark=BENCHMARK, sampler="speculative")]
    configurations = list(dict.fromkeys((row["drafter"], row["window"]) for row in measured))
    drafters = list(dict.fromkeys(drafter for drafter, _ in configurations))
    windows = list(dict.fromkeys(window for _, window in configurations))
    for drafter, window in configurations:
        chosen = _by(measured, "batch", drafter=drafter, window=window)
        axes.plot(
            list(chosen),
            [row["speedup"][row["implementation"]] for row in chosen.values()],
            color=_COLORS[windows.index(window) % len(_COLORS)],
            ls=("-", "--", "-.")[drafters.index(drafter) % 3],
            marker="o",
            label=f"{drafter}, W {window}",
        )
    bounds = _by(rows, "batch", benchmark="bound")
    axes.plot(list(bounds), [row["bound"] for row in bounds.values()], color="0.4", ls=":", marker="_", label="bound")
    axes.axhline(1.0, color="0.2", lw=1)


def _break_even(axes: Any, rows: Rows) -> None:
    """Where the efficiency (points) is above what a round costs (lines), speculation pays."""
    for color, batch in zip(_COLORS, _batches(rows, FORWARD), strict=False):
        taken = _by(rows, "window", benchmark=FORWARD, batch=batch)
        if 1 in taken:
            one = taken[1]["seconds_median"]
            axes.plot(
                list(taken),
                [row["seconds_median"] / one for row in taken.values()],
                color=color,
                label=f"T(W)/T(1), batch {batch}",
            )
        for marker, drafter in zip("o^s", dict.fromkeys(row["drafter"] for row in rows if "speedup" in row), strict=False):
            reached = _by(rows, "window", benchmark=BENCHMARK, sampler="speculative", batch=batch, drafter=drafter)
            reached.pop("auto", None)
            axes.plot(
                list(reached),
                [row["parallel_efficiency"] for row in reached.values()],
                color=color,
                marker=marker,
                mfc="none",
                ls="",
                label=f"S / rounds, batch {batch}, {drafter}",
            )


def _batches(rows: Rows, benchmark: str) -> list[int]:
    return sorted({row["batch"] for row in rows if row["benchmark"] == benchmark})


def _by(rows: Rows, name: str, **key: Any) -> dict[Any, dict[str, Any]]:
    """The newest of the matching rows for each value of ``name``, in order."""
    chosen = {row[name]: row for row in rows if matches(row, **key)}
    return dict(sorted(chosen.items(), key=lambda item: (isinstance(item[0], str), item[0])))
