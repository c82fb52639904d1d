"""What the choice of a window is made from: rounds timed on the device at hand, and what earlier runs have shown."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from free.drafters import Drafter, as_drafter
from free.processes import ReverseProcess
from free.sampling.account import Account
from free.sampling.capture import Graphs, drafter_key, wants_capture
from free.sampling.loop import Run
from free.sampling.memory import memory_of, remember
from free.sampling.relaxation import Relaxation
from free.sampling.request import DEFAULT_STEPS, Options, Request, check_request
from free.sampling.statistics import SamplingStatistics, Stopwatch
from free.sampling.window import Setup, advance, first_window
from free.targets.base import take_rows
from free.windows import (
    WINDOWS,
    AutoWindow,
    Experience,
    KeyLog,
    LoadWindow,
    Measurements,
    RoundSeconds,
    Schedule,
    WindowPlan,
    by_window,
)

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

ExperienceT = TypeVar("ExperienceT", bound=Experience)


@torch.no_grad()
def plan_window(
    model: Any,
    drafter: str | Drafter | Any = "gains",
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
    the acceptance by step from a pilot run of the batch with ``window="auto"``, or from ``statistics``. Where a wide forward
    costs what its states cost one by one, the plan is a window of 1: the ancestral sampler.

    A plan may not have seen the noise of the samples that it is used for. The pilot draws from keys of a root of their own,
    so that its plan serves every seed, ``seed`` itself included; one made from ``statistics`` is refused for their samples.

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
    request = check_request(model, Options.among(locals())).pilot()
    drafter = as_drafter(drafter, request.seed.device)
    drafter.check(request.target)
    captured = wants_capture(capture, request, drafter)
    steps = request.process.num_steps
    if statistics is not None and not isinstance(statistics, SamplingStatistics):
        raise ValueError(f"statistics is a {type(statistics).__name__}; allowed is a free.SamplingStatistics, or None")
    if statistics is not None and statistics.steps != steps:
        raise ValueError(f"statistics is of {statistics.steps} steps; the process has {steps}")
    setup = Setup.of(request, drafter, WINDOWS[-1], impl)
    with request.running(drafter, compile=compile, impl=impl):
        graphs = Graphs.of(setup) if captured else None
        if statistics is not None:
            tested, accepted = statistics.tested.astype(float), statistics.accepted.astype(float)
            experience = Experience(tested, accepted, keys=KeyLog(statistics.keys))
        else:
            experience = Experience.none(steps)
        seconds, ranks = round_seconds(setup, graphs), request.target.ranks
        schedule = AutoWindow(seconds, experience, request.process, request.batch, ranks)
        if statistics is None:
            for _ in Run(setup, graphs).turns(schedule):
                pass
    return schedule.plan(request.batch)


def auto_window(setup: Setup, graphs: Graphs | None) -> Schedule:
    """A schedule that knows what was measured and seen of this model before, but nothing of these samples' noise.

    A key that was met before meets none of that experience. And rows that share a key share noise: where one of them stands
    may not choose the window of another, so they get a window that is the same in each round.
    """
    request, keys = setup.request, setup.request.keys
    experience = experience_for(request, setup.drafter, setup.relaxation, Experience)
    seconds, ranks = round_seconds(setup, graphs), request.target.ranks
    schedule = AutoWindow(seconds, experience, request.process, request.batch, ranks)
    return schedule if len(set(keys)) == len(keys) else schedule.fixed(request.batch)


def load_window(setup: Setup, graphs: Graphs | None) -> LoadWindow:
    """The window that is expected to settle most steps a second, for 1, 2, 4 … B samples under way at a time.

    Made of rounds that are timed and of a pilot run of the setup's B samples, under keys of a root of their own: it has seen
    no sample's noise. ``graphs``, if given, are replayed, and their account is empty afterwards.
    """
    request = setup.request.pilot()
    setup = replace(setup, request=request)
    batch, process = request.batch, request.process
    learned = AutoWindow(round_seconds(setup, graphs), Experience.none(process.num_steps), process, batch)
    for _ in Run(setup, graphs).turns(learned):
        pass
    windows = {}
    for samples in sorted({*(1 << power for power in range(batch.bit_length())), batch}):
        rows = torch.arange(samples, device=request.seed.device)
        few = replace(request, seed=request.seed[rows], conditioning=take_rows(request.conditioning, rows), latents=None)
        seconds = round_seconds(replace(setup, request=few), graphs)
        windows[samples] = AutoWindow(seconds, learned.experience, process, samples).fixed(samples).widest
    if graphs is not None:
        graphs.account.reset()
    return LoadWindow(windows, batch)


def experience_for(
    request: Request,
    drafter: Drafter,
    relaxation: Relaxation | None,
    kind: type[ExperienceT],
    setting: Hashable = None,
) -> ExperienceT:
    """What earlier runs have shown of this model, by which windows may be chosen for the request's samples, and which sees
    them from now on; it is none if it has seen one of their keys before.

    Args:
        request, drafter, relaxation: of the run.
        kind: of experience.
        setting: what else makes runs alike.
    """
    steps, process = request.process.num_steps, request.process.fingerprint()
    key = (kind, drafter_key(drafter), request.guidance_scale, process, relaxation, setting)
    experience = remember(request.target, key, lambda: kind.none(steps))
    if experience.is_full(request.keys):
        experience = memory_of(request.target)[key] = kind.none(steps)
    return experience if experience.admit(request.keys) else kind.none(steps)


def round_seconds(setup: Setup, graphs: Graphs | None = None) -> RoundSeconds:
    """What a round takes by its number of states, drafting and verification included; remembered by model and setting.

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
        target.ranks.size,
    )
    return remember(request.target, key, Measurements).latest(lambda: _measure(setup, graphs), target.ranks)


def _measure(setup: Setup, graphs: Graphs | None) -> RoundSeconds:
    request = setup.request.pilot()
    setup = replace(setup, request=request)
    live, watch = first_window(setup, request.initial_state()), Stopwatch(torch.device("cpu"))
    account = Account(request.process.num_steps, request.seed)

    def run(window: int) -> None:
        nonlocal live
        if graphs is not None:
            live, _ = graphs.advance(live, window, watch)  # it goes on in its own buffers
        else:
            # each from the first step, lest wide windows be timed near the end, where they are short
            account.add(*advance(live, setup, window, watch))

    seconds = by_window(run, request.seed.device, setup.widest, request.target.ranks)
    if graphs is not None:
        graphs.account.reset()
    return RoundSeconds(request.batch * np.array(list(seconds), dtype=float), np.array(list(seconds.values())))
