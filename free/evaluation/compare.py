"""``free-dit compare``: any drafters against one target, over windows, steps, guidance scales, processes and relaxations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from free.checks import check_number
from free.data.digits import weights_path
from free.drafters.loading import drafter_of
from free.evaluation.configuration import STEP_BY_STEP, Configuration, Contender, key, label
from free.evaluation.measure import learned_tensors, measure
from free.evaluation.pareto import draw_samplers, sampler_table
from free.evaluation.quality import Judge, load_data
from free.evaluation.report import draw, draw_quality, table
from free.evaluation.rows import append_row, environment, read_rows
from free.evaluation.samplers import Sampler, sampler_of
from free.outputs import check_figure, check_file
from free.processes import VARIANCES, ReverseProcess
from free.sampling.relaxation import Relaxation
from free.targets.loading import default_device, fingerprint, load_target

DEFAULT_RESULTS = Path("benchmarks/results/compare.jsonl")
"""Where the rows go if the caller names no file and is in a checkout."""

DEFAULT_DRAFTERS = ("gains", "hold-x0")
DEFAULT_WINDOWS = (2, 4, 8, 16, 32, 64)
DEFAULT_STEPS = (50, 250)


def compare(
    *,
    model: Path | None = None,
    samplers: Sequence[str] | None = None,
    drafters: Sequence[str] | None = None,
    windows: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] = (1.5,),
    variance: Sequence[str] = ("posterior",),
    stochasticity: Sequence[float] = (1.0,),
    relaxation: Sequence[float] = (0.0,),
    uncertainty: str | None = None,
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
        samplers: words that :func:`sampler_of` takes, instead of ``steps``, ``variance``, ``stochasticity`` and
            ``relaxation``: each is drawn step by step, and one with noise by every drafter and window above 1 too. They are
            judged by ``data``; table and figure are their distance from it over rounds.
        drafters: words that :func:`drafter_of` takes; gains and hold-x0 if left out.
        windows: W, each at least 1 (which is the ancestral sampler); 2 to 64 by powers of two if left out, 8 of samplers.
        steps: S; 50 and 250 if left out.
        guidance_scales: each at least 1 (none).
        variance: of the process, names that :meth:`free.ReverseProcess.ddpm` takes, or ``"learned"``, the model's own as
            :func:`free.average_learned_variance` makes it.
        stochasticity: of the process, as there.
        relaxation: strengths, 0 being exact; a window of 1 tests nothing and is measured once, as exact.
        uncertainty: ``"residual"`` (if left out) or ``"learned"``, of relaxed samples.
        budget: likewise.
        data: real images that the samples are judged by (:mod:`free.evaluation.quality`), as its ``load_data`` takes them;
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
    named = _named(samplers, drafters, steps, data, variance, stochasticity, relaxation)
    drafters = _distinct("drafters", DEFAULT_DRAFTERS if drafters is None else drafters)
    windows = _distinct("windows", (DEFAULT_WINDOWS if samplers is None else (8,)) if windows is None else windows)
    steps = _distinct("steps", DEFAULT_STEPS if steps is None else steps)
    guidance_scales = [float(scale) for scale in _distinct("guidance_scales", guidance_scales)]
    for name, values in {"windows": windows, "samples": [samples], "batch_size": [batch_size]}.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} holds {value!r}; allowed are ints, 1 or more")
    for scale in guidance_scales:
        if not 1 <= scale < float("inf"):
            raise ValueError(f"guidance_scales holds {scale}; allowed is 1 (no guidance) or more")
    chosen = [drafter_of(word, default_device()) for word in drafters]
    for strength in relaxation:
        check_number("relaxation", strength, "0 (exact) or more", 0)
    for name, value in (("uncertainty", uncertainty), ("budget", budget)):
        if value is not None and not any(relaxation):
            raise ValueError(f"{name} is {value!r}, but nothing is relaxed; allowed is None, or a relaxation above 0")
    relaxations = [
        Relaxation(strength, uncertainty or "residual", budget) for strength in _distinct("relaxation", relaxation)
    ]
    variance, stochasticity = _distinct("variance", variance), _distinct("stochasticity", stochasticity)
    for word in variance:
        if word not in (*VARIANCES, "learned"):
            raise ValueError(f"variance holds {word!r}; known are {', '.join(map(repr, (*VARIANCES, 'learned')))}")
    check_figure("output", output)
    if results is None and DEFAULT_RESULTS.parent.is_dir():
        results = DEFAULT_RESULTS
    if results is not None:
        check_file("results", results)
    if resume and results is None:
        raise ValueError("resume needs the results of the run that it continues; give a results file")
    known = {key(row): row for row in read_rows(results) if row.get("benchmark") == "compare"} if resume and results else {}

    target = load_target(weights_path() if model is None else model)
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
        Contender(label(word), drafter, learned_tensors(drafter, target))
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
        Configuration(scale, count, word, float(level), contender, window, one)
        for scale in guidance_scales
        for count in steps
        for word in variance
        for level in stochasticity
        for contender in contenders
        for window in windows
        for one in (relaxations if window > 1 else [Relaxation(0.0)])
    ]
    if named is not None:
        configurations = _of_samplers(named, guidance_scales, contenders, windows)
    with tqdm(total=len(configurations) * samples, disable=not progress, unit="sample") as bar:
        for configuration in configurations:
            bar.set_description(configuration.title)
            described = {**run, **configuration.row(), **({} if judge is None else {"data_fingerprint": judge.fingerprint})}
            row = known.get(key({**measured_on, **described}))
            if row is None:
                row = {**described, **measure(target, configuration, described, judge, bar)}
                row = {**measured_on, **row} if results is None else append_row(results, row, measured_on)
            else:
                bar.update(samples)
            rows.append(row)
    if named is not None:
        print(sampler_table(rows))
        draw_samplers(rows, output)
    else:
        print(table(rows))
        (draw if judge is None else draw_quality)(rows, output)
    print(f"\nfigure: {output}" + (f"\nrows: {results}" if results is not None else ""))
    return rows


def _named(
    words: Sequence[str] | None,
    drafters: Sequence[str] | None,
    steps: Sequence[int] | None,
    data: str | None,
    variance: Sequence[str],
    stochasticity: Sequence[float],
    relaxation: Sequence[float],
) -> list[Sampler] | None:
    """The samplers that were asked for by name, or None; what does not go with them is refused."""
    if words is None:
        return None
    named = list(dict.fromkeys(sampler_of(word) for word in _distinct("samplers", words)))
    unsaid = {
        "steps": steps is None,
        "variance": list(variance) == ["posterior"],
        "stochasticity": list(stochasticity) == [1],
        "relaxation": list(relaxation) == [0],
    }
    for name, left_out in unsaid.items():
        if not left_out:
            raise ValueError(f"{name} is given with samplers, which say themselves what is sampled, exactly: leave it out")
    if data is None:
        raise ValueError("samplers are judged by real data, and data is None; give 'digits' or a .npz file")
    if drafters is not None and all(sampler.deterministic for sampler in named):
        raise ValueError(f"drafters is {list(drafters)}, but every sampler is deterministic: there is nothing to draft")
    return named


def _of_samplers(
    named: Sequence[Sampler], guidance_scales: Sequence[float], contenders: Sequence[Contender], windows: Sequence[int]
) -> list[Configuration]:
    """Each step by step, and by every drafter and window if it draws noise."""
    ways = [(contender, window) for contender in contenders for window in windows if window > 1]
    return [
        Configuration(scale, sampler.steps, "posterior", 1.0, contender, window, Relaxation(0.0), sampler)
        for sampler in named
        for scale in (guidance_scales if sampler.guidance_scale is None else [sampler.guidance_scale])
        for contender, window in [(STEP_BY_STEP, 1), *([] if sampler.deterministic else ways)]
    ]


def _distinct(name: str, values: Sequence[Any]) -> list[Any]:
    if not len(values):
        raise ValueError(f"{name} is empty; at least one is needed")
    return list(dict.fromkeys(values))
