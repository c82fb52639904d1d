"""Meta-World's tasks: what an episode begins with, what the policy sees of it, and many of them stepped together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TASKS = ("reach-v3", "push-v3", "pick-place-v3")
EXECUTED = 8
"""Actions of a chunk that are executed before the next one is drawn."""
MOST_STEPS = 200
"""Of an episode; the experts take about 60."""

_A_SET = 50  # begins of one seed of Meta-World's
_NOW, _GOAL = 18, 3  # numbers of an observation: one frame, the one before it, the goal


def begins(task: str, count: int, seed: int) -> list[Any]:
    """``count`` begins of a task: where things lie, and the goal. Those of different seeds differ."""
    import metaworld

    sets = -(-count // _A_SET)
    # sets of neighbouring seeds must not be shared: a thousand for each
    return [begin for i in range(sets) for begin in metaworld.MT1(task, seed=1000 * seed + i).train_tasks][:count]


def environment(task: str) -> Any:
    """Without a screen. Its ``reset`` forgets all earlier episodes."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    return ALL_V3_ENVIRONMENTS[task]()


def expert(task: str) -> Callable[[np.ndarray], np.ndarray]:
    """Meta-World's scripted expert: observation [39] to action [4] in [-1, 1]."""
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[task]()

    def act(observation: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that its actions are clipped
            return np.clip(policy.get_action(observation), -1, 1)

    return act


def seen(observation: np.ndarray, task: str) -> np.ndarray:
    """What the policy is given of Meta-World's observations [N, 39]: [N, 2, 24], the frame before and the one now.

    Meta-World's observation holds both frames; the goal and which task it is stand beside each.
    """
    frames = np.stack((observation[:, _NOW : 2 * _NOW], observation[:, :_NOW]), 1)
    goal = np.broadcast_to(observation[:, None, -_GOAL:], (len(observation), 2, _GOAL))
    which = np.broadcast_to(np.eye(len(TASKS))[TASKS.index(task)], (len(observation), 2, len(TASKS)))
    return np.concatenate((frames, goal, which), 2).astype(np.float32)


@dataclass(frozen=True)
class Outcome:
    """Of some episodes of one task."""

    success: np.ndarray
    """bool [N]: whether the task was done at some step, as Meta-World counts."""
    steps: np.ndarray
    """int [N]: until success, or the end."""


Policy = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Observations [B, 2, 24] and a seed a row, to chunks [B, 16, 4]."""


class Episodes:
    """The same begins of one task for every policy, stepped side by side: one call of the policy a control step.

    Args:
        task: among :data:`TASKS`.
        count: N.
        seed: of the begins, and of what the policies draw.
        most_steps: after which an episode has failed.
    """

    def __init__(self, task: str, count: int, seed: int, most_steps: int = MOST_STEPS) -> None:
        self.task, self.seed, self.most_steps = task, seed, most_steps
        self.begins = begins(task, count, seed)
        self.environments = [environment(task) for _ in self.begins]

    def run(self, policy: Policy) -> Outcome:
        """Each to its success, or its end. A chunk's seed depends on the episode and the control step only."""
        success, steps = np.zeros(len(self.begins), bool), np.full(len(self.begins), self.most_steps)
        observation = np.stack([reset(*pair) for pair in zip(self.environments, self.begins, strict=True)])  # [N, 39]
        for start in range(0, self.most_steps, EXECUTED):
            under_way = np.flatnonzero(~success)
            if not len(under_way):
                break
            seeds = [chunk_seed(self.seed, int(index), start // EXECUTED) for index in under_way]
            chunks = policy(torch.from_numpy(seen(observation[under_way], self.task)), seeds).clamp(-1, 1).numpy()
            for index, chunk in zip(under_way, chunks, strict=True):
                for step, action in enumerate(chunk[:EXECUTED], start + 1):
                    observation[index], _, _, _, information = self.environments[index].step(action)
                    if information["success"]:
                        success[index], steps[index] = True, step
                        break
        return Outcome(success, steps)


def chunk_seed(seed: int, episode: int, call: int) -> int:
    """Another for each chunk of a run, the same for every sampler."""
    return (seed * 10_000 + episode) * 1000 + call


def reset(environment: Any, begin: Any) -> np.ndarray:
    """The first observation [39] of an episode; nothing of an earlier one is left."""
    environment.set_task(begin)
    return environment.reset()[0]
