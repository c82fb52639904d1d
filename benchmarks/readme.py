"""The measured tables of README and docs, from the rows: ``python -m benchmarks.readme`` (and ``benchmarks.draw``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import BENCHMARK, BY_IMPLEMENTATION, COMPARED, PIPELINE
from benchmarks.figures import figure_path
from benchmarks.latency import BEST, IMPLEMENTATIONS
from benchmarks.models import GUIDANCE
from benchmarks.peers import peers
from benchmarks.policies.report import table as policies_table
from benchmarks.record import matches
from benchmarks.rows import REMOVED, RESULTS, markdown_table, read_rows
from benchmarks.samplers import fewer_steps, samplers
from benchmarks.scale import scale
from free.evaluation.rows import ROOT

_NAMES = ("gpu", "sampler", "compare", "quality", "picard", "parallel", "pareto", "policies")
_SHOWN_WINDOWS = (8, 32)
_WIDE = (4, 8, 16, 32, 64)
_NO_GPU = (
    "No rows of a GPU are there yet: all that follows was measured on a CPU, and says nothing about the seconds that a GPU "
    "takes."
)
_COMPARED = {
    "digits": "the digits DiT (64 numbers a sample)",
    "photo_dit": "the photo testbed's DiT (3072 numbers a sample)",
}
_ENOUGH = 400  # samples
_SHARES = ("DiT-XL/2", "DiT-S/2")

Row = dict[str, Any]
Rows = Sequence[Row]


def write_blocks() -> None:
    """Put what the committed rows say between the marks of each page.

    Raises:
        ValueError: a page lacks the marks of its block.
    """
    rows = committed_rows()
    for name, (page, block) in BLOCKS.items():
        before, _, after = split(page.read_text(encoding="utf-8"), name)
        page.write_text(f"{before}{block(rows)}{after}", encoding="utf-8")


def committed_rows() -> dict[str, list[Row]]:
    """By file."""
    return {name: read_rows(name) for name in _NAMES}


def split(text: str, name: str) -> tuple[str, str, str]:
    """What is before, between and behind the marks of a block."""
    first = f"<!-- {name}: written by `python -m benchmarks.draw` from the rows in benchmarks/results -->\n"
    last = f"<!-- end of {name} -->"
    before, begin, rest = text.partition(first)
    between, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page lacks {first!r} or {last!r}")
    return before + begin, between, end + after


def performance(rows: Mapping[str, Rows]) -> str:
    """Markdown, each number with its device, batch and baseline."""
    gpu = [row for row in rows["gpu"] if "skipped" not in row and not row.get("toy")]
    return "\n" + "\n\n".join([*(_gpu(gpu) if gpu else [_NO_GPU]), *_cpu(rows)]) + "\n\n"


def _gpu(rows: Rows) -> Iterator[str]:
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        yield from _end_to_end(device, own)
        yield from _by_implementation(device, own)
        yield from _break_even(device, own)
        yield from _share(device, own)
        yield from _projection(device, own)


def _end_to_end(device: str, rows: Rows) -> Iterator[str]:
    latest = _newest(
        [row for row in rows if row["benchmark"] == BENCHMARK and row["sampler"] == "speculative"],
        "model", "batch", "steps", "drafter", "window",
    )  # fmt: skip
    if not latest:
        return
    first = latest[0]
    yield (
        f"Seconds a sample on one {device} (torch {first['torch']}, {first['dtype']}), S = {first['steps']}, guidance "
        f"{first['guidance_scale']}: speculative sampling, {first['implementation']}, of DiTs trained for minutes on 32×32 "
        "photo patches. The baselines, in the same run: diffusers' `DiTPipeline` (of an untrained model of the size, "
        "nothing decoded), and the ancestral sampler, eager and at its best "
        f"({first['implementation']}). The bound is the most that the measured T(W) and acceptance allow over the last of "
        "them, were drafting and verifying free. 1.00x is as fast as the baseline, less is slower."
    )
    bounds = {(row["model"], row["batch"]): row["bound"] for row in rows if row["benchmark"] == "bound"}
    lines = []
    for row in latest:
        bound = bounds.get((row["model"], row["batch"]))
        lines.append((
            row["model"], row["batch"], row["drafter"], row["window"], f"{row['parallel_efficiency']:.2f}",
            f"{row['seconds_per_sample']:.3g}",
            f"{row['speedup'][PIPELINE]:.2f}x" if PIPELINE in row["speedup"] else "-", f"{row['speedup']['eager']:.2f}x",
            f"{row['speedup'][row['implementation']]:.2f}x", f"{bound:.2f}x" if bound else "-",
        ))  # fmt: skip
    yield markdown_table(
        (
            "model",
            "batch",
            "drafter",
            "W",
            "S / rounds",
            "seconds",
            f"over {PIPELINE}",
            "over eager",
            f"over {first['implementation']}",
            "bound",
        ),
        lines,
    )
    yield _image("gpu-speedup", "speed-up by batch", device)
    yield _image("gpu-break-even", "rounds saved against what a round costs", device)


def _by_implementation(device: str, rows: Rows) -> Iterator[str]:
    speculative = [row for row in rows if row["benchmark"] == BY_IMPLEMENTATION]
    if not speculative:
        return
    window = speculative[-1]["window"]
    of_both = {
        "ancestral": {"sampler": "ancestral"},
        "speculative": {"sampler": "speculative", "drafter": COMPARED, "window": window},
    }
    compared = [row for row in rows if row["benchmark"] in (BENCHMARK, BY_IMPLEMENTATION)]
    seconds = {
        (row["model"], row["batch"], sampler, row["implementation"]): row["seconds_per_sample"]
        for row in compared
        for sampler, key in of_both.items()
        if matches(row, **key)
    }
    groups = dict.fromkeys((row["model"], row["batch"]) for row in speculative)
    yield (
        f"What each way to run a model is worth to either sampler, seconds a sample on one {device}, S = "
        f"{speculative[-1]['steps']}, guidance {GUIDANCE}; speculative sampling by {COMPARED}, W = {window}:"
    )
    lines = [
        (
            *group,
            sampler,
            *(f"{taken:.3g}" if (taken := seconds.get((*group, sampler, name))) else "-" for name in IMPLEMENTATIONS),
        )
        for group in groups
        for sampler in of_both
    ]
    yield markdown_table(("model", "batch", "sampler", *IMPLEMENTATIONS), lines)


def _break_even(device: str, rows: Rows) -> Iterator[str]:
    latest = _newest(
        [row for row in rows if matches(row, benchmark="forward", implementation=BEST, guidance_scale=GUIDANCE)],
        "model", "batch", "window",
    )  # fmt: skip
    taken = {(row["model"], row["batch"], row["window"]): row["seconds_median"] for row in latest}
    groups = [(model, batch) for model, batch, window in taken if window == 1]
    if groups:
        yield (
            f"Where the break-even lies on one {device}: what a forward over W states takes beside one over a single state, "
            f"T(W) / T(1), target alone, {BEST}, guidance {GUIDANCE}. Speculation pays where S / rounds is more."
        )
        lines = [
            (
                *group,
                f"{1e3 * taken[(*group, 1)]:.2f}",
                *(
                    f"{taken[(*group, window)] / taken[(*group, 1)]:.2f}" if (*group, window) in taken else "-"
                    for window in _WIDE
                ),
            )
            for group in groups
        ]
        yield markdown_table(("model", "batch", "T(1), ms", *(f"W = {window}" for window in _WIDE)), lines)
        yield _image("gpu-latency", "T(W)", device)


def _share(device: str, rows: Rows) -> Iterator[str]:
    latest = _newest(
        [row for row in rows if matches(row, benchmark="share of a round", implementation=BEST) and row["model"] in _SHARES],
        "model", "batch", "drafter",
    )  # fmt: skip
    if latest:
        yield f"Where a round goes on one {device}, {BEST}, beside the target's forward alone (100 % is the round):"
        yield markdown_table(
            ("model", "batch", "drafter", "W", "round, ms", "drafting", "beside forward and drafting"),
            [
                (
                    row["model"],
                    row["batch"],
                    row["drafter"],
                    row["window"],
                    f"{1e3 * row['seconds_round']:.2f}",
                    f"{row['share_draft']:.1%}",
                    f"{row['share_outside']:.1%}",
                )
                for row in latest
            ],
        )


def _projection(device: str, rows: Rows) -> Iterator[str]:
    latest = _newest([row for row in rows if row["benchmark"] == "projection"], "model", "batch", "window", "gpus")
    latest = [row for row in latest if row["batch"] == 1]
    if latest:
        yield (
            f"A projection, not a measurement: W states split over several {device}, from T(W / n) on one of them, "
            "drafting and verification left out, and an exchange a round over a link of "
            f"{latest[-1]['link_bytes_per_second'] / 1e9:g} GB/s; over the ancestral sampler on one ({BEST}), batch 1:"
        )
        lines = [
            (row["model"], row["batch"], row["drafter"], row["window"], row["gpus"], f"{row['projected_speedup']:.2f}x")
            for row in latest
        ]
        yield markdown_table(("model", "batch", "drafter", "W", "GPUs", "projected"), lines)


def _cpu(rows: Mapping[str, Rows]) -> Iterator[str]:
    for model, words in _COMPARED.items():
        yield from _efficiency(model, words, rows["compare"])
    seconds = _newest(
        [row for row in rows["sampler"] if row["benchmark"] == "seconds a sample, digits"], "device", "batch", "window"
    )
    if seconds:
        yield "Seconds a sample of the digits DiT, guidance 1.5, hold-x0, medians of both samplers in turn:"
        lines = [
            (
                row["steps"],
                row["window"],
                row["batch"],
                f"{row['ancestral_seconds_median']:.3f}",
                f"{row['seconds_median']:.3f}",
                f"{row['speedup']:.2f}x",
                f"{row['device']}, {row['threads']} threads",
            )
            for row in seconds
        ]
        yield markdown_table(("S", "W", "batch", "ancestral", "speculative", "speed-up", "device"), lines)


def _efficiency(model: str, words: str, rows: Rows) -> Iterator[str]:
    latest = _newest(
        [
            row
            for row in rows
            if matches(row, model=model, guidance_scale=1.5)
            and row["drafter"] not in REMOVED
            and row["window"] in _SHOWN_WINDOWS
            and row.get("strength", 0) == 0
            and row.get("variance", "posterior") == "posterior"
            and row.get("stochasticity", 1) == 1
        ],
        "device", "drafter", "steps", "window",
    )  # fmt: skip
    if not latest:
        return
    yield (
        f"Rounds of {words}, guidance 1.5, where the ancestral sampler takes S (on any device, or nearly): means over the "
        "samples with their standard error; and what drafting a window takes beside the target's forward over it:"
    )
    latest.sort(key=lambda row: (-row["steps"], row["window"]))
    lines = [
        (
            row["drafter"],
            row["steps"],
            row["window"],
            row["samples"],
            f"{row['rounds']:.1f}",
            f"{row['parallel_efficiency']:.2f} ± {row['standard_error']:.2f}",
            f"{row['draft_milliseconds'] / row['target_milliseconds']:.1%}",
            f"{row['device']}, batch {row['batch_size']}",
        )
        for row in latest
    ]
    yield markdown_table(("drafter", "S", "W", "samples", "rounds", "S / rounds", "drafting", "device"), lines)


def relaxation(rows: Mapping[str, Rows]) -> str:
    """Markdown: exact, relaxed and fewer steps, with how far each is from real data."""
    latest = _newest(of_enough(rows["quality"]), "device", "model", "steps", "window", "strength", "uncertainty", "samples")
    parts = []
    for model in dict.fromkeys(row["model"] for row in latest):
        own = [row for row in latest if row["model"] == model]
        own.sort(key=lambda row: (row["window"] == 1, row["strength"], -row["steps"]))
        lines = [
            (
                _how(row),
                row["steps"],
                f"{row['rounds']:.1f}",
                f"{row['parallel_efficiency']:.2f}",
                f"{row['total_variation_bound']:.2g}" if row["strength"] else "0",
                f"{row['energy_distance']:.4f} ± {row['energy_error']:.4f}",
                f"{row['frechet_distance']:.4f} ± {row['frechet_error']:.4f}",
            )
            for row in own
        ]
        first = own[0]
        parts.append(
            f"{_COMPARED[model][0].upper()}{_COMPARED[model][1:]}, guidance {first['guidance_scale']:g}, {first['samples']} "
            f"samples, {first['device']}; distances from real data without units, less is better:"
        )
        header = ("sampler", "S", "rounds", "S / rounds", "certified bound", "energy distance", "Fréchet distance")
        parts.append(markdown_table(header, lines))
        parts.append(f"![distance from real data over rounds, {model}](../benchmarks/results/{quality_path(model).name})")
    return "\n" + "\n\n".join(parts) + "\n\n" if parts else "\n"


def of_enough(rows: Rows) -> list[Row]:
    """Those of samples enough that the distances' errors are smaller than what is compared."""
    return [row for row in rows if row["samples"] >= _ENOUGH]


