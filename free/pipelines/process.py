"""Which process a pipeline's scheduler stands for, as it is set for one call."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from free.pipelines.errors import UnsupportedPipelineError
from free.processes import ReverseProcess


@dataclass(frozen=True)
class ProcessOptions:
    """What a caller asks of the process, as :meth:`free.ReverseProcess.from_scheduler` takes it; None is its default."""

    variance: str | torch.Tensor | None = None
    stochasticity: float | None = None
    eta: float | None = None

    def of_call(self, call_eta: float) -> ProcessOptions:
        """With the ``eta`` that the pipeline's call gives the scheduler's step, where it gives one.

        Raises:
            UnsupportedPipelineError: the two disagree.
        """
        if not call_eta or call_eta == self.eta:
            return self
        if self.eta is not None:
            raise UnsupportedPipelineError(
                f"eta is {call_eta} in the pipeline's call and {self.eta} in free.speculate; give one"
            )
        return ProcessOptions(self.variance, self.stochasticity, call_eta)


def process_of(scheduler: Any, options: ProcessOptions) -> tuple[ReverseProcess, str]:
    """The process of a scheduler whose timesteps are set, and what to say of it.

    Returns:
        The process, and its description: the scheduler's class, and how a deterministic one became a stochastic one.

    Raises:
        UnsupportedPipelineError: a scheduler that stands for no process.
    """
    given = {name: value for name in ("variance", "stochasticity", "eta") if (value := getattr(options, name)) is not None}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            inverted = bool(scheduler.config.get("invert_sigmas"))
            process = ReverseProcess.from_scheduler(_upright(scheduler) if inverted else scheduler, None, **given)
            if inverted:  # the network tells the way to the data, where a flow's tells the way to noise
                process = replace(
                    process,
                    timestep=scheduler.timesteps.cpu().clone(),
                    model_coef=-process.model_coef,
                    x0_model_coef=-process.x0_model_coef,
                )
        except ValueError as error:
            raise UnsupportedPipelineError(f"scheduler: {error}") from error
    words = [str(warning.message) for warning in said if warning.category is UserWarning]
    asked = "".join(f", {name} {value}" for name, value in given.items() if not isinstance(value, torch.Tensor))
    return process, "; ".join(words) or type(scheduler).__name__ + asked


def _upright(scheduler: Any) -> Any:
    """A flow scheduler whose levels rise to the data, as one whose levels fall to it."""
    from diffusers.configuration_utils import FrozenDict

    upright: Any = object.__new__(type(scheduler))
    upright.__dict__.update(scheduler.__dict__)
    upright._internal_dict = FrozenDict({**scheduler.config, "invert_sigmas": False})
    upright.sigmas = 1 - scheduler.sigmas
    upright.timesteps = upright.sigmas[:-1] * scheduler.config.num_train_timesteps
    return upright
