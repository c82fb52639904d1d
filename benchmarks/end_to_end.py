"""Wall seconds a sample of trained DiTs: speculative against ancestral, each as it is best run; and what was to be had."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTPipeline

import free
from benchmarks.bound import bound_of_choice, bound_of_window
from benchmarks.latency import IMPLEMENTATIONS, NO_GRAPHS, best, forward_seconds, is_captured, is_compiled
from benchmarks.models import GUIDANCE, Recipe, Size, labels_of, request_of, trained, untrained
from benchmarks.record import OUT_OF_TIME, Record
from free.processes import ReverseProcess
from free.targets import DiTTarget

BENCHMARK = "end to end"
BY_IMPLEMENTATION = "end to end, by implementation"
COMPARED = "gains"
"""The drafter that is run in every implementation, with the first of the windows."""
PIPELINE = "diffusers' pipeline"
"""A baseline: diffusers' own ``DiTPipeline``, eager."""
FORWARD = "forward in the sampler's run"
_RUNS = 3  # of a configuration, after one that warms up
_ENOUGH = 6.0  # seconds, after which there are no more of them


def measure(
    record: Record,
    recipe: Recipe,
    batches: Sequence[int],
    windows: Sequence[int],
    forwards: Sequence[int],
    steps: int,
    device: torch.device,
    folder: Path,
) -> None:
    """One model, trained in ``folder``, at each batch size: baselines, T(W) at ``forwards``, speculative, the bound."""
    keys = [{"benchmark": "bound", "model": recipe.size.name, "batch": batch, "steps": steps} for batch in batches]
    keys = [key for key in keys if not record.known(**key)]
    if not keys:
        return
    target, learned = trained(recipe, device, folder)
    drafters = {"gains": "gains", "hold-x0": "hold-x0", "feature, trained": learned}
    for key in keys:
        if record.out_of_time:
            record.skip(OUT_OF_TIME, **key)
        else:
            _Group(record, target, recipe.size, key, device).measure(drafters, windows, forwards)


