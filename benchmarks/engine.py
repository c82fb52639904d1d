"""An engine against batches and against lone samples, on the digits DiT: how busy its slots are, and what it evaluates.

``python -m benchmarks.engine`` appends to ``results/engine.jsonl`` a row of an engine that 1,000 digits go through, and one
of as many in batches of its slots, each of which waits for its slowest sample.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import free
from benchmarks.rows import RESULTS, write_row
from free.demo import load_digits_dit
from free.sampling.statistics import standard_error


def through_engine(model: Any, requests: list[dict[str, Any]], slots: int, **common: Any) -> dict[str, Any]:
    """All requests asked at once; what they took, by name."""
    engine = free.Engine(model, slots=slots, **common)
    begin = time.perf_counter()
    handles = [engine.add(**request) for request in requests]
    busy, rounds_of_a_queue = 0, 0
    while engine.unfinished:
        before = engine.stats.sample_rounds
        engine.step()
        if engine.waiting:
            busy, rounds_of_a_queue = busy + engine.stats.sample_rounds - before, rounds_of_a_queue + 1
    seconds = time.perf_counter() - begin
    rounds = np.array([handle.stats.rounds for handle in handles if handle.stats])
    return {
        "rounds": engine.stats.rounds,
        "busy": engine.stats.busy,
        "busy_while_some_wait": busy / (slots * rounds_of_a_queue) if rounds_of_a_queue else None,
        "target_evaluations": engine.stats.target_evaluations,
        "rounds_a_sample": float(rounds.mean()),
        "seconds": seconds,
    }


def in_batches(model: Any, requests: list[dict[str, Any]], batch: int, **common: Any) -> dict[str, Any]:
    """The same in calls of the sampler of ``batch`` samples."""
    begin, of_calls = time.perf_counter(), []
    for first in range(0, len(requests), batch):
        some = requests[first : first + batch]
        asked = {name: [request[name] for request in some] for name in some[0]}
        of_calls.append(free.speculative_sample(model, **asked, **common).stats)
    seconds = time.perf_counter() - begin
    rounds = np.concatenate([stats.rounds for stats in of_calls])
    longest = sum(int(stats.rounds.max()) for stats in of_calls)
    return {
        "rounds": longest,
        "busy": float(rounds.sum() / (batch * longest)),
        "busy_while_some_wait": None,
        "target_evaluations": sum(stats.target_evaluations for stats in of_calls),
        "rounds_a_sample": float(rounds.mean()),
        "seconds": seconds,
    }


_BY = {"engine": through_engine, "batches": in_batches}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", nargs="+", choices=_BY, default=list(_BY))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--lone", type=int, default=100, help="of the samples, drawn one by one to compare with")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    model = load_digits_dit()
    common: dict[str, Any] = {
        "num_inference_steps": given.steps, "window": given.window, "guidance_scale": given.guidance_scale,
    }  # fmt: skip
    requests = [{"seed": i, "class_labels": i % 10} for i in range(given.samples)]
    lone = [free.speculative_sample(model, **request, **common).stats for request in requests[: given.lone]]
    evaluations = np.array([stats.target_evaluations for stats in lone])
    for name in given.by:
        taken = _BY[name](model, requests, given.slots, **common)
        row = {
            "benchmark": "engine", "model": "digits_dit", "drafter": lone[0].drafter, "by": name,
            "samples": given.samples, "slots": given.slots, "steps": given.steps, "window": given.window,
            "guidance_scale": given.guidance_scale, **taken,
            "lone_samples": given.lone, "lone_evaluations": float(evaluations.mean()),
            "lone_evaluations_standard_error": standard_error(evaluations),
            "evaluations_over_lone": taken["target_evaluations"] / given.samples / float(evaluations.mean()),
        }  # fmt: skip
        write_row("engine", row, given.results)
        print({key: row[key] for key in ("by", *taken, "evaluations_over_lone")}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
