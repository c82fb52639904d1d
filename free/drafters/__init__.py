"""Cheap guesses of the target's next steps, behind one small interface; a new drafter is one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from free.drafters.base import Anchor, Drafter, LastWindow, Situation, StepDrafter
from free.drafters.fresh import Fresh
from free.drafters.gains import Gains
from free.drafters.hold import HoldOutput, HoldX0
from free.drafters.model import ModelDrafter
from free.targets import Target

if TYPE_CHECKING:
    from free.drafters.feature import FeatureDrafter

DRAFTERS: dict[str, Callable[[], Drafter]] = {HoldX0.name: HoldX0, HoldOutput.name: HoldOutput, Gains.name: Gains}
"""The drafters that need no weights, by name."""

__all__ = [
    "DRAFTERS",
    "Anchor",
    "Drafter",
    "FeatureDrafter",
    "Fresh",
    "Gains",
    "HoldOutput",
    "HoldX0",
    "LastWindow",
    "ModelDrafter",
    "Situation",
    "StepDrafter",
    "as_drafter",
]


def as_drafter(drafter: Any, device: torch.device | str = "cpu") -> Drafter:
    """The drafter that a name, the folder of a saved one, a :class:`Drafter`, or a smaller model (anything
    :func:`free.as_target` takes) stands for.

    Args:
        drafter: see above.
        device: that one from a folder goes to.

    Raises:
        ValueError: an unknown name, or a folder that holds no whole drafter.
        TypeError: something that is none of these.
    """
    if isinstance(drafter, (str, Path)):
        if str(drafter) in DRAFTERS:
            return DRAFTERS[str(drafter)]()
        if not str(drafter) or not Path(drafter).is_dir():
            known = ", ".join(map(repr, DRAFTERS))
            raise ValueError(f"drafter is {str(drafter)!r}; known are {known}, a drafter's folder, or a Drafter, or a model")
        from free.drafters.loading import drafter_in

        return drafter_in(Path(drafter), device)
    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, type) or not (callable(drafter) or isinstance(drafter, Target)):
        raise TypeError(f"drafter is a {type(drafter).__name__}; allowed are a name, a Drafter, or a model")
    return ModelDrafter(drafter)


def __getattr__(name: str) -> Any:
    if name == "FeatureDrafter":  # when it is asked for: diffusers' layers import triton
        from free.drafters.feature import FeatureDrafter

        return FeatureDrafter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
