"""How much a round launches outside the forward: a captured one pays for each launch, whatever it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free import FeatureDrafter, Relaxation, ReverseProcess
from free.drafters import as_drafter
from free.sampling.account import Account
from free.sampling.request import Options, check_request
from free.sampling.statistics import Stopwatch
from free.sampling.tensors import assign
from free.sampling.window import Setup, advance, first_window
from tests.operations import Operations
from tests.unit.helpers import on_meta

pytest.importorskip("triton")

STEPS = 50
SHAPE = (4, 32, 32)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def dit() -> DiTTransformer2DModel:
    """Samples of a DiT-XL/2 at 256², with a learned variance, of which a step reads but a half: its output has gaps."""
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=32,
        patch_size=8, num_embeds_ada_norm=5,
    ).eval()  # fmt: skip


def launches(
    name: str,
    relaxation: Relaxation | None = None,
    batch: int = 1,
    window: int = 8,
    widest: int | None = None,
    guidance_scale: float = 1.5,
    **options: Any,
) -> Operations:
    """What the second round of a captured run records beside the networks."""
    process, model = ReverseProcess.ddpm(STEPS), dit()
    asked = Options(seed=0, class_labels=[1] * batch, process=process, guidance_scale=guidance_scale)
    request = check_request(model, asked)
    if name == "feature":
        drafter = torch.nn.Module.to(FeatureDrafter.from_target(model, **options), "meta")
    else:
        drafter = as_drafter(name)
    moved = {field: on_meta(getattr(request, field)) for field in ("process", "conditioning", "seed")}
    target = free.as_target(model.to("meta"))
    request = dataclasses.replace(request, target=target, **moved)
    operations = Operations()
    with ExitStack() as during:
        for network in (target, drafter):
            if hasattr(network, "forward"):
                during.enter_context(mock.patch.object(network, "forward", operations.unseen(network.forward)))
        if drafter.needs_features:
            during.enter_context(target.capture_features())
        if relaxation is not None:
            during.enter_context(relaxation.capture(target))
        during.enter_context(operations)
        setup = Setup.of(request, drafter, widest or window, "triton", relaxation=relaxation)
        setup = dataclasses.replace(setup, static_shapes=True)
        account, watch = Account(STEPS, request.seed), Stopwatch(torch.device("cpu"))
        live = first_window(setup, torch.empty(batch, 4096, device="meta")).clone()
        for _ in range(2):
            operations.counts.clear()
            moved_on, done = advance(live, setup, window, watch)
            account.add(moved_on, done)
            assign(live, moved_on)
    return operations


@pytest.mark.parametrize(
    ("most", "given"),
    [
        (14, {"name": "hold-x0"}),
        (14, {"name": "hold-output"}),
        (14, {"name": "hold-x0", "batch": 16}),
        (13, {"name": "hold-x0", "guidance_scale": 1.0}),
        (15, {"name": "hold-x0", "batch": 4, "window": 4, "widest": 8}),
        (11, {"name": "hold-x0", "window": 1}),
        (96, {"name": "feature"}),
        (84, {"name": "feature", "base": "hold-x0"}),
        (19, {"name": "gains"}),
        (19, {"name": "gains", "batch": 16}),
        (14, {"name": "gains", "window": 1}),
        (20, {"name": "hold-x0", "relaxation": Relaxation(1.0, "residual")}),
        (22, {"name": "hold-x0", "relaxation": Relaxation(1.0, "residual", budget=0.1)}),
        (21, {"name": "hold-x0", "relaxation": Relaxation(1.0, "learned")}),
        (23, {"name": "hold-x0", "relaxation": Relaxation(1.0, "learned", budget=0.1)}),
        (27, {"name": "gains", "relaxation": Relaxation(1.0, "residual", budget=0.1)}),
        (28, {"name": "gains", "relaxation": Relaxation(1.0, "learned", budget=0.1)}),
    ],
)
def test_a_round_launches_no_more_than_this_outside_the_networks(most: int, given: dict[str, Any]) -> None:
    operations = launches(**given)
    assert operations.total() <= most, operations.counts


def test_what_is_counted() -> None:
    first, second = torch.empty(2, 4, 3, device="meta")
    with Operations() as operations:
        view = first[1:].T.unflatten(0, (3, 1)).detach()
        torch.empty_like(view)
        assert not operations.total()
        first.reshape(-1)
        first.T.reshape(-1)  # a copy
        assert operations.total() == 1
        torch.where(first > 0, first, 0.0)  # compares, makes the zero, chooses
        assert operations.total() == 4
        torch._foreach_copy_([first, second], [second.clone(), first.clone()])
        assert operations.counts["_foreach_copy_"] == 1
        torch._foreach_copy_([first[:, :2], second[:, :2]], [first[:, 1:], second[:, 1:]])  # they have gaps
        assert operations.counts["_foreach_copy_"] == 3
        operations.unseen(torch.add)(first, 1)
        assert operations.counts["add"] == 0
