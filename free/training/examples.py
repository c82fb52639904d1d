"""What a drafter learns from: states, what it may know, and what the target says there. Made on the fly, never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from diffusers import DDPMScheduler

from free.drafters import Anchor, FeatureDrafter, LastWindow
from free.drafters.hold import hold
from free.process import ReverseProcess
from free.request import Request
from free.statistics import Stopwatch
from free.targets import DiTTarget
from free.window import Live, Setup, advance, evaluate
from free_kernels import guided, posterior


@dataclass
class Examples:
    """N drafts that a drafter could have made."""

    process: ReverseProcess
    state: torch.Tensor
    """float32 [N, D], what the block sees."""
    step: torch.Tensor
    """int64 [N]."""
    anchor: Anchor
    label_embedding: torch.Tensor
    """[N, width]."""
    feature: torch.Tensor | None
    """[N, tokens, width], of an earlier step."""
    wanted: torch.Tensor
    """float32 [N, D]: the target's guided output, or with a base what hold-x0's draft misses of it."""
    next_feature: torch.Tensor | None
    """[N, tokens, width]: the target's at this step."""
    weight: torch.Tensor
    """float32 [N]."""


class NoisedPairs:
    """FREE's examples (arXiv 2511.20390): noise the data to a step, take the target's reverse step, draft the next one.

    Args:
        target: frozen.
        process: with steps as far apart as inference will take them.
        guidance_scale: of the outputs that are learned.
        unroll: drafts in a row; from the second on the block leans on its own feature, at a state that its own draft made.
        depth_weight: of each draft relative to the one before it.
        scheduler: noises the data; the original DiT's linear betas if left out.
    """

    def __init__(
        self,
        target: DiTTarget,
        process: ReverseProcess,
        guidance_scale: float,
        *,
        unroll: int = 1,
        depth_weight: float = 0.8,
        scheduler: DDPMScheduler | None = None,
    ) -> None:
        if not 1 <= unroll < process.num_steps - 1:
            raise ValueError(
                f"unroll is {unroll}; allowed is 1 … {process.num_steps - 2}, the process has {process.num_steps} steps"
            )
        self.target, self.process, self.guidance_scale = target, process, guidance_scale
        self.unroll, self.depth_weight = unroll, depth_weight
        self.scheduler = scheduler or DDPMScheduler(clip_sample=False)

    @torch.no_grad()
    def draw(self, drafter: FeatureDrafter, clean: torch.Tensor, labels: torch.Tensor) -> Examples:
        """``unroll`` examples for each of n clean samples [n, *sample shape] with labels int64 [n]."""
        process, count = self.process, len(clean)
        conditioning = {"class_labels": labels}
        label_embedding = self.target.label_embedding(conditioning)
        # the last step is never drafted
        step = torch.randint(process.num_steps - 1 - self.unroll, (count,), device=clean.device)
        noised = self.scheduler.add_noise(clean, torch.randn_like(clean), process.timestep[step].long())
        anchor = _evaluate(self.target, noised.flatten(1), step, conditioning, process, self.guidance_scale)
        state, output, feature = anchor.state, anchor.output, anchor.feature
        seed = torch.zeros_like(step)  # not used: the noise is given
        parts = []
        for depth in range(self.unroll):
            state = posterior(state, output, seed, step, process.table, noise=torch.randn_like(state))
            step = step + 1
            # the paper's block leans on the step before, which from the second draft on is one of its own
            leant = anchor if drafter.base is not None else Anchor(step - 1, anchor.state, anchor.output, anchor.feature)
            exact = _evaluate(self.target, state, step, conditioning, process, self.guidance_scale)
            weight = torch.full((count,), self.depth_weight**depth, device=state.device)
            hold_x0 = leant.hold_x0(state, step, process) if drafter.base is not None else torch.zeros_like(state)
            wanted = exact.output - hold_x0
            parts.append(Examples(process, state, step, leant, label_embedding, feature, wanted, exact.feature, weight))
            if depth + 1 < self.unroll:
                drafted, own = drafter.predict(state, step, leant, label_embedding, process, feature)
                output, feature = drafted + hold_x0, feature if drafter.base is not None else own
        return _cat(parts)


