"""Rounds as CUDA graphs: what a round launches is recorded once for each batch size and window, and replayed.

A graph reads and writes memory of its own. All graphs of a batch size share one set of buffers,
:class:`free.sampling.window.Live`, which a round moves on in place; what is not a tensor (the guidance scale, the shapes) is
baked in. Noise is made from seed and step, so that no random state has to follow.

What was recorded stays with the model, weakly: who asks the same of the same model again finds it there, and it goes with
the model. It refers to no model, target or drafter, only to the tensors that the graphs read. Whoever uses it has it alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from free.checks import without_gradients
from free.drafters import Drafter
from free.sampling.account import Account
from free.sampling.ancestral import Chain, step_on
from free.sampling.likeness import alike, settings, tensors_of, weights, who_is
from free.sampling.memory import memory_of
from free.sampling.recording import Recording, casts_recorded
from free.sampling.relaxation import Relaxation
from free.sampling.request import Request
from free.sampling.statistics import Stopwatch
from free.sampling.tensors import assign
from free.sampling.window import Live, Round, Setup, advance
from free.targets import Target
from free.targets.base import has_rows

T = TypeVar("T")

_KEPT = 4
"""Configurations whose graphs, and the memory that they hold, stay with a model."""


def wants_capture(
    capture: str | bool, request: Request, drafter: Drafter | None = None, relaxation: Relaxation | None = None
) -> bool:
    """Whether the rounds are to be captured.

    Raises:
        ValueError: ``capture`` is none of ``"auto"``, True and False, or True where there is no CUDA device or where the
            relaxation asks the device or several processes evaluate the target.
    """
    if not (isinstance(capture, bool) or capture == "auto"):
        raise ValueError(f"capture is {capture!r}; allowed are 'auto', True and False")
    device = request.seed.device
    if capture is True and device.type != "cuda":
        raise ValueError(f"capture is True, but the model runs on {device}: a graph needs CUDA; use 'auto' or False")
    if capture is True and request.target.ranks.size > 1:
        raise ValueError(
            "capture is True, but the model runs on several processes, whose hosts exchange messages in every round, which "
            "a CUDA graph cannot record; use 'auto' or False"
        )
    checked = relaxation is not None and not relaxation.capturable
    if capture is True and checked:
        raise ValueError(
            "capture is True, but the values of a callable uncertainty are read each round; use 'auto' or False"
        )
    if capture == "auto" and checked:
        return False
    if capture == "auto":
        return device.type == "cuda" and request.target.capturable and (drafter is None or drafter.capturable)
    return bool(capture)


def _recorded(function: Callable[[], T], pool: Any) -> Recording[T]:
    with casts_recorded():
        return Recording(function, pool)


class _Rounds:
    """What stays of the captured rounds of one kind, whoever asks for them."""

    def __init__(self, setup: Setup) -> None:
        self.account = Account(setup.request.process.num_steps, setup.request.seed)
        self.buffers: dict[int, Live] = {}
        """By batch size; of the conditioning the rows alone."""
        self.recordings: dict[tuple[int, int], Recording[Round]] = {}
        """By batch size and window."""
        self.pool = torch.cuda.graph_pool_handle()
        self.held: dict[Hashable, torch.Tensor] = {}
        """What the graphs read: it must live, though others may put something else in its place."""


class Graphs:
    """The captured rounds of one setup, by batch size and window.

    Args:
        setup: of the rounds.
        kept: what was recorded of them before; nobody else uses it.
    """

    def __init__(self, setup: Setup, kept: _Rounds) -> None:
        self.setup, self._kept = setup, kept
        self.account = kept.account

    @classmethod
    @without_gradients
    def of(cls, setup: Setup) -> Graphs:
        """Those of an earlier call of the same kind, with an empty account, unless somebody uses them; else new ones.

        They are given back when what is returned is gone.
        """
        target, key = setup.request.target, _key(setup)
        kept = _taken(target, key) or _Rounds(setup)
        kept.account.reset()
        graphs = cls(setup, kept)
        _given_back(graphs, target, key, kept)
        return graphs

    @without_gradients
    def advance(self, live: Live, window: int, watch: Stopwatch) -> tuple[Live, Round]:
        """As :func:`free.sampling.window.advance`, the round entered in :attr:`account`.

        What is returned lasts until the next round, and the situation's state and last window have moved on already.
        """
        batch, kept = len(live.index), self._kept
        buffers = kept.buffers.get(batch)
        if buffers is None:
            buffers = kept.buffers[batch] = replace(live, conditioning=_rows_of(live.conditioning)).clone()
        elif live is not buffers:
            assign(buffers, live)
        if (batch, window) not in kept.recordings:
            with watch.on_host("recording"):
                kept.recordings[batch, window] = self._record(buffers, window)
        with watch("round"):
            done = kept.recordings[batch, window]()
        return buffers, replace(done, situation=replace(done.situation, target=self.setup.request.target))

    def _record(self, buffers: Live, window: int) -> Recording[Round]:
        setup, request, account = self.setup, self.setup.request, self.account
        silent = Stopwatch(torch.device("cpu"))

        def one_round() -> Round:
            live = replace(buffers, conditioning={**request.conditioning, **buffers.conditioning})
            moved, done = advance(live, setup, window, silent)
            account.add(moved, done)
            assign(buffers, moved)
            # what is kept must not keep the model
            situation = replace(done.situation, target=cast(Target, None), conditioning=buffers.conditioning)
            return replace(done, situation=situation)

        # the calls that warm up are of finished samples, which leaves all but the last window as it is
        before = buffers.clone()
        buffers.step.fill_(request.process.num_steps)
        try:
            recording = _recorded(one_round, self._kept.pool)
        finally:
            assign(buffers, before)
        self._kept.held |= _read_by_graphs(request, setup.drafter, setup.reach)
        return recording


class _Steps:
    """What stays of the captured steps of one kind."""

    def __init__(self, request: Request) -> None:
        self.account = Account(request.process.num_steps, request.seed)
        chain = Chain.begin(request)
        self.chain = replace(chain, conditioning=_rows_of(chain.conditioning)).clone()
        self.recording: Recording[None] | None = None
        self.held: dict[Hashable, torch.Tensor] = {}


class AncestralGraph:
    """One captured step of the ancestral sampler, for all its steps.

    Args:
        request: whose steps they are.
        impl: of the operations.
        kept: what was recorded before; nobody else uses it.
    """

    def __init__(self, request: Request, impl: str, kept: _Steps) -> None:
        self._request, self._impl, self._kept = request, impl, kept
        self.account = kept.account

    @classmethod
    @without_gradients
    def of(cls, request: Request, impl: str) -> AncestralGraph:
        """As :meth:`Graphs.of`."""
        key = (weights(request.target.module), "step", baked(request, impl))
        kept = _taken(request.target, key) or _Steps(request)
        kept.account.reset()
        graph = cls(request, impl, kept)
        _given_back(graph, request.target, key, kept)
        return graph

    @without_gradients
    def advance(self, chain: Chain, watch: Stopwatch) -> Chain:
        """As :func:`step_on`, entered in :attr:`account`. What is returned lasts until the next step."""
        kept = self._kept
        if kept.recording is None:
            with watch.on_host("recording"):
                kept.recording = self._record()
            kept.account.reset()
        if chain is not kept.chain:
            assign(kept.chain, chain)
        with watch("round"):
            kept.recording()
        return kept.chain

    def _record(self) -> Recording[None]:
        request, impl, chain, account = self._request, self._impl, self._kept.chain, self.account
        silent = Stopwatch(torch.device("cpu"))

        def one_step() -> None:
            whole = replace(chain, conditioning={**request.conditioning, **chain.conditioning})
            moved, _ = step_on(whole, request, None, impl, silent)
            account.add_step(moved.step, moved.state)
            assign(chain, moved)

        recording = _recorded(one_step, torch.cuda.graph_pool_handle())
        self._kept.held |= _read_by_graphs(request)
        return recording


def _taken(target: Target, key: tuple[Hashable, ...]) -> Any:
    """What is kept of the target's model under ``key``, and from here on no longer; None if it is not there."""
    shelf = _shelf(target)
    # where the weights have moved, what was recorded of them serves nobody
    for other in [other for other in shelf if other[0] != key[0]]:
        del shelf[other]
    return shelf.pop(key, None)


