"""Samplers side by side: distance from real data over rounds, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from free.evaluation.report import DISTANCES
from free.evaluation.samplers import sampler_of
from free.sampling.statistics import aligned

Row = dict[str, Any]

_OPEN = {"step by step": "o", "deterministic": "^"}
_FILLED = ("o", "s", "D", "v", "P", "X")


def sampler_table(rows: Sequence[Row]) -> str:
    """The rows as a table for people."""
    lines = [
        (
            row["sampler"],
            f"{row['guidance_scale']:g}",
            how(row),
            f"{row['rounds']:.1f}",
            f"{row['parallel_efficiency']:.2f}",
            f"{row['frechet_distance']:.4f} ± {row['frechet_error']:.4f}",
            f"{row['energy_distance']:.4f} ± {row['energy_error']:.4f}",
        )
        for row in rows
    ]
    first = rows[0]
    header = ("sampler", "guidance", "drawn", "rounds", "S / rounds", "Fréchet", "energy")
    return "\n".join(
        (
            f"model {first['model']}, {first['samples']} samples in batches of {first['batch_size']}, {first['device']}",
            *aligned([header, *lines]),
            "Fréchet, energy: distances from real data, ± what so few samples leave open (free.evaluation.quality); as many "
            f"real images are at a Fréchet distance of {first['frechet_floor']:.4f}",
        )
    )


def how(row: Row) -> str:
    """How a sampler was drawn."""
    if row["window"] > 1:
        return f"{row['drafter']}, W={row['window']}"
    return "deterministic" if sampler_of(row["sampler"]).deterministic else "step by step"


def family(row: Row) -> str:
    """The sampler's word less its S: samplers of one kind are one curve."""
    name, _, *options = row["sampler"].split(":")
    return ", ".join((name, *options))


def draw_samplers(rows: Sequence[Row], output: Path) -> None:
    """A line of panels a guidance scale: both distances over rounds, Fréchet first.

    A kind of samplers is a colour; open marks are step by step, triangles of those without noise, filled ones speculative,
    a shape for each drafter and window; a line leads from a sampler to itself, speculated. Points are named by S.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scales = sorted({row["guidance_scale"] for row in rows})
    families = list(dict.fromkeys(map(family, rows)))
    color = {name: f"C{i % 10}" for i, name in enumerate(families)}
    ways = list(dict.fromkeys(how(row) for row in rows if row["window"] > 1))
    marker = {**_OPEN, **dict(zip(ways, _FILLED * len(ways), strict=False))}
    figure = Figure(figsize=(12, 4.4 * len(scales) + 1.1), layout="constrained")
    panels = figure.subplots(len(scales), 2, squeeze=False)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for line, scale in zip(panels, scales, strict=True):
        here = [row for row in rows if row["guidance_scale"] == scale]
        for panel, distance in zip(line, reversed(DISTANCES), strict=True):
            begin = {row["sampler"]: row for row in here if row["window"] == 1}
            for i, row in enumerate(here):
                at = (row["rounds"], row[f"{distance}_distance"])
                own = color[family(row)]
                panel.errorbar(
                    *at, row[f"{distance}_error"], color=own, marker=marker[how(row)], markersize=6, elinewidth=0.8,
                    markerfacecolor="white" if row["window"] == 1 else None, linestyle="none", capsize=2,
                )  # fmt: skip
                first = begin.get(row["sampler"])
                if row["window"] > 1 and first is not None:
                    panel.plot([first["rounds"], at[0]], [first[f"{distance}_distance"], at[1]], color=own, linewidth=0.8,
                               alpha=0.5, zorder=0)  # fmt: skip
                panel.annotate(
                    str(row["steps"]), at, (4, 4 if i % 2 else -4), textcoords="offset points", fontsize=7, color=own,
                    va="bottom" if i % 2 else "top",
                )  # fmt: skip
            floor = float(np.mean([row["frechet_floor"] for row in here])) if distance == "frechet" else 0.0
            panel.axhline(floor, color="0.6", linewidth=1, zorder=0)
            panel.set(
                xscale="log",
                xlabel="rounds",
                ylabel=DISTANCES[distance],
                title=f"guidance {scale:g}, {here[0]['samples']} samples",
            )
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
            panel.xaxis.set_major_formatter(plain)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
    handles = [Line2D([], [], color=color[name], linewidth=4, label=name) for name in families]
    handles += [
        Line2D([], [], color="0.3", marker=shape, linestyle="none", label=way,
               markerfacecolor="white" if way in _OPEN else None)
        for way, shape in marker.items()
    ]  # fmt: skip
    handles.append(Line2D([], [], color="0.6", linewidth=1, label="real data, kept apart"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(f"model {rows[0]['model']}; points are named by S")
    figure.savefig(output, dpi=110)
