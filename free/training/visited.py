"""Examples of our own: the drafts of rounds that the sampler takes with the drafter as it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers import DDPMScheduler

from free.drafters import Anchor, LastWindow, Situation
from free.drafters.feature import FeatureDrafter
from free.drafters.gains import GainMemory
from free.processes import ReverseProcess
from free.sampling.request import Request
from free.sampling.statistics import Stopwatch
from free.sampling.window import Live, Query, Setup, advance, evaluate
from free.targets import DiTTarget
from free.training.examples import Examples
from free_kernels import guided, x0_estimate

MEMORY = 16
"""Rounds that are kept for reuse."""


class VisitedWindows:
    """Rounds of the sampler itself with the drafter as it stands, on a pool of live samples at steps of their own.

    The target's forward that verifies a window is the supervision of all its drafts. In sweeps the block learns, from the
    path that it will see, what its draft will miss on the path that follows.

    Args:
        target: frozen.
        process: of the rounds.
        guidance_scale: of the outputs that are learned.
        window: W.
        pool: live samples.
        reuse: times that a round is learned from, where the target's forward costs more than learning does: one draw in
            ``reuse`` is a new round, the others come from the last :data:`MEMORY` rounds.
        scheduler: noises the data that the pool begins with; the original DiT's linear betas if left out.
    """

    def __init__(
        self,
        target: DiTTarget,
        process: ReverseProcess,
        guidance_scale: float,
        *,
        window: int,
        pool: int,
        reuse: int = 1,
        scheduler: DDPMScheduler | None = None,
    ) -> None:
        assert target.sample_shape is not None
        device = target.device or torch.device("cpu")
        conditioning = {"class_labels": torch.zeros(pool, dtype=torch.int64, device=device)}
        seed = torch.zeros(pool, dtype=torch.int64, device=device)
        self.request = Request(target, process.to(device), conditioning, guidance_scale, target.sample_shape, seed, None)
        self.window = min(window, process.num_steps)
        self.reuse = reuse
        self.scheduler = scheduler or DDPMScheduler(clip_sample=False)
        self.live: Live | None = None
        self.memory: list[Examples] = []
        self.draws = 0

    @torch.no_grad()
    def draw(self, drafter: FeatureDrafter, clean: Callable[[], torch.Tensor], labels: torch.Tensor) -> Examples:
        """The drafts of one round.

        Args:
            drafter: as it stands.
            clean: called once, by the pool's beginning: clean samples [n, *sample shape] that it noises to random steps.
            labels: int64 [n], of the samples that the pool begins with, or of trajectories that begin where others ended.
        """
        self.draws += 1
        if self.memory and self.draws % self.reuse:
            return self.memory[int(torch.randint(len(self.memory), ()))]
        examples = self._round(drafter, clean, labels)
        if self.reuse > 1:
            self.memory = [*self.memory[1 - MEMORY :], examples]
        return examples

    def state_dict(self) -> dict[str, Any]:
        """All that the next rounds depend on, beside the drafter: tensors and ints in dicts and lists."""
        live = self.live
        state: dict[str, Any] = {"draws": self.draws, "memory": [_as_dict(examples) for examples in self.memory]}
        if live is not None:
            state["live"] = {
                "labels": self.request.conditioning["class_labels"],
                "seed": live.seed,
                "step": live.step,
                "state": live.state,
                "last": _as_dict(live.last),
                **({} if live.x0 is None else {"x0": live.x0}),
                **({} if live.memory is None else {"learned": _as_dict(live.memory)}),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        device, process = self.request.seed.device, self.request.process
        state = _moved(state, device)
        self.draws = state["draws"]
        self.memory = [
            Examples(**{**values, "process": process, "anchor": Anchor(**values["anchor"])}) for values in state["memory"]
        ]
        self.live = None
        if "live" in state:
            live = state["live"]
            conditioning = self.request.conditioning
            conditioning["class_labels"].copy_(live["labels"])
            index = torch.arange(len(live["step"]), device=device)
            last = LastWindow(**live["last"])
            moving = live["seed"], live["step"], live["state"]
            learned = GainMemory(**live["learned"]) if "learned" in live else None
            self.live = Live(index, *moving, last, conditioning, None, x0=live.get("x0"), memory=learned)

    def _round(self, drafter: FeatureDrafter, clean: Callable[[], torch.Tensor], labels: torch.Tensor) -> Examples:
        request, process = self.request, self.request.process
        with request.target.capture_features():
            setup = Setup.of(request, drafter, self.window, "auto")
            if self.live is None:
                live = self._begin(drafter, clean(), labels)
            else:
                live = self._begin_again(drafter, self.live, labels)
            self.live, done = advance(live, setup, self.window, Stopwatch(live.state.device))
        situation, last = done.situation, self.live.last

        drafts = self.window - 1
        column = torch.arange(drafts, device=done.step.device)
        steps = (done.step[:, None] + column).clamp(max=process.num_steps - 1)  # [B, W-1]
        rows = (column < (done.length - 1)[:, None]).flatten().nonzero()[:, 0]  # [N], what was drafted
        anchor = situation.anchor(steps).flatten().take(rows)
        visited, step = done.states[:, :-1].flatten(0, 1)[rows], steps.flatten()[rows]
        answers = _answers(drafter, situation, done.states[:, :-1], steps)
        answer = None if answers is None else answers.flatten(0, 1)[rows]
        output = guided(last.output, last.unconditional, request.guidance_scale, torch.float32)
        wanted = output[:, :-1].flatten(0, 1)[rows]
        if drafter.base is not None:
            wanted = wanted - anchor.hold_x0(visited, step, process)
        if answer is not None:
            wanted = wanted - answer
        seen = visited
        if drafter.sweeps == 1:  # the block sees the base's path
            path, answers = drafter.hold(situation)
            seen = path.states[:, :-1].flatten(0, 1)[rows]
            answer = None if answers is None else answers.flatten(0, 1)[rows]
        label_embedding = request.target.label_embedding(request.conditioning).repeat_interleave(drafts, 0)[rows]
        next_feature = None if last.feature is None else last.feature[:, :-1].flatten(0, 1)[rows]
        weight = torch.ones(len(rows), device=seen.device)
        settled = done.verification.advance - 1 + done.verification.rejected  # [B]
        tested = (column < settled[:, None]).flatten()[rows]
        return Examples(
            process, seen, step, anchor, label_embedding, anchor.feature, wanted, next_feature, weight, tested, answer
        )

    def _begin(self, drafter: FeatureDrafter, clean: torch.Tensor, labels: torch.Tensor) -> Live:
        """Noised data at random steps, each with one evaluation to lean on."""
        request, process, size = self.request, self.request.process, len(self.request.seed)
        if len(clean) < size:
            raise ValueError(f"clean holds {len(clean)} samples; a pool of {size} begins with as many")
        request.conditioning["class_labels"].copy_(labels[:size])
        step = torch.randint(process.num_steps, (size,), device=request.seed.device)
        clean = clean[:size]
        noised = self.scheduler.add_noise(clean, torch.randn_like(clean), process.timestep[step].long())
        state, index, one = noised.flatten(1), torch.arange(size, device=step.device), torch.ones_like(step)
        first = evaluate(Query(state, step, index, None), request.conditioning, request)
        output, unconditional = (
            None if values is None else values.flatten(1)[:, None] for values in (first.output, first.unconditional)
        )
        assert output is not None
        feature = None if first.feature is None else first.feature[:, None]
        last = LastWindow(step, one, state[:, None], output, unconditional, feature)
        live = Live(index, _draw_seeds(one), step, state, last, request.conditioning, None)
        live.memory = self._first_memory(drafter, live)
        if process.memory is not None:
            # of the state before nothing is known: as if nothing had changed
            half = None if unconditional is None else unconditional[:, 0]
            live.x0 = x0_estimate(
                state, guided(output[:, 0], half, request.guidance_scale, torch.float32), step, process.table
            )
        return live

    def _first_memory(self, drafter: FeatureDrafter, live: Live) -> GainMemory | None:
        """What a drafter that remembers makes of the pool's first evaluations, with nothing evaluated before."""
        request, last = self.request, live.last
        before = replace(last, step=(last.step - 1).clamp(min=0))
        situation = Situation(
            live.state,
            live.step,
            live.seed,
            1,
            before,
            None,
            request.process,
            request.target,
            live.conditioning,
            request.sample_shape,
            request.guidance_scale,
            "auto",
            memory=drafter.begin(before, request.sample_shape),
        )
        return drafter.remember(situation, last)

    def _begin_again(self, drafter: FeatureDrafter, live: Live, labels: torch.Tensor) -> Live:
        """New trajectories where old ones ended: from noise, with nothing to lean on."""
        request, last = self.request, live.last
        ended = live.step == request.process.num_steps  # [B]
        request.conditioning["class_labels"][ended] = labels[: int(ended.sum())]
        live.seed[ended] = _draw_seeds(live.seed[ended])
        live.state[ended] = request.process.initial_std * torch.randn_like(live.state[ended])
        for values in (last.states, last.output, last.unconditional, last.feature):
            if values is not None:
                values[ended] = 0
        fresh = drafter.begin(last, request.sample_shape)
        if fresh is not None:
            for entry in fields(fresh):
                getattr(live.memory, entry.name)[ended] = getattr(fresh, entry.name)[ended]
        length = torch.where(ended, 1, last.length)
        live.last = replace(last, step=torch.where(ended, 0, last.step), length=length)
        live.step = torch.where(ended, 0, live.step)
        return live


def _answers(
    drafter: FeatureDrafter, situation: Situation, states: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor | None:
    """What gains, where they are the drafter's base, add to hold-x0's drafts at ``states`` [B, W-1, D] of ``steps``."""
    columns = zip(states.unbind(1), steps.unbind(1), strict=True)
    answers = [drafter.answer(situation, state, step) for state, step in columns]
    known = [answer for answer in answers if answer is not None]
    return torch.stack(known, 1) if known else None


def _as_dict(value: Examples | Anchor | LastWindow | GainMemory) -> dict[str, Any]:
    """The tensors of a dataclass, by name."""
    entries = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    return {
        name: _as_dict(entry) if isinstance(entry, Anchor) else entry
        for name, entry in entries.items()
        if not isinstance(entry, ReverseProcess)
    }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    if isinstance(value, list):
        return [_moved(entry, device) for entry in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _draw_seeds(like: torch.Tensor) -> torch.Tensor:
    return torch.randint(2**63 - 1, like.shape, device=like.device)
