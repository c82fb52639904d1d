"""A pipeline under speculation: what its calls go through, and what is put back after each."""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from free.drafters import Drafter
from free.pipelines.batch import Repeated
from free.pipelines.callbacks import OBSERVED, watch_call
from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.loop import Loop, Plan, Watch
from free.pipelines.networks import Network, networks_of
from free.pipelines.process import ProcessOptions, process_of
from free.pipelines.refusals import (
    check_arguments,
    check_blending,
    check_clipped_noise,
    check_guiders,
    check_pipeline_class,
    check_scheduler,
)
from free.pipelines.rows import change_tensors, plain
from free.pipelines.scheduler import as_set, driven
from free.pipelines.target import check_networks
from free.processes import ReverseProcess
from free.sampling.relaxation import Relaxation
from free.sampling.sharing import exclusively
from free.sampling.statistics import SamplingStatistics
from free.windows import Schedule, together

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class _Past:
    """Of the loops that the call under way has had before: a later one has seen what they made."""

    loops: int = 0
    keys: frozenset[int] = frozenset()
    spent: torch.Tensor | None = None
    """float64 [B, 3]: what relaxation has cost the samples so far."""
    left: bool = False
    """Whether one of them was left before its samples were finished."""

    def after(self, loop: Loop) -> _Past:
        assert loop.run is not None
        left = self.left or (loop.run.unfinished and not loop.interrupted)
        return _Past(self.loops + 1, self.keys.union(loop.run.setup.request.keys), loop.run.account.spent, left)