def quality_path(model: str) -> Path:
    """The figure of a model's distances from real data."""
    return RESULTS / f"quality-{model}.png"


def _how(row: Row) -> str:
    if row["window"] == 1:
        return "ancestral"
    if not row["strength"]:
        return f"exact, {row['drafter']}, W={row['window']}"
    return f"relaxed by {row['strength']:g} ({row['uncertainty']})"


def _newest(rows: Rows, *names: str) -> list[Row]:
    """The last row for each combination of these values, in the order in which they first appeared."""
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def _image(kind: str, words: str, device: str) -> str:
    return f"![{words}, {device}](../benchmarks/results/{figure_path(kind, device).name})"


BLOCKS: dict[str, tuple[Path, Callable[[Mapping[str, Rows]], str]]] = {
    "peers": (ROOT / "README.md", peers),
    "performance": (ROOT / "docs" / "performance.md", performance),
    "relaxation": (ROOT / "docs" / "relaxation.md", relaxation),
    "scale": (ROOT / "docs" / "scale.md", scale),
    "samplers": (ROOT / "docs" / "samplers.md", samplers),
    "fewer steps": (ROOT / "README.md", fewer_steps),
    "policies": (ROOT / "docs" / "policies.md", lambda rows: policies_table(rows["policies"])),
}
"""The page that each pair of marks is in, and what stands between them."""


if __name__ == "__main__":
    write_blocks()
