"""The drafter that a word of a command line stands for."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from free.drafters import Drafter, Fresh, LinearDrafter, as_drafter
from free.drafters.feature import FeatureDrafter

FRESH, SWEEPS = "fresh:", ":sweeps="


def drafter_of(word: str, device: str = "cpu") -> Drafter:
    """The drafter that a word of the command line stands for.

    A name in :data:`free.drafters.DRAFTERS`, or the folder of a calibrated or a trained one, which goes to ``device``.
    ``fresh:WORD`` hides abandoned states from it (:class:`free.Fresh`); ``FOLDER:sweeps=N`` sets a trained one's sweeps.

    Raises:
        ValueError: an unknown name, a folder that is not whole, or sweeps where there are none to set.
    """
    if word.startswith(FRESH):
        return Fresh(drafter_of(word.removeprefix(FRESH), device))
    folder, found, sweeps = word.partition(SWEEPS)
    drafter = as_drafter(folder, device)
    if found:
        if not isinstance(drafter, FeatureDrafter) or not sweeps.isdecimal():
            raise ValueError(f"drafter is {word!r}; allowed is {SWEEPS}N after the folder of a trained drafter, N 0 or more")
        drafter.sweeps = int(sweeps)
    return drafter


def drafter_in(folder: Path, device: torch.device | str) -> Drafter:
    """The calibrated or trained drafter in a folder, on ``device``; raises a ValueError if there is none that is whole."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, TypeError, KeyError):
        return LinearDrafter.from_pretrained(folder)  # no model of diffusers, or no configuration: it says what is wrong
    if name != FeatureDrafter.__name__:
        raise ValueError(f"drafter in {str(folder)!r} is a {name}; allowed are a FeatureDrafter and a calibrated drafter")
    return FeatureDrafter.from_pretrained(folder).eval().to(device)
