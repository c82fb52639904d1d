"""A pipeline's own scheduler, of which the loop's part is replaced: class, configuration and the rest remain."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.timesteps import Driver, Timesteps


class StepDriver(Driver, Protocol):
    """Who takes a scheduler's steps."""

    @property
    def in_rounds(self) -> bool:
        """Whether the latents are states of a round, which the network sees as they are."""

    def step(self, model_output: torch.Tensor, sample: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """What ``prev_sample`` is."""


def driven(scheduler: Any, driver: StepDriver) -> Any:
    """A scheduler of the same class, configuration and state, whose timesteps and steps are the driver's.

    The given one is left as it is.

    Raises:
        UnsupportedPipelineError: it evaluates the network more than once a step.
    """
    own = type(scheduler)
    if getattr(scheduler, "order", 1) != 1:
        raise UnsupportedPipelineError(
            f"scheduler is a {own.__name__}, which evaluates the network {scheduler.order} times a step; allowed are those "
            "that do it once"
        )
    signature, scales = inspect.signature(own.step), hasattr(own, "scale_model_input")

    @functools.wraps(own.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        own.set_timesteps(self, *args, **kwargs)
        self.timesteps = Timesteps.of(self.timesteps, driver)

    @functools.wraps(own.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        arguments = signature.bind(self, *args, **kwargs).arguments
        model_output, sample = arguments.pop("model_output"), arguments.pop("sample")
        if scales and not driver.in_rounds:
            # a process keeps the state as the network sees it
            sample = own.scale_model_input(self, sample, arguments["timestep"])
        latents = driver.step(model_output, sample, arguments)
        return SchedulerOutput(prev_sample=latents) if arguments.get("return_dict", True) else (latents,)

    def scale_model_input(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # some pipelines ask whether the scheduler is of one exact class, and take one of another for one that scales
        return own.scale_model_input(self, sample, *args, **kwargs) if scales and not driver.in_rounds else sample

    def copied(self: Any, memo: Any) -> Any:
        raise UnsupportedPipelineError(
            "the pipeline copies its scheduler to drive another chain beside the latents (as with sound and video); it "
            "cannot be speculated"
        )

    members: dict[str, Callable[..., Any] | str] = {
        "set_timesteps": set_timesteps,
        "step": step,
        "scale_model_input": scale_model_input,
        "__deepcopy__": copied,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
    }
    replaced: Any = object.__new__(type(own.__name__, (own,), members))
    replaced.__dict__.update(scheduler.__dict__)
    return replaced


def as_set(scheduler: Any, own: type) -> Any:
    """The scheduler as its class made it, for those who read what is set: with plain timesteps."""
    read: Any = object.__new__(own)
    read.__dict__.update(scheduler.__dict__)
    read.timesteps = scheduler.timesteps.as_subclass(torch.Tensor)
    return read
