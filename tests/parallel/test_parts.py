"""What a window over processes is made of, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from diffusers import DiTTransformer2DModel

import free
from free.drafters import as_drafter
from free.parallel.digest import checksum, digest
from free.parallel.group import Group, Point
from free.parallel.packing import pack, unpack
from free.sampling.account import Account
from free.sampling.capture import wants_capture
from free.sampling.statistics import Stopwatch
from free.sampling.window import Setup, advance, first_window
from tests.analytic import ElementwiseTarget
from tests.unit.helpers import on_meta
from tests.unit.rehearsal import request_for

SAMPLED: dict[str, Any] = {"shape": (6,), "seed": [1, 2], "num_inference_steps": 8, "window": 3}


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_torch_distributed() -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised: start the processes by torchrun"):
        free.WindowParallel(ElementwiseTarget())


@pytest.mark.usefixtures("group_of_one")
def test_in_a_group_of_one_nothing_is_split() -> None:
    target = free.WindowParallel(ElementwiseTarget())
    expected = free.speculative_sample(ElementwiseTarget(), **SAMPLED)
    assert torch.equal(free.speculative_sample(target, **SAMPLED).samples, expected.samples)
    assert not target.bytes


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(("group", "given"), [("window", "str"), (0, "int")])
def test_what_is_no_group(group: Any, given: str) -> None:
    with pytest.raises(
        ValueError, match=f"group is {given}; allowed is a ProcessGroup of this process, a DeviceMesh of one"
    ):
        free.WindowParallel(ElementwiseTarget(), group)


@pytest.mark.usefixtures("group_of_one")
def test_a_group_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ValueError, match="group has the backends 'cuda:nccl', which cannot carry the hosts' words"):
        free.WindowParallel(ElementwiseTarget())


def test_no_graph_of_rounds_over_processes() -> None:
    ranks = SimpleNamespace(size=2)
    request: Any = SimpleNamespace(
        seed=SimpleNamespace(device=torch.device("cuda")), target=SimpleNamespace(ranks=ranks, capturable=False)
    )
    assert not wants_capture("auto", request)
    with pytest.raises(ValueError, match="capture is True, but the model runs on several processes"):
        wants_capture(True, request)


class Pretended(Group):
    """One of several processes, the others of which never come: exchanges leave what they find."""

    def _exchange(self, what: str, collective: Callable[[], Any]) -> None:
        pass

    def _meet(self, point: Point, number: float = 0.0, message: str = "") -> list[float]:
        return [number] * self.size


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["gains", "hold-x0"])
def test_a_round_reads_nothing_from_the_device(
    make_dit: Callable[..., DiTTransformer2DModel], monkeypatch: pytest.MonkeyPatch, name: str, rank: int
) -> None:
    """Sizes are known to the host, and what it is told by others goes from host to host."""
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    process = free.ReverseProcess.ddpm(20)
    request = request_for(make_dit(), class_labels=[1, 2, 3], process=process, guidance_scale=1.5)
    moved = {field: on_meta(getattr(request, field)) for field in ("process", "conditioning", "seed")}
    target = object.__new__(free.WindowParallel)
    target.__dict__.update(vars(free.as_target(make_dit().to("meta"))))
    target.target, target.ranks, target._apart = free.as_target(make_dit().to("meta")), Pretended(cast(Any, None)), None
    setup = Setup.of(dataclasses.replace(request, target=target, **moved), as_drafter(name), 5, "auto")
    setup = dataclasses.replace(setup, static_shapes=True)
    account, watch = Account(20, setup.request.seed), Stopwatch(torch.device("cpu"))
    with torch.no_grad():
        live = first_window(setup, torch.empty(3, 128, device="meta"))
        for _ in range(2):
            live, done = advance(live, setup, 5, watch)
            account.add(live, done)
    assert live.state.shape == (3, 128)
    assert target._apart is not None
    # 15 states of 128 numbers, both halves of the guidance, in two shares of 8; a checksum in 16 bytes
    assert target.bytes["outputs"] == 2 * 2 * (2 * 8 * 128 * 4 + 16)


TENSORS = [
    torch.arange(6.0).view(2, 3),
    None,
    torch.tensor([[True], [False]]),
    torch.arange(10, dtype=torch.bfloat16).view(2, 5)[:, ::2],
    torch.tensor([-7, 2**60]),
    torch.empty(2, 0),
]


def test_packed_tensors_come_out_as_they_went_in() -> None:
    packed = pack(TENSORS)
    assert packed.dtype == torch.uint8
    assert len(packed) % 16 == 0
    others = pack([None if tensor is None else torch.zeros_like(tensor) for tensor in TENSORS])
    for got, tensor in zip(unpack(torch.stack((packed, others)), TENSORS), TENSORS, strict=True):
        if tensor is None:
            assert got is None
        else:
            assert got is not None
            assert got.dtype == tensor.dtype
            assert torch.equal(got, torch.cat((tensor, torch.zeros_like(tensor))))


def test_a_checksum_sees_each_bit_and_each_place() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    changed = [values.clone() for _ in range(3)]
    changed[0][3] = torch.nextafter(values[3], torch.tensor(9.0))
    changed[1][[5, 6]] = values[[6, 5]]
    changed[2] = -values
    sums = {int(checksum(one)) for one in (values, *changed)}
    assert len(sums) == 4
    assert int(checksum(values)) == int(checksum(values.clone()))
    assert int(checksum(values, values[:1])) != int(checksum(values))
    assert int(checksum(torch.tensor([1.0, float("nan")]))) == int(checksum(torch.tensor([1.0, float("nan")])))


def test_a_checksum_of_many_numbers_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are looked at a part at a time; a place counts as such in each part."""
    values = torch.arange(24.0)
    monkeypatch.setattr("free.parallel.digest._AT_ONCE", 8)
    assert int(checksum(values)) != int(checksum(torch.cat((values[8:16], values[:8], values[16:]))))


def test_digests_are_of_what_a_call_means() -> None:
    """Other processes hold other objects, on other devices, and things of their own."""
    linear = torch.nn.Linear(2, 2).eval()
    same = torch.nn.Linear(2, 2).eval()
    same.load_state_dict(linear.state_dict())
    assert digest(free.as_target(linear)) == digest(free.as_target(same))
    before = digest(linear)
    with torch.no_grad():
        linear.weight[0, 0] += 1  # a checksum that is remembered is of the tensor as it was
    assert digest(linear) != before
    assert digest(torch.device("cuda:0")) == digest(torch.device("cuda:1"))
    assert digest({"a": 1}) != digest({"a": 1.0})
    assert digest(free.Fresh(as_drafter("hold-x0"))) != digest(as_drafter("hold-x0"))
    assert digest(free.Relaxation(0.5, "residual")) != digest(free.Relaxation(0.6, "residual"))
