"""``free-dit demo``: the ancestral and the speculative sampler side by side on the digits DiT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from free.data.digits import NUM_CLASSES, digits_data, load_digits_dit, load_digits_drafter
from free.demo.retrain import train_digits_dit
from free.drafters import Drafter
from free.drafters.loading import drafter_of
from free.outputs import check_figure
from free.sampling.samplers import SamplingOutput, ancestral_sample, speculative_sample
from free.sampling.statistics import aligned
from free.training import TargetTrainingConfig

_TINY = 10_000_000
"""Parameters below which threads gain nothing on a few samples; on a busy machine they wait for each other instead."""


@dataclass
class Runs:
    """One sampler's runs, one sample each."""

    name: str
    samples: torch.Tensor
    """float32 [N, 1, 8, 8]."""
    rounds: float
    parallel_efficiency: float
    forwards: float
    seconds: float
    """Median over the runs."""
    recognised: float
    accepted: np.ndarray
    """int64 [S]."""
    tested: np.ndarray
    """int64 [S]."""


def run_demo(
    *,
    steps: int,
    window: int | str,
    guidance_scale: float,
    drafters: Sequence[str],
    per_class: int,
    seed: int,
    output: Path,
    weights: Path | None,
    retrain: bool,
    train_steps: int | None,
) -> list[Runs]:
    """Draw ``per_class`` samples of each digit, one at a time, print the table and write the picture to ``output``.

    All on one thread if the model is tiny; the number of threads is afterwards what it was.

    Args:
        steps: S.
        window: W, or ``"auto"``.
        guidance_scale: 1 is no guidance.
        drafters: words that :func:`free.drafters.loading.drafter_of` takes, or ``"learned"``, which ships with the digits
            DiT.
        per_class: samples of each digit.
        seed: of the first sample; the others follow.
        output: where the picture goes.
        weights: folder of a digits DiT; None is the package's own, or with ``retrain`` ``free-dit-digits``.
        retrain: train the DiT first, into ``weights``.
        train_steps: of that training; None is the usual number.

    Returns:
        The ancestral runs, then those of each drafter.

    Raises:
        ImportError: the demo's extra is not installed.
        ValueError: an argument out of range.
        OSError: ``output`` cannot be written, or there are no weights.
    """
    try:
        import matplotlib
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the demo needs {error.name}: pip install 'free-dit[demo]'") from error
    if train_steps is not None and not retrain:
        raise ValueError(f"train_steps is {train_steps}, but nothing is trained; give retrain too")
    matplotlib.use("Agg")
    chosen = {word: load_digits_drafter() if word == "learned" else drafter_of(word) for word in drafters}
    check_figure("output", output)
    if retrain:
        config = TargetTrainingConfig()
        if train_steps is not None:
            config = dataclasses.replace(config, num_steps=train_steps)
        weights = weights or Path("free-dit-digits")
        train_digits_dit(weights, config)
        print(f"trained weights: {weights}")
    model = load_digits_dit(weights)

    labels = torch.arange(NUM_CLASSES).repeat(per_class)
    with few_threads(model) as threads:
        runs = _run_in_turn(model, chosen, labels, steps, window, guidance_scale, seed)
    setting = f"Digits DiT, S={steps}, W={window}, guidance {guidance_scale}, {len(labels)} samples one at a time"
    print(f"\n{setting}, CPU, {threads}")
    print(_table(runs))
    _draw(runs, output)
    print(f"\npicture: {output}")
    return runs


