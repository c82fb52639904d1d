"""The policies' table and figure, from the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import matches
from benchmarks.rows import RESULTS

SUCCESS, TIME = "success", "time of a chunk"
"""The two kinds of rows."""
FIGURE = "policies.png"

_IS_A_SAMPLER = ("method", "steps", "drafter", "window")
_STYLES = {"diffusers DDPM": ("0.2", "s"), "DDPM": ("C0", "o"), "diffusers DDIM": ("C3", "^"), "2M SDE": ("C2", "D")}

Row = dict[str, Any]
Rows = Sequence[Row]


def table(rows: Rows) -> str:
    """Markdown: success by task with its interval, rounds, evaluations and time of each sampler, by device."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        timed, succeeded = _timed(own), _newest(own, SUCCESS, "task", *_IS_A_SAMPLER)
        if not timed or not succeeded:
            continue
        tasks = list(dict.fromkeys(row["task"] for row in succeeded))
        lines = [
            (
                row["method"],
                row["steps"],
                row["drafter"] or "-",
                row["window"] or "-",
                f"{row['rounds']:.1f}",
                f"{row['evaluations']:.0f}",
                f"{row['milliseconds_median']:.1f}",
                f"{row['hertz']:.0f}",
                f"{row['over_diffusers']:.2f}x",
                *(_success(succeeded, row, task) for task in tasks),
            )
            for row in timed
        ]
        first, tried = timed[0], succeeded[0]
        parts.append(
            f"{tried['episodes']} episodes a sampler and task, the same begins and seeds for all, at most "
            f"{tried['most_steps']} steps each, {tried['executed']} actions of a chunk executed: success in % with its 95 % "
            f"interval (Wilson). Times are medians of {first['runs']} chunks at batch 1, all samplers in turn, on {device}, "
            f"{first['threads']} thread; rounds and evaluations are those of the same chunks. The network has "
            f"{first['parameters'] / 1e6:.1f} M parameters. Over the first row, 1.00x is as fast, less is slower."
        )
        header = (
            "sampler", "S", "drafter", "W", "rounds", "evaluations", "ms a chunk", "Hz", "over diffusers",
            *(task.removesuffix("-v3") for task in tasks),
        )  # fmt: skip
        written = (header, ["---"] * len(header), *lines)
        parts.append("\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in written))
    if (RESULTS / FIGURE).exists() and parts:
        parts.append(f"![success over milliseconds a chunk](../benchmarks/results/{FIGURE})")
    return "\n" + "\n\n".join(parts) + "\n\n" if parts else "\n"


def draw(rows: Rows, path: Path = RESULTS / FIGURE) -> None:
    """A panel a task: success with its interval over milliseconds a chunk, of the device that was measured last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    device = rows[-1]["device"]
    own = [row for row in rows if row["device"] == device]
    timed, succeeded = _timed(own), _newest(own, SUCCESS, "task", *_IS_A_SAMPLER)
    tasks = list(dict.fromkeys(row["task"] for row in succeeded))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(2.5 + 3.0 * len(tasks), 3.8), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, task in zip(panels.flat, tasks, strict=True):
        for label, color, marker, fill, points in _series(timed, succeeded, task):
            milliseconds = [time["milliseconds_median"] for time, _ in points]
            success = [100 * row["success"] for _, row in points]
            below = [100 * (row["success"] - row["success_low"]) for _, row in points]
            above = [100 * (row["success_high"] - row["success"]) for _, row in points]
            style = {"color": color, "marker": marker, "mfc": fill, "ls": "", "capsize": 2, "lw": 1, "label": label}
            axes.errorbar(milliseconds, success, (below, above), **style)
        axes.set(title=task, ylim=(0, 104))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside right upper")
    figure.supxlabel("milliseconds a chunk, batch 1")
    figure.supylabel("success, %")
    episodes = f"{succeeded[0]['episodes']} episodes a task, 95 % intervals"
    figure.suptitle(f"{device}, {timed[0]['threads']} thread; {episodes}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def measured(rows: Rows) -> bool:
    """Whether there is something to draw."""
    return all(any(row["benchmark"] == kind for row in rows) for kind in (SUCCESS, TIME))


def _series(timed: Rows, succeeded: Rows, task: str) -> Iterator[tuple[str, str, str, str, list[tuple[Row, Row]]]]:
    """Label, colour, marker, filling and points of each method, step by step (filled) and speculative."""
    found: dict[tuple[str, int, bool], list[tuple[Row, Row]]] = {}
    for time in timed:
        key = {name: time[name] for name in _IS_A_SAMPLER}
        success = next((row for row in succeeded if matches(row, task=task, **key)), None)
        if success:
            found.setdefault((time["method"], time["steps"], time["drafter"] is not None), []).append((time, success))
    for (method, steps, speculative), points in found.items():
        color, marker = _STYLES[method]
        label = f"{method}, S={steps}" + (", speculative" if speculative else "")
        yield label, color, marker, "none" if speculative else color, points


def _success(succeeded: Rows, time: Row, task: str) -> str:
    key = {name: time[name] for name in _IS_A_SAMPLER}
    row = next((row for row in succeeded if matches(row, task=task, **key)), None)
    return f"{100 * row['success']:.0f} ({100 * row['success_low']:.0f}–{100 * row['success_high']:.0f})" if row else "-"


def _timed(rows: Rows) -> list[Row]:
    """Of the last run: times of different runs are not compared."""
    newest = _newest(rows, TIME, *_IS_A_SAMPLER)
    return [row for row in newest if row["run"] == newest[-1]["run"]] if newest else []


def _newest(rows: Rows, kind: str, *names: str) -> list[Row]:
    return list({tuple(row[name] for name in names): row for row in rows if row["benchmark"] == kind}.values())
