"""What only a GPU can show of the samplers: rounds that wait for nothing, and graphs that change nothing.

What compiles comes last: an error of the compiler's may take the process along.
"""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free.drafters import as_drafter
from free.sampling.capture import Graphs
from free.sampling.loop import Run
from free.sampling.memory import memory_of
from free.sampling.recording import Recording
from free.sampling.request import Options, check_request
from free.sampling.window import Setup, evaluate, first_window, propose
from free.targets import TargetOutput
from free.windows import FixedWindow
from tests.analytic import ElementwiseTarget

pytestmark = pytest.mark.gpu


@pytest.fixture
def _default_sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def target(make_dit: Callable[..., DiTTransformer2DModel]) -> free.DiTTarget:
    return free.DiTTarget(make_dit().cuda().bfloat16())


def forward_of(target: free.DiTTarget, guidance_scale: float = 1.5) -> Callable[[], TargetOutput]:
    """One forward over the first window of two samples: a chain of bfloat16 forwards is chaotic, and compares nothing."""
    with torch.no_grad():
        request = check_request(target, Options(class_labels=[1, 2], guidance_scale=guidance_scale, seed=1))
        setup = Setup.of(request, as_drafter("hold-x0"), 4, "auto")
        query = propose(first_window(setup, request.initial_state()), setup, 4).query
    return functools.partial(evaluate, query, request.conditioning, request)


def assert_close(got: TargetOutput, expected: TargetOutput) -> None:
    """Up to what bfloat16 leaves of one forward: outputs of different batch sizes differ by as much."""
    for name in ("output", "unconditional"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        if theirs is not None:
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=0.05 * float(theirs.float().std()))


@pytest.mark.usefixtures("_default_sync_mode")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("drafter", ["hold-x0", "gains"])
@torch.no_grad()
def test_no_round_synchronises(target: free.DiTTarget, drafter: str, window: int, captured: bool) -> None:
    process = free.ReverseProcess.ddpm(60)
    request = check_request(target, Options(class_labels=[0, 1, 2], process=process, guidance_scale=1.5, seed=0))
    setup = Setup.of(request, as_drafter(drafter), window, "auto")
    assert setup.static_shapes
    for turn_number in range(2):  # the first run compiles kernels and records graphs of every batch size
        graphs = Graphs.of(setup) if captured else None
        run = Run(setup, graphs)
        torch.cuda.synchronize()
        if turn_number:
            torch.cuda.set_sync_debug_mode("error")
            with pytest.raises(RuntimeError):
                run.state.sum().item()  # the mode does see one
        for _ in run.turns(FixedWindow(setup.widest), 1):
            pass
        torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(run.state).all()
        del run, graphs  # who holds them keeps them from the next run


@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output", "gains"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_captured_run_equals_the_eager_one_to_the_bit(drafter: str, window: int, order: int) -> None:
    """Elementwise, so that the shapes that batches shrink through do not matter."""
    target = free.as_target(ElementwiseTarget())
    angle = torch.linspace(1.5, 0.0, 51)
    timestep = free.ReverseProcess.ddpm(50).timestep
    for seed in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):
        common: dict[str, Any] = {
            "latents": torch.full((5, 4, 8, 8), 0.5, device="cuda"),
            "process": free.ReverseProcess.from_levels(angle.cos(), angle.sin(), timestep, order=order),
            "seed": seed,
            "window": window,
        }
        eager = free.speculative_sample(target, drafter, capture=False, **common)
        captured = free.speculative_sample(target, drafter, capture=True, **common)
        assert torch.equal(captured.samples, eager.samples)
        for name in ("rounds", "tested", "accepted"):
            assert getattr(captured.stats, name).tolist() == getattr(eager.stats, name).tolist()
        assert captured.stats.seconds["round"] > 0
        del common["window"]
        step_by_step = [free.ancestral_sample(target, capture=capture, **common).samples for capture in (False, True)]
        assert torch.equal(*step_by_step)


