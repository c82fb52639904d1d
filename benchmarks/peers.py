"""README's first table: the literature's ways to draft beside ours, on one model, from the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.rows import REMOVED

MODEL, GUIDANCE = "photo_dit", 1.5
COLUMNS = ((50, 8), (50, 32), (250, 8), (250, 32))
"""Steps and window."""

Row = dict[str, Any]

_PEERS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "frozen target, fresh noise (De Bortoli et al.; autospeculative decoding)": (
        "compare",
        lambda drafter: drafter == "fresh:hold-output",
    ),
    "FREE's trained block, fresh noise": ("compare", lambda drafter: drafter.startswith("fresh:photo_paper")),
    "Picard iteration, tolerance 0.1 (ParaDiGMS), *not exact*": ("picard", lambda drafter: True),
    "**ours, no training (`gains`)**": ("compare", lambda drafter: drafter == "gains"),
    "**ours, trained block**": ("compare", lambda drafter: drafter.startswith("photo_drafter")),
}


def peers(rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: rounds, and S / rounds with its standard error; of several rows of one kind the best counts."""
    lines = []
    for words, (name, fits) in _PEERS.items():
        own = [
            row
            for row in rows[name]
            if _is_plain(row) and fits(row.get("drafter", "")) and row.get("drafter") not in REMOVED
        ]
        lines.append((words, *(_cell(own, steps, window) for steps, window in COLUMNS)))
    measured = [row for row in rows["compare"] if row["model"] == MODEL]
    if not measured:
        return "\n"
    header = ("drafts", *(f"S={steps}, W={window}" for steps, window in COLUMNS))
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *lines))
    return (
        "\nS is the number of denoising steps, W how many states of a sample one forward evaluates. Rounds (S / rounds) "
        f"where the step-by-step sampler takes S, of a DiT of 3072 numbers a sample, guidance {GUIDANCE}, "
        f"{max(row['samples'] for row in measured)} samples; - is not measured:\n\n{table}\n\n"
    )


def _is_plain(row: Row) -> bool:
    usual = {"model": MODEL, "guidance_scale": GUIDANCE, "strength": 0.0, "variance": "posterior", "stochasticity": 1.0}
    return all(row.get(name, value) == value for name, value in usual.items())


def _cell(rows: Sequence[Row], steps: int, window: int) -> str:
    newest = {row.get("drafter"): row for row in rows if row["steps"] == steps and row["window"] == window}
    if not newest:
        return "-"
    best = max(newest.values(), key=lambda row: row["parallel_efficiency"])
    return f"{best['rounds']:.0f} ({best['parallel_efficiency']:.2f} ± {best['standard_error']:.2f})"
