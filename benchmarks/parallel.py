"""Seconds a sample of a window over processes, against one process: ``python -m benchmarks.parallel``.

Shown on a CPU, each process on a core of its own with one thread, as a GPU each would be. Who is compared takes turns; a
process that is not meant waits for the others, asleep. A repeat counts if other processes left the machine alone meanwhile.
What more processes would do is projected from what forwards of fewer states and an exchange take here.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import free
from benchmarks.calm import Others
from benchmarks.models import GUIDANCE, forward_of, request_of
from benchmarks.photos import WEIGHTS
from benchmarks.projection import GPUS, exchange_bytes
from benchmarks.rows import RESULTS, write_row
from benchmarks.scale import BENCHMARK, PROJECTION
from benchmarks.timing import median_microseconds
from free.parallel.group import Group
from free.sampling.request import Request
from free.targets import Target
from free.targets.loading import load_target

NAME = "parallel"
_ONE, _THREADS, _PROCESSES = "one process, one thread", "one process, as many threads", "processes"
_PATIENCE = timedelta(minutes=5)
_AT_ONCE = 10
"""Forwards of one repeat."""
_EXCHANGES = 100
_CALM = 0.1
"""Cores that other processes may take."""
_FLOAT_BYTES = 4 * 2  # float32, and both halves of the guidance


@torch.no_grad()
def measure(rank: int, options: argparse.Namespace, store: str) -> None:
    """What one of the processes does; the first one writes the rows."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, options.processes),
        rank=rank,
        world_size=options.processes,
        timeout=_PATIENCE,
    )
    torch.set_num_threads(1)
    target = load_target(options.model)
    split = free.WindowParallel(target)
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(options.processes)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    others = Others([*map(int, pids), os.getppid()])
    for window, drafter in itertools.product(options.windows, options.drafters):
        arms: dict[str, _Arm] = {
            _ONE: _Sampler(target, drafter, window, options.steps, 1),
            _THREADS: _Sampler(target, drafter, window, options.steps, options.processes),
            _PROCESSES: _Sampler(split, drafter, window, options.steps, 1),
        }
        request = request_of(target, 1, GUIDANCE, options.steps)
        for share in sorted({1, window, *(-(-window // count) for count in GPUS)}):
            arms[f"forward of {share}"] = _Forward(request, share)
        arms["exchange"] = _Exchange(split, window)
        enough = warm = False
        while not enough:
            for arm in arms.values():
                dist.barrier()
                if rank == 0 or not arm.alone:
                    others.begin()
                    seconds = arm.run()
                    if warm and others.share() < _CALM:
                        arm.seconds.append(seconds)
            if not warm:
                warm, end = True, time.perf_counter() + 60 * options.minutes
            calm = min(len(arm.seconds) for arm in arms.values())
            enough = split.ranks.any(rank == 0 and (calm >= options.repeats or time.perf_counter() > end))
        if rank == 0 and calm:
            _write(arms, split, window, options)
        elif rank == 0:
            counts = {name: len(arm.seconds) for name, arm in arms.items()}
            print(f"other processes took more than {_CALM:g} cores too often ({counts}): no row is written", flush=True)
    dist.destroy_process_group()


class _Arm(ABC):
    """Something that is measured again and again."""

    alone = True
    """Whether one process does it while the others wait."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        """Of those that count."""

    @abstractmethod
    def run(self) -> float:
        """Once; seconds."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class _Sampler(_Arm):
    """A sample, the same each time."""

    def __init__(self, model: Target, drafter: str, window: int, steps: int, threads: int) -> None:
        super().__init__()
        self.model, self.drafter, self.window, self.steps, self.threads = model, drafter, window, steps, threads
        self.alone = model.ranks.size == 1
        self.shares: list[float] = []
        """Of the target in each run's seconds: rounds near the end have fewer states than W."""

    def run(self) -> float:
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        self.stats = free.speculative_sample(
            self.model,
            self.drafter,
            window=self.window,
            class_labels=0,
            guidance_scale=GUIDANCE,
            num_inference_steps=self.steps,
            seed=1000,
        ).stats
        taken = time.perf_counter() - begin
        self.shares.append(self.stats.seconds["target"] / taken)
        torch.set_num_threads(1)
        return taken

    @property
    def rounds(self) -> float:
        return float(self.stats.rounds.mean())


class _Forward(_Arm):
    """The target's forward over so many states."""

    def __init__(self, request: Request, states: int) -> None:
        super().__init__()
        self._forward = forward_of(request, states)

    def run(self) -> float:
        return 1e-6 * median_microseconds(self._forward, torch.device("cpu"), _AT_ONCE, flush=False)


class _Exchange(_Arm):
    """Of a round's outputs and its settled state, between processes that have nothing else to do."""

    alone = False

    def __init__(self, split: free.WindowParallel, window: int) -> None:
        super().__init__()
        shape = split.sample_shape
        assert shape is not None
        self._ranks, self._window = split.ranks, window
        share = -(-window // split.ranks.size)
        self._outputs = [torch.randn(share, *shape) for _ in ("conditional", "unconditional")]

    def run(self) -> float:
        assert isinstance(self._ranks, Group)
        begin = time.perf_counter()
        for _ in range(_EXCHANGES):
            self._ranks.gather(self._window, self._outputs)
            self._ranks.settled(lambda: (self._outputs[0][0],))
        return (time.perf_counter() - begin) / _EXCHANGES


def _write(arms: dict[str, _Arm], split: free.WindowParallel, window: int, options: argparse.Namespace) -> None:
    one, threads, processes = (arms[name] for name in (_ONE, _THREADS, _PROCESSES))
    assert isinstance(one, _Sampler)
    assert isinstance(processes, _Sampler)
    forwards = {int(name.split()[-1]): arm.median for name, arm in arms.items() if isinstance(arm, _Forward)}
    exchange, shape = arms["exchange"].median, split.sample_shape
    assert shape is not None
    of_exchange = {
        "seconds_of_exchange": exchange,
        "bytes_of_exchange": exchange_bytes(window, 1, math.prod(shape), _FLOAT_BYTES),
    }
    common = {
        "model": options.model.name,
        "steps": options.steps,
        "batch": 1,
        "guidance_scale": GUIDANCE,
        "drafter": one.drafter,
        "window": window,
    }
    row = write_row(
        NAME,
        {
            "benchmark": BENCHMARK,
            **common,
            "processes": options.processes,
            "repeats": {name: len(arm.seconds) for name, arm in arms.items()},
            "seconds_median": processes.median,
            "seconds_one_thread_median": one.median,
            "seconds_as_many_threads_median": threads.median,
            "speedup": one.median / processes.median,
            "speedup_of_threads": one.median / threads.median,
            "rounds": processes.rounds,
            "rounds_one_thread": one.rounds,
            "seconds_of_forwards": {str(states): forwards[states] for states in sorted(forwards)},
            **of_exchange,
        },
        options.results,
    )
    print({name: value for name, value in row.items() if name != "command"}, flush=True)
    in_target = one.median / one.rounds * statistics.median(one.shares)
    rest = one.median / one.rounds - in_target
    for count in (count for count in GPUS if count <= window):
        share = in_target * forwards[-(-window // count)] / forwards[window]
        write_row(
            NAME,
            {
                "benchmark": PROJECTION,
                **common,
                "processes": count,
                "seconds_of_share": share,
                "seconds_of_rest": rest,
                **of_exchange,
                "projected_speedup": (in_target + rest) / (share + rest + exchange),
                "is_projection": "not measured: of one process the target's part of a round, by T(ceil(W / R)) / T(W), and "
                "an exchange as between two here",
            },
            options.results,
        )


def main(arguments: Sequence[str] | None = None, spawn: Callable[..., Any] = torch.multiprocessing.spawn) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--drafters", nargs="+", default=["gains", "hold-x0"])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=7, help="that count, of everything")
    parser.add_argument("--minutes", type=float, default=3.0, help="after which fewer repeats will do, a window and drafter")
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (options, str(Path(folder) / "store")), nprocs=options.processes)


if __name__ == "__main__":
    main()