@pytest.mark.parametrize("drafter", ["hold-x0", "gains"])
def test_captured_engines_and_policies_draw_what_the_eager_sampler_draws(drafter: str) -> None:
    target = free.as_target(ElementwiseTarget())
    latents = torch.full((1, 4, 8, 8), 0.5, device="cuda")
    common: dict[str, Any] = {"process": free.ReverseProcess.ddpm(30), "window": 4}
    expected = [
        free.speculative_sample(target, drafter, latents=latents, seed=seed, capture=False, **common).samples[0]
        for seed in range(7)
    ]
    engine = free.Engine(target, drafter, slots=4, capture=True, **common)
    handles = [engine.add(latents=latents, seed=seed) for seed in range(7)]
    list(engine.run())
    policy = free.Sampler(target, shape=(4, 8, 8), num_samples=1, drafter=drafter, capture=True, **common)
    for handle, samples in zip(handles, expected, strict=True):
        assert torch.equal(handle.sample, samples)
        assert torch.equal(policy(latents=latents, seed=handle.seed)[0], samples)


def test_the_captured_ancestral_sampler_equals_the_eager_one_to_the_bit() -> None:
    target = free.as_target(ElementwiseTarget())
    for seed in (1, 2):
        common: dict[str, Any] = {"latents": torch.full((2, 4, 8, 8), 0.5, device="cuda"), "num_inference_steps": 20}
        common |= {"seed": seed}
        eager = free.ancestral_sample(target, capture=False, **common)
        captured = free.ancestral_sample(target, capture=True, **common)
        assert torch.equal(captured.samples, eager.samples)
        first = captured.samples.clone()
        free.ancestral_sample(target, capture=True, **{**common, "seed": 9})
        assert torch.equal(captured.samples, first)  # the result is not the graph's own memory


@torch.no_grad()
def test_a_captured_forward_of_a_dit_is_the_eager_one(target: free.DiTTarget) -> None:
    forward = forward_of(target)
    recording = Recording(forward, torch.cuda.graph_pool_handle())
    for _ in range(2):
        assert_close(recording(), forward())


def test_conditioning_follows_into_a_kept_graph(target: free.DiTTarget) -> None:
    common: dict[str, Any] = {"guidance_scale": 1.5, "num_inference_steps": 20, "seed": 1, "capture": True}
    first = free.speculative_sample(target, class_labels=[1, 2], **common).samples
    other = free.speculative_sample(target, class_labels=[3, 4], **common).samples
    assert len(memory_of(target)["graphs"]) == 1
    assert not torch.equal(first, other)
    assert torch.equal(free.speculative_sample(target, class_labels=[1, 2], **common).samples, first)


def make_drafter(name: str, model: DiTTransformer2DModel, make_dit: Callable[..., DiTTransformer2DModel]) -> Any:
    if name == "gains, fresh noise":
        return free.Fresh(free.Gains())
    if name == "feature":
        return free.FeatureDrafter.from_target(model)
    return make_dit(seed=1).cuda() if name == "model" else name


