"""Planted bugs: each patches the package's own functions within a ``with``, and names the checks that should see it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from free_kernels import NOISE_STREAM


@contextmanager
def replaced(module: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Puts ``make(original)`` wherever the package has bound ``module.name``, under whatever name and in whatever module."""
    original = getattr(importlib.import_module(module), name)
    planted = functools.wraps(original)(make(original))
    with ExitStack() as patches:
        for loaded in list(sys.modules.values()):
            if getattr(loaded, "__name__", "").split(".")[0] not in ("free", "free_kernels"):
                continue
            for bound, value in list(vars(loaded).items()):
                if value is original:
                    patches.enter_context(mock.patch.object(loaded, bound, planted))
        yield


@dataclass(frozen=True)
class Mutation:
    """A bug that the checks must see."""

    plant: Callable[[], Any]
    """Makes a context manager within which the bug is in the package."""
    checks: tuple[str, ...]
    """Of ``tests.statistical.checks.CHECKS``; one has to reject at the budget, all of them are run."""


def _final_noise(
    change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Callable[..., torch.Tensor]], torch.Tensor],
) -> Callable[[], Any]:
    """A bug in what verification does to the noise of a rejected step: ``change(noise, delta, inner, norm², original)``."""

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda noise, delta, inner, squared_norm: change(noise, delta, inner, squared_norm, original)

    return lambda: replaced("free_kernels.householder.reference", "householder", make)


def _uniform(change: Callable[..., torch.Tensor]) -> Callable[[], Any]:
    """A bug in the uniforms of the tests: ``change(original, seed, step, stream, dtype)``."""

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda seed, step, stream, dtype: change(original, seed, step, stream, dtype)

    return lambda: replaced("free_kernels.philox.reference", "uniform", make)


def _correlated(
    original: Callable[..., torch.Tensor], seed: torch.Tensor, step: torch.Tensor, stream: int, dtype: torch.dtype
) -> torch.Tensor:
    """Still uniform, with a correlation of 0.1 to the first element of the noise."""
    normal = importlib.import_module("free_kernels.philox.reference").normal
    noise = normal(seed, step, 1, NOISE_STREAM, torch.float64)[..., 0]
    own = torch.special.ndtri(original(seed, step, stream, torch.float64))
    return torch.special.ndtr(0.1 * noise + math.sqrt(1 - 0.1**2) * own).to(dtype)


def _leaked(
    original: Callable[..., torch.Tensor], seed: torch.Tensor, step: torch.Tensor, stream: int, dtype: torch.dtype
) -> torch.Tensor:
    """An independent 5 % of the tests pass whatever the ratio is, so 5 % of the rejections are leaked."""
    u = original(seed, step, stream, dtype)
    return torch.where(original(seed, step, 99, torch.float64) < 0.05, torch.full_like(u, 1e-38), u)


def _wrong_std(module: str, name: str) -> Any:
    """One operation is given a std 3 % too large."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def planted(*args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(original).bind(*args, **kwargs)
            table = call.arguments["table"]
            call.arguments["table"] = table._replace(std=1.03 * table.std)
            return original(*call.args, **call.kwargs)

        return planted

    return replaced(module, name, make)


@contextmanager
def _wrong_std_of_drafts() -> Iterator[None]:
    with (
        _wrong_std("free_kernels.propose.reference", "propose"),
        _wrong_std("free_kernels.posterior.reference", "posterior"),
    ):
        yield


def _later_anchor(module: str) -> Callable[[], Any]:
    """An anchor at step k+1 for a draft of step k, in one of the two places that choose anchors."""

    def planted(steps: torch.Tensor, anchor_step: torch.Tensor, anchor_length: torch.Tensor) -> torch.Tensor:
        return torch.minimum(steps + 1 - anchor_step[:, None], anchor_length[:, None] - 1).clamp_(min=0)

    return lambda: mock.patch.object(importlib.import_module(module), "anchor_index", planted)


def _later_timestep() -> Any:
    """The target is told the timestep of step k+1."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def planted(query: Any, conditioning: Any, request: Any) -> Any:
            timestep = request.process.timestep
            process = dataclasses.replace(request.process, timestep=torch.cat((timestep[1:], timestep[-1:])))
            return original(query, conditioning, dataclasses.replace(request, process=process))

        return planted

    return replaced("free.sampling.window", "evaluate", make)


