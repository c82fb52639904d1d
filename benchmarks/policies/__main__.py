"""``python -m benchmarks.policies --collect``, then ``--train``, then ``--evaluate``. Each takes up what was begun.

Demonstrations and evaluation need ``pip install '.[robots]'``. What is made on the way lies in --work; the evaluation takes
the committed weights, if not told otherwise, and appends its rows to ``results/policies.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.policies import demonstrations, evaluation, training
from benchmarks.policies.episodes import TASKS
from benchmarks.policies.network import PolicyDiT
from benchmarks.policies.samplers import SAMPLERS
from benchmarks.record import Record
from benchmarks.rows import RESULTS

WEIGHTS = Path(__file__).parents[1] / "weights" / "policy_dit"
PARTS = ("success", "time")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    do = parser.add_mutually_exclusive_group(required=True)
    do.add_argument("--collect", action="store_true", help="paths of the scripted experts, into --work")
    do.add_argument("--train", action="store_true", help="the policy of these, into --work")
    do.add_argument("--evaluate", nargs="*", choices=PARTS, metavar="PART", help="success and time (both, if none is named)")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "free-dit" / "policies")
    parser.add_argument("--paths", type=int, default=400, help="of a task to collect")
    parser.add_argument("--num-steps", type=int, default=6_000, help="of training")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the policy to evaluate")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--episodes", type=int, default=100, help="of a task and sampler")
    parser.add_argument("--first", type=int, default=len(SAMPLERS), help="of the samplers, as many are evaluated")
    parser.add_argument("--chunks", type=int, default=60, help="to time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # small tensors gain nothing from more
    if given.collect:
        demonstrations.collect(given.work, given.paths)
    elif given.train:
        training.train(demonstrations.load(given.work), given.work, given.num_steps)
    else:
        record = Record("policies", toy=False, resume=True, minutes=float("inf"), results=given.results)
        network = PolicyDiT.load(given.weights)
        if "success" in (given.evaluate or PARTS):
            evaluation.measure_success(record, network, SAMPLERS[: given.first], given.tasks, given.episodes)
        if "time" in (given.evaluate or PARTS):
            evaluation.measure_time(record, network, SAMPLERS[: given.first], given.chunks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