@pytest.mark.parametrize("drafter", [None, "hold-x0", "gains, fresh noise", "feature", "model"])
def test_a_raw_model_is_recorded_once_and_its_graphs_read_nothing_that_was_freed(
    make_dit: Callable[..., DiTTransformer2DModel],
    monkeypatch: pytest.MonkeyPatch,
    drafter: str | None,
) -> None:
    """The reference operations: torch does not follow what kernels of others read. None is the ancestral sampler."""
    made = []

    class Counted(Recording[Any]):
        def __init__(self, *arguments: Any) -> None:
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr("free.sampling.capture.Recording", Counted)
    if "check_input_liveness" in inspect.signature(torch.cuda.graph).parameters:
        monkeypatch.setattr(torch.cuda, "graph", functools.partial(torch.cuda.graph, check_input_liveness=True))
    model, process = make_dit().cuda(), free.ReverseProcess.ddpm(12)
    sample: Callable[..., Any] = free.ancestral_sample if drafter is None else free.speculative_sample
    arguments = [] if drafter is None else [make_drafter(drafter, model, make_dit)]
    counts, samples, poison = [], [], []
    for _ in range(3):
        # the process is made anew on the device in each call
        out = sample(model, *arguments, class_labels=[1], process=process, seed=1, capture=True, impl="reference")
        counts.append(len(made))
        samples.append(out.samples)
        gc.collect()
        # what was freed is NaN from here on, small tensors and large
        poison += [torch.full((size,), torch.nan, device="cuda") for size in (128, 4096, 2**20) for _ in range(500)]
    assert len(set(counts)) == 1
    assert all(torch.equal(one, samples[0]) for one in samples)
    del poison
    graphs = [weakref.ref(one) for one in made]
    made.clear()
    assert all(one() for one in graphs)
    del model, arguments
    gc.collect()
    assert not any(one() for one in graphs)


def test_auto_captures_what_is_known_to_leave_the_host_out(target: free.DiTTarget) -> None:
    common: dict[str, Any] = {"num_inference_steps": 8, "seed": 1}
    assert "round" in free.speculative_sample(target, class_labels=[1], **common).stats.seconds
    latents = torch.zeros(1, 4, device="cuda")
    plain = free.speculative_sample(ElementwiseTarget(), latents=latents, **common)
    assert "round" not in plain.stats.seconds


def test_nan_is_named_by_a_captured_run_too() -> None:
    process = free.ReverseProcess.ddpm(30)
    timestep_of_9 = process.timestep[9].item()

    def broken(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.where((timestep == timestep_of_9)[:, None], torch.nan, ElementwiseTarget()(x, timestep))

    latents = torch.zeros(2, 4, device="cuda")
    for sample in (free.ancestral_sample, free.speculative_sample):
        with pytest.raises(free.NonFiniteOutputError, match=r"model returned NaN or infinity at step 9 "):
            sample(broken, process=process, latents=latents, seed=[1, 2], capture=True)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_a_captured_relaxed_run_equals_the_eager_one_to_the_bit(budget: float | None) -> None:
    target = free.as_target(ElementwiseTarget())
    common: dict[str, Any] = {
        "latents": torch.full((5, 4, 8, 8), 0.5, device="cuda"),
        "num_inference_steps": 50,
        "seed": [1, 2, 3, 4, 5],
        "window": 4,
        "relaxation": free.Relaxation(4.0, "residual", budget),
    }
    eager = free.speculative_sample(target, "hold-output", capture=False, **common)
    for _ in range(2):  # recorded, then found again
        captured = free.speculative_sample(target, "hold-output", capture=True, **common)
        assert torch.equal(captured.samples, eager.samples)
        assert captured.stats.excess_acceptance.tolist() == eager.stats.excess_acceptance.tolist()
    assert eager.stats.total_variation_bound > 0
    common["relaxation"] = free.Relaxation(1.0, lambda drafted: torch.zeros(drafted.step.shape, device="cuda"))
    with pytest.raises(ValueError, match="capture is True, but the values of a callable uncertainty are read"):
        free.speculative_sample(target, capture=True, **common)


# --- compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@torch.no_grad()
def test_a_compiled_forward_is_the_eager_one(target: free.DiTTarget, guidance_scale: float) -> None:
    forward = forward_of(target, guidance_scale)
    expected = forward()
    with target.compile():
        assert_close(forward(), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_compiled_and_captured(target: free.DiTTarget, guidance_scale: float) -> None:
    common: dict[str, Any] = {"class_labels": [1, 2], "guidance_scale": guidance_scale, "num_inference_steps": 12, "seed": 1}
    for sample in (free.ancestral_sample, free.speculative_sample):
        out = sample(target, compile=True, capture=True, **common)
        assert torch.isfinite(out.samples).all()
