"""What the readers of schedulers share: what is wanted of a scheduler, and a copy of it that has set its timesteps."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from free.checks import check_count

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Wanted:
    """The arguments of :meth:`free.ReverseProcess.from_scheduler`."""

    steps: int | None
    variance: str | torch.Tensor | None
    stochasticity: float
    eta: float | None
    mu: float | None

    def eta_of_deterministic(self, scheduler: SchedulerMixin, stochastic: str) -> float:
        """The caller's eta; a scheduler that draws no noise otherwise becomes its stochastic counterpart, with a warning."""
        if self.eta is not None:
            return self.eta
        warnings.warn(
            f"{type(scheduler).__name__} is deterministic as configured, and a step without noise cannot be drafted: "
            f"this is its stochastic counterpart, {stochastic}; give eta to choose the noise yourself",
            UserWarning,
            stacklevel=6,
        )
        return 1.0

    def refuse_mu(self, scheduler: SchedulerMixin) -> None:
        if self.mu is not None:
            raise ValueError(f"mu is {self.mu}, but a {type(scheduler).__name__} shifts nothing; leave mu out")


def prepared(scheduler: SchedulerMixin, wanted: Wanted, most: int | None = None) -> Any:
    """A copy of the scheduler whose timesteps are set; those that were set before if no number of steps is given.

    Args:
        scheduler: left as it is.
        wanted: its ``steps`` and ``mu`` are set.
        most: steps that it has.
    """
    own: Any = copy.deepcopy(scheduler)
    if wanted.steps is None:
        set_before = getattr(own, "num_inference_steps", None) is not None or getattr(own, "custom_timesteps", False)
        if not set_before:
            raise ValueError(
                "num_inference_steps is None, but the scheduler has no timesteps set; give the number, or call set_timesteps"
            )
        return own
    given = {} if wanted.mu is None else {"mu": wanted.mu}
    if given and "mu" not in inspect.signature(own.set_timesteps).parameters:
        wanted.refuse_mu(scheduler)
    own.set_timesteps(check_count("num_inference_steps", wanted.steps, most), **given)
    return own


def checked_prediction(scheduler: SchedulerMixin, allowed: tuple[str, ...]) -> str:
    """The scheduler's prediction type, which its class does not check."""
    given = scheduler.config.prediction_type
    if given not in allowed:
        raise ValueError(
            f"scheduler has prediction_type={given!r}, which a {type(scheduler).__name__} configured so cannot have; "
            f"allowed are {', '.join(map(repr, allowed))}"
        )
    return given


def refuse_thresholding(config: Any) -> None:
    if config.thresholding:
        raise ValueError(
            "scheduler has thresholding=True: dynamic thresholding is not a Gaussian step that can be coupled; "
            "use clip_sample=True with a clip_sample_range instead"
        )
