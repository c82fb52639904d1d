"""What the choice of a window is made from: rounds timed on the device at hand, and what earlier runs have shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from free.capture import Graphs, drafter_key, wants_capture
from free.drafters import Drafter, as_drafter
from free.loop import rounds
from free.process import ReverseProcess
from free.request import DEFAULT_STEPS, Request, check_request
from free.schedule import WINDOWS, AutoWindow, Experience, FixedWindow, RoundSeconds, Schedule, WindowPlan
from free.statistics import Account, SamplingStatistics, Stopwatch
from free.window import Setup, advance, first_window

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_REPEATS = 2  # of a measurement, after the first one; the least counts, as a busy machine only adds
_ROUNDS_ON_CUDA = 3  # timed at once, so that the wait for the last one is a small part

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
    request = check_request(
        model,
        class_labels=class_labels,
        conditioning=conditioning,
        num_samples=num_samples,
        shape=shape,
        process=process,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        generator=None,
        latents=latents,
        impl=impl,
        callback_on_step_end=None,
    )
    drafter.check(request.target)
    captured = wants_capture(capture, request, drafter)
    steps = request.process.num_steps
    if statistics is not None and statistics.steps != steps:
        raise ValueError(f"statistics is of {statistics.steps} steps; the process has {steps}")
    setup = Setup.of(request, drafter, WINDOWS[-1], impl)
    with request.running(features=drafter.needs_features, compile=compile):
        graphs = Graphs.of(setup) if captured else None
        if statistics is not None:
            experience = Experience(statistics.tested.astype(float), statistics.accepted.astype(float))
            return AutoWindow(round_seconds(setup, graphs), experience, request.process, request.batch).plan(request.batch)
        schedule = auto_window(setup, graphs)
        account = graphs.account if graphs else Account(steps, request.seed)
        pilot = SamplingStatistics(steps, schedule.name, drafter.name, np.zeros(request.batch, np.int64))
        watch = Stopwatch(request.seed.device)
        for _ in rounds(setup, schedule, request.initial_state(), account, pilot, watch, graphs=graphs):
            pass
    return schedule.plan(request.batch)


def check_window(window: Any) -> None:
    """Raise a ValueError unless ``window`` is a positive int, ``"auto"`` or a plan."""
    fits = isinstance(window, WindowPlan) or window == "auto" or (type(window) is int and window >= 1)
    if not fits:
        raise ValueError(f"window is {window!r}; allowed is an int, 1 or more, 'auto', or a plan of free.plan_window")


def schedule_of(window: int | str | WindowPlan) -> Schedule | None:
    """The schedule that a checked ``window`` stands for; None is one that has to be measured, :func:`auto_window`."""
    if isinstance(window, WindowPlan):
        return window
    return FixedWindow(window) if isinstance(window, int) else None


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


def by_window(run: Callable[[int], Any], device: torch.device, widest: int) -> dict[int, float]:
    """Seconds of ``run(window)`` for wider and wider windows, until wider ones are no cheaper a state."""
    taken: dict[int, float] = {}
    for window in (window for window in WINDOWS if window <= widest):
        run(window)  # shapes that are met for the first time are slow
        taken[window] = _timed(run, window, device)
        # the narrower one takes turns with it: of a machine that is busy at times, neither sees more
        pair = (window, window // 2) if window > 1 else (window,)
        for _ in range(_REPEATS):
            for one in pair:
                taken[one] = min(taken[one], _timed(run, one, device))
        # twice as wide goes less than twice as far
        if window > 1 and taken[window] > 1.8 * taken[window // 2]:
            break
    return taken


def _timed(run: Callable[[int], Any], window: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_ROUNDS_ON_CUDA):
            run(window)
        torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / _ROUNDS_ON_CUDA
    # a single thread's own time is not stretched by what else the machine does
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run(window)
    return clock() - begin


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
