"""``free-dit compare``: any drafters against one target, over windows, steps and guidance scales."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from free.drafters import Drafter, LinearDrafter, Situation, as_drafter
from free.loop import rounds
from free.request import check_request
from free.rows import append_row, environment, read_rows
from free.sampling import speculative_sample
from free.schedule import FixedWindow
from free.statistics import Account, SamplingStatistics, Stopwatch, aligned, standard_error
from free.targets import Target
from free.targets.dit import DiTTarget
from free.window import Setup
from free_kernels import Proposal

DEFAULT_RESULTS = Path("benchmarks/results/compare.jsonl")
"""Where the rows go if the caller names no file and is in a checkout."""

_DRAWN_WINDOW = 8  # the sampler's default, for the panels that show one window
_BINS = 25

# what makes two rows measurements of the same thing: milliseconds depend on the batch size and the device too
_KEY = (
    "model_fingerprint",
    "drafter",
    "drafter_fingerprint",
    "window",
    "steps",
    "guidance_scale",
    "samples",
    "batch_size",
    "seed",
    "device",
)


@dataclass(frozen=True)
class _Contender:
    """A drafter as the command line named it."""

    word: str
    drafter: Drafter
    learned: list[torch.Tensor]

    @property
    def fingerprint(self) -> str | None:
        """Of what it learned; None where it learned nothing."""
        return _digest(self.learned) if self.learned else None


def compare(
    *,
    model: Path | None = None,
    drafters: Sequence[str] = ("hold-x0", "hold-output"),
    windows: Sequence[int] = (2, 4, 8, 16, 32, 64),
    steps: Sequence[int] = (50, 250),
    guidance_scales: Sequence[float] = (1.5,),
    samples: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    output: Path = Path("compare.png"),
    results: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Sample with every drafter, window, number of steps and guidance scale; print the table, draw the figure.

    Sample i has label i modulo the model's classes and seed ``seed + i``, whatever the batch size.

    Args:
        model: a folder saved by ``DiTTransformer2DModel.save_pretrained``; the package's digits DiT if left out.
        drafters: words that :func:`drafter_of` takes.
        windows: W, each at least 1 (which is the ancestral sampler).
        steps: S.
        guidance_scales: each at least 1 (none).
        samples: drawn for each configuration.
        batch_size: samples drawn at once, which milliseconds depend on.
        seed: of the first sample.
        output: the figure, in a format that matplotlib writes.
        results: a JSON-lines file to which each configuration's row is appended as soon as it is measured; if left out,
            :data:`DEFAULT_RESULTS` where its folder exists, else no rows are written.
        resume: take over the rows that ``results`` already holds for the same model, drafter, configuration and device.
        progress: show a bar that counts samples.

    Returns:
        One row a configuration.

    Raises:
        ValueError, OSError: a wrong argument, a folder without a DiT, or a file that cannot be written; before any work
            is done.
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the figure needs {error.name}: pip install 'free-dit[demo]'") from error
    drafters, windows, steps = _distinct("drafters", drafters), _distinct("windows", windows), _distinct("steps", steps)
    guidance_scales = [float(scale) for scale in _distinct("guidance_scales", guidance_scales)]
    for name, values in {"windows": windows, "samples": [samples], "batch_size": [batch_size]}.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} holds {value!r}; allowed are ints, 1 or more")
    for scale in guidance_scales:
        if not 1 <= scale < float("inf"):
            raise ValueError(f"guidance_scales holds {scale}; allowed is 1 (no guidance) or more")
    chosen = [drafter_of(word) for word in drafters]
    _check_output(output)
    if results is None and DEFAULT_RESULTS.parent.is_dir():
        results = DEFAULT_RESULTS
    if results is not None:
        _check_file("results", results)
    if resume and results is None:
        raise ValueError("resume needs the results of the run that it continues; give a results file")
    known = {_key(row): row for row in read_rows(results) if row.get("benchmark") == "compare"} if resume and results else {}

    target = load_target(model)
    for drafter in chosen:
        drafter.check(target)
    for count in steps:
        target.default_process(count)
    contenders = [
        # a folder's own name: where it stands says nothing
        _Contender(Path(word).name, drafter, _learned(drafter, target))
        for word, drafter in zip(drafters, chosen, strict=True)
    ]
    run = {
        "benchmark": "compare",
        "model": "digits" if model is None else model.resolve().name,
        "model_fingerprint": fingerprint(target),
        "samples": samples,
        "batch_size": batch_size,
        "seed": seed,
    }
    # a long run is measured on the code that it started with, whatever happens to the checkout meanwhile
    measured_on = environment()

    rows: list[dict[str, Any]] = []
    configurations = [
        (scale, count, contender, window)
        for scale in guidance_scales
        for count in steps
        for contender in contenders
        for window in windows
    ]
    with tqdm(total=len(configurations) * samples, disable=not progress, unit="sample") as bar:
        for scale, count, contender, window in configurations:
            bar.set_description(f"{contender.word}, W={window}, S={count}, guidance {scale:g}")
            configuration: dict[str, Any] = {
                **run,
                "drafter": contender.word,
                "drafter_fingerprint": contender.fingerprint,
                "window": window,
                "steps": count,
                "guidance_scale": scale,
            }
            row = known.get(_key({**measured_on, **configuration}))
            if row is None:
                row = {**configuration, **_measure(target, contender, configuration, bar)}
                row = {**measured_on, **row} if results is None else append_row(results, row, measured_on)
            else:
                bar.update(samples)
            rows.append(row)
    print(table(rows))
    draw(rows, output)
    print(f"\nfigure: {output}" + (f"\nrows: {results}" if results is not None else ""))
    return rows


def drafter_of(word: str) -> Drafter:
    """The drafter that a word of the command line stands for: a name in :data:`free.drafters.DRAFTERS`, or the folder of a
    calibrated one.

    Raises:
        ValueError: an unknown name, or a folder that is not whole.
    """
    return LinearDrafter.from_pretrained(word) if Path(word).is_dir() else as_drafter(word)


def load_target(folder: Path | None = None) -> DiTTarget:
    """The DiT in a folder (the package's digits DiT if left out) in eval mode, float32, on the GPU if there is one.

    Raises:
        FileNotFoundError: the folder is not there, or holds no ``config.json``.
        ValueError: it holds something else than a whole DiT.
    """
    from diffusers import DiTTransformer2DModel
    from safetensors import SafetensorError

    from free.demo.digits import weights_path

    if folder is None:
        folder = weights_path()
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no model in {str(folder)!r}: expected config.json and safetensors, as DiTTransformer2DModel.save_pretrained "
            "writes them"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is no model's configuration: {error}") from error
    if name != "DiTTransformer2DModel":
        raise ValueError(f"model in {str(folder)!r} is a {name}; allowed is a DiTTransformer2DModel")
    try:
        model, report = DiTTransformer2DModel.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model in {str(folder)!r} cannot be loaded: {error}") from error
    # diffusers fills what is missing with random numbers
    if report["missing_keys"]:
        raise ValueError(f"model in {str(folder)!r} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])} …")
    return DiTTarget(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"))


def fingerprint(target: DiTTarget) -> str:
    """Sixteen hexadecimal digits that follow from the model's configuration and weights, wherever they are stored."""
    config = {name: value for name, value in target.transformer.config.items() if not name.startswith("_")}
    state = target.transformer.state_dict()
    return _digest((state[name] for name in sorted(state)), json.dumps(config, sort_keys=True, default=str))


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
    return "\n".join(
        (
            f"model {first['model']}, {first['samples']} samples in batches of {first['batch_size']}, {first['device']}",
            *aligned([header, *lines]),
            "efficiency: S / rounds, mean over samples ± standard error; |delta|: mean over tests",
            f"parameters: the drafter's over the target's {first['target_parameters']:,}",
            "FLOPs: of the matrix products of one drafted window over those of one target evaluation of one state",
            "ms: of drafting a batch's windows and of the target's forward at their states; time: their ratio",
        )
    )


def draw(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """A line of panels a guidance scale: efficiency by window, then acceptance and mean |delta| by step of one window."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    scales = sorted({row["guidance_scale"] for row in rows})
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    counts = sorted({row["steps"] for row in rows})
    windows = sorted({row["window"] for row in rows})
    drawn = _DRAWN_WINDOW if _DRAWN_WINDOW in windows else windows[len(windows) // 2]
    color = {drafter: f"C{i}" for i, drafter in enumerate(drafters)}
    dashes = {count: ("-", "--", "-.", ":")[i % 4] for i, count in enumerate(reversed(counts))}

    figure = Figure(figsize=(12, 3.5 * len(scales) + 0.8), layout="constrained")
    panels = figure.subplots(len(scales), 3, squeeze=False, sharey="col")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for line, scale in zip(panels, scales, strict=True):
        here = [row for row in rows if row["guidance_scale"] == scale]
        for drafter in drafters:
            for count in counts:
                curve = sorted(
                    (row for row in here if row["drafter"] == drafter and row["steps"] == count),
                    key=lambda row: row["window"],
                )
                line[0].errorbar(
                    [row["window"] for row in curve],
                    [row["parallel_efficiency"] for row in curve],
                    [row["standard_error"] or 0.0 for row in curve],
                    color=color[drafter],
                    linestyle=dashes[count],
                    marker="o",
                    markersize=4,
                    capsize=3,
                    label=f"{drafter}, S={count}",
                )
            for row in here:
                if (row["drafter"], row["steps"], row["window"]) == (drafter, counts[-1], drawn):
                    step, accepted, delta = _by_step(row)
                    line[1].plot(step, accepted, color=color[drafter], marker="o", markersize=4, label=drafter)
                    line[2].plot(step, delta, color=color[drafter], marker="o", markersize=4, label=drafter)
        line[0].plot(windows, windows, color="0.6", linewidth=1, zorder=0, label="bound: W")
        line[0].set(xscale="log", yscale="log", xlabel="window W", ylabel="parallel efficiency, S / rounds")
        line[0].set_xticks(windows)
        top = 1.25 * max(row["parallel_efficiency"] for row in rows)
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
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(f"model {rows[0]['model']}, mean of {rows[0]['samples']} samples with its standard error")
    figure.savefig(output, dpi=110)


class _Watched(Drafter):
    """A drafter whose floating-point operations are counted, those of the latest window."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.name, self.needs_features = drafter.name, drafter.needs_features
        self.flops = 0

    def propose(self, situation: Situation) -> Proposal:
        with _Flops() as counter:
            proposal = self.drafter.propose(situation)
        self.flops = counter.total
        return proposal


class _Flops:
    """Counts the operations of matrix products and convolutions; attention is spelled out, or a CPU's would be missed."""

    def __enter__(self) -> _Flops:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        self._attention = sdpa_kernel(SDPBackend.MATH)
        self._counter = FlopCounterMode(display=False)
        self._attention.__enter__()
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)
        self._attention.__exit__(*error)
        self.total = int(self._counter.get_total_flops())


def _measure(target: DiTTarget, contender: _Contender, configuration: dict[str, Any], bar: Any) -> dict[str, Any]:
    """Sample one configuration; returns what its row says beside the configuration."""
    samples, batch_size = configuration["samples"], configuration["batch_size"]
    arguments = {
        "num_inference_steps": configuration["steps"],
        "guidance_scale": configuration["guidance_scale"],
    }
    window = configuration["window"]
    labels = [i % target.null_class for i in range(samples)]
    seeds = [configuration["seed"] + i for i in range(samples)]
    target_flops, drafter_flops = _count_flops(target, contender.drafter, window, labels[:batch_size], **arguments)
    runs: list[SamplingStatistics] = []
    for first in range(0, samples, batch_size):
        part = slice(first, first + batch_size)
        output = speculative_sample(
            target,
            contender.drafter,
            class_labels=labels[part],
            seed=seeds[part],
            window=window,
            capture=False,  # of a captured round the drafts' share is not known
            **arguments,
        )
        runs.append(output.stats)
        bar.update(len(labels[part]))

    efficiency = np.concatenate([stats.efficiency_per_sample for stats in runs])
    tested = np.sum([stats.tested for stats in runs], axis=0)
    accepted = np.sum([stats.accepted for stats in runs], axis=0)
    delta = np.sum([stats.delta_sum for stats in runs], axis=0)
    tests = int(tested.sum())
    return {
        "parallel_efficiency": float(efficiency.mean()),
        "standard_error": standard_error(efficiency) if len(efficiency) > 1 else None,
        "rounds": float(np.concatenate([stats.rounds for stats in runs]).mean()),
        "acceptance_rate": int(accepted.sum()) / tests if tests else None,
        "mean_delta": float(delta.sum()) / tests if tests else None,
        "tested_by_step": tested.tolist(),
        "accepted_by_step": accepted.tolist(),
        "mean_delta_by_step": [
            float(f"{total / count:.4g}") if count else None
            for total, count in zip(delta.tolist(), tested.tolist(), strict=True)
        ],
        "target_parameters": sum(parameter.numel() for parameter in target.transformer.parameters()),
        "drafter_parameters": sum(tensor.numel() for tensor in contender.learned),
        "target_flops": target_flops,
        "drafter_flops": drafter_flops,
        "target_milliseconds": 1e3 * sum(stats.seconds["target"] for stats in runs) / sum(stats.forwards for stats in runs),
        "draft_milliseconds": 1e3 * sum(stats.seconds["draft"] for stats in runs) / sum(stats.draft_calls for stats in runs),
        "seconds": sum(stats.total_seconds for stats in runs),
    }


@torch.no_grad()
def _count_flops(
    target: DiTTarget, drafter: Drafter, window: int, labels: list[int], *, num_inference_steps: int, guidance_scale: float
) -> tuple[int, int]:
    """Of one evaluation of one state (both guidance halves), and of one drafted window of one sample.

    Two rounds at the batch size of the run, which warm its shapes up as well: the first window has no anchors, so the
    second one counts.
    """
    request = check_request(
        target,
        class_labels=labels,
        conditioning=None,
        num_samples=None,
        shape=None,
        process=None,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=0,
        generator=None,
        latents=None,
        impl="auto",
        callback_on_step_end=None,
    )
    watched, steps, state = _Watched(drafter), request.process.num_steps, request.initial_state()
    setup, account = Setup.of(request, watched, window, "auto"), Account(steps, request.seed)
    stats = SamplingStatistics(steps, window, drafter.name, np.zeros(request.batch, np.int64))
    with target.capture_features() if drafter.needs_features else nullcontext():
        turns = rounds(setup, FixedWindow(window), state, account, stats, Stopwatch(request.seed.device))
        for _ in itertools.islice(turns, 2):
            pass
    state = request.initial_state()[:1].view(1, *request.sample_shape)
    conditioning = {name: value[:1] for name, value in request.conditioning.items()}
    with _Flops() as counter:
        target.evaluate(state, request.process.timestep[:1], conditioning, request.guided)
    return counter.total, watched.flops // len(labels)


def _learned(drafter: Drafter, target: DiTTarget) -> list[torch.Tensor]:
    """The numbers that a drafter learned: parameters, and tensors that it holds itself; never the target's."""
    found: dict[int, torch.Tensor] = {}
    for part in (drafter, *vars(drafter).values()):
        module = part.module if isinstance(part, Target) else part
        if isinstance(module, torch.nn.Module):
            found.update({id(parameter): parameter for parameter in module.parameters()})
        elif isinstance(module, torch.Tensor):
            found[id(module)] = module
    targets = {id(parameter) for parameter in target.transformer.parameters()}
    return [tensor for identity, tensor in found.items() if identity not in targets]


def _digest(tensors: Iterable[torch.Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)


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


def _distinct(name: str, values: Sequence[Any]) -> list[Any]:
    if not len(values):
        raise ValueError(f"{name} is empty; at least one is needed")
    return list(dict.fromkeys(values))


def _check_output(output: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    _check_file("output", output)
    allowed = sorted(FigureCanvasBase.get_supported_filetypes())
    if output.suffix[1:].lower() not in allowed:
        raise ValueError(f"output is {str(output)!r}; allowed are files that end in .{', .'.join(allowed)}")


def _check_file(name: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} is {str(path)!r}, and its folder does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{name} is {str(path)!r}, which is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{name} is {str(path)!r}, which cannot be written")


def _or_dash(value: float | None, pattern: str, dash: str = "-") -> str:
    return dash if value is None else pattern.format(value)