class _Group:
    """A model at a batch size: what is compared with each other is measured together, and taken up again together."""

    def __init__(self, record: Record, target: DiTTarget, size: Size, key: dict[str, Any], device: torch.device) -> None:
        self.record, self.target, self.size, self.device, self.steps = record, target, size, device, key["steps"]
        self.batch, self.bound_key = key["batch"], key
        self.key = {
            "model": key["model"],
            "batch": key["batch"],
            "steps": key["steps"],
            "guidance_scale": GUIDANCE,
            "dtype": str(target.dtype).removeprefix("torch."),
        }
        self.common: dict[str, Any] = {
            "class_labels": labels_of(target, self.batch),
            "guidance_scale": GUIDANCE,
            "num_inference_steps": self.steps,
        }

    def measure(self, drafters: dict[str, Any], windows: Sequence[int], forwards: Sequence[int]) -> None:
        measured = {PIPELINE: self._pipeline(), **{name: self._ancestral(name) for name in IMPLEMENTATIONS}}
        baselines = {name: seconds for name, seconds in measured.items() if seconds is not None}
        for name in baselines:
            if name not in (PIPELINE, best(self.device)):
                self._speculative(COMPARED, drafters[COMPARED], windows[0], baselines, {}, name)
        if best(self.device) not in baselines:
            self.record.skip(OUT_OF_TIME, **self.bound_key)
            return
        taken = self._forwards(forwards)
        found, bounds = [], {"ancestral": 1.0}
        for name, drafter in drafters.items():
            seen: list[free.SamplingStatistics] = []
            for window in ("auto", *windows):
                row, stats = self._speculative(name, drafter, window, baselines, taken)
                seen += stats
                found += [row] if row else []
                if row and "bound" in row:
                    bounds[f"{name}, W = {window}"] = row["bound"]
            if seen:
                bounds[f"{name}, W chosen by step"] = bound_of_choice(seen, self._drafted, taken)
        if len(found) < len(drafters) * (1 + len(windows)):
            self.record.skip(OUT_OF_TIME, **self.bound_key)
            return
        baseline = best(self.device)
        most = max(bounds, key=bounds.__getitem__)
        reached = max(found, key=lambda row: row["speedup"][baseline])
        self.record.write(
            **self.bound_key,
            guidance_scale=GUIDANCE,
            baseline=baseline,
            bound=bounds[most],
            bound_of=most,
            bounds=bounds,
            reached=reached["speedup"][baseline],
            reached_by=f"{reached['drafter']}, W {reached['window']}",
            share_of_bound=reached["speedup"][baseline] / bounds[most],
        )

    @property
    def _drafted(self) -> np.ndarray:
        """bool [S]: steps that may be drafted."""
        return ReverseProcess.ddpm(self.steps).exact_step.numpy() != np.arange(self.steps)

    def _ancestral(self, implementation: str) -> float | None:
        key = {"benchmark": BENCHMARK, "sampler": "ancestral", **self.key, "implementation": implementation}
        if is_captured(implementation) and self.device.type != "cuda":
            self.record.skip(NO_GRAPHS, **key)
            return None
        if self.record.out_of_time:
            self.record.skip(OUT_OF_TIME, **key)
            return None
        modes = {"capture": is_captured(implementation), "compile": is_compiled(implementation)}

        def run(seed: int) -> free.SamplingStatistics:
            return free.ancestral_sample(self.target, seed=seed, **modes, **self.common).stats

        stats = _repeated(run)
        seconds = _per_sample(stats)
        self.record.write(**key, seconds_per_sample=seconds, runs=len(stats))
        return seconds

    def _pipeline(self) -> float | None:
        """Of an untrained model of the size with 1000 classes, since the pipeline knows no others; nothing is decoded."""
        key = {"benchmark": BENCHMARK, "sampler": PIPELINE, **self.key, "implementation": "eager"}
        if self.record.out_of_time:
            self.record.skip(OUT_OF_TIME, **key)
            return None
        pipeline = DiTPipeline(untrained(self.size, self.device).transformer, _NoDecoder(), DDPMScheduler(clip_sample=False))
        pipeline.set_progress_bar_config(disable=True)
        taken: list[float] = []
        while len(taken) <= _RUNS and sum(taken[1:]) < _ENOUGH:  # the first one warms up
            begin = time.perf_counter()
            pipeline(
                list(range(self.batch)),
                guidance_scale=GUIDANCE,
                num_inference_steps=self.steps,
                generator=torch.Generator(self.device).manual_seed(len(taken)),
                output_type="np",  # brings the samples to the host, as ours ends when they are there
            )
            taken.append((time.perf_counter() - begin) / self.batch)
        seconds = statistics.median(taken[1:])
        self.record.write(**key, seconds_per_sample=seconds, runs=len(taken) - 1)
        return seconds

    def _forwards(self, windows: Sequence[int]) -> dict[int, float]:
        request = request_of(self.target, self.batch, GUIDANCE, self.steps)
        implementation, taken = best(self.device), {}
        for window, seconds in forward_seconds(request, implementation, windows):
            key = {"benchmark": FORWARD, **self.key, "implementation": implementation, "window": window}
            if isinstance(seconds, str):
                self.record.skip(seconds, **key)
            else:
                taken[window] = seconds
                self.record.write(**key, seconds_median=seconds)
        return taken

    def _speculative(
        self,
        name: str,
        drafter: Any,
        window: int | str,
        baselines: dict[str, float],
        taken: dict[int, float],
        implementation: str | None = None,
    ) -> tuple[dict[str, Any] | None, list[free.SamplingStatistics]]:
        """In the fastest implementation, or in another one that is named."""
        benchmark, implementation = (
            (BENCHMARK, best(self.device)) if implementation is None else (BY_IMPLEMENTATION, implementation)
        )
        key = {"benchmark": benchmark, "sampler": "speculative", **self.key, "drafter": name, "window": window}
        if self.record.out_of_time:
            self.record.skip(OUT_OF_TIME, **key, implementation=implementation)
            return None, []
        modes = {"capture": is_captured(implementation), "compile": is_compiled(implementation)}

        def run(seed: int) -> free.SamplingStatistics:
            return free.speculative_sample(self.target, drafter, window=window, seed=seed, **modes, **self.common).stats

        stats = _repeated(run)
        seconds = _per_sample(stats)
        efficiency = float(np.mean([one.parallel_efficiency for one in stats]))
        widths: Counter[int] = sum((one.windows for one in stats), Counter())
        row = self.record.write(
            **key,
            implementation=implementation,
            seconds_per_sample=seconds,
            runs=len(stats),
            parallel_efficiency=efficiency,
            acceptance_rate=float(sum(one.accepted.sum() for one in stats) / max(1, sum(one.tested.sum() for one in stats))),
            windows={str(width): count for width, count in sorted(widths.items())},
            speedup={name: baseline / seconds for name, baseline in baselines.items()},
            **({"bound": bound_of_window(efficiency, window, taken)} if isinstance(window, int) and taken else {}),
        )
        return row, stats


def _repeated(run: Callable[[int], free.SamplingStatistics]) -> list[free.SamplingStatistics]:
    """Of several seeds, after a run that warms up."""
    run(0)
    begin, stats = time.perf_counter(), []
    while len(stats) < _RUNS and (not stats or time.perf_counter() - begin < _ENOUGH):
        stats.append(run(1 + len(stats)))
    return stats


def _per_sample(stats: Sequence[free.SamplingStatistics]) -> float:
    """Without the recording of graphs, which a run needs where it meets a batch size or a window for the first time, and
    without the timing of rounds, of which "auto" does more in its first seconds than ever after.
    """
    once = ("recording", "measuring")
    return statistics.median(
        (one.total_seconds - sum(one.seconds.get(phase, 0.0) for phase in once)) / len(one.rounds) for one in stats
    )


class _NoDecoder:
    """Stands for a VAE, whose time is not that of sampling."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: torch.Tensor) -> Any:
        return SimpleNamespace(sample=latents)
