"""Success with its interval, and the time of a chunk, of each sampler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import binomtest

from benchmarks.policies.episodes import (
    EXECUTED,
    MOST_STEPS,
    TASKS,
    Episodes,
    begins,
    chunk_seed,
    environment,
    expert,
    reset,
    seen,
)
from benchmarks.policies.network import PolicyDiT
from benchmarks.policies.report import SUCCESS, TIME
from benchmarks.policies.samplers import BASELINE, Drawn, Sampler
from benchmarks.record import Record

SEED = 2
"""Of the begins; demonstrations have others."""
_CONFIDENCE = 0.95
_WARM_UP = 10  # chunks of which the automatic windows learn before the clock runs


def interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's, of 95 % confidence."""
    found = binomtest(successes, episodes).proportion_ci(_CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def measure_success(
    record: Record, network: PolicyDiT, samplers: Sequence[Sampler], tasks: Sequence[str], episodes: int
) -> None:
    """A row a sampler and task, of the same begins and seeds."""
    for task in tasks:
        key = {"benchmark": SUCCESS, "task": task, "episodes": episodes, "most_steps": MOST_STEPS, "executed": EXECUTED}
        missing = [sampler for sampler in samplers if not record.known(**key, **sampler.key)]
        same = Episodes(task, episodes, SEED) if missing else None
        for sampler in missing:
            assert same is not None
            drawn: list[tuple[int, Drawn]] = []
            draw = sampler.of(network)

            def policy(observation: torch.Tensor, seeds: Sequence[int], draw=draw, drawn=drawn) -> torch.Tensor:
                drawn.append((len(seeds), draw(observation, seeds)))
                return drawn[-1][1].chunks

            outcome = same.run(policy)
            chunks = sum(rows for rows, _ in drawn)
            successes = int(outcome.success.sum())
            low, high = interval(successes, episodes)
            record.write(
                **key,
                **sampler.key,
                successes=successes,
                success=successes / episodes,
                success_low=low,
                success_high=high,
                steps_of_an_episode=float(outcome.steps.mean()),
                chunks=chunks,
                rounds=sum(rows * one.rounds for rows, one in drawn) / chunks,
                evaluations=sum(rows * one.evaluations for rows, one in drawn) / chunks,
            )


def measure_time(record: Record, network: PolicyDiT, samplers: Sequence[Sampler], chunks: int) -> None:
    """A row a sampler: the median of ``chunks`` draws at batch 1, all samplers in turn on the same observations."""
    situations = observations(_WARM_UP + chunks)
    draws = {sampler: sampler.of(network) for sampler in samplers}
    seconds: dict[Sampler, list[float]] = {sampler: [] for sampler in samplers}
    costs: dict[Sampler, list[Drawn]] = {sampler: [] for sampler in samplers}
    for index, observation in enumerate(situations):
        for sampler, draw in draws.items():
            begin = time.perf_counter()
            drawn = draw(observation, [chunk_seed(SEED + 1, 0, index)])
            if index >= _WARM_UP:
                seconds[sampler].append(time.perf_counter() - begin)
                costs[sampler].append(drawn)
    run = int(time.time())  # times are compared within one run
    medians = {sampler: statistics.median(values) for sampler, values in seconds.items()}
    for sampler in samplers:
        record.write(
            benchmark=TIME,
            **sampler.key,
            run=run,
            batch=1,
            runs=chunks,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            milliseconds_median=1e3 * medians[sampler],
            hertz=1 / medians[sampler],
            over_diffusers=medians[BASELINE] / medians[sampler],
            rounds=float(np.mean([drawn.rounds for drawn in costs[sampler]])),
            evaluations=float(np.mean([drawn.evaluations for drawn in costs[sampler]])),
        )


def observations(count: int) -> list[torch.Tensor]:
    """What a policy is asked about, [1, 2, 24] each: the experts' paths of all tasks, at every control step."""
    found: list[torch.Tensor] = []
    for task in TASKS:
        world, act = environment(task), expert(task)
        share: list[torch.Tensor] = []
        for begin in begins(task, 1 + count // len(TASKS), SEED + 1):
            observation = reset(world, begin)
            for step in range(MOST_STEPS):
                if step % EXECUTED == 0:
                    share.append(torch.from_numpy(seen(observation[None], task)))
                observation, _, _, _, information = world.step(act(observation))
                if information["success"]:
                    break
            if len(share) * len(TASKS) >= count:
                break
        found += share[: -(-count // len(TASKS))]
    # tasks in turn, so that what is timed first is no task of its own
    by_task = np.arange(len(found)).reshape(len(TASKS), -1).T.ravel()
    return [found[index] for index in by_task][:count]
