"""Planted bugs: each patches the package's own functions within a ``with``, and names the checks that should see it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from free.windows import KeyLog
from free_kernels import NOISE_STREAM
from tests.statistical.planting import Mutation, method, replaced, within


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


def _finite_or_nothing() -> Any:
    """The anchors of a window are usable if all its states are finite: the later ones have seen the noise of the drafts."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def planted(target_output: Any, length: torch.Tensor, *rest: Any) -> Any:
            found = original(target_output, length, *rest)
            return found._replace(usable=torch.where(found.usable == length, found.usable, 1))

        return planted

    return replaced("free_kernels.finite.reference", "finite", make)


def _latents_of_step_0() -> Any:
    return mock.patch.object(importlib.import_module("free.sampling.request"), "LATENT_STREAM", NOISE_STREAM)


def _counted_keys() -> Any:
    """The keys of a batch are seed, seed + 1, …, which the next seeds' batches have too."""

    def make(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def planted(seed: Any, generator: Any, batch: int) -> list[int]:
            return original([seed + i for i in range(batch)] if isinstance(seed, int) else seed, generator, batch)

        return planted

    return replaced("free.sampling.request", "check_seeds", make)


def _later_feature() -> Any:
    """The anchor's state and output are of a step that may be known, its feature is of the next."""
    situation = importlib.import_module("free.drafters.base").Situation
    original = situation.anchor

    def planted(self: Any, step: torch.Tensor) -> Any:
        anchor = original(self, step)
        if anchor.feature is None:
            return anchor
        first, length = (values.view(-1, *(1,) * (step.dim() - 1)) for values in (self.last.step, self.last.length))
        column = torch.minimum(anchor.step - first + 1, length - 1)
        row = torch.arange(len(step), device=step.device).view_as(first)
        return dataclasses.replace(anchor, feature=self.last.feature[row, column])

    return mock.patch.object(situation, "anchor", planted)


def _two_moments() -> Any:
    """The divergence of a relaxed step without the third moment of its bound."""
    module = importlib.import_module("free_kernels.relaxation.reference")

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def planted(squared_norm: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
            def tilted(power: torch.Tensor | float) -> torch.Tensor:
                return module._tilted(squared_norm.double(), power)

            tau = tau.double()
            third = (tilted(3 * tau) - tilted(3.0)) - 3 * (tilted(2 * tau + 1) - tilted(tau + 2))
            return (original(squared_norm, tau) - third / 2).clamp(min=0.0)

        return planted

    return replaced("free_kernels.relaxation.reference", "divergence", make)


def _budget_anew() -> Any:
    """Each test of a window may spend what is left of the budget before the window."""

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def planted(*arguments: Any) -> torch.Tensor:
            with mock.patch.object(torch.Tensor, "cumsum", lambda values, dim: values):
                return original(*arguments)

        return planted

    return replaced("free_kernels.relaxation.reference", "relaxed_tau", make)


def _rows_of_another() -> Any:
    """The target is told each sample's neighbour's conditioning."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda query, conditioning, request: original(
            query, {name: values.roll(1, 0) for name, values in conditioning.items()}, request
        )

    return replaced("free.sampling.window", "evaluate", make)


def _rows_left_behind() -> Any:
    """When samples leave, the conditioning of the others stays where it was, and so is another's."""
    live = importlib.import_module("free.sampling.window").Live
    original = live.keep

    def planted(self: Any, rows: torch.Tensor) -> Any:
        conditioning = {name: values[: len(rows)] for name, values in self.conditioning.items()}
        return dataclasses.replace(original(self, rows), conditioning=conditioning)

    return mock.patch.object(live, "keep", planted)


def _memory(change: Callable[..., Any]) -> Callable[[], Any]:
    """A bug in what verification of a process of second order remembers: ``change(original, arguments by name)``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def planted(*args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            return original(**call) if call["previous_x0"] is None else change(original, call)

        return planted

    return lambda: replaced("free_kernels.verify.reference", "verify", make)


def _estimates(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The steps of a window [B, W], the target's guided outputs there, and what they say of x0."""
    reference = importlib.import_module("free_kernels.posterior.reference")
    states, table = call["states"], call["table"]
    steps = (call["step"][:, None] + torch.arange(states.shape[1])).clamp(max=table.num_steps - 1)
    output = reference.guided(call["target_output"], call["unconditional_output"], call["guidance_scale"], states.dtype)
    return steps, output, reference.x0_estimate(states, output, steps, table)


def _memory_of_the_draft(original: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Within a window the change of x0 is taken from what was drafted at the step before, not from its evaluation."""
    reference = importlib.import_module("free_kernels.posterior.reference")
    steps, output, x0 = _estimates(call)
    drafted = reference.x0_estimate(call["states"][:, :-1], call["draft_output"], steps[:, :-1], call["table"])
    before = torch.cat((call["previous_x0"][:, None], drafted), 1)
    output = output + reference.at_step(call["table"].memory_gain, steps, x0.dtype) * (x0 - before)
    given = {"target_output": output, "unconditional_output": None, "guidance_scale": 1.0, "previous_x0": None}
    outcome = original(**{**call, **given, "table": call["table"]._replace(memory_gain=None)})
    return outcome._replace(x0=x0[torch.arange(len(x0)), (outcome.advance - 1).clamp(min=0)])


def _memory_of_the_next_step(original: Callable[..., Any], call: dict[str, Any]) -> Any:
    """After a rejection the x0 estimate of the abandoned state is remembered, one step too far."""
    outcome, (_, _, x0) = original(**call), _estimates(call)
    row, last = torch.arange(len(x0)), x0.shape[1] - 1
    later = x0[row, outcome.advance.clamp(max=last)]
    return outcome._replace(x0=torch.where(outcome.rejected[:, None], later, outcome.x0))


def _key_of_the_first() -> Any:
    """Whoever takes a slot of an engine draws with the key of the first sample that was in it."""
    keys: dict[int, torch.Tensor] = {}

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def planted(samples: Any, slots: list[int], setup: Any) -> Any:
            fresh = original(samples, slots, setup)
            seed = torch.stack([keys.setdefault(slot, key) for slot, key in zip(slots, fresh.seed, strict=True)])
            return dataclasses.replace(fresh, seed=seed)

        return planted

    return replaced("free.parallel.engine.batch", "_begin", make)


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


def _heard_before() -> Any:
    """A warm start from samples of the same keys."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def planted(self: Any, request: Any) -> Any:
            self._seen = KeyLog()
            return original(self, request)

        return planted

    owner = importlib.import_module("free.policies.sampler").Sampler
    return mock.patch.object(owner, "_guess", make(owner._guess))


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
        _later_anchor("free.drafters.base"), ("chain: gaussian, leaning, W=4", "chain: gaussian, blending, W=4")
    ),
    "anchor at step k+1, gains": Mutation(
        _later_anchor("free_kernels.gain_correction.reference"),
        ("chain: gaussian, gains, W=4", "chain: ill-conditioned, gains, W=8"),
    ),
    "gains learned from step k+1": Mutation(_knowledge(_learned_ahead), ("chain: gaussian, remembering, W=4",)),
    "gains learned from abandoned steps": Mutation(_knowledge(_learned_abandoned), ("chain: gaussian, remembering, W=4",)),
    "timestep off by one": Mutation(_later_timestep, (_SHIFTED, "chain: mixture, hold-x0, W=4")),
    "delta of x0 not clamped": Mutation(_unclipped_delta, ("one step, clipped", "chain: mixture, shifted, W=8, clipped")),
    "memory from the draft": Mutation(
        _memory(_memory_of_the_draft),
        ("chain: gaussian, second order, shifted, W=4", "chain: gaussian, second order, hold-x0, W=16"),
    ),
    "memory of the abandoned step": Mutation(
        _memory(_memory_of_the_next_step),
        ("chain: gaussian, second order, shifted, W=4", "chain: gaussian, second order, hold-x0, W=4"),
    ),
    "guidance left out of verification": Mutation(_unguided, ("one step, guided", "chain: gaussian, hold-x0, W=4, guided")),
    "anchors only if all are finite": Mutation(_finite_or_nothing, ("chain: cliff, over the cliff, W=3",)),
    "latents are the noise of step 0": Mutation(_latents_of_step_0, ("chain: gaussian, leaning, W=4",)),
    "keys of a batch are seed + i": Mutation(_counted_keys, ("keys of a seed",)),
    "feature of the anchor at step k+1": Mutation(_later_feature, ("chain: gaussian, leaning on the feature, W=4",)),
    "noise refilled only if all rows need it": Mutation(
        lambda: within("free.sampling.noise", "NoiseWindow", "reach", any=torch.Tensor.all),
        ("chain: gaussian, uneven, W=4, two by two",),
    ),
    "conditioning of another sample": Mutation(_rows_of_another, ("chain: gaussian, leaning, W=4, rows of their own",)),
    "conditioning left behind by a sample": Mutation(
        _rows_left_behind, ("chain: gaussian, hold-x0, W=4, guided, rows of their own",)
    ),
    "budget spent by each test anew": Mutation(
        _budget_anew,
        ("certificate: within a budget",),
    ),
    "divergence without its third moment": Mutation(_two_moments, ("certificate: tau 0.02",)),
    "warm start of the same keys": Mutation(_heard_before, ("keys: a warm start of the same seed",)),
    "a pilot of the samples' own keys": Mutation(
        method("free.sampling.request:Request", "pilot", lambda request: request), ("keys: a plan of the same seed",)
    ),
    "a plan that forgot whose noise it has seen": Mutation(
        method("free.windows:WindowPlan", "keys", property(lambda plan: frozenset(), lambda plan, keys: None)),
        ("keys: a plan of statistics",),
    ),
    "auto remembers the same key": Mutation(
        method("free.windows:Experience", "admit", lambda experience, keys: True), ("keys: auto twice",)
    ),
    "auto pools rows of one key": Mutation(
        method("free.windows:AutoWindow", "fixed", lambda schedule, batch: schedule), ("keys: auto, a key in two rows",)
    ),
    "an engine's slot keeps its first key": Mutation(_key_of_the_first, ("engine: refilled slots",)),
    "the load chooses for a key that was met": Mutation(
        method("free.parallel.engine.keys:Keys", "meet", lambda keys, joining, under_way: None),
        ("engine: a key in two slots, by load",),
    ),
}
