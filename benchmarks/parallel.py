"""Seconds a sample of a window over processes, against one process: ``python -m benchmarks.parallel``.

Shown on a CPU, each process on a core of its own with one thread, as a GPU each would be. Who is compared takes turns, so
that a machine that is busy for a while is so for all; a process that is not meant waits for the others, asleep.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import free
from benchmarks.models import GUIDANCE
from benchmarks.rows import RESULTS, write_row
from free.targets.loading import load_target

BENCHMARK = "a window over processes"
WEIGHTS = Path(__file__).resolve().parent / "weights" / "photo_dit"
DRAFTER = "gains"
_PATIENCE = timedelta(minutes=5)


def measure(rank: int, options: argparse.Namespace, store: str) -> None:
    """What one of the processes does; the first one writes a row for each window."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, options.processes),
        rank=rank,
        world_size=options.processes,
        timeout=_PATIENCE,
    )
    torch.set_num_threads(1)
    model = load_target(options.model)
    split = free.WindowParallel(model)
    for window in options.windows:
        arms = {
            "one process, one thread": _Arm(model, window, options.steps, 1, alone=True),
            "one process, as many threads": _Arm(model, window, options.steps, options.processes, alone=True),
            "processes": _Arm(split, window, options.steps, 1, alone=False),
        }
        for repeat in range(-1, options.repeats):  # the first one warms up
            for arm in arms.values():
                dist.barrier()
                if rank == 0 or not arm.alone:
                    arm.run(repeat)
        if rank == 0:
            _write(arms, split, window, options)
    dist.barrier()
    dist.destroy_process_group()


class _Arm:
    """One of those that are compared."""

    def __init__(self, model: Any, window: int, steps: int, threads: int, *, alone: bool) -> None:
        self.model, self.window, self.steps, self.threads, self.alone = model, window, steps, threads, alone
        self.seconds: list[float] = []
        self.rounds: list[float] = []
        self.phases: list[dict[str, float]] = []

    def run(self, repeat: int) -> None:
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        stats = free.speculative_sample(
            self.model,
            DRAFTER,
            window=self.window,
            class_labels=0,
            guidance_scale=GUIDANCE,
            num_inference_steps=self.steps,
            seed=1000 + repeat,
        ).stats
        if repeat >= 0:
            self.seconds.append(time.perf_counter() - begin)
            self.rounds.append(float(stats.rounds.mean()))
            self.phases.append(stats.seconds)
        torch.set_num_threads(1)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def phase(self, name: str) -> float:
        """Milliseconds of a round, the median."""
        return statistics.median(
            1e3 * phases[name] / rounds for phases, rounds in zip(self.phases, self.rounds, strict=True)
        )


def _write(arms: dict[str, _Arm], split: free.WindowParallel, window: int, options: argparse.Namespace) -> None:
    one, threads, processes = arms.values()
    received, rounds = split.bytes, sum(processes.rounds)
    row = write_row(
        "parallel",
        {
            "benchmark": BENCHMARK,
            "model": options.model.name,
            "steps": options.steps,
            "batch": 1,
            "guidance_scale": GUIDANCE,
            "drafter": DRAFTER,
            "window": window,
            "processes": options.processes,
            "repeats": options.repeats,
            "seconds_median": processes.median,
            "seconds_one_thread_median": one.median,
            "seconds_as_many_threads_median": threads.median,
            "speedup": one.median / processes.median,
            "speedup_of_threads": one.median / threads.median,
            "speedup_paired_median": statistics.median(map(_ratio, one.seconds, processes.seconds)),
            "rounds": statistics.mean(processes.rounds),
            "rounds_one_thread": statistics.mean(one.rounds),
            "milliseconds": {name: {phase: arm.phase(phase) for phase in arm.phases[0]} for name, arm in arms.items()},
            "seconds": {name: [round(value, 4) for value in arm.seconds] for name, arm in arms.items()},
        },
        options.results,
    )
    print({name: value for name, value in row.items() if name not in ("seconds", "command")}, received, rounds, flush=True)


def _ratio(one: float, other: float) -> float:
    return one / other


def main(arguments: Sequence[str] | None = None, spawn: Callable[..., Any] = torch.multiprocessing.spawn) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (options, str(Path(folder) / "store")), nprocs=options.processes)


if __name__ == "__main__":
    main()
