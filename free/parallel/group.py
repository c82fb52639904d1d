"""Processes that go through the same rounds: how they stay together, and how they end together.

Before each exchange of tensors all say, in a few words over the host's own network, where they are. So nobody enters an
exchange that another one never comes to: who has raised says so instead, and takes the others along with its message. The
words go from host to host; the device, which may be a round behind, is not waited for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from free.parallel.digest import describe, digest, terms_of
from free.parallel.packing import pack, unpack
from free.targets.ranks import Ranks

T = TypeVar("T", bound=tuple[Any, ...])

_MESSAGE = 2048
"""Bytes of a message: all ranks send as many."""
_TERMS = 32
"""Digests that are compared at a call's start, most of them zeros."""


class RankError(RuntimeError):
    """Another process of the group has raised, has ended, or does not do what this one does; the message says which."""


class Point(IntEnum):
    """Where a process is."""

    BEGIN = 0
    EVALUATE = 1
    SETTLE = 2  # and waits for the first rank
    NUMBER = 3
    END = 4
    FAILED = 5

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Point.BEGIN: "begins a call",
    Point.EVALUATE: "has evaluated its share of {} states",
    Point.SETTLE: "settles a round",
    Point.NUMBER: "has chosen a number",
    Point.END: "ends a call",
    Point.FAILED: "has raised",
}


class Group(Ranks):
    """The processes of a ``torch.distributed`` group, more than one, all of which make the same calls in the same order.

    Args:
        group: with a way between the hosts, gloo, and one between the devices.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device = torch.device("cpu")
        """Where the target computes."""
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []
        """What is on its way, which must live until it has arrived."""
        self.bytes: Counter[str] = Counter()
        """That were exchanged so far, as each process received them, by what for: ``"outputs"``, ``"settled"``, and
        ``"words"`` between the hosts."""

    @contextmanager
    def call(self, request: Any, drafter: Any, **settings: Any) -> Iterator[None]:
        self._compare(terms_of(request, drafter, settings))
        try:
            yield
        except RankError:
            raise  # all know
        except BaseException as error:
            # the others may be gone as well: what has happened here is what matters here
            with suppress(RankError):
                self._meet(Point.FAILED, message=f"{type(error).__name__}: {error}")
            raise
        self._meet(Point.END)

    def first(self, number: float) -> float:
        return self._meet(Point.NUMBER, number)[0]

    def any(self, flag: bool) -> bool:
        return any(self._meet(Point.NUMBER, float(flag)))

    def settled(self, settle: Callable[[], T]) -> T:
        # rank 0 does not wait for the others, who wait for it alone; so who has failed must still take what it sends
        values, failure = None, None
        try:
            values = settle()
            packed = pack(values)
        except BaseException as error:
            failure, packed = error, torch.empty(0, dtype=torch.uint8)
        size = self._from_first(torch.tensor([-1 if failure else len(packed)]))
        self.bytes["words"] += size.element_size()
        if int(size) < 0:
            if failure is None:
                self._meet(Point.SETTLE)  # where rank 0 says what has happened
            raise failure or RankError("rank 0 has settled nothing")
        if failure is not None:
            packed = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        packed = self._from_first(packed)
        self.bytes["settled"] += len(packed)
        if failure is not None:
            raise failure
        assert values is not None
        return values if self.rank == 0 else cast(T, tuple(unpack(packed[None], values)))

    def _from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's."""

        def send() -> None:
            work = dist.broadcast(tensor, group=self._group, group_src=0, async_op=self.rank == 0 and not tensor.is_cuda)
            self._sent += [(work, tensor)] if work is not None else []

        self._exchange("what was settled", send)
        return tensor

    def gather(self, states: int, own: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Each tensor of all processes, one after the other along a new first axis; of ``states`` states in all."""
        packed = pack(own)
        self._device = packed.device
        everybodys = packed.new_empty(self.size, len(packed))
        self._meet_alike(Point.EVALUATE, states)
        self._exchange("outputs", lambda: dist.all_gather(list(everybodys.unbind()), packed, group=self._group))
        self.bytes["outputs"] += everybodys.numel()
        return unpack(everybodys, own)

    def _compare(self, terms: dict[str, Any]) -> None:
        """Raise a ValueError, on all alike, that names the first of the terms that is not the same everywhere."""
        own = {name: digest(value) for name, value in terms.items()}
        names = digest(tuple(own))
        said = self._meet(Point.BEGIN, float(names >> 16))  # a number of 53 bits is whole as a float
        digests = torch.tensor([*own.values(), *[0] * (_TERMS - len(own))])
        everybodys = self._words(digests)
        unlike = [name for name, column in zip(own, everybodys.T.tolist(), strict=False) if len(set(column)) > 1]
        if len(set(said)) == 1 and not unlike:
            return
        what = unlike[0] if len(set(said)) == 1 else "call"
        descriptions = self._messages(describe(terms[what]))
        other = next(rank for rank in range(self.size) if descriptions[rank] != descriptions[0])
        raise ValueError(
            f"{what} is not the same on all ranks: {descriptions[0]} on rank 0, {descriptions[other]} on rank {other}; all "
            "ranks must make the same call" + (", with a seed, or generators in the same state" if what == "seed" else "")
        )

    def _meet_alike(self, point: Point, number: int) -> None:
        """As :meth:`_meet`, with a number that must be the same everywhere."""
        numbers = self._meet(point, number)
        other = next((rank for rank in range(self.size) if numbers[rank] != numbers[0]), None)
        if other is not None:
            raise _diverged(other, *(point.words.format(int(numbers[rank])) for rank in (0, other)))

    def _meet(self, point: Point, number: float = 0.0, message: str = "") -> list[float]:
        """All say where they are, with a number; returns everybody's.

        Raises:
            RankError: somebody has failed, or is elsewhere; but not where this one has failed itself.
        """
        words = self._words(torch.tensor([float(point), number], dtype=torch.float64))
        points, numbers = [Point(int(value)) for value in words[:, 0].tolist()], words[:, 1].tolist()
        if Point.FAILED in points:
            rank = points.index(Point.FAILED)
            said = self._messages(message)[rank]
            if point is not Point.FAILED:
                raise RankError(f"rank {rank} has raised {said}")
        elif len(set(points)) > 1:
            other = next(rank for rank in range(self.size) if points[rank] != points[0])
            raise _diverged(other, *(points[rank].words.format(int(numbers[rank])) for rank in (0, other)))
        return numbers

    def _words(self, own: torch.Tensor) -> torch.Tensor:
        """[R, N] of each rank's [N], from host to host."""
        everybodys = own.new_empty(self.size, len(own))

        def exchange() -> None:
            while self._sent:
                self._sent.pop()[0].wait()
            dist.all_gather(list(everybodys.unbind()), own, group=self._group)

        self._exchange("words", exchange)
        self.bytes["words"] += everybodys.numel() * everybodys.element_size()
        return everybodys

    def _messages(self, own: str) -> list[str]:
        """Each rank's, the beginning of a long one."""
        content = own.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0")
        everybodys = self._words(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in everybodys]

    def _exchange(self, what: str, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} has lost the others while {what} were exchanged: a process has ended, or "
                f"has not answered within the group's timeout ({str(error).splitlines()[0]})"
            ) from error