def _shared_noise() -> Any:
    """Two steps in a row have the same noise."""

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda seed, step, numel, stream, dtype: original(seed, step // 2, numel, stream, dtype)

    return replaced("free_kernels.philox.reference", "normal", make)


def _unclipped_delta() -> Any:
    """The gap of the means as if x0 were not clamped."""

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda state, target, draft, step, table: original(
            state, target, draft, step, table._replace(clip_range=None)
        )

    return replaced("free_kernels.acceptance.reference", "mean_difference", make)


def _unguided() -> Any:
    """Verification takes the conditional half for the guided output."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def planted(*args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(original).bind(*args, **kwargs)
            call.arguments["unconditional_output"] = None
            return original(*call.args, **call.kwargs)

        return planted

    return replaced("free_kernels.verify.reference", "verify", make)


def _knowledge(change: Callable[[inspect.BoundArguments, Callable[..., Any]], Any]) -> Callable[[], Any]:
    """A bug in what a window teaches of the gains: ``change(the call's arguments, original)``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: change(inspect.signature(original).bind(*args), original)

    return lambda: replaced("free_kernels.learn_gains.reference", "learn_gains", make)


def _learned_ahead(call: inspect.BoundArguments, original: Callable[..., Any]) -> Any:
    """The draft of step k has absorbed the evaluation at k+1, which has seen the noise of step k."""
    states, x0, sums = original(*call.args)
    return states, x0, torch.cat((sums[:, 1:], sums[:, -1:]), 1)


def _learned_abandoned(call: inspect.BoundArguments, original: Callable[..., Any]) -> Any:
    """The sums go on from the end of the last window, though its last steps were abandoned and are drafted again."""
    sums, length = call.arguments["known_sums"], call.arguments["known_length"]
    end = sums[torch.arange(len(sums)), length - 1]
    call.arguments["known_sums"] = end[:, None].expand_as(sums)
    return original(*call.args)


_PLAIN, _SHIFTED = "one step, plain", "chain: gaussian, shifted, W=4"
_BOTH = (_PLAIN, _SHIFTED)

MUTATIONS: dict[str, Mutation] = {
    "no reflection on rejection": Mutation(_final_noise(lambda z, delta, inner, norm, original: z.clone()), _BOTH),
    "half a reflection": Mutation(
        _final_noise(lambda z, delta, inner, norm, original: (z + original(z, delta, inner, norm)) / 2), _BOTH
    ),
    "fresh target draw on rejection": Mutation(
        _final_noise(
            lambda z, delta, inner, norm, original: torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
        ),
        _BOTH,
    ),
    "rejected draft kept": Mutation(_final_noise(lambda z, delta, inner, norm, original: z + delta), _BOTH),
    "5 % of rejections leaked": Mutation(_uniform(_leaked), _BOTH),
    "std off by 3 % in verification": Mutation(
        lambda: _wrong_std("free_kernels.verify.reference", "verify"),
        (*_BOTH, "chain: ill-conditioned, hold-x0, W=8"),
    ),
    "std off by 3 % in drafts": Mutation(_wrong_std_of_drafts, (*_BOTH, "chain: mixture, hold-x0, W=4")),
    "u from the noise's stream": Mutation(
        _uniform(lambda original, seed, step, stream, dtype: original(seed, step, NOISE_STREAM, dtype)),
        (*_BOTH, "streams"),
    ),
    "u correlated with the noise": Mutation(_uniform(_correlated), ("streams", _PLAIN)),
    "u the same at every step": Mutation(
        _uniform(lambda original, seed, step, stream, dtype: original(seed, step * 0, stream, dtype)),
        ("streams", "chain: gaussian, shifted, W=8, guided"),
    ),
    "noise shared by two steps": Mutation(_shared_noise, ("streams", _PLAIN, _SHIFTED)),
    "anchor at step k+1, hold drafts": Mutation(
        _later_anchor("free_kernels.propose.reference"),
        ("chain: gaussian, hold-output, W=4", "chain: gaussian, hold-x0, W=8", "chain: ill-conditioned, hold-x0, W=8"),
    ),
    "anchor at step k+1, Situation.anchor": Mutation(
        _later_anchor("free.drafters.base"), ("chain: gaussian, leaning, W=4", "chain: gaussian, linear, W=4")
    ),
    "anchor at step k+1, gains": Mutation(
        _later_anchor("free_kernels.gain_correction.reference"),
        ("chain: gaussian, gains, W=4", "chain: ill-conditioned, gains, W=8"),
    ),
    "gains learned from step k+1": Mutation(_knowledge(_learned_ahead), ("chain: gaussian, remembering, W=4",)),
    "gains learned from abandoned steps": Mutation(_knowledge(_learned_abandoned), ("chain: gaussian, remembering, W=4",)),
    "timestep off by one": Mutation(_later_timestep, (_SHIFTED, "chain: mixture, hold-x0, W=4")),
    "delta of x0 not clamped": Mutation(_unclipped_delta, ("one step, clipped", "chain: mixture, shifted, W=8, clipped")),
    "guidance left out of verification": Mutation(_unguided, ("one step, guided", "chain: gaussian, hold-x0, W=4, guided")),
}
