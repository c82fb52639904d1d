"""Rounds as CUDA graphs: what a round launches is recorded once for each batch size and window, and replayed.

A graph reads and writes memory of its own. All graphs of a batch size share one set of buffers,
:class:`free.sampling.window.Live`, which a round moves on in place; what is not a tensor (the guidance scale, the shapes) is
baked in. Noise is made from seed and step, so that no random state has to follow. The graphs stay with the target: who
samples again with the same :class:`free.Target` finds them there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

from free.drafters import Drafter
from free.sampling.account import Account
from free.sampling.ancestral import Chain, step_on
from free.sampling.relaxation import Relaxation
from free.sampling.request import Request
from free.sampling.statistics import Stopwatch
from free.sampling.tensors import assign
from free.sampling.window import Live, Round, Setup, advance
from free.targets import Target

T = TypeVar("T")

_KEPT = 4
"""Configurations whose graphs, and the memory that they hold, stay with a target."""


def wants_capture(
    capture: str | bool, request: Request, drafter: Drafter | None = None, relaxation: Relaxation | None = None
) -> bool:
    """Whether the rounds are to be captured.

    Raises:
        ValueError: ``capture`` is none of ``"auto"``, True and False, or True where there is no CUDA device or where the
            relaxation asks the device.
    """
    if not (isinstance(capture, bool) or capture == "auto"):
        raise ValueError(f"capture is {capture!r}; allowed are 'auto', True and False")
    device = request.seed.device
    if capture is True and device.type != "cuda":
        raise ValueError(f"capture is True, but the model runs on {device}: a graph needs CUDA; use 'auto' or False")
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


class Recording(Generic[T]):
    """What a function launches on the device, as one graph; a call launches it again.

    Args:
        function: works in place on tensors that stay where they are, and must not read from the device. It is called twice
            outside the graph, to compile and load what that takes.
        pool: of the graphs' memory.
    """

    def __init__(self, function: Callable[[], T], pool: Any) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = function()

    def __call__(self) -> T:
        self._graph.replay()
        return self._result


class Graphs:
    """The captured rounds of one setup, by batch size and window.

    Args:
        setup: kept, with the process, the weights and the drafter that the graphs read.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.account = Account(setup.request.process.num_steps, setup.request.seed)
        self._buffers: dict[int, Live] = {}
        self._rounds: dict[tuple[int, int], Recording[Round]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._held: list[Any] = []

    @classmethod
    def of(cls, setup: Setup) -> Graphs:
        """Those that the target kept of an earlier call of the same setup, their account empty again; else new ones."""
        graphs = kept(setup.request.target, _key(setup), lambda: cls(setup))
        graphs.account.reset()
        return graphs

    def advance(self, live: Live, window: int, watch: Stopwatch) -> tuple[Live, Round]:
        """As :func:`free.sampling.window.advance`, the round entered in :attr:`account`.

        What is returned lasts until the next round, and the situation's state and last window have moved on already.
        """
        batch = len(live.index)
        buffers = self._buffers.get(batch)
        if buffers is None:
            buffers = self._buffers[batch] = live.clone()
        if (batch, window) not in self._rounds:
            self._rounds[batch, window] = self._record(buffers, window)
        if live is not buffers:
            assign(buffers, live)
        with watch("round"):
            return buffers, self._rounds[batch, window]()

    def _record(self, buffers: Live, window: int) -> Recording[Round]:
        silent = Stopwatch(torch.device("cpu"))

        def one_round() -> Round:
            moved, done = advance(buffers, self.setup, window, silent)
            self.account.add(moved, done)
            assign(buffers, moved)
            return done

        # the calls that warm up are of finished samples, which leaves all but the last window as it is
        before = buffers.clone()
        buffers.step.fill_(self.setup.request.process.num_steps)
        recording = Recording(one_round, self._pool)
        # what the drafter prepared is read by the graph: it must live, though the drafter may put other things in its place
        self._held.append(dict(vars(self.setup.drafter)))
        assign(buffers, before)
        return recording


class AncestralGraph:
    """One captured step of the ancestral sampler, for all its steps."""

    def __init__(self, request: Request, impl: str) -> None:
        self.account = Account(request.process.num_steps, request.seed)
        chain = Chain.begin(request).clone()
        silent = Stopwatch(torch.device("cpu"))

        def one_step() -> Chain:
            moved, _ = step_on(chain, request, None, impl, silent)
            self.account.add_step(moved.step, moved.state)
            assign(chain, moved)
            return chain

        self._step = Recording(one_step, torch.cuda.graph_pool_handle())
        self._chain = chain

    @classmethod
    def of(cls, request: Request, impl: str) -> AncestralGraph:
        """As :meth:`Graphs.of`."""
        graph = kept(request.target, ("step", *baked(request, impl)), lambda: cls(request, impl))
        graph.account.reset()
        return graph

    def advance(self, chain: Chain, watch: Stopwatch) -> Chain:
        """As :func:`step_on`, entered in :attr:`account`. What is returned lasts until the next step."""
        if chain is not self._chain:
            assign(self._chain, chain)
        with watch("round"):
            return self._step()


def kept(target: Target, key: Hashable, make: Callable[[], T]) -> T:
    """What the target keeps under ``key``, made if it is not there; the least recently used of many is dropped."""
    found = target.graphs.pop(key, None) or make()
    target.graphs[key] = found
    while len(target.graphs) > _KEPT:
        del target.graphs[next(iter(target.graphs))]
    return found


def baked(request: Request, impl: str) -> tuple[Hashable, ...]:
    """All of a request that a graph cannot be told anew."""
    conditioning = tuple(
        (name, value.shape[1:], value.dtype) if isinstance(value, torch.Tensor) and value.dim() else (name, id(value))
        for name, value in request.conditioning.items()
    )
    return (
        request.batch,
        request.sample_shape,
        request.guidance_scale,
        request.process.fingerprint(),
        conditioning,
        tuple(weights(request.target)),
        impl,
        request.target.compiled,
        request.target.runs,
    )


def weights(*holders: Any) -> Iterator[tuple[int, torch.dtype]]:
    """Where the parameters are of whatever modules and targets ``holders`` are or hold: a graph reads them there."""
    for holder in holders:
        module = holder.module if isinstance(holder, Target) else holder
        if isinstance(module, torch.nn.Module):
            for parameter in module.parameters():
                yield parameter.data_ptr(), parameter.dtype


def drafter_key(drafter: Drafter) -> Hashable:
    """Equal for drafters that are alike, by class, name and weights."""
    return type(drafter), drafter.name, tuple(weights(*vars(drafter).values()))


def _key(setup: Setup) -> Hashable:
    drafter = setup.drafter
    return (
        "rounds",
        # one that holds anything is only like itself
        id(drafter) if vars(drafter) else None,
        drafter_key(drafter),
        setup.widest,
        setup.reach.cpu().numpy().tobytes(),
        setup.relaxation,
        *baked(setup.request, setup.impl),
    )
