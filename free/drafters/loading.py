"""The drafter that a word of a command line stands for."""

from __future__ import annotations

from pathlib import Path

import torch

from free.drafters import Drafter, Fresh, as_drafter
from free.drafters.feature import FeatureDrafter

FRESH, SWEEPS = "fresh:", ":sweeps="


def drafter_of(word: str, device: str = "cpu") -> Drafter:
    """The drafter that a word of the command line stands for.

    A name in :data:`free.drafters.DRAFTERS`, or the folder of a trained one, which goes to ``device``.
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
    """The trained drafter in a folder, on ``device``; raises a ValueError if there is none that is whole."""
    return FeatureDrafter.from_pretrained(folder).eval().to(device)
