"""What the policy learns from: paths of Meta-World's scripted experts, who are disturbed in what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.policies.episodes import MOST_STEPS, TASKS, begins, environment, expert, reset, seen
from benchmarks.policies.network import ACTIONS, HORIZON

SEED = 1
"""Evaluation begins from others."""
_MOST_NOISE = 0.3
"""Standard deviation of what disturbs the hand, of the strongest disturbed episode; how to come back is learned from it."""


@dataclass(frozen=True)
class Demonstrations:
    """Of all tasks."""

    observation: torch.Tensor
    """float32 [N, 2, 24]."""
    chunk: torch.Tensor
    """float32 [N, 16, 4], actions in [-1, 1]: the expert's own, from the observation on."""


def collect(folder: Path, episodes: int) -> None:
    """Write ``<task>.npz``, the successful ones of ``episodes`` paths, for each task that has none there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        path = folder / f"{task}.npz"
        if path.exists():
            print(f"{path.name} is there")
            continue
        world = environment(task)
        paths = [
            _path(world, expert(task), begin, np.random.default_rng((SEED, TASKS.index(task), index)))
            for index, begin in enumerate(begins(task, episodes, SEED))
        ]
        kept = [path for path in paths if path is not None]
        unfinished = path.with_suffix(".part.npz")  # a run that is killed leaves no half file under the name
        np.savez_compressed(
            unfinished,
            observation=np.concatenate([observation for observation, _ in kept]),
            action=np.concatenate([action for _, action in kept]),
            episode=np.repeat(np.arange(len(kept)), [len(action) for _, action in kept]),
        )
        unfinished.rename(path)
        print(f"{task}: {len(kept)} of {episodes} paths, {sum(len(action) for _, action in kept)} steps", flush=True)


def _path(
    world: Any, act: Callable[[np.ndarray], np.ndarray], begin: Any, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Observations [T, 39] and the expert's actions [T, 4], a chunk beyond success; None without it."""
    observation = reset(world, begin)
    noise = _MOST_NOISE * generator.random()
    observations, actions, remaining = [], [], MOST_STEPS
    reached = False
    while remaining:
        action = act(observation)
        observations.append(observation)
        actions.append(action)
        executed = action.copy()
        executed[:3] += noise * generator.standard_normal(3)
        observation, _, _, _, information = world.step(np.clip(executed, -1, 1))
        remaining -= 1
        if information["success"] and not reached:
            reached, remaining = True, HORIZON
    return (np.stack(observations).astype(np.float32), np.stack(actions).astype(np.float32)) if reached else None


def load(folder: Path) -> Demonstrations:
    """All chunks that lie within one path.

    Raises:
        FileNotFoundError: a task's file, which ``--collect`` writes.
    """
    observations, chunks = [], []
    for task in TASKS:
        with np.load(folder / f"{task}.npz") as file:
            observation, action, episode = file["observation"], file["action"], file["episode"]
        begin = np.flatnonzero(episode[: 1 - HORIZON] == episode[HORIZON - 1 :])
        observations.append(seen(observation[begin], task))
        chunks.append(action[begin[:, None] + np.arange(HORIZON)])
        assert chunks[-1].shape[1:] == (HORIZON, ACTIONS)
    return Demonstrations(torch.from_numpy(np.concatenate(observations)), torch.from_numpy(np.concatenate(chunks)))