def group_of(group: dist.ProcessGroup | dist.DeviceMesh | None) -> Ranks:
    """Those of a process group, of the one axis of a device mesh, or of all processes.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, this process is no member, the mesh has several axes, or the
            group has no way between the hosts.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialised: start the processes by torchrun, and call "
            "torch.distributed.init_process_group('cpu:gloo,cuda:nccl') before"
        )
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of axes {group.mesh_dim_names}; allowed is one of one axis, as mesh['window'] is"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        given = "a group without this process" if group is dist.GroupMember.NON_GROUP_MEMBER else type(group).__name__
        raise ValueError(f"group is {given}; allowed is a ProcessGroup of this process, a DeviceMesh of one axis, or None")
    backends = dist.get_backend_config(group)
    if "cpu:gloo" not in backends:
        raise ValueError(
            f"group has the backends {backends!r}, which cannot carry the hosts' words; give it gloo beside, by "
            "init_process_group('cpu:gloo,cuda:nccl')"
        )
    return Group(group) if dist.get_world_size(group) > 1 else Ranks()


def _diverged(rank: int, ours: str, theirs: str) -> RankError:
    """What rank 0 and another one say of where they are."""
    return RankError(
        f"the ranks have diverged: rank 0 {ours}, rank {rank} {theirs}; all must make the same calls with the same arguments"
    )
