"""A pipeline's callbacks while it is speculated: they see settled samples, once a round."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.loop import Loop

OBSERVED, _INPUTS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"


class Watched(Protocol):
    """Whose call it is."""

    @property
    def loop(self) -> Loop | None:
        """The one under way."""


def watch_call(bound: inspect.BoundArguments, watched: Watched) -> None:
    """Let the callbacks of a call see settled samples, and an interrupted pipeline end with them.

    Raises:
        UnsupportedPipelineError: a callback object of diffusers, which changes guidance by the number of the step.
    """
    arguments, parameters = bound.arguments, bound.signature.parameters
    if arguments.get("callback") is not None:
        arguments["callback"] = _legacy(arguments["callback"], watched)
    if OBSERVED not in parameters:
        return
    callback = arguments.get(OBSERVED)
    if callback is not None and hasattr(callback, "tensor_inputs"):
        raise UnsupportedPipelineError(
            f"{OBSERVED} is a {type(callback).__name__}, which acts by the number of the step; while speculating allowed is "
            "a function that observes"
        )
    wanted = arguments.get(_INPUTS, parameters[_INPUTS].default if _INPUTS in parameters else ["latents"]) or []
    arguments[OBSERVED] = _observer(callback, list(wanted), watched)
    if _INPUTS in parameters:
        arguments[_INPUTS] = list(dict.fromkeys([*wanted, "latents"]))


def _observer(
    callback: Callable[..., Any] | None, wanted: list[str], watched: Watched
) -> Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]:
    """What the pipeline calls instead: shows settled samples, and changes nothing but where it is interrupted."""

    def observe(pipe: Any, number: int, _timestep: torch.Tensor, shown: dict[str, Any]) -> dict[str, Any]:
        loop = watched.loop
        if loop is None or loop.run is None:
            return {}
        loop.interrupted = bool(getattr(pipe, "_interrupt", False)) and loop.run.unfinished
        if callback is None and not loop.interrupted:
            return {}
        settled = loop.settled_of(shown["latents"])
        if callback is not None:
            given = {
                name: settled.clone() if name == "latents" else value for name, value in shown.items() if name in wanted
            }
            before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
            returned = callback(pipe, number, loop.timestep(), given)
            _check_unchanged(returned or {}, before)
            loop.interrupted = bool(getattr(pipe, "_interrupt", False)) and loop.run.unfinished
        return {"latents": settled} if loop.interrupted else {}

    return observe


def _check_unchanged(returned: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in returned.items():
        same = name in before and (
            value is before[name]
            or (
                isinstance(value, torch.Tensor)
                and isinstance(before[name], torch.Tensor)
                and value.shape == before[name].shape
                and torch.equal(value, before[name])
            )
        )
        if not same:
            raise UnsupportedPipelineError(
                f"{OBSERVED} returned another {name!r} than it was given; while speculating a callback observes"
            )


def _legacy(callback: Callable[..., Any], watched: Watched) -> Callable[[int, torch.Tensor, torch.Tensor], Any]:
    """Of older pipelines: called with the number, the timestep and the latents."""

    def observe(number: int, timestep: torch.Tensor, latents: torch.Tensor) -> Any:
        loop = watched.loop
        if loop is None or loop.run is None:
            return callback(number, timestep, latents)
        return callback(number, loop.timestep(), loop.settled_of(latents))

    return observe