@contextmanager
def few_threads(model: torch.nn.Module) -> Iterator[str]:
    """Within this context torch computes on one thread if the model is tiny; the value says on how many, and why."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) >= _TINY:
        yield f"{before} threads"
        return
    torch.set_num_threads(1)
    try:
        yield f"1 thread of {before}, as the model is tiny" if before > 1 else "1 thread"
    finally:
        torch.set_num_threads(before)


def _run_in_turn(
    model: torch.nn.Module,
    drafters: dict[str, Drafter],
    labels: torch.Tensor,
    steps: int,
    window: int | str,
    guidance_scale: float,
    seed: int,
) -> list[Runs]:
    """The ancestral sampler and each drafter, a sample at a time."""
    common: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    samplers: dict[str, Callable[..., SamplingOutput]] = {"ancestral": partial(ancestral_sample, model, **common)}
    for word, one in drafters.items():
        samplers[f"speculative, {Path(word).name}"] = partial(speculative_sample, model, one, window=window, **common)
        # a warm-up, which also times the rounds that automatic windows are chosen by
        speculative_sample(model, one, class_labels=0, window=window, **{**common, "num_inference_steps": min(steps, 20)})
    outputs: dict[str, list[SamplingOutput]] = {name: [] for name in samplers}
    # they take turns, so that a busy machine slows all alike
    for i, label in enumerate(tqdm(labels.tolist(), desc="digits, one at a time", unit="sample")):
        for name, sample in samplers.items():
            outputs[name].append(sample(class_labels=label, seed=seed + i))
    return [_gather(name, of_sampler, labels) for name, of_sampler in outputs.items()]


def _gather(name: str, runs: list[SamplingOutput], labels: torch.Tensor) -> Runs:
    samples = torch.cat([run.samples for run in runs])
    stats = [run.stats for run in runs]
    return Runs(
        name,
        samples,
        float(np.mean([one.rounds.mean() for one in stats])),
        float(np.mean([one.parallel_efficiency for one in stats])),
        float(np.mean([one.forwards for one in stats])),
        float(np.median([one.total_seconds for one in stats])),
        recognised(samples, labels).float().mean().item(),
        np.sum([one.accepted for one in stats], axis=0),
        np.sum([one.tested for one in stats], axis=0),
    )


def _table(runs: list[Runs]) -> str:
    header = ("sampler", "rounds", "efficiency", "forwards", "seconds", "speed-up", "recognised")
    rows = [
        (
            run.name,
            f"{run.rounds:.1f}",
            f"{run.parallel_efficiency:.2f}",
            f"{run.forwards:.1f}",
            f"{run.seconds:.3f}",
            f"{runs[0].seconds / run.seconds:.2f}x",
            f"{run.recognised:.0%}",
        )
        for run in runs
    ]
    return "\n".join((*aligned([header, *rows]), "per sample; seconds are medians"))


def _draw(runs: list[Runs], output: Path) -> None:
    from matplotlib import pyplot

    heights = [1.0] * len(runs) + [2.2]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(8, 1.2 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    for axis, run in zip(axes, runs, strict=False):
        grid = run.samples[:, 0].unflatten(0, (-1, NUM_CLASSES))  # [per class, 10, 8, 8]
        tiled = torch.nn.functional.pad(grid, (1, 1, 1, 1), value=-1.0).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        axis.imshow(tiled.clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(f"{run.name}: {run.rounds:.0f} rounds, {run.seconds:.2f} s a sample", fontsize=10)
        axis.axis("off")
    for run in runs[1:]:
        bins = min(25, len(run.tested))
        edges = np.linspace(0, len(run.tested), bins + 1).astype(int)
        tested = np.add.reduceat(run.tested, edges[:-1])
        accepted = np.add.reduceat(run.accepted, edges[:-1])
        share = np.divide(accepted, tested, out=np.full(bins, np.nan), where=tested > 0)
        axes[-1].plot((edges[:-1] + edges[1:]) / 2, share, marker="o", label=run.name.removeprefix("speculative, "))
    axes[-1].set(xlabel="step (noise to data)", ylabel="drafts accepted", ylim=(0, 1.02), xlim=(0, len(runs[0].tested)))
    axes[-1].grid(alpha=0.3)
    if len(runs) > 1:
        axes[-1].legend()
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def recognised(samples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which samples [B, 1, 8, 8] a support vector classifier trained on the real digits takes for their label; bool [B]."""
    from sklearn.svm import SVC

    images, classes = digits_data()
    classifier = SVC(gamma="scale", C=10.0).fit(images.flatten(1).numpy(), classes.numpy())
    predicted = classifier.predict(samples.clamp(-1, 1).flatten(1).numpy())
    return torch.from_numpy(predicted == labels.numpy())
