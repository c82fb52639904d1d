"""The two samplers: check the arguments, loop, gather the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from free.drafters import Drafter, as_drafter
from free.processes import ReverseProcess
from free.sampling.account import Account, Report
from free.sampling.ancestral import Chain, step_on
from free.sampling.capture import AncestralGraph, Graphs, wants_capture
from free.sampling.loop import Run, Turn, check_finite
from free.sampling.planning import auto_window
from free.sampling.relaxation import Relaxation
from free.sampling.request import DEFAULT_STEPS, Callback, Options, Request, check_request
from free.sampling.statistics import SamplingStatistics, Stopwatch
from free.sampling.window import Setup
from free.windows import WINDOWS, WindowPlan, check_window, schedule_of, together
from free_kernels import NOISE_STREAM, normal
from free_kernels.dispatch import resolve

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# the ancestral sampler draws the noise of several steps in one call, this many numbers at most
_NOISE_BLOCK = 2**16


@dataclass
class SamplingOutput:
    """What a sampler returns."""

    samples: torch.Tensor
    """float32 [B, *sample shape]: x after the last step; latents where the model works on latents."""
    stats: SamplingStatistics
    trajectory: torch.Tensor | None = None
    """float32 [B, S + 1, *sample shape] with ``return_trajectory``: the state before each step, then the sample."""


@torch.no_grad()
def speculative_sample(
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
    window: int | str | WindowPlan = 8,
    relaxation: Relaxation | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    impl: str = "auto",
    capture: str | bool = "auto",
    compile: bool = False,
    progress: bool = False,
    callback_on_step_end: Callback | None = None,
    return_trajectory: bool = False,
) -> SamplingOutput:
    """Draw samples with the law of :func:`ancestral_sample`, in far fewer rounds of sequential work.

    The same in distribution, relative to the model as it is executed (dtype, batch shape); not the same sample per seed.
    The model may write into its input, which is a copy: the state of the sample stays what it was. Threads may share models,
    targets and drafters; those that do take turns, a call long.

    Args:
        model: a ``DiTTransformer2DModel``, a ``DiTPipeline`` (its latents are returned, not decoded), any callable
            ``model(x, timestep, **conditioning) -> output``, or a :class:`free.Target`.
        drafter: ``"gains"``, ``"hold-x0"``, ``"hold-output"``, a :class:`free.Drafter`, or a smaller model of the same
            samples.
        class_labels: an int, or one a sample; None is the null class.
        conditioning: keywords of a callable model; tensors have one row a sample, the rest is passed through.
        num_samples: B; left out, it follows from labels, conditioning, latents, seeds or generators, else 1.
        shape: of one sample; left out, the model's own or that of ``latents``.
        process: a :class:`free.ReverseProcess` or a diffusers scheduler (see its ``from_scheduler``); left out, the
            pipeline's scheduler, else the original DiT's ``ReverseProcess.ddpm(num_inference_steps)``.
        num_inference_steps: S, where ``process`` does not say.
        guidance_scale: classifier-free guidance, at least 1 (none).
        window: W, states of a sample evaluated in one round; 1 is the ancestral sampler. ``"auto"`` chooses, of 1 … 64, what
            settles most steps a second on this device, by rounds that it times (once for each model and setting) and by
            how drafts fare: the law is the same whatever is chosen, but the sample of a seed may vary with what was
            measured. What it remembers of a model from call to call is not used for a seed that it was learned from, and
            rows that share a seed get one window for all rounds. A plan of :func:`free.plan_window` chooses the same in
            each run.
        relaxation: a :class:`free.Relaxation` trades exactness for fewer rounds; ``stats.total_variation_bound``
            estimates how much of it, ``stats.total_variation_limit`` says how much at most, with 95 % confidence. None is
            exact.
        seed: an int (the first sample's key; the others get keys derived from it), or one a sample.
        generator: a torch generator, or one a sample, from which seeds are drawn; torch's default one if neither is given.
        latents: the initial states [B, *shape], float32 or a half precision; drawn from the seeds if left out.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``, of :mod:`free_kernels`.
        capture: replay each round as one CUDA graph: True, False, or ``"auto"``, which does so on CUDA where model and
            drafter are known to leave the host out (``capturable``: a DiT and the drafters of this package are; a plain
            callable may do anything). Recording takes about three rounds for each batch size and window; the graphs stay
            with the model, and serve the next call of the same kind.
        compile: run the model under ``torch.compile(fullgraph=True)`` during this call, a DiT block by block, which compiles
            one block for all, and a :class:`free.FeatureDrafter` likewise. Compiling takes seconds once a process, and again
            for a new kind of shape.
        progress: show a bar that counts steps.
        callback_on_step_end: called after each round with (model, step, timestep, {"latents": states}): step int64 [B]
            and timestep [B] of each sample's last settled step, states [B, *shape]. It observes; what it returns is not
            used.
        return_trajectory: keep every state (only then does memory grow with S).

    Returns:
        :class:`SamplingOutput`.

    Raises:
        ValueError: a wrong argument, named, before any work is done.
        TypeError: a model or drafter that is none of the above.
        NonFiniteOutputError: the model or the drafter returned NaN or infinity where a step depends on it; the error has
            the samples that were finished (``error.samples``, ``error.finished``).
    """
    if relaxation is not None and not isinstance(relaxation, Relaxation):
        raise TypeError(f"relaxation is a {type(relaxation).__name__}; allowed is a free.Relaxation, or None")
    check_window(window)
    request = check_request(model, Options.among(locals()))
    drafter = as_drafter(drafter, request.seed.device)
    drafter.check(request.target)
    if relaxation is not None:
        relaxation.check(request.target, request.process)
    captured = wants_capture(capture, request, drafter, relaxation)

    schedule = schedule_of(window)
    if schedule:
        schedule.check_keys(request.keys)
    widest, reach = (schedule.widest, schedule.reach(request.process)) if schedule else (WINDOWS[-1], None)
    setup = Setup.of(request, drafter, widest, impl, reach, relaxation)
    begin = time.perf_counter()
    bar = tqdm(total=request.batch * request.process.num_steps, disable=not progress, unit="step")
    with bar, request.running(drafter, relaxation, compile=compile, window=window, impl=impl):
        run = Run(setup, Graphs.of(setup) if captured else None)
        if schedule is None:
            with run.watch.on_host("measuring"):
                schedule = auto_window(setup, run.graphs)
        result = _Result(request, run.state, model, callback_on_step_end, return_trajectory)
        # with static shapes the host may be a round behind, unless somebody looks at every round
        lag = 1 if setup.static_shapes and not request.target.ranks.any(result.watched or progress) else 0
        for turn in run.turns(schedule, lag):
            result.settle(turn)
            bar.update(int(turn.known.step.sum()) - bar.n)
            bar.set_postfix_str(f"efficiency {bar.n / max(1, int(turn.known.rounds.sum())):.2f}", refresh=False)
        stats = run.finish()
        stats.keys = together(schedule.keys, request.keys)
    stats.total_seconds = time.perf_counter() - begin
    return result.output(stats)


@torch.no_grad()
def ancestral_sample(
    model: Any,
    *,
    class_labels: Any = None,
    conditioning: dict[str, Any] | None = None,
    num_samples: int | None = None,
    shape: Sequence[int] | None = None,
    process: ReverseProcess | SchedulerMixin | None = None,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = 1.0,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    impl: str = "auto",
    capture: str | bool = "auto",
    compile: bool = False,
    progress: bool = False,
    callback_on_step_end: Callback | None = None,
    return_trajectory: bool = False,
) -> SamplingOutput:
    """Draw samples step by step: one forward of the model for each of the S steps (Ho et al. 2020, algorithm 2).

    The baseline, and what :func:`speculative_sample` is exact against. Arguments, result and errors as there.
    """
    request = check_request(model, Options.among(locals()))
    captured = wants_capture(capture, request)
    process, target = request.process, request.target
    stats = SamplingStatistics(process.num_steps, 1, "none", np.full(request.batch, process.num_steps))
    chain = Chain.begin(request)
    result = _Result(request, chain.state, model, callback_on_step_end, return_trajectory)
    watch = Stopwatch(request.seed.device)
    block = max(1, _NOISE_BLOCK // chain.state.numel())
    # the kernels make noise faster than they could read it, and a graph makes its own
    stored = resolve(impl, request.seed.device) == "reference" and not captured
    begin = time.perf_counter()
    with request.running(compile=compile, impl=impl):
        graph = AncestralGraph.of(request, impl) if captured else None
        account = graph.account if graph else Account(stats.steps, request.seed)
        for k in tqdm(range(process.num_steps), disable=not progress, unit="step"):
            if graph:
                chain = graph.advance(chain, watch)
            else:
                if stored and k % block == 0:
                    with watch("verification"):
                        steps = torch.arange(k, min(k + block, process.num_steps), device=request.seed.device)
                        noise = normal(request.seed[:, None], steps, chain.state.shape[1], stream=NOISE_STREAM, impl=impl)
                chain, _ = step_on(chain, request, noise[:, k % block] if stored else None, impl, watch)
                account.add_step(chain.step, chain.state)
            stats.count_forward(request.batch, target.forward_batch(request.guided))
            # a GPU is asked at the end, rather than waited for
            if k + 1 == process.num_steps or (stored and (k + 1) % block == 0):
                samples = chain.state.unflatten(-1, request.sample_shape)
                check_finite(Report(account).read(), stats.drafter, process, samples)
            result.settle_all(k, chain.state)
        stats.seconds = watch.finish()
        stats.keys = frozenset(request.keys)
    stats.total_seconds = time.perf_counter() - begin
    return result.output(stats)


class _Result:
    """Gathers the states of all samples, finished or not."""

    def __init__(
        self, request: Request, state: torch.Tensor, model: Any, callback: Callback | None, return_trajectory: bool
    ) -> None:
        self.request = request
        self.state = state
        self.model = model
        self.callback = callback
        self.step = torch.full_like(request.seed, -1)  # the last settled one
        self.trajectory: torch.Tensor | None = None
        if return_trajectory:
            self.trajectory = state.new_empty(request.batch, request.process.num_steps + 1, state.shape[1])
            self.trajectory[:, 0] = state

    @property
    def watched(self) -> bool:
        """Whether every state is wanted, not the last ones only."""
        return self.callback is not None or self.trajectory is not None

    def settle(self, turn: Turn) -> None:
        """Take over the states of a round, where somebody wants them."""
        if not self.watched:
            return
        live, done = turn.live, turn.done
        self.state[live.index] = live.state
        self.step[live.index] = live.step - 1
        if self.trajectory is not None:
            window = done.states.shape[1]
            column = torch.arange(window, device=live.step.device)
            # the drafted states that were accepted, then the last one, which verification made
            row, accepted = (column < done.verification.advance[:, None]).nonzero(as_tuple=True)
            self.trajectory[live.index[row], done.step[row] + accepted] = done.states[row, accepted]
            self.trajectory[live.index, live.step] = live.state
        self._call_back()

    def settle_all(self, step: int, state: torch.Tensor) -> None:
        """Take over all samples after the same step."""
        self.state = state
        if not self.watched:
            return
        self.step.fill_(step)
        if self.trajectory is not None:
            self.trajectory[:, step + 1] = state
        self._call_back()

    def output(self, stats: SamplingStatistics) -> SamplingOutput:
        shape = self.request.sample_shape
        trajectory = None if self.trajectory is None else self.trajectory.unflatten(-1, shape)
        # a copy: the state may be a graph's, which the next call writes to
        return SamplingOutput(self.state.unflatten(-1, shape).clone(), stats, trajectory)

    def _call_back(self) -> None:
        if self.callback is not None:
            latents = self.state.unflatten(-1, self.request.sample_shape).clone()
            self.callback(self.model, self.step.clone(), self.request.process.timestep[self.step], {"latents": latents})
