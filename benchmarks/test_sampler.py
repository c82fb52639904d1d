"""The sampler as a whole: what a round costs beside the networks, and parallel efficiency on the digits DiT."""

from __future__ import annotations

import statistics

import pytest
import torch

import free
from benchmarks.rows import write_row
from free.demo import load_digits_dit
from free.demo.digits import NUM_CLASSES
from free.statistics import standard_error

RUNS = 15


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 32, 32)], ids=["64 numbers", "4096 numbers"])
def test_overhead_of_a_round(benchmark: pytest.FixtureRequest, shape: tuple[int, ...]) -> None:
    """A target that costs nothing: all that is left is proposing, verifying and bookkeeping. B=1, W=8, S=250."""
    output = torch.zeros(8, *shape)

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return output[: len(x)]

    seeds = iter(range(10**6))
    per_round = []

    def run() -> None:
        stats = free.speculative_sample(model, shape=shape, seed=next(seeds)).stats
        per_round.append(1e3 * (stats.total_seconds - stats.seconds["target"]) / int(stats.rounds[0]))

    benchmark.pedantic(run, rounds=RUNS, warmup_rounds=2)
    median = statistics.median(per_round)
    write_row("sampler", {"benchmark": "overhead of a round", "batch": 1, "window": 8, "shape": list(shape), "runs": RUNS,
                          "milliseconds_per_round_median": median})  # fmt: skip
    print(f"\n{shape}: {median:.2f} ms a round outside the target")


@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output"])
@pytest.mark.parametrize(("steps", "window"), [(250, 8), (50, 8)])
def test_parallel_efficiency_on_digits(benchmark: pytest.FixtureRequest, drafter: str, steps: int, window: int) -> None:
    """Mean of S / rounds over 20 samples, guidance 1.5, with its standard error."""
    model = load_digits_dit()
    labels = torch.arange(NUM_CLASSES).repeat(2)
    arguments = {"class_labels": labels, "guidance_scale": 1.5, "num_inference_steps": steps, "window": window, "seed": 0}
    stats = benchmark.pedantic(lambda: free.speculative_sample(model, drafter, **arguments).stats, rounds=1)
    efficiency = stats.efficiency_per_sample
    error = standard_error(efficiency)
    write_row("sampler", {"benchmark": "parallel efficiency, digits", "drafter": drafter, "steps": steps, "window": window,
                          "guidance_scale": 1.5, "samples": len(labels), "parallel_efficiency": stats.parallel_efficiency,
                          "standard_error": error})  # fmt: skip
    print(f"\n{drafter}, S={steps}, W={window}: {stats.parallel_efficiency:.2f} ± {error:.2f}")