class VisitedWindows:
    """Rounds of the sampler itself with the drafter as it stands, on a pool of live samples at steps of their own.

    The target's forward that verifies a window is the supervision of all its drafts. In sweeps the block learns, from the
    path that it will see, what its draft will miss on the path that follows.

    Args:
        target: frozen.
        processes: taken in turn, a pool each.
        guidance_scale: of the outputs that are learned.
        window: W of the rounds.
        pool: live samples of each process.
    """

    def __init__(
        self, target: DiTTarget, processes: Sequence[ReverseProcess], guidance_scale: float, *, window: int, pool: int
    ) -> None:
        self.target, self.guidance_scale, self.window = target, guidance_scale, window
        self.pools = [_Pool(target, process, guidance_scale, min(window, process.num_steps), pool) for process in processes]
        self.turn = 0

    @torch.no_grad()
    def draw(self, drafter: FeatureDrafter, clean: torch.Tensor, labels: torch.Tensor) -> Examples:
        """The drafts of one round of one pool. It begins with these clean samples [n, *sample shape], noised at random;
        trajectories that ended begin again with these labels int64 [n].
        """
        pool = self.pools[self.turn]
        self.turn = (self.turn + 1) % len(self.pools)
        return pool.round(drafter, clean, labels)

    def state_dict(self) -> dict[str, Any]:
        """All that the next rounds depend on, beside the drafter."""
        return {"turn": self.turn, "pools": [pool.state_dict() for pool in self.pools]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.turn = state["turn"]
        for pool, of_pool in zip(self.pools, state["pools"], strict=True):
            pool.load_state_dict(of_pool)


class _Pool:
    """Live samples of one process, begun again as they end."""

    def __init__(self, target: DiTTarget, process: ReverseProcess, guidance_scale: float, window: int, size: int) -> None:
        assert target.sample_shape is not None
        device = target.device or torch.device("cpu")
        conditioning = {"class_labels": torch.zeros(size, dtype=torch.int64, device=device)}
        seed = torch.zeros(size, dtype=torch.int64, device=device)
        self.request = Request(target, process.to(device), conditioning, guidance_scale, target.sample_shape, seed, None)
        self.window = window
        self.live: Live | None = None

    def round(self, drafter: FeatureDrafter, clean: torch.Tensor, labels: torch.Tensor) -> Examples:
        request, process = self.request, self.request.process
        with request.target.capture_features():
            setup = Setup.of(request, drafter, self.window, "auto")
            live = self._begin(setup, clean, labels) if self.live is None else self._begin_again(self.live, labels)
            self.live, done = advance(live, setup, self.window, Stopwatch(live.state.device))
        situation, last = done.situation, self.live.last

        drafts = self.window - 1
        column = torch.arange(drafts, device=done.step.device)
        steps = (done.step[:, None] + column).clamp(max=process.num_steps - 1)  # [B, W-1]
        rows = (column < (done.length - 1)[:, None]).flatten().nonzero()[:, 0]  # [N], what was drafted
        anchor = situation.anchor(steps).flatten().take(rows)
        visited, step = done.states[:, :-1].flatten(0, 1)[rows], steps.flatten()[rows]
        seen = hold(situation, "hold-x0").states[:, :-1].flatten(0, 1)[rows] if drafter.sweeps == 1 else visited
        output = guided(last.output, last.unconditional, request.guidance_scale, torch.float32)
        wanted = output[:, :-1].flatten(0, 1)[rows]
        if drafter.base is not None:
            wanted = wanted - anchor.hold_x0(visited, step, process)
        label_embedding = request.target.label_embedding(request.conditioning).repeat_interleave(drafts, 0)[rows]
        next_feature = None if last.feature is None else last.feature[:, :-1].flatten(0, 1)[rows]
        weight = torch.ones(len(rows), device=seen.device)
        return Examples(process, seen, step, anchor, label_embedding, anchor.feature, wanted, next_feature, weight)

    def _begin(self, setup: Setup, clean: torch.Tensor, labels: torch.Tensor) -> Live:
        """Noised data at random steps, each with one evaluation to lean on."""
        request, process, size = self.request, self.request.process, len(self.request.seed)
        if len(clean) < size:
            raise ValueError(f"clean holds {len(clean)} samples; a pool of {size} begins with as many")
        request.conditioning["class_labels"].copy_(labels[:size])
        step = torch.randint(process.num_steps, (size,), device=request.seed.device)
        clean = clean[:size]
        noised = DDPMScheduler(clip_sample=False).add_noise(clean, torch.randn_like(clean), process.timestep[step].long())
        state, index, one = noised.flatten(1), torch.arange(size, device=step.device), torch.ones_like(step)
        first, _ = evaluate(state[:, None], step, one, request.conditioning, setup)
        last = LastWindow(step, one, state[:, None], first.output, first.unconditional, first.feature)
        return Live(index, _draw_seeds(one), step, state, last, request.conditioning, None)

    def _begin_again(self, live: Live, labels: torch.Tensor) -> Live:
        """New trajectories where old ones ended: from noise, with nothing to lean on."""
        request, last = self.request, live.last
        ended = live.step == request.process.num_steps  # [B]
        request.conditioning["class_labels"][ended] = labels[: int(ended.sum())]
        live.seed[ended] = _draw_seeds(live.seed[ended])
        live.state[ended] = torch.randn_like(live.state[ended])
        for values in (last.states, last.output, last.unconditional, last.feature):
            if values is not None:
                values[ended] = 0
        length = torch.where(ended, 1, last.length)
        live.last = replace(last, step=torch.where(ended, 0, last.step), length=length)
        live.step = torch.where(ended, 0, live.step)
        return live

    def state_dict(self) -> dict[str, Any]:
        live = self.live
        if live is None:
            return {}
        last = {entry.name: getattr(live.last, entry.name) for entry in fields(live.last)}
        own = {"seed": live.seed, "step": live.step, "state": live.state}
        return {"labels": self.request.conditioning["class_labels"], "last": last, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            self.live = None
            return
        device = self.request.seed.device
        moved = {name: value.to(device) for name, value in state.items() if name != "last"}
        last: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in state["last"].items()}
        self.request.conditioning["class_labels"].copy_(moved["labels"])
        index = torch.arange(len(moved["step"]), device=device)
        self.live = Live(
            index, moved["seed"], moved["step"], moved["state"], LastWindow(**last), self.request.conditioning, None
        )


def _evaluate(
    target: DiTTarget,
    state: torch.Tensor,
    step: torch.Tensor,
    conditioning: dict[str, torch.Tensor],
    process: ReverseProcess,
    guidance_scale: float,
) -> Anchor:
    """The target at states [N, D], with its feature."""
    assert target.sample_shape is not None
    shaped = state.view(-1, *target.sample_shape)
    with target.capture_features():
        output = target.evaluate(shaped, process.timestep[step], conditioning, guidance_scale != 1.0)
    unconditional = None if output.unconditional is None else output.unconditional.flatten(1)
    return Anchor(
        step, state, guided(output.output.flatten(1), unconditional, guidance_scale, torch.float32), output.feature
    )


def _draw_seeds(like: torch.Tensor) -> torch.Tensor:
    return torch.randint(2**63 - 1, like.shape, device=like.device)


def _cat(parts: list[Examples]) -> Examples:
    """The rows of all parts, which share their process."""

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)
        if isinstance(values[0], Anchor):
            return Anchor(*(joined([getattr(value, entry.name) for value in values]) for entry in fields(Anchor)))
        return values[0]

    return Examples(*(joined([getattr(part, entry.name) for part in parts]) for entry in fields(Examples)))
