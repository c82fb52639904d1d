"""``free-dit compare``: any drafters against one target, over windows, steps, guidance scales, processes and relaxations."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from free.drafters import Drafter, Fresh, LinearDrafter, Situation, as_drafter
from free.drafters.feature import FeatureDrafter
from free.loop import rounds
from free.process import VARIANCES, ReverseProcess
from free.quality import Judge, load_data
from free.relaxation import Relaxation
from free.report import draw, draw_quality, table
from free.request import check_request
from free.rows import append_row, environment, read_rows
from free.sampling import speculative_sample
from free.schedule import FixedWindow
from free.statistics import Account, SamplingStatistics, Stopwatch, standard_error, total_variation
from free.targets import Target
from free.targets.dit import DiTTarget
from free.variance import average_learned_variance
from free.window import Setup
from free_kernels import Proposal

DEFAULT_RESULTS = Path("benchmarks/results/compare.jsonl")
"""Where the rows go if the caller names no file and is in a checkout."""

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
    "variance",
    "stochasticity",
    "strength",
    "uncertainty",
    "budget",
    "data_fingerprint",
)
# of rows that were written before these could be chosen
_USUAL = {"variance": "posterior", "stochasticity": 1.0, "strength": 0.0}


_FRESH, _SWEEPS = "fresh:", ":sweeps="


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


@dataclass(frozen=True)
class _Configuration:
    """What one row measures."""

    guidance_scale: float
    steps: int
    variance: str
    stochasticity: float
    contender: _Contender
    window: int
    relaxation: Relaxation

    @property
    def title(self) -> str:
        relaxed = f", strength {self.relaxation.strength:g}" if self.relaxation.strength else ""
        return f"{self.contender.word}, W={self.window}, S={self.steps}, guidance {self.guidance_scale:g}{relaxed}"

    def row(self) -> dict[str, Any]:
        relaxed = self.relaxation.strength > 0
        return {
            "drafter": self.contender.word,
            "drafter_fingerprint": self.contender.fingerprint,
            "window": self.window,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "variance": self.variance,
            "stochasticity": self.stochasticity,
            "strength": float(self.relaxation.strength),
            "uncertainty": self.relaxation.uncertainty if relaxed else None,
            "budget": self.relaxation.budget if relaxed else None,
        }

    def process(self, target: DiTTarget) -> ReverseProcess:
        variance: str | torch.Tensor = self.variance
        if variance == "learned":
            variance = average_learned_variance(
                target, self.steps, class_labels=range(target.null_class), guidance_scale=self.guidance_scale
            )
        return ReverseProcess.ddpm(self.steps, variance=variance, stochasticity=self.stochasticity)


def compare(
    *,
    model: Path | None = None,
    drafters: Sequence[str] = ("hold-x0", "hold-output"),
    windows: Sequence[int] = (2, 4, 8, 16, 32, 64),
    steps: Sequence[int] = (50, 250),
    guidance_scales: Sequence[float] = (1.5,),
    variance: Sequence[str] = ("posterior",),
    stochasticity: Sequence[float] = (1.0,),
    relaxation: Sequence[float] = (0.0,),
    uncertainty: str = "residual",
    budget: float | None = None,
    data: str | None = None,
    samples: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    output: Path = Path("compare.png"),
    results: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Sample with every drafter, window, number of steps, guidance scale, process and relaxation; print the table, draw the
    figure.

    Sample i has label i modulo the model's classes and seed ``seed + i``, whatever the batch size.

    Args:
        model: a folder saved by ``DiTTransformer2DModel.save_pretrained``; the package's digits DiT if left out.
        drafters: words that :func:`drafter_of` takes.
        windows: W, each at least 1 (which is the ancestral sampler).
        steps: S.
        guidance_scales: each at least 1 (none).
        variance: of the process, names that :meth:`free.ReverseProcess.ddpm` takes, or ``"learned"``, the model's own as
            :func:`free.average_learned_variance` makes it.
        stochasticity: of the process, as there.
        relaxation: strengths, 0 being exact; a window of 1 tests nothing and is measured once, as exact.
        uncertainty: ``"residual"`` or ``"learned"``.
        budget: of a relaxed sample.
        data: real images that the samples are judged by (:mod:`free.quality`), as :func:`free.quality.load_data` takes them;
            the figure is then quality over rounds. None judges nothing.
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
    chosen = [drafter_of(word, default_device()) for word in drafters]
    relaxations = [Relaxation(strength, uncertainty, budget) for strength in _distinct("relaxation", relaxation)]
    variance, stochasticity = _distinct("variance", variance), _distinct("stochasticity", stochasticity)
    for word in variance:
        if word not in (*VARIANCES, "learned"):
            raise ValueError(f"variance holds {word!r}; known are {', '.join(map(repr, (*VARIANCES, 'learned')))}")
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
    if "learned" in variance:
        target.check_learned_variance()
    for count in steps:
        for level in stochasticity:
            process = ReverseProcess.ddpm(count, stochasticity=level)
    if any(one.strength for one in relaxations):
        relaxations[0].check(target, process)
    judge = None if data is None else Judge(*load_data(data))
    if judge is not None and judge.sample_shape != target.sample_shape:
        raise ValueError(f"data has images of shape {judge.sample_shape}; the model's samples are {target.sample_shape}")
    if judge is not None and samples < 3:
        raise ValueError(f"samples is {samples}; allowed is 3 or more, where data judges them")
    contenders = [
        _Contender(_label(word), drafter, _learned(drafter, target)) for word, drafter in zip(drafters, chosen, strict=True)
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
        _Configuration(scale, count, word, float(level), contender, window, one)
        for scale in guidance_scales
        for count in steps
        for word in variance
        for level in stochasticity
        for contender in contenders
        for window in windows
        for one in (relaxations if window > 1 else [Relaxation(0.0)])
    ]
    with tqdm(total=len(configurations) * samples, disable=not progress, unit="sample") as bar:
        for configuration in configurations:
            bar.set_description(configuration.title)
            described = {**run, **configuration.row(), **({} if judge is None else {"data_fingerprint": judge.fingerprint})}
            row = known.get(_key({**measured_on, **described}))
            if row is None:
                row = {**described, **_measure(target, configuration, described, judge, bar)}
                row = {**measured_on, **row} if results is None else append_row(results, row, measured_on)
            else:
                bar.update(samples)
            rows.append(row)
    print(table(rows))
    (draw if judge is None else draw_quality)(rows, output)
    print(f"\nfigure: {output}" + (f"\nrows: {results}" if results is not None else ""))
    return rows


def drafter_of(word: str, device: str = "cpu") -> Drafter:
    """The drafter that a word of the command line stands for.

    A name in :data:`free.drafters.DRAFTERS`, or the folder of a calibrated or a trained one, which goes to ``device``.
    ``fresh:WORD`` hides abandoned states from it (:class:`free.Fresh`); ``FOLDER:sweeps=N`` sets a trained one's sweeps.

    Raises:
        ValueError: an unknown name, a folder that is not whole, or sweeps where there are none to set.
    """
    if word.startswith(_FRESH):
        return Fresh(drafter_of(word.removeprefix(_FRESH), device))
    folder, found, sweeps = word.partition(_SWEEPS)
    drafter = _drafter_in(folder, device) if Path(folder).is_dir() else as_drafter(folder)
    if found:
        if not isinstance(drafter, FeatureDrafter) or not sweeps.isdecimal():
            raise ValueError(
                f"drafter is {word!r}; allowed is {_SWEEPS}N after the folder of a trained drafter, N 0 or more"
            )
        drafter.sweeps = int(sweeps)
    return drafter


def _drafter_in(folder: str, device: str) -> Drafter:
    try:
        name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, TypeError, KeyError):
        return LinearDrafter.from_pretrained(folder)  # no model of diffusers, or no configuration: it says what is wrong
    if name != FeatureDrafter.__name__:
        raise ValueError(f"drafter in {folder!r} is a {name}; allowed are a FeatureDrafter and a calibrated drafter")
    return FeatureDrafter.from_pretrained(folder).eval().to(device)


def _label(word: str) -> str:
    """A word less the path of its folder: where it stands says nothing."""
    fresh = _FRESH if word.startswith(_FRESH) else ""
    return fresh + Path(word.removeprefix(_FRESH)).name


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    return DiTTarget(model.eval().to(default_device()))


def fingerprint(target: DiTTarget) -> str:
    """Sixteen hexadecimal digits that follow from the model's configuration and weights, wherever they are stored."""
    config = {name: value for name, value in target.transformer.config.items() if not name.startswith("_")}
    state = target.transformer.state_dict()
    return _digest((state[name] for name in sorted(state)), json.dumps(config, sort_keys=True, default=str))


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


