"""What the choice of a window is made from: rounds timed on the device at hand, and what earlier runs have shown."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from free.drafters import Drafter, as_drafter
from free.processes import ReverseProcess
from free.sampling.account import Account
from free.sampling.capture import Graphs, drafter_key, wants_capture
from free.sampling.loop import Run
from free.sampling.request import DEFAULT_STEPS, Options, Request, check_request
from free.sampling.statistics import SamplingStatistics, Stopwatch
from free.sampling.window import Setup, advance, first_window
from free.windows import WINDOWS, AutoWindow, Experience, RoundSeconds, WindowPlan, by_window

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_REMEMBERED: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()
"""What was measured and seen of each model, as long as the model lives."""


@torch.no_grad()
def plan_window(
    model: Any,
    drafter: str | Drafter | Any = "hold-x0",
    *,
    class_labels: Any = None,
    conditioning: dict[str, Any] | None = None,
    num_samples: int | None = None,
    shape: Sequence[int] | None = None,
    process: ReverseProcess | SchedulerMixin | None = None,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = 1.0,
    seed: int | Sequence[int] | None = 0,
    latents: torch.Tensor | None = None,
    impl: str = "auto",
    capture: str | bool = "auto",
    compile: bool = False,
    statistics: SamplingStatistics | None = None,
) -> WindowPlan:
    """The window for each step that is expected to settle most steps a second, of this model on this device at this batch.

    Times rounds of 1, 2, 4 … 64 states a sample (once for each model, device, batch size, dtype and guidance), and takes
    the acceptance by step from a run of the batch with ``window="auto"``, or from ``statistics``. Where a wide forward costs
    what its states cost one by one, the plan is a window of 1: the ancestral sampler.

    ``window="auto"`` plans as it goes, by what it measured here and now: the law of a sample is the same whatever it
    chooses, but the sample of a seed may differ from run to run. Given as ``window``, a plan chooses the same in each run.

    Args:
        model, drafter, class_labels, conditioning, num_samples, shape, process, num_inference_steps, guidance_scale, seed,
            latents, impl, capture, compile: as in :func:`free.speculative_sample`; the batch is what is planned for.
        statistics: of an earlier run of the same process, whose acceptance by step is taken instead of a new run's.

    Raises:
        ValueError: a wrong argument, named, before any work is done.
        NonFiniteOutputError: the model or the drafter returned NaN or infinity.
    """
    drafter = as_drafter(drafter)
    request = check_request(model, Options.among(locals()))
    drafter.check(request.target)
    captured = wants_capture(capture, request, drafter)
    steps = request.process.num_steps
    if statistics is not None and statistics.steps != steps:
        raise ValueError(f"statistics is of {statistics.steps} steps; the process has {steps}")
    setup = Setup.of(request, drafter, WINDOWS[-1], impl)
    with request.running(features=drafter.needs_features, compile=compile), drafter.running(compile=compile):
        graphs = Graphs.of(setup) if captured else None
        if statistics is not None:
            experience = Experience(statistics.tested.astype(float), statistics.accepted.astype(float))
            return AutoWindow(round_seconds(setup, graphs), experience, request.process, request.batch).plan(request.batch)
        schedule = auto_window(setup, graphs)
        for _ in Run(setup, graphs).turns(schedule):
            pass
    return schedule.plan(request.batch)


def auto_window(setup: Setup, graphs: Graphs | None) -> AutoWindow:
    """A schedule that knows what was measured and seen of this model before."""
    request = setup.request
    steps = request.process.num_steps
    key = ("experience", drafter_key(setup.drafter), request.guidance_scale, request.process.fingerprint(), setup.relaxation)
    experience = _remember(request, key, lambda: Experience(np.zeros(steps), np.zeros(steps)))
    return AutoWindow(round_seconds(setup, graphs), experience, request.process, request.batch)


def round_seconds(setup: Setup, graphs: Graphs | None = None) -> RoundSeconds:
    """What a round takes by its number of states, drafting and verification included; measured once a model and setting.

    Wider windows are timed until they are no cheaper a state. ``graphs``, if given, are replayed, and their account is empty
    afterwards.
    """
    request, target = setup.request, setup.request.target
    key = (
        "seconds",
        request.seed.device,
        request.batch,
        target.dtype,
        target.max_forward_batch,
        target.compiled,
        request.sample_shape,
        request.guided,
        drafter_key(setup.drafter),
        setup.impl,
        graphs is not None,
        torch.get_num_threads(),
    )
    return _remember(request, key, lambda: _measure(setup, graphs))


def _measure(setup: Setup, graphs: Graphs | None) -> RoundSeconds:
    request = setup.request
    live, watch = first_window(setup, request.initial_state()), Stopwatch(torch.device("cpu"))
    account = Account(request.process.num_steps, request.seed)

    def run(window: int) -> None:
        nonlocal live
        if graphs is not None:
            live, _ = graphs.advance(live, window, watch)  # it goes on in its own buffers
        else:
            account.add(*advance(live, setup, window, watch))

    seconds = by_window(run, request.seed.device, setup.widest)
    if graphs is not None:
        graphs.account.reset()
    states = request.batch * np.array(list(seconds), dtype=float)
    # a wider window that took less shows what a narrower one takes at most
    least = np.minimum.accumulate(np.array(list(seconds.values()))[::-1])[::-1]
    return RoundSeconds(states, least)


def _remember(request: Request, key: Hashable, make: Callable[[], Any]) -> Any:
    """What is known of the request's model under ``key``; not kept of a model that cannot be referred to weakly."""
    model = request.target.model if request.target.module is None else request.target.module
    try:
        known = _REMEMBERED.setdefault(model, {})
    except TypeError:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]
