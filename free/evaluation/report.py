"""What the rows of a comparison say: the table, and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from free.sampling.confidence import CONFIDENCE
from free.sampling.statistics import aligned

_DRAWN_WINDOW = 8  # the sampler's default, for the panels that show one window
_BINS = 25

DISTANCES = {
    "energy": "energy distance / mean distance of two real images",
    "frechet": "Fréchet distance / variance of real features",
}
_FRESH = "fresh:"
_COLORS = {"ancestral": "0.3", "hold-x0": "C0", "hold-output": "C1", "gains": "C2", "learned": "C4"}
"""The same sampler in the same colour in every figure; those of other drafters follow."""
_MEANINGS = {
    "TV at most": "TV: of relaxed rows, estimated bound on the total variation from the exact law (docs/relaxation.md)",
    "TV limit": f"TV limit: what it is at most with {CONFIDENCE:.0%} confidence",
    "energy": "energy, Fréchet: distances from real data, ± what so few samples leave open (free.evaluation.quality)",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    header = (
        "drafter", "W", "S", "guidance", "efficiency", "accepted", "|delta|", "parameters", "FLOPs", "ms drafting",
        "ms target", "time",
    )  # fmt: skip
    lines = [
        (
            row["drafter"],
            str(row["window"]),
            str(row["steps"]),
            f"{row['guidance_scale']:g}",
            f"{row['parallel_efficiency']:.2f}" + _or_dash(row["standard_error"], " ± {:.2f}", ""),
            _or_dash(row["acceptance_rate"], "{:.1%}"),
            _or_dash(row["mean_delta"], "{:.2f}"),
            _or_dash(row["drafter_parameters"] / row["target_parameters"] or None, "{:.2%}"),
            _or_dash(row["drafter_flops"] / row["target_flops"] or None, "{:.2%}"),
            f"{row['draft_milliseconds']:.2f}",
            f"{row['target_milliseconds']:.2f}",
            f"{row['draft_milliseconds'] / row['target_milliseconds']:.2%}",
        )
        for row in rows
    ]
    first = rows[0]
    further = _further_columns(rows)
    lines = [(*line, *(cells[i] for cells in further.values())) for i, line in enumerate(lines)]
    return "\n".join(
        (
            f"model {first['model']}, {first['samples']} samples in batches of {first['batch_size']}, {first['device']}",
            *aligned([(*header, *further), *lines]),
            "efficiency: S / rounds, mean over samples ± standard error; |delta|: mean over tests",
            f"parameters: the drafter's over the target's {first['target_parameters']:,}",
            "FLOPs: of the matrix products of one drafted window over those of one target evaluation of one state",
            "ms: of drafting a batch's windows and of the target's forward at their states; time: their ratio",
            *(meaning for column, meaning in _MEANINGS.items() if column in further),
        )
    )


def _further_columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Cells of the columns that tell rows of this comparison apart, or that it was asked for."""
    columns = {
        "variance": [row.get("variance", "posterior") for row in rows],
        "stochasticity": [f"{row.get('stochasticity', 1.0):g}" for row in rows],
        "strength": [f"{row.get('strength', 0.0):g}" for row in rows],
        "TV at most": [
            _or_dash(row.get("total_variation_bound") or None, "{:.3f}")
            + _or_dash(row.get("total_variation_error") or None, " ± {:.3f}", "")
            for row in rows
        ],
        "TV limit": [_or_dash(row.get("total_variation_limit") or None, "{:.3f}") for row in rows],
        "energy": [_with_error(row, "energy", "{:.4f}") for row in rows],
        "Fréchet": [_with_error(row, "frechet", "{:.4f}") for row in rows],
    }
    usual = {"posterior", "1", "0", "-"}
    return {name: cells for name, cells in columns.items() if set(cells) - usual}


def _with_error(row: dict[str, Any], distance: str, pattern: str) -> str:
    value = row.get(f"{distance}_distance")
    return _or_dash(value, pattern) + _or_dash(row.get(f"{distance}_error"), f" ± {pattern}", "")