def _measure(
    target: DiTTarget, configuration: _Configuration, described: dict[str, Any], judge: Judge | None, bar: Any
) -> dict[str, Any]:
    """Sample one configuration; returns what its row says beside what it is."""
    samples, batch_size = described["samples"], described["batch_size"]
    contender, window, scale = configuration.contender, configuration.window, configuration.guidance_scale
    process, relaxation = configuration.process(target), configuration.relaxation
    labels = [i % target.null_class for i in range(samples)]
    seeds = [described["seed"] + i for i in range(samples)]
    target_flops, drafter_flops = _count_flops(
        target,
        contender.drafter,
        window,
        labels[:batch_size],
        num_inference_steps=configuration.steps,
        guidance_scale=scale,
    )
    runs: list[SamplingStatistics] = []
    drawn: list[torch.Tensor] = []
    for first in range(0, samples, batch_size):
        part = slice(first, first + batch_size)
        output = speculative_sample(
            target,
            contender.drafter,
            class_labels=labels[part],
            seed=seeds[part],
            window=window,
            process=process,
            guidance_scale=scale,
            relaxation=relaxation if relaxation.strength else None,
            capture=False,  # of a captured round the drafts' share is not known
        )
        runs.append(output.stats)
        drawn.append(output.samples)
        bar.update(len(labels[part]))

    efficiency = np.concatenate([stats.efficiency_per_sample for stats in runs])
    tested = np.sum([stats.tested for stats in runs], axis=0)
    accepted = np.sum([stats.accepted for stats in runs], axis=0)
    delta = np.sum([stats.delta_sum for stats in runs], axis=0)
    tests = int(tested.sum())
    excess = np.concatenate([stats.excess_acceptance for stats in runs])
    bound, bound_error = total_variation(excess, np.concatenate([stats.divergence for stats in runs]))
    return {
        **({} if judge is None else asdict(judge(torch.cat(drawn)))),
        "total_variation_bound": bound,
        "total_variation_error": bound_error if samples > 1 else None,
        "excess_acceptance": float(excess.mean()),
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
    drafter = drafter.drafter if isinstance(drafter, Fresh) else drafter
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
    return tuple(row.get(name, _USUAL.get(name)) for name in _KEY)


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
