"""A sampler that is made once and called again and again: what can be checked, measured and planned is done at making."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from free.checks import check_count, check_number, without_gradients
from free.drafters import Drafter, as_drafter
from free.processes import ReverseProcess
from free.sampling.capture import Graphs, wants_capture
from free.sampling.company import check_alike
from free.sampling.likeness import settings, weights
from free.sampling.loop import Run
from free.sampling.planning import plan_window
from free.sampling.request import DEFAULT_STEPS, Options, Request, check_request, check_samples
from free.sampling.samplers import ancestral_sample
from free.sampling.statistics import SamplingStatistics
from free.sampling.window import Setup
from free.targets import KnownEntries, Target, as_target
from free.targets.base import has_rows
from free.targets.known import KNOWN
from free.windows import KeyLog, Schedule, WindowPlan, check_window, schedule_of, together
from free.windows.automatic import MOST_KEYS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass
class _Made:
    """What every call needs."""

    setup: Setup
    plan: int | WindowPlan
    schedule: Schedule
    graphs: Graphs | None
    recorded: Hashable
    """Of the network, when the graphs were made."""


class Sampler:
    """Draws samples of one kind, with the law of :func:`free.ancestral_sample`, at every call.

    ``policy = free.Sampler(network, shape=(16, 7), process=…)``, then ``policy({"observation": …}, seed=…)`` at each control
    step. A call does what :func:`free.speculative_sample` does, and nothing that could be done before. The same seed and
    conditioning give the same sample, unless there is a warm start. Threads may share it; they take turns.

    Args:
        network: any callable ``network(x, timestep, **conditioning) -> output``, a DiT, or a :class:`free.Target`.
        shape: of one sample, such as (actions of a chunk, numbers of an action); left out, the model's own.
        conditioning: an example of what the calls will give, so that all is made now; left out, the first call's serves.
        num_samples: B, where the conditioning does not say; else 1.
        process, num_inference_steps, guidance_scale, impl, capture, compile: as in :func:`free.speculative_sample`.
        drafter: as there; ``"gains"`` saves some more rounds, but beside a network of milliseconds they cost more than that.
        window: W, a plan of :func:`free.plan_window`, or ``"auto"``, which makes such a plan: from rounds that it times, and
            a pilot under keys of its own, so that calls choose alike.
        known: bool, ``shape``: the entries that calls give (a goal, the first action), see :class:`free.KnownEntries`.
        shift: how many actions are executed between calls: the last sample, so many rows on, becomes what the next one's
            first drafts lean on, a warm start. Exact as any draft is; where a call has a seed that a sample before it had,
            it starts cold, as what it would lean on has seen its noise. :meth:`reset` forgets the last sample.

    Raises:
        ValueError: a wrong argument, named, before any work is done.
        TypeError: a model or drafter that is none of those allowed.
    """

    @without_gradients
    def __init__(
        self,
        network: Any,
        *,
        shape: Sequence[int] | None = None,
        conditioning: dict[str, Any] | None = None,
        num_samples: int | None = None,
        process: ReverseProcess | SchedulerMixin | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = 1.0,
        drafter: str | Drafter | Any = "hold-x0",
        window: int | str | WindowPlan = "auto",
        known: torch.Tensor | None = None,
        shift: int | None = None,
        impl: str = "auto",
        capture: str | bool = "auto",
        compile: bool = False,
    ) -> None:
        check_window(window)
        if known is not None:
            target: Target = KnownEntries(network, known)
            if shape is not None and tuple(shape) != tuple(known.shape):
                raise ValueError(f"known has shape {tuple(known.shape)}; shape is {tuple(shape)}: they must agree")
            shape = None
        else:
            target = as_target(network)
        self._target, self._drafter = target, drafter
        self._options = Options(
            num_samples=num_samples,
            shape=shape,
            process=process,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=0,
            impl=impl,
        )
        self._window, self._capture, self._compile = window, capture, compile
        self._turn = threading.RLock()
        self._made: _Made | None = None
        self.stats: SamplingStatistics | None = None
        """Of the last call."""
        self._previous: torch.Tensor | None = None
        self._seen = KeyLog()
        self.shift = None if shift is None else check_count("shift", shift, least=0)
        if conditioning is not None:
            self._make(conditioning)
        else:
            # what does not hang on the conditioning is checked now
            check_number("guidance_scale", guidance_scale, "1 (no guidance) or more", 1)
            example = None if known is None else {KNOWN: torch.zeros(num_samples or 1, *known.shape)}
            check_request(target, replace(self._options, guidance_scale=1.0, conditioning=example))

    @without_gradients
    def __call__(
        self,
        conditioning: dict[str, Any] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One sample for each row of the conditioning.

        Args:
            conditioning: keywords of the network, tensors or NumPy arrays with one row a sample, of the names, shapes and
                dtypes that the sampler was made with; ``class_labels`` and, with known entries, ``known`` [B, *shape] too.
            seed, generator, latents: as in :func:`free.speculative_sample`.

        Returns:
            float32 [B, *shape], on the network's device.

        Raises:
            ValueError: what is unlike at making, NaN in an observation, a network that was put into train mode; before any
                work is done.
            NonFiniteOutputError: the network returned NaN or infinity where a step depends on it.
        """
        with self._turn:
            made = self._made or self._make(conditioning or {}, latents)
            labels, rest = _split(conditioning)
            request = self._request(made.setup.request, labels, rest, seed, generator, latents)
            if made.graphs and made.recorded != _recorded(request.target):
                raise ValueError(
                    "network has moved, or was changed (an adapter, a hook, a setting), since this sampler was made, which "
                    "recorded what it launches; make another"
                )
            made.schedule.check_keys(request.keys)
            samples = self._draw(made, request, self._guess(request))
            if self.shift is not None:
                self._previous = samples.clone()
            return samples

    def reset(self) -> None:
        """Begin the next call without the last sample, as an episode begins."""
        with self._turn:
            self._previous = None
            self._seen = KeyLog()

    def _make(self, conditioning: dict[str, Any], latents: torch.Tensor | None = None) -> _Made:
        """Check, plan, and draw once, so that nothing is met for the first time by a call.

        Latents of the first call say where a network without parameters computes; nothing else is made of them.
        """
        labels, rest = _split(conditioning)
        asked = replace(self._options, class_labels=labels, conditioning=rest, latents=latents)
        request = replace(check_request(self._target, asked), latents=None)
        if self.shift is not None:
            whole = self._target.whole_shape if isinstance(self._target, KnownEntries) else request.sample_shape
            check_count("shift", self.shift, whole[0] - 1, least=0, why="fewer than a sample has rows")
        drafter = as_drafter(self._drafter, request.seed.device)
        drafter.check(request.target)
        captured = wants_capture(self._capture, request, drafter)
        options: dict[str, Any] = {"impl": asked.impl, "capture": self._capture, "compile": self._compile}
        plan = self._window
        if isinstance(plan, str):
            plan = plan_window(
                self._target,
                drafter,
                class_labels=labels,
                conditioning=rest,
                num_samples=request.batch,
                shape=request.sample_shape,
                process=request.process,
                guidance_scale=request.guidance_scale,
                latents=None if latents is None else request.pilot().initial_state().unflatten(1, request.sample_shape),
                **options,
            )
        schedule = schedule_of(plan)
        assert schedule is not None
        setup = Setup.of(request, drafter, schedule.widest, asked.impl, schedule.reach(request.process))
        with request.running(drafter):
            graphs = Graphs.of(setup) if captured and schedule.widest > 1 else None
        made = _Made(setup, plan, schedule, graphs, _recorded(request.target) if graphs else ())
        self._draw(made, request.pilot(), None)
        self._made = made
        return made

    def _request(self, example: Request, class_labels: Any, conditioning: dict[str, Any] | None, *noise: Any) -> Request:
        """The samples of a call, of the kind of ``example``; ``noise`` is seed, generator and latents."""
        example.target.check_ready()
        seed, generator, latents = noise
        asked = replace(
            self._options,
            class_labels=class_labels,
            conditioning=conditioning,
            num_samples=example.batch,
            shape=example.sample_shape,
            seed=seed,
            generator=generator,
            latents=latents,
        )
        request = check_samples(example.target, example.process, example.guidance_scale, asked)
        check_alike(request, example, "the samples that it was made for")
        for name, value in request.conditioning.items():
            if has_rows(value) and value.is_floating_point() and not torch.isfinite(value).all():
                where = (~torch.isfinite(value)).nonzero()[0].tolist()
                raise ValueError(
                    f"conditioning {name!r} holds NaN or infinity, at {where} for one; allowed are finite numbers"
                )
        return request

    def _guess(self, request: Request) -> torch.Tensor | None:
        """float32 [B, D]: the last sample, moved on, unless it may have seen noise of the keys that are asked for."""
        if self.shift is None:
            return None
        keys, last = set(request.keys), self._previous
        if last is None or not self._seen.isdisjoint(keys) or len(self._seen) + len(keys) > MOST_KEYS:
            self._previous, self._seen = None, KeyLog(keys)
            return None
        self._seen.add(keys)
        # the last row stands for those that follow it
        moved = torch.cat((last[:, self.shift :], last[:, -1:].expand(-1, self.shift, *last.shape[2:])), 1)
        return (request.target.unknown(moved) if isinstance(request.target, KnownEntries) else moved).flatten(1)

    def _draw(self, made: _Made, request: Request, guess: torch.Tensor | None) -> torch.Tensor:
        drafter, begin = made.setup.drafter, time.perf_counter()
        if made.schedule.widest == 1:
            labels, rest = _split(request.conditioning)
            result = ancestral_sample(
                request.target,
                class_labels=labels,
                conditioning=rest,
                shape=request.sample_shape,
                process=request.process,
                guidance_scale=request.guidance_scale,
                seed=request.keys,
                latents=None if request.latents is None else request.latents.unflatten(1, request.sample_shape),
                impl=made.setup.impl,
                capture=self._capture,
                compile=self._compile,
            )
            samples, self.stats = result.samples, result.stats
        else:
            setup = replace(made.setup, request=request)
            with request.running(drafter, compile=self._compile, window=made.plan, impl=setup.impl):
                if made.graphs:
                    made.graphs.account.reset()
                run = Run(setup, made.graphs)
                for _ in run.turns(made.schedule, int(setup.static_shapes), guess):
                    pass
                self.stats = run.finish()
            # the guess has heard all of those
            self.stats.keys = together(self._seen.heard(), request.keys, made.schedule.keys)
            self.stats.total_seconds = time.perf_counter() - begin
            samples = run.state.unflatten(1, request.sample_shape)
        if isinstance(request.target, KnownEntries):
            samples = request.target.whole(samples, request.conditioning[KNOWN])
        return samples


def _recorded(target: Target) -> Hashable:
    """What graphs of a target hold, and do not see change."""
    return weights(target.module), settings(target.module)


def _split(conditioning: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Class labels, which are an argument of their own, and the rest."""
    if conditioning is not None and not isinstance(conditioning, dict):
        raise ValueError(f"conditioning is a {type(conditioning).__name__}; allowed is a dict of the network's keywords")
    rest = dict(conditioning or {})
    labels = rest.pop("class_labels", None)
    return labels, rest or None