def draw(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """A line of panels a guidance scale: efficiency by window, then acceptance and mean |delta| by step of one window."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullLocator

    scales = sorted({row["guidance_scale"] for row in rows})
    drafters = list(dict.fromkeys(map(_series, rows)))
    counts = sorted({row["steps"] for row in rows})
    windows = sorted({row["window"] for row in rows})
    drawn = _DRAWN_WINDOW if _DRAWN_WINDOW in windows else windows[len(windows) // 2]
    color = _colors(drafters)
    dashes = {count: ("-", "--", "-.", ":")[i % 4] for i, count in enumerate(reversed(counts))}

    figure = Figure(figsize=(12, 3.5 * len(scales) + 0.8), layout="constrained")
    panels = figure.subplots(len(scales), 3, squeeze=False, sharey="col")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for line, scale in zip(panels, scales, strict=True):
        here = [row for row in rows if row["guidance_scale"] == scale]
        for drafter in drafters:
            for count in counts:
                curve = sorted(
                    (row for row in here if _series(row) == drafter and row["steps"] == count),
                    key=lambda row: row["window"],
                )
                if not curve:
                    continue
                line[0].errorbar(
                    [row["window"] for row in curve],
                    [row["parallel_efficiency"] for row in curve],
                    [row["standard_error"] or 0.0 for row in curve],
                    color=color[drafter],
                    linestyle=dashes[count],
                    marker="o",
                    markersize=4,
                    markerfacecolor="white" if drafter.startswith(_FRESH) else None,
                    capsize=3,
                )
            for row in here:
                if (_series(row), row["steps"], row["window"]) == (drafter, counts[-1], drawn):
                    step, accepted, delta = _by_step(row)
                    face = "white" if drafter.startswith(_FRESH) else None
                    for panel, values in zip(line[1:], (accepted, delta), strict=True):
                        panel.plot(step, values, color=color[drafter], marker="o", markersize=4, markerfacecolor=face)
        line[0].set(xscale="log", yscale="log", xlabel="window W", ylabel="parallel efficiency, S / rounds")
        line[0].set_xticks(windows)
        top = 1.25 * max(row["parallel_efficiency"] for row in rows)
        line[0].plot([1.0, top], [1.0, top], color="0.6", linewidth=1, zorder=0)
        line[0].annotate("W, the bound", (top, top), (-4, -2), textcoords="offset points", ha="right", va="top", fontsize=8,
                         color="0.4")  # fmt: skip
        ticks = [2.0**power for power in range(11) if 2.0**power <= top]
        line[0].set_yticks(ticks)
        line[0].set_ylim(0.9, top)
        for axis in (line[0].xaxis, line[0].yaxis):
            axis.set_major_formatter(plain)
            axis.set_minor_locator(NullLocator())
        line[0].set_title(f"guidance {scale:g}")
        line[1].set(xlabel="step (noise to data)", ylabel="drafts accepted", ylim=(0, 1.02))
        line[2].set(xlabel="step (noise to data)", ylabel="mean |delta|")
        # a window of 1 tests nothing, and a perfect draft is off by nothing: then there is no logarithm to draw
        if any((curve.get_ydata() > 0).any() for curve in line[2].lines):
            line[2].set_yscale("log", nonpositive="mask")
        for panel in line[1:]:
            panel.set(xlim=(0, counts[-1]), title=f"guidance {scale:g}, S={counts[-1]}, W={drawn}")
        for panel in line:
            panel.grid(alpha=0.3)
    # a drafter by its colour, S by its line
    named = {_family(drafter): drafter for drafter in reversed(drafters)}
    handles = [
        Line2D([], [], color=color[drafter], marker="o", markersize=4, label=family,
               markerfacecolor="white" if drafter.startswith(_FRESH) else None)
        for family, drafter in reversed(named.items())
    ]  # fmt: skip
    handles += [Line2D([], [], color="0.3", linestyle=dashes[count], label=f"S={count}") for count in reversed(counts)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9)
    figure.suptitle(f"model {rows[0]['model']}, mean of {rows[0]['samples']} samples with its standard error")
    figure.savefig(output, dpi=110)


def draw_quality(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """A line of panels a guidance scale: both distances from real data over rounds.

    A curve joins the numbers of steps of one sampler (the ancestral one is a window of 1); another the strengths of one
    relaxation at the most steps.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scales = sorted({row["guidance_scale"] for row in rows})
    most = max(row["steps"] for row in rows)
    figure = Figure(figsize=(12, 4.2 * len(scales) + 0.9), layout="constrained")
    panels = figure.subplots(len(scales), 2, squeeze=False)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for line, scale in zip(panels, scales, strict=True):
        here = [row for row in rows if row["guidance_scale"] == scale]
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in here:
            if row.get("strength", 0.0) == 0:
                curves.setdefault(_sampler(row), []).append(row)
            elif row["steps"] == most:
                curves.setdefault(f"{_sampler(row, strength=False)}, S={most}", []).append(row)
        for panel, (distance, title) in zip(line, DISTANCES.items(), strict=True):
            colors = _colors([name.split(",")[0] for name in curves])
            for i, (name, curve) in enumerate(curves.items()):
                color = colors[name.split(",")[0]]
                curve.sort(key=lambda row: row["rounds"])
                relaxed = curve[0].get("strength", 0.0) > 0
                panel.errorbar(
                    [row["rounds"] for row in curve],
                    [row[f"{distance}_distance"] for row in curve],
                    [row[f"{distance}_error"] for row in curve],
                    color=color,
                    linestyle="--" if relaxed else "-",
                    marker="s" if relaxed else "o",
                    markersize=4,
                    capsize=3,
                    label=name,
                )
                # those of one curve above it and below it in turn, those of the next the other way round
                for j, row in enumerate(curve):
                    above = (i + j) % 2 == 0
                    note = f"×{row['strength']:g}" if relaxed else f"{row['steps']}"
                    at = (row["rounds"], row[f"{distance}_distance"])
                    panel.annotate(note, at, (3, 5 if above else -5), textcoords="offset points", fontsize=7, color=color,
                                   va="bottom" if above else "top")  # fmt: skip
            if distance == "frechet":
                floor = float(np.mean([row["frechet_floor"] for row in here]))
                panel.axhline(floor, color="0.6", linewidth=1, zorder=0, label="real data, kept apart")
            else:
                panel.axhline(0.0, color="0.6", linewidth=1, zorder=0)
            panel.set(xscale="log", xlabel="rounds", ylabel=title, title=f"guidance {scale:g}")
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter(plain)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        f"model {rows[0]['model']}, {rows[0]['samples']} samples each; points are named by S, relaxed ones (×) by strength"
    )
    figure.savefig(output, dpi=110)


