"""What a comparison runs: one configuration a row, and what makes two rows the same measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from free.drafters import Drafter, HoldX0
from free.drafters.loading import FRESH
from free.evaluation.samplers import Sampler
from free.processes import ReverseProcess
from free.sampling.relaxation import Relaxation
from free.sampling.variance import average_learned_variance
from free.targets import DiTTarget
from free.targets.loading import digest

# what makes two rows measurements of the same thing: milliseconds depend on the batch size and the device too
_KEY = (
    "model_fingerprint",
    "drafter",
    "drafter_fingerprint",
    "window",
    "steps",
    "guidance_scale",
    "samples",
    "batch_size",
    "seed",
    "device",
    "variance",
    "stochasticity",
    "strength",
    "uncertainty",
    "budget",
    "data_fingerprint",
    "sampler",
)
# of rows that were written before these could be chosen
_USUAL = {"variance": "posterior", "stochasticity": 1.0, "strength": 0.0}


@dataclass(frozen=True)
class Contender:
    """A drafter as the command line named it."""

    word: str
    drafter: Drafter
    learned: list[torch.Tensor]

    @property
    def fingerprint(self) -> str | None:
        """Of what it learned; None where it learned nothing."""
        return digest(self.learned) if self.learned else None


STEP_BY_STEP = Contender("ancestral", HoldX0(), [])
"""Of a window of 1, which drafts nothing."""


@dataclass(frozen=True)
class Configuration:
    """What one row measures."""

    guidance_scale: float
    steps: int
    variance: str
    stochasticity: float
    contender: Contender
    window: int
    relaxation: Relaxation
    sampler: Sampler | None = None
    """Instead of the DDPM of these steps, variance and stochasticity."""

    @property
    def title(self) -> str:
        if self.sampler is not None:
            return f"{self.sampler.word}, {self.contender.word}, W={self.window}, guidance {self.guidance_scale:g}"
        relaxed = f", strength {self.relaxation.strength:g}" if self.relaxation.strength else ""
        return f"{self.contender.word}, W={self.window}, S={self.steps}, guidance {self.guidance_scale:g}{relaxed}"

    def row(self) -> dict[str, Any]:
        relaxed = self.relaxation.strength > 0
        return {
            **({} if self.sampler is None else {"sampler": self.sampler.word}),
            "drafter": self.contender.word,
            "drafter_fingerprint": self.contender.fingerprint,
            "window": self.window,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "variance": self.variance,
            "stochasticity": self.stochasticity,
            "strength": float(self.relaxation.strength),
            "uncertainty": self.relaxation.uncertainty if relaxed else None,
            "budget": self.relaxation.budget if relaxed else None,
        }

    def process(self, target: DiTTarget) -> ReverseProcess:
        if self.sampler is not None:
            return self.sampler.process()
        variance: str | torch.Tensor = self.variance
        if variance == "learned":
            variance = average_learned_variance(
                target, self.steps, class_labels=range(target.null_class), guidance_scale=self.guidance_scale
            )
        return ReverseProcess.ddpm(self.steps, variance=variance, stochasticity=self.stochasticity)


def label(word: str) -> str:
    """A word less the path of its folder: where it stands says nothing."""
    fresh = FRESH if word.startswith(FRESH) else ""
    return fresh + Path(word.removeprefix(FRESH)).name


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name, _USUAL.get(name)) for name in _KEY)
