"""The most that speculation can gain, from what forwards take and how drafts fare: drafting and verifying at no cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from free.sampling.statistics import SamplingStatistics
from free.windows import Experience, RoundSeconds


def bound_of_window(efficiency: float, window: int, seconds: Mapping[int, float]) -> float:
    """Speed-up over the ancestral sampler at this parallel efficiency, were a round nothing but its forward.

    Args:
        efficiency: S / rounds, measured with this window.
        window: W.
        seconds: T(W) by window, 1 among them.
    """
    return efficiency * seconds[1] / float(_curve(seconds).at(np.array([window]))[0])


def bound_of_choice(stats: Sequence[SamplingStatistics], drafted: np.ndarray, seconds: Mapping[int, float]) -> float:
    """Speed-up of the best choice of a window at each step, by the acceptance that runs have shown.

    Args:
        stats: of the runs, all of S steps.
        drafted: bool [S], steps that are drafted.
        seconds: T(W) by window, 1 among them; these are chosen from.
    """
    tested, accepted = (sum(getattr(one, name).astype(float) for one in stats) for name in ("tested", "accepted"))
    acceptance = Experience(tested, accepted).acceptance(drafted)
    return len(acceptance) * seconds[1] / least_seconds(acceptance, seconds)


def least_seconds(acceptance: np.ndarray, seconds: Mapping[int, float]) -> float:
    """Expected seconds of S steps with the best window at each of them, by dynamic programming from the last step on.

    Args:
        acceptance: float64 [S], of a draft at each step, given that it is reached.
        seconds: T(W) by window.
    """
    steps = len(acceptance)
    left = np.zeros(steps + 1)  # seconds from each step to the end
    for step in reversed(range(steps)):
        reached = np.concatenate(([1.0], acceptance[step : step + max(seconds) - 1].cumprod()))
        options = []
        for window, taken in seconds.items():
            width = min(window, steps - step)
            settled = reached[:width] - np.append(reached[1:width], 0.0)  # probability of 1, 2 … width steps
            options.append(taken + settled @ left[step + 1 : step + width + 1])
        left[step] = min(options)
    return float(left[0])


def _curve(seconds: Mapping[int, float]) -> RoundSeconds:
    """Beyond what was measured it goes on in a straight line."""
    windows = sorted(seconds)
    return RoundSeconds(np.array(windows, dtype=float), np.array([seconds[window] for window in windows]))
