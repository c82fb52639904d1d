"""Threads that share models, targets and drafters draw what each would draw alone, to the bit."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free.sampling.sharing import exclusively
from tests.analytic import ElementwiseTarget

THREADS = 4
PATIENCE = 60.0
"""Seconds after which threads that wait for each other are taken for dead."""

Sample = Callable[[int], torch.Tensor]


@pytest.fixture(autouse=True)
def _threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call returned or raised, a thread each, begun together."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "threads wait for each other"
    return results


def check(sample: Sample) -> None:
    """Four threads against one after the other."""
    alone = [sample(i) for i in range(THREADS)]
    together = at_once([functools.partial(sample, i) for i in range(THREADS)])
    for got, expected in zip(together, alone, strict=True):
        assert isinstance(got, torch.Tensor), got
        assert torch.equal(got, expected)


def lively(dit: DiTTransformer2DModel) -> free.FeatureDrafter:
    """A drafter whose drafts do depend on features and labels."""
    drafter = free.FeatureDrafter.from_target(dit)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return drafter


@pytest.mark.parametrize("shares", ["model", "target"])
def test_features(dit: DiTTransformer2DModel, shares: str) -> None:
    model: Any = dit if shares == "model" else free.as_target(dit)
    drafter = lively(dit)
    check(
        lambda i: free.speculative_sample(
            # one of them runs without features, beside those with
            model, "hold-x0" if i == 3 else drafter, class_labels=[i, 1], seed=i, num_inference_steps=12, window=4
        ).samples
    )  # fmt: skip


def test_learned_variance(make_dit: Callable[..., DiTTransformer2DModel]) -> None:
    target = free.as_target(make_dit(out_channels=4))

    def sample(i: int) -> torch.Tensor:
        if i == 3:
            return free.average_learned_variance(target, 12, num_trajectories=1)
        relaxation = free.Relaxation(4.0) if i else None
        return free.speculative_sample(
            target, class_labels=[i, 1], seed=i, num_inference_steps=12, window=4, relaxation=relaxation
        ).samples

    check(sample)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6, bias=False)
        torch.nn.init.eye_(self.linear.weight)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) * (1 + 1e-3 * timestep[:, None])


@pytest.mark.parametrize("models", [1, 2])
def test_compiled_models(models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # traced and guarded as by any other backend, without a compiler's seconds
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shared = [Network().eval() for _ in range(models)]

    def sample(i: int) -> torch.Tensor:
        model = shared[i % models]
        return free.speculative_sample(model, shape=(6,), seed=i, num_inference_steps=12, window=4, compile=i != 3).samples

    check(sample)
    assert not any("forward" in vars(model) for model in shared)


class Reusing(ElementwiseTarget):
    """Computes in memory of its own."""

    def __init__(self) -> None:
        self.memory = torch.empty(64, 3000)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return self.memory[: len(x)].copy_(super().__call__(x, timestep))


@pytest.mark.parametrize("held_by", ["target", "drafter", "method"])
def test_a_model_with_memory_of_its_own(held_by: str) -> None:
    model = Reusing()

    def sample(i: int) -> torch.Tensor:
        pair: dict[str, tuple[Any, Any]] = {
            "target": (model, "hold-x0"),
            "drafter": (ElementwiseTarget(), free.Fresh(free.ModelDrafter(model))),
            "method": (model.__call__, functools.partial(model)),
        }
        return free.speculative_sample(*pair[held_by], shape=(3000,), seed=i, num_inference_steps=8, window=3).samples

    check(sample)


def test_models_that_draft_for_each_other_do_not_wait_for_each_other() -> None:
    pair = (Network().eval(), Network().eval())

    def sample(i: int) -> torch.Tensor:
        model, drafter = pair if i % 2 else pair[::-1]
        samples = [
            free.speculative_sample(model, drafter, shape=(6,), seed=[i, n], num_inference_steps=3, window=2).samples
            for n in range(20)
        ]
        return torch.cat(samples)

    check(sample)


def test_others_wait_and_the_same_thread_does_not() -> None:
    shared, inside, seen = ElementwiseTarget(), threading.Event(), []

    def other() -> None:
        inside.wait()
        with exclusively(shared):
            seen.append("other")

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with exclusively(shared, "a name"), exclusively("a name", shared):
        inside.set()
        thread.join(0.2)
        assert thread.is_alive()
        seen.append("first")
    thread.join(PATIENCE)
    assert seen == ["first", "other"]
    with exclusively([1], {}, [2]):  # nothing that can be a key
        pass


# --- within one thread ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["hold-x0", "feature"])
@pytest.mark.parametrize("outer", ["hold-x0", "feature"])
def test_a_callback_may_sample_the_model_that_called_it(
    make_dit: Callable[..., DiTTransformer2DModel], outer: str, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    dit = make_dit(out_channels=4)
    target, drafters = free.as_target(dit), {"hold-x0": "hold-x0", "feature": lively(dit)}
    run: dict[str, Any] = {"class_labels": [2, 1], "num_inference_steps": 6, "window": 3, "compile": True}
    expected = free.speculative_sample(target, drafters[outer], **run, seed=5, relaxation=free.Relaxation(1.0)).samples

    def again(*_: Any) -> None:
        if again.left:
            again.left -= 1
            free.speculative_sample(target, drafters[inner], **run, seed=9, relaxation=free.Relaxation(1.0))

    again.left = 2  # type: ignore[attr-defined]
    got = free.speculative_sample(
        target, drafters[outer], **run, seed=5, relaxation=free.Relaxation(1.0), callback_on_step_end=again
    ).samples
    assert torch.equal(got, expected)
    assert (target.runs, target.compiled) == (0, False)
    assert not any("forward" in vars(module) for module in dit.modules())
    assert not dit.transformer_blocks[-1]._forward_hooks


def test_a_forward_of_the_instances_own_outlives_a_compiled_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    network = Network().eval()
    own = network.forward
    network.forward = own  # as a hook of accelerate's does
    free.ancestral_sample(network, shape=(6,), num_inference_steps=2, seed=0, compile=True)
    assert vars(network)["forward"] is own


def test_somebody_else_who_calls_the_model_is_found_out(dit: DiTTransformer2DModel) -> None:
    """The sampler cannot keep them out; but a feature of theirs must not become an anchor."""
    calls = [torch.zeros(1, 2, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)]
    intruder = threading.Thread(target=torch.no_grad()(dit), args=calls)

    def meanwhile(*_: Any) -> None:
        if intruder.ident is None:
            intruder.start()
            intruder.join()

    dit.transformer_blocks[0].register_forward_pre_hook(meanwhile)
    with pytest.raises(RuntimeError, match="top block ran 2 times within one forward: somebody else calls the model"):
        free.speculative_sample(dit, lively(dit), class_labels=[0, 1], num_inference_steps=4, window=2, seed=0)