def _family(drafter: str) -> str:
    """What a drafter is called in a legend: those trained for one S, and for another, are of one kind."""
    word, comma, rest = drafter.partition(",")
    plain = word.removeprefix(_FRESH).split(":")[0]
    kind = "learned" if "drafter" in plain else plain
    return kind + (", fresh noise" if word.startswith(_FRESH) else "") + comma + rest


def _colors(drafters: Sequence[str]) -> dict[str, str]:
    """By drafter; a kind that is not among the usual ones takes the next colour."""
    families = [_family(drafter).split(",")[0] for drafter in drafters]
    others = [family for family in dict.fromkeys(families) if family not in _COLORS]
    by_family = {**_COLORS, **{family: f"C{5 + i}" for i, family in enumerate(others)}}
    return {drafter: by_family[family] for drafter, family in zip(drafters, families, strict=True)}


def _sampler(row: dict[str, Any], strength: bool = True) -> str:
    """What a curve over steps has in common."""
    if row["window"] == 1:
        return ", ".join(["ancestral", *_settings(row, strength)])
    return ", ".join([f"{row['drafter']}, W={row['window']}", *_settings(row, strength)])


def _series(row: dict[str, Any]) -> str:
    """A drafter, and what differs from the usual process and the exact test."""
    return ", ".join([row["drafter"], *_settings(row)])


def _settings(row: dict[str, Any], strength: bool = True) -> list[str]:
    settings = []
    if row.get("variance", "posterior") != "posterior":
        settings.append(f"{row['variance']} variance")
    if row.get("stochasticity", 1.0) != 1:
        settings.append(f"ε={row['stochasticity']:g}")
    if row.get("strength", 0.0):
        settings.append(f"relaxed by {row['uncertainty']}")
        if strength:
            settings.append(f"strength {row['strength']:g}")
        if row["budget"] is not None:
            settings.append(f"budget {row['budget']:g}")
    return settings


def _by_step(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middle of each bin of steps, share of accepted drafts, mean |delta|; NaN where nothing was tested."""
    tested = np.array(row["tested_by_step"])
    edges = np.linspace(0, len(tested), min(_BINS, len(tested)) + 1).astype(int)
    delta = np.array([value or 0.0 for value in row["mean_delta_by_step"]]) * tested

    def of_bins(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, edges[:-1]).astype(float)

    tests = of_bins(tested)
    tests[tests == 0] = np.nan
    return (edges[:-1] + edges[1:]) / 2, of_bins(np.array(row["accepted_by_step"])) / tests, of_bins(delta) / tests


def _or_dash(value: float | None, pattern: str, dash: str = "-") -> str:
    return dash if value is None else pattern.format(value)