class Speculation:
    """A pipeline whose calls are speculated until :meth:`remove`; made by :func:`free.speculate`.

    As a context it removes itself at the end.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        schedule: Schedule | None,
        drafter: Drafter,
        relaxation: Relaxation | None,
        seed: Sequence[int] | None,
        options: ProcessOptions,
        impl: str,
        mode: str = "ragged",
    ) -> None:
        check_pipeline_class(pipe, mode)
        self._repeated = Repeated(type(pipe), schedule.widest) if mode == "batch" and schedule else None
        self.pipe: Any = pipe
        self.schedule, self.drafter, self.relaxation = schedule, drafter, relaxation
        self.seed, self.options, self.impl = seed, options, impl
        self.history: list[SamplingStatistics] = []
        """The statistics of each loop that was finished, the last one last. Relaxation's cost is that of its call so far."""
        self.process: ReverseProcess | None = None
        """What the last loop sampled."""
        self.watch: Watch | None = None
        """Told of every round of every call."""
        self.scheduler: Any = None
        """The driven one, during a call."""
        self._own_scheduler: Any = None
        self._loop: Loop | None = None
        self._past = _Past()
        self._networks: list[Network] = []
        self._arguments: dict[str, Any] = {}
        self._sampler = ""
        self._said: set[str] = set()
        self._own_class: type | None = type(pipe)
        self._install()

    @property
    def stats(self) -> SamplingStatistics:
        """What the last loop of the last call cost; most pipelines have one.

        Raises:
            RuntimeError: no call was finished yet.
        """
        if not self.history:
            raise RuntimeError("no statistics yet: the pipeline was not called since it is speculated")
        return self.history[-1]

    def remove(self) -> None:
        """Give the pipeline its own class back. Doing it again does nothing."""
        if self._own_class is not None:
            self.pipe.__class__, self._own_class = self._own_class, None

    def __enter__(self) -> Speculation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _install(self) -> None:
        own = type(self.pipe)
        if hasattr(own, "_free_speculation"):
            raise RuntimeError("pipe is speculated already; remove() that first")
        signature = inspect.signature(own.__call__)

        @functools.wraps(own.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(pipe, *args, **kwargs)
            arguments = _by_name(bound)
            check_arguments(arguments)
            check_blending(pipe, arguments)
            check_guiders(pipe.components)
            watch_call(bound, self)
            if self._repeated is not None:
                self._repeated.ask(bound.arguments)
            with self.calling(arguments):
                return change_tensors(own.__call__(*bound.args, **bound.kwargs), plain)

        members: dict[str, Any] = {
            "__call__": call,
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "_free_speculation": self,
        }
        if self._repeated is not None:
            members["prepare_latents"] = self._repeated.prepare_latents()
        if hasattr(own, "interrupt") and OBSERVED in signature.parameters:
            # what a round hands out are drafts: a pipeline passes through the rest only once it was given what is settled
            members["interrupt"] = property(lambda pipe: self._loop is not None and self._loop.interrupted)
        self.pipe.__class__ = type(own.__name__, (own,), members)

    @contextmanager
    def calling(self, arguments: dict[str, Any]) -> Iterator[None]:
        """The context of one call: the scheduler and the networks are the pipeline's own again when it ends."""
        pipe, networks = self.pipe, networks_of(self.pipe)
        if not networks:
            raise UnsupportedPipelineError(f"pipe is a {type(pipe).__name__}, none of whose networks takes a timestep")
        check_networks(networks)
        with exclusively(pipe, self.drafter, *networks.values()), ExitStack() as during:
            if self._own_scheduler is not None:
                raise RuntimeError("pipe is called within its own call; calls of a speculated pipeline go one by one")
            own = pipe.scheduler
            check_scheduler(own)
            self.scheduler, steps = driven(own, self), own.config.get("num_train_timesteps", 1000)
            self._arguments, self._own_scheduler = arguments, own
            during.callback(self._end_call)
            # not by setattr, which would enter it into the pipeline's configuration
            during.callback(pipe.__dict__.__setitem__, "scheduler", own)
            pipe.__dict__["scheduler"] = self.scheduler
            self._networks = [Network(name, module, steps, self._repeated) for name, module in networks.items()]
            for network in self._networks:
                during.enter_context(network.wrapped(self._shown_first))
            yield
            if self._past.left:
                raise UnsupportedPipelineError(
                    "the pipeline left its loop before its samples were finished, and has drafts in their place; it cannot "
                    "be speculated"
                )

    def _shown_first(self) -> torch.Tensor | None:
        """The timestep of a first round under way, in which all rows have the same."""
        return None if self._loop is None or self._loop.in_rounds else self._loop.shown

    def iterate(self, timesteps: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        """The rounds of one loop of the pipeline."""
        plan = Plan(
            networks={network.name: network.module for network in self._networks},
            process=self._process,
            schedule=self.schedule,
            drafter=self.drafter,
            relaxation=self.relaxation,
            seed=self.seed,
            impl=self.impl,
            setting=self._setting,
            copies=self._copies(),
            repeated=self._repeated,
            barrier=self._barrier(),
            watch=self.watch,
            number=self._past.loops,
            spent=self._past.spent,
        )
        loop = self._loop = Loop(plan, timesteps, first)
        begin = time.perf_counter()
        try:
            yield from loop
            if loop.run is not None:
                stats = loop.run.finish()
                stats.total_seconds = time.perf_counter() - begin
                stats.seconds["target"] = stats.total_seconds - stats.seconds["draft"] - stats.seconds["verification"]
                stats.sampler = self._sampler
                stats.keys = together(loop.run.schedule.keys, loop.run.setup.request.keys, self._past.keys)
                self.history.append(stats)
        finally:
            if loop.run is not None:
                self._past = self._past.after(loop)
            self._loop = None

    @property
    def loops_before(self) -> int:
        """How many loops the call under way has had."""
        return self._past.loops

    def _setting(self) -> Hashable:
        """Of a call under way: what its networks were shown in the first round, and how they are guided."""
        words = ("guidance", "cfg")
        guidance = {name: value for name, value in self._arguments.items() if any(word in name for word in words)}
        calls = tuple(call for network in self._networks for call in network.calls)
        return calls, tuple((name, str(value)) for name, value in guidance.items() if not isinstance(value, torch.Tensor))

    def _process(self, arguments: dict[str, Any]) -> ReverseProcess:
        """Of the schedule as the pipeline has set it, and of what it gives the scheduler's first step."""
        for name, default in (("s_churn", 0.0), ("s_noise", 1.0), ("per_token_timesteps", None), ("variance_noise", None)):
            if arguments.get(name, default) != default:
                raise UnsupportedPipelineError(f"the pipeline gives scheduler.step {name}, which cannot be speculated")
        options = self.options.of_call(arguments.get("eta") or 0.0)
        check_clipped_noise(self._own_scheduler, options.eta, arguments)
        self.process, self._sampler = process_of(as_set(self.scheduler, type(self._own_scheduler)), options)
        if self._sampler not in self._said:
            # once is enough, where it is another process than the pipeline's own
            self._said.add(self._sampler)
            if "deterministic" in self._sampler:
                warnings.warn(self._sampler, UserWarning, stacklevel=2)
        return self.process

    def _copies(self) -> int:
        """How often the samples are in the latents: the class-conditional DiT's guidance doubles them before the loop."""
        from diffusers import DiTPipeline

        if not isinstance(self.pipe, DiTPipeline):
            return 1
        return 2 if self._arguments.get("guidance_scale", 1.0) > 1 else 1

    def _barrier(self) -> Callable[[torch.Tensor], bool] | None:
        """Where a pipeline of two networks changes from one to the other, by the timestep."""
        ratio = self.pipe.config.get("boundary_ratio")
        if ratio is None:
            return None
        boundary = ratio * self.scheduler.config.num_train_timesteps
        return lambda timestep: bool(timestep >= boundary)

    def _end_call(self) -> None:
        self._arguments, self._loop, self._networks, self._past = {}, None, [], _Past()
        self._own_scheduler = self.scheduler = None

    @property
    def iterating(self) -> bool:
        return self._loop is not None

    @property
    def in_rounds(self) -> bool:
        return self._loop is not None and self._loop.in_rounds

    @property
    def loop(self) -> Loop | None:
        """The one under way."""
        return self._loop

    def step(self, model_output: torch.Tensor, sample: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        if self._loop is None:
            raise UnsupportedPipelineError(
                "the pipeline calls scheduler.step outside a loop over scheduler.timesteps; it cannot be speculated"
            )
        return self._loop.step(model_output, sample, arguments)


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call, defaults and those that it takes as ``**kwargs`` included."""
    parameters = bound.signature.parameters.values()
    arguments = {one.name: one.default for one in parameters if one.default is not one.empty} | dict(bound.arguments)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return arguments
