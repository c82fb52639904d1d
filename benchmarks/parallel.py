"""Seconds a sample of a window over processes, against one process: ``python -m benchmarks.parallel``.

Shown on a CPU, each process on a core of its own with one thread, as a GPU each would be. Who is compared takes turns, seed
by seed, and the least of a seed's repeats counts, as a machine that is busy with other things only adds; a process that is
not meant waits for the others, asleep. What more processes would do is projected from what forwards of fewer states and an
exchange take here.
"""

from __future__ import annotations

import argparse
import itertools
import math
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
from benchmarks.models import GUIDANCE, forward_of, request_of
from benchmarks.projection import GPUS, exchange_bytes
from benchmarks.rows import RESULTS, write_row
from benchmarks.scale import BENCHMARK, PROJECTION
from benchmarks.timing import median_microseconds
from free.targets.loading import load_target

NAME = "parallel"
WEIGHTS = Path(__file__).resolve().parent / "weights" / "photo_dit"
DRAFTER = "gains"
_ONE, _THREADS, _PROCESSES = "one process, one thread", "one process, as many threads", "processes"
_PATIENCE = timedelta(minutes=5)
_EXCHANGES = 50
_FORWARDS = 15
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
    for window in options.windows:
        arms = {
            _ONE: _Arm(target, window, options.steps, 1, alone=True),
            _THREADS: _Arm(target, window, options.steps, options.processes, alone=True),
            _PROCESSES: _Arm(split, window, options.steps, 1, alone=False),
        }
        for repeat in range(-1, options.repeats):  # the first one warms up
            for seed in range(1000, 1000 + options.seeds):
                for arm in arms.values():
                    dist.barrier()
                    if rank == 0 or not arm.alone:
                        arm.run(seed, counts=repeat >= 0)
        exchange = _exchange_seconds(split, window)
        dist.barrier()
        if rank == 0:
            request = request_of(target, 1, GUIDANCE, options.steps)
            shares = sorted({1, window, *(-(-window // count) for count in GPUS)})
            forwards = {share: _seconds(forward_of(request, share)) for share in shares}
            _write(arms, forwards, exchange, window, options)
        dist.barrier()
    dist.destroy_process_group()


class _Arm:
    """One of those that are compared."""

    def __init__(self, model: Any, window: int, steps: int, threads: int, *, alone: bool) -> None:
        self.model, self.window, self.steps, self.threads, self.alone = model, window, steps, threads, alone
        self.seconds: dict[int, list[float]] = {}
        """By seed."""
        self.rounds: dict[int, float] = {}
        self.phases: list[dict[str, float]] = []
        """Seconds of a round."""

    def run(self, seed: int, *, counts: bool) -> None:
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        stats = free.speculative_sample(
            self.model,
            DRAFTER,
            window=self.window,
            class_labels=0,
            guidance_scale=GUIDANCE,
            num_inference_steps=self.steps,
            seed=seed,
        ).stats
        taken = time.perf_counter() - begin
        torch.set_num_threads(1)
        if counts:
            rounds = float(stats.rounds.mean())
            self.seconds.setdefault(seed, []).append(taken)
            self.rounds[seed] = rounds
            self.phases.append({phase: seconds / rounds for phase, seconds in stats.seconds.items()})

    @property
    def least(self) -> float:
        """Seconds a sample."""
        return statistics.mean(map(min, self.seconds.values()))

    @property
    def median(self) -> float:
        return statistics.median(itertools.chain(*self.seconds.values()))

    def of_a_round(self, phase: str) -> float:
        """Seconds, the least."""
        return min(phases[phase] for phases in self.phases)


def _seconds(forward: Callable[[], Any]) -> float:
    return 1e-6 * median_microseconds(forward, torch.device("cpu"), _FORWARDS, flush=False)


def _exchange_seconds(split: free.WindowParallel, window: int) -> float:
    """Of a round's outputs and its settled state, between processes that have nothing else to do."""
    shape = split.sample_shape
    assert shape is not None
    share = -(-window // split.ranks.size)
    outputs = [torch.randn(share, *shape) for _ in ("conditional", "unconditional")]
    taken = []
    for _ in range(_EXCHANGES):
        begin = time.perf_counter()
        split.ranks.gather(window, outputs)
        split.ranks.settled(lambda: (outputs[0][0],))
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _write(
    arms: dict[str, _Arm], forwards: dict[int, float], exchange: float, window: int, options: argparse.Namespace
) -> None:
    one, threads, processes = arms.values()
    shape = one.model.sample_shape
    common = {
        "model": options.model.name,
        "steps": options.steps,
        "batch": 1,
        "guidance_scale": GUIDANCE,
        "drafter": DRAFTER,
        "window": window,
    }
    row = write_row(
        NAME,
        {
            "benchmark": BENCHMARK,
            **common,
            "processes": options.processes,
            "samples": options.seeds,
            "repeats": options.repeats,
            "seconds": processes.least,
            "seconds_one_thread": one.least,
            "seconds_as_many_threads": threads.least,
            "speedup": one.least / processes.least,
            "speedup_of_threads": one.least / threads.least,
            "medians": {name: arm.median for name, arm in arms.items()},
            "rounds": statistics.mean(processes.rounds.values()),
            "rounds_one_thread": statistics.mean(one.rounds.values()),
            "seconds_of_a_round": {
                name: {phase: arm.of_a_round(phase) for phase in arm.phases[0]} for name, arm in arms.items()
            },
            "seconds_of_exchange": exchange,
            "bytes_of_exchange": exchange_bytes(window, 1, math.prod(shape), _FLOAT_BYTES),
            "seconds_of_forwards": {str(states): seconds for states, seconds in forwards.items()},
            "all_seconds": {name: list(arm.seconds.values()) for name, arm in arms.items()},
        },
        options.results,
    )
    print({name: value for name, value in row.items() if name not in ("all_seconds", "command")}, flush=True)
    rest = one.of_a_round("draft") + one.of_a_round("verification")
    whole = forwards[window] + rest
    for count in (count for count in GPUS if count <= window):
        share = forwards[-(-window // count)]
        write_row(
            NAME,
            {
                "benchmark": PROJECTION,
                **common,
                "processes": count,
                "seconds_of_share": share,
                "seconds_of_rest": rest,
                "seconds_of_exchange": exchange,
                "link_bytes_per_second": exchange_bytes(window, 1, math.prod(shape), _FLOAT_BYTES) / exchange,
                "projected_speedup": whole / (share + rest + exchange),
                "is_projection": "not measured: T(ceil(W / R)) of one process, and an exchange as between two here",
            },
            options.results,
        )


def main(arguments: Sequence[str] | None = None, spawn: Callable[..., Any] = torch.multiprocessing.spawn) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (options, str(Path(folder) / "store")), nprocs=options.processes)


if __name__ == "__main__":
    main()
