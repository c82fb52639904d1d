"""Samplers side by side, from the rows of ``free-dit compare --samplers``: what is drawn, and the tables of README and docs.

Samples drawn speculatively have the law of those drawn step by step, so rounds are counted of fewer of them than a distance
takes: such a row stands at the distance of its sampler's own, step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, markdown_table

Row = dict[str, Any]
Rows = Sequence[Row]

ENOUGH = 200
"""Samples of a distance."""
WINDOW = 8
DRAFTERS = ("gains", "hold-x0")
MODELS = {"photo_dit": "the photo testbed's DiT", "digits": "the digits DiT"}
SHOWN = ("photo_dit", 1.0)
"""Model and guidance of README's table."""
_SHOWN_WORDS = "a small DiT trained on 32×32 photo patches (`benchmarks/photos.py`)"

_IN_SHORT = ("2m-ode:7", "2m-sde:15", "2m-ode:15", "ddpm:20")
_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM, deterministic",
    "edm": "EDM with churn 40, Euler steps",
    "flow": "posterior of flow matching's levels",
    "2m-sde": "DPM-Solver++ 2M SDE",
    "2m-sde-karras": "DPM-Solver++ 2M SDE, Karras",
    "2m-ode": "DPM-Solver++ 2M, deterministic",
    "flow-2m-sde": "DPM-Solver++ 2M SDE, levels of flow matching",
}
_KEPT = ("frechet_distance", "frechet_error", "frechet_floor", "energy_distance", "energy_error", "samples")


def groups(rows: Rows) -> list[list[Row]]:
    """The newest rows, step by step, of each model, guidance scale and number of samples; distances of other numbers of
    samples are biased otherwise. Models as above, guidance rising, most samples first.
    """
    newest = {
        (row["model"], row["guidance_scale"], row["samples"], row["sampler"]): row
        for row in rows
        if row["window"] == 1 and row["samples"] >= ENOUGH
    }
    order = sorted({key[:3] for key in newest}, key=lambda key: (list(MODELS).index(key[0]), key[1], -key[2]))
    return [[row for key, row in newest.items() if key[:3] == group] for group in order]


def counted(rows: Rows, of: Row, drafter: str) -> Row | None:
    """Where the rounds of a sampler drafted by ``drafter`` are counted: the row of most samples, the newest of those."""
    names = ("model", "guidance_scale", "sampler")
    own = [
        row
        for row in rows
        if row["drafter"] == drafter and row["window"] == WINDOW and all(row[name] == of[name] for name in names)
    ]
    return max(own, key=lambda row: (row["samples"], row["time"]), default=None)


def drawn(rows: Rows, model: str) -> list[Row]:
    """What the figure of a model shows: of each guidance scale the group of most samples, speculated by gains."""
    largest: dict[float, list[Row]] = {}
    for group in groups([row for row in rows if row["model"] == model]):
        largest.setdefault(group[0]["guidance_scale"], group)
    shown = []
    for row in (row for group in largest.values() for row in group):
        shown.append(row)
        speculated = counted(rows, row, DRAFTERS[0])
        if speculated is not None:
            same = speculated["samples"] == row["samples"]
            shown.append(speculated if same else {**speculated, **{name: row[name] for name in _KEPT}})
    return shown


def samplers(rows: Mapping[str, Rows]) -> str:
    """Markdown for docs/samplers.md: a table a group, and the figure of each model."""
    parts = []
    for group in groups(rows["pareto"]):
        first = group[0]
        parts.append(
            f"{MODELS[first['model']][0].upper()}{MODELS[first['model']][1:]}, guidance {first['guidance_scale']:g}, "
            f"{first['samples']} samples (as many real images: Fréchet distance {first['frechet_floor']:.4f}):"
        )
        lines = [
            (
                _name(row),
                row["steps"],
                *(_rounds(counted(rows["pareto"], row, drafter)) for drafter in DRAFTERS),
                f"{row['frechet_distance']:.4f} ± {row['frechet_error']:.4f}",
                f"{row['energy_distance']:.4f} ± {row['energy_error']:.4f}",
            )
            for row in sorted(group, key=lambda row: (_name(row), row["steps"]))
        ]
        header = ("sampler", "S", *(f"rounds, {drafter}, W={WINDOW}" for drafter in DRAFTERS), "Fréchet", "energy")
        parts.append(markdown_table(header, lines))
    for model in dict.fromkeys(row["model"] for row in rows["pareto"]):
        parts.append(f"![distance from real data over rounds, {model}](../benchmarks/results/{figure(model).name})")
    return "\n" + "\n\n".join(parts) + "\n\n" if parts else "\n"


def fewer_steps(rows: Mapping[str, Rows]) -> str:
    """Markdown for README: a few samplers by their rounds, with their distances."""
    own = [row for row in rows["pareto"] if (row["model"], row["guidance_scale"]) == SHOWN]
    if not own:
        return "\n"
    lines = []
    for row in groups(own)[0]:
        speculated = counted(own, row, DRAFTERS[0])
        taken = row if speculated is None else speculated
        cells = (
            f"{_name(row)}, S={row['steps']}" + ("" if speculated is None else ", **speculated**"),
            f"{taken['rounds']:.1f}",
            f"{row['frechet_distance']:.3f} ± {row['frechet_error']:.3f}",
            f"{1000 * row['energy_distance']:.1f} ± {1000 * row['energy_error']:.1f}",
        )
        if row["sampler"] in _IN_SHORT:
            lines.append((taken["rounds"], cells))
    lines.sort(key=lambda line: line[0])
    first = groups(own)[0][0]
    return (
        f"\nDistances of {first['samples']} samples of {_SHOWN_WORDS} from real images, guidance {SHOWN[1]:g} (as many real "
        f"ones: Fréchet {first['frechet_floor']:.3f}); drafted by `{DRAFTERS[0]}`, W={WINDOW}:\n\n"
        + markdown_table(("sampler", "rounds", "Fréchet", "energy × 1000"), [cells for _, cells in lines])
        + "\n\n"
    )


def figure(model: str) -> Path:
    """Where a model's figure is."""
    return RESULTS / f"samplers-{model}.png"


def _name(row: Row) -> str:
    name, _, *options = row["sampler"].split(":")
    return ", ".join((_NAMES[name], *options))


def _rounds(row: Row | None) -> str:
    """Rounds with the standard error of their mean."""
    if row is None:
        return "-"
    # to first order the rounds' relative error is that of S / rounds
    return f"{row['rounds']:.1f} ± {row['rounds'] * row['standard_error'] / row['parallel_efficiency']:.1f}"
