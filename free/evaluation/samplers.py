"""Samplers by name, ``name:S``: what ``free-dit compare --samplers`` takes.

All are over the schedule that a DiT is trained with: 1000 steps, linear betas, noise predicted. Each is a
:class:`free.ReverseProcess`, most as diffusers' schedulers have it; a deterministic one has no noise, and nothing to draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from free.processes import ReverseProcess

_TRAINED_STEPS = 1000
_SHIFT = 3.0
"""Of the levels of flow matching, as Stable Diffusion 3 has it."""


@dataclass(frozen=True)
class Sampler:
    """A process and its number of steps, as the command line named it."""

    name: str
    steps: int
    eta: float
    """How much of a step's noise is fresh, 0 … 1."""
    guidance_scale: float | None = None
    """None leaves it to the comparison."""

    @property
    def word(self) -> str:
        """What it is called in rows, which have its guidance apart."""
        usual = _KINDS[self.name].eta
        return f"{self.name}:{self.steps}" + ("" if self.eta == usual else f":eta={self.eta:g}")

    def process(self) -> ReverseProcess:
        return _KINDS[self.name].make(self.steps, self.eta)

    @property
    def deterministic(self) -> bool:
        """Whether no step has noise, so that there is nothing to draft."""
        return not bool(self.process().std.any())


@dataclass(frozen=True)
class _Kind:
    make: Callable[[int, float], ReverseProcess]
    eta: float = 1.0
    """If the word does not say."""


def sampler_of(word: str) -> Sampler:
    """The sampler that ``name:S[:eta=E][:guidance=G]`` stands for.

    Raises:
        ValueError: an unknown name, an S that is no number or more than the schedule has, or an option that is not there or
            out of range.
    """
    name, *rest = word.split(":")
    if name not in _KINDS:
        raise ValueError(f"sampler {word!r} is unknown; known are {', '.join(map(repr, _KINDS))}, each as name:S")
    if not rest or not rest[0].isdecimal() or not 1 <= int(rest[0]) <= _TRAINED_STEPS:
        raise ValueError(f"sampler {word!r} has no number of steps; allowed is {name}:S, S an int, 1 … {_TRAINED_STEPS}")
    kind, given = _KINDS[name], {}
    for option in rest[1:]:
        key, _, text = option.partition("=")
        if key not in ("eta", "guidance") or key in given:
            raise ValueError(f"sampler {word!r} has the option {option!r}; allowed are eta=E and guidance=G, once each")
        given[key] = _number(word, key, text)
    scale = given.get("guidance")
    if scale is not None and not 1 <= scale < math.inf:
        raise ValueError(f"sampler {word!r} has guidance {scale:g}; allowed is 1 (no guidance) or more")
    eta = given.get("eta", kind.eta)
    if "-ode" in name and eta:
        noisy = name.replace("-ode", "-sde")
        raise ValueError(f"sampler {word!r} has eta {eta:g}, but is deterministic; {noisy!r} takes it")
    sampler = Sampler(name, int(rest[0]), eta, scale)
    sampler.process()
    return sampler


def _number(word: str, key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"sampler {word!r} has {key} {text!r}; allowed is a number") from None


def _ddpm(steps: int, eta: float) -> ReverseProcess:
    return ReverseProcess.ddpm(steps) if eta == 1 else ReverseProcess.ddpm(steps, eta=eta)


def _euler_ancestral(steps: int, eta: float) -> ReverseProcess:
    from diffusers import EulerAncestralDiscreteScheduler

    return ReverseProcess.from_scheduler(EulerAncestralDiscreteScheduler(), steps, eta=eta)


def _multistep(**options: Any) -> Callable[[int, float], ReverseProcess]:
    """DPM-Solver++ 2M, with as much noise as eta says: its ODE at 0, its SDE at 1."""

    def make(steps: int, eta: float) -> ReverseProcess:
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **options)
        return ReverseProcess.from_scheduler(scheduler, steps, eta=eta)

    return make


def _flow(order: int) -> Callable[[int, float], ReverseProcess]:
    """The levels of flow matching, shifted, for a network that predicts the noise of a state of unit variance.

    ``x = (1 - sigma) x0 + sigma eps`` differs from such a state by a factor alone, so sigma / (1 - sigma) says which one it
    is, and what time the network is told. The first level is the noisiest that the network was trained with.
    """

    def make(steps: int, eta: float) -> ReverseProcess:
        trained = _trained_ratios()
        noisiest = trained[-1] / (1 + trained[-1])
        even = torch.linspace(float(noisiest / (_SHIFT - (_SHIFT - 1) * noisiest)), 0, steps + 1, dtype=torch.float64)
        sigma = _SHIFT * even / (1 + (_SHIFT - 1) * even)
        ratio = sigma / (1 - sigma)
        alpha = (ratio.square() + 1).rsqrt()
        return ReverseProcess.from_levels(alpha, ratio * alpha, _time_of(ratio[:-1]), eta=eta, order=order)

    return make


def _edm(steps: int, eta: float) -> ReverseProcess:
    """EDM's stochastic sampler by Euler steps (Karras et al. 2022): its levels and constants, s_churn 40 at eta = 1."""
    lowest, highest, rho = float(_trained_ratios()[0]), 80.0, 7
    sigma = torch.linspace(highest ** (1 / rho), lowest ** (1 / rho), steps, dtype=torch.float64) ** rho
    sigma = torch.cat((sigma, torch.zeros_like(sigma[:1])))
    return ReverseProcess.edm(sigma, s_churn=40 * eta, time=_time_of)


@cache
def _trained_ratios() -> torch.Tensor:
    """Noise over signal at each time of the network's training, rising, float64 [1000]."""
    from diffusers import DDPMScheduler

    return (1 / DDPMScheduler().alphas_cumprod.double() - 1).sqrt()


def _time_of(ratio: torch.Tensor) -> torch.Tensor:
    """When the network was trained with so much noise over signal, float32 [S]: between its times by the logarithm."""
    trained = _trained_ratios()
    timestep = np.interp(ratio.log().numpy(), trained.log().numpy(), np.arange(len(trained)))
    return torch.from_numpy(timestep).float()


_KINDS = {
    "ddpm": _Kind(_ddpm),
    "ddim": _Kind(_ddpm, eta=0.0),
    "euler-ancestral": _Kind(_euler_ancestral),
    "2m-sde": _Kind(_multistep()),
    "2m-sde-karras": _Kind(_multistep(use_karras_sigmas=True)),
    "2m-ode": _Kind(_multistep(), eta=0.0),
    "2m-ode-karras": _Kind(_multistep(use_karras_sigmas=True), eta=0.0),
    "edm": _Kind(_edm),
    "flow": _Kind(_flow(1)),
    "flow-2m-sde": _Kind(_flow(2)),
    "flow-2m-ode": _Kind(_flow(2), eta=0.0),
}
SAMPLERS = tuple(_KINDS)
"""Names that :func:`sampler_of` takes."""
