"""The sampler as a whole: what a round costs beside the networks, and parallel efficiency on the digits DiT."""

from __future__ import annotations

import statistics

import pytest
import torch

import free
from benchmarks import policy_networks
from benchmarks.rows import write_row
from free.data.digits import NUM_CLASSES
from free.demo import load_digits_dit
from free.sampling.statistics import standard_error

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


@pytest.mark.parametrize("window", ["auto", 8])
def test_seconds_of_a_sample_on_digits(benchmark: pytest.FixtureRequest, window: int | str) -> None:
    """One sample at a time, guidance 1.5, the ancestral sampler and the speculative one in turn."""
    target = free.as_target(load_digits_dit())
    seconds: dict[str, list[float]] = {"ancestral": [], "speculative": []}
    seeds = iter(range(10**6))

    def run() -> None:
        seed = next(seeds)
        common = {"class_labels": seed % NUM_CLASSES, "guidance_scale": 1.5, "num_inference_steps": 250, "seed": seed}
        seconds["ancestral"].append(free.ancestral_sample(target, **common).stats.total_seconds)
        seconds["speculative"].append(free.speculative_sample(target, window=window, **common).stats.total_seconds)

    run()  # warms up, and measures what the automatic window chooses from
    for values in seconds.values():
        values.clear()
    benchmark.pedantic(run, rounds=RUNS)
    ancestral, speculative = (statistics.median(values) for values in seconds.values())
    write_row("sampler", {"benchmark": "seconds a sample, digits", "drafter": "hold-x0", "steps": 250, "window": window,
                          "batch": 1, "guidance_scale": 1.5, "runs": RUNS, "ancestral_seconds_median": ancestral,
                          "seconds_median": speculative, "speedup": ancestral / speculative})  # fmt: skip
    print(f"\nW={window}: {speculative:.3f} s, ancestral {ancestral:.3f} s, {ancestral / speculative:.2f}x")


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("model", ["1-D U-Net policy", "transformer policy", "digits"])
def test_automatic_windows_are_never_slower(benchmark: pytest.FixtureRequest, model: str, batch: int) -> None:
    """Seconds of ``window="auto"``, of W = 16 and of the ancestral sampler, in turn, from the second call on."""
    torch.manual_seed(0)
    labels = {"class_labels": [i % NUM_CLASSES for i in range(batch)], "guidance_scale": 1.5, "num_inference_steps": 100}
    observed = {"conditioning": {"observation": torch.randn(batch, policy_networks.OBSERVATION)}}
    of_policies = {
        **observed,
        "shape": (policy_networks.HORIZON, policy_networks.ACTIONS),
        "process": policy_networks.process(),
    }
    network, common = {
        "1-D U-Net policy": lambda: (policy_networks.UNetPolicy().eval(), of_policies),
        "transformer policy": lambda: (policy_networks.TransformerPolicy().eval(), of_policies),
        "digits": lambda: (load_digits_dit(), labels),
    }[model]()
    target = free.as_target(network)
    samplers = {
        "ancestral": lambda **given: free.ancestral_sample(target, **given),
        "auto": lambda **given: free.speculative_sample(target, window="auto", **given),
        "16": lambda **given: free.speculative_sample(target, window=16, **given),
    }
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    rounds: dict[str, list[float]] = {name: [] for name in samplers}
    seeds = iter(range(10**6))

    def run() -> None:
        given = {**common, "seed": [1000 * next(seeds) + i for i in range(batch)]}
        for name, draw in samplers.items():
            stats = draw(**given).stats
            seconds[name].append(stats.total_seconds)
            rounds[name].append(float(stats.rounds.mean()))

    run()  # warms up, and measures what the automatic window chooses from
    for values in (*seconds.values(), *rounds.values()):
        values.clear()
    benchmark.pedantic(run, rounds=RUNS)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    write_row("sampler", {"benchmark": "automatic windows", "model": model, "steps": 100, "batch": batch, "runs": RUNS,
                          "parameters": sum(parameter.numel() for parameter in network.parameters()),
                          "seconds_median": medians, "rounds_median": {n: statistics.median(v) for n, v in rounds.items()},
                          "speedup": medians["ancestral"] / medians["auto"]})  # fmt: skip
    print(f"\n{model}, batch {batch}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in medians.items()))