def _given_back(user: Any, target: Target, key: tuple[Hashable, ...], kept: Any) -> None:
    """See to it that ``kept`` is there again when ``user`` is gone."""
    weakref.finalize(user, _put_back, _shelf(target), key, kept).atexit = False


def _put_back(shelf: dict[tuple[Hashable, ...], Any], key: tuple[Hashable, ...], kept: Any) -> None:
    """The least recently used of many is dropped."""
    shelf.pop(key, None)
    shelf[key] = kept
    while len(shelf) > _KEPT:
        del shelf[next(iter(shelf))]


def _shelf(target: Target) -> dict[tuple[Hashable, ...], Any]:
    return memory_of(target).setdefault("graphs", {})


def _rows_of(conditioning: dict[str, Any]) -> dict[str, Any]:
    """What differs from sample to sample; the rest may know the model, and stays with the caller."""
    return {name: value for name, value in conditioning.items() if has_rows(value)}


def _read_by_graphs(request: Request, *others: Any) -> dict[Hashable, torch.Tensor]:
    rest = [value for value in request.conditioning.values() if not has_rows(value)]
    return tensors_of(request.process, request.target, rest, *others)


def baked(request: Request, impl: str) -> tuple[Hashable, ...]:
    """All of a request that a graph cannot be told anew, but for where the model's weights are."""
    conditioning = tuple(
        (name, value.shape[1:], value.dtype) if has_rows(value) else (name, alike(value))
        for name, value in request.conditioning.items()
    )
    device = request.seed.device
    return (
        device,
        request.batch,
        request.sample_shape,
        request.guidance_scale,
        request.process.fingerprint(),
        conditioning,
        who_is(request.target),
        settings(request.target.module),
        impl,
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
    )


def drafter_key(drafter: Drafter) -> Hashable:
    """Equal for drafters that are alike: :func:`free.sampling.likeness.alike`."""
    return alike(drafter)


def _key(setup: Setup) -> tuple[Hashable, ...]:
    return (
        weights(setup.request.target.module),
        "rounds",
        drafter_key(setup.drafter),
        setup.widest,
        setup.reach.cpu().numpy().tobytes(),
        setup.relaxation,
        baked(setup.request, setup.impl),
    )
