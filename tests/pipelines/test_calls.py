"""What a call of a speculated pipeline leaves alone, shows, and puts back."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

import free
from tests.pipelines.cases import CASES
from tests.pipelines.parts import assemble, ddpm, prompts, unet
from tests.pipelines.stubs import class_pipeline, draw


def diffusion(steps: int = 6, **changed: Any) -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion with DDPM, and a call of it."""
    pipe = assemble("StableDiffusionPipeline", unet=unet().eval(), scheduler=ddpm(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": steps, "output_type": "latent", "generator": generator, "height": 16, "width": 16}
    return pipe, prompts(6, 8) | call | changed


def test_a_pipeline_keeps_its_class_and_gets_everything_back() -> None:
    pipe, call = diffusion()
    own = type(pipe), pipe.scheduler, dict(pipe.config), dict(pipe.unet.__dict__), dict(pipe.scheduler.__dict__)
    with free.speculate(pipe) as run:
        assert isinstance(pipe, own[0])
        assert type(pipe).__name__ == own[0].__name__
        pipe(**call)
        assert pipe.scheduler is own[1]
        assert pipe.unet.__dict__.keys() == own[3].keys()
        with pytest.raises(RuntimeError, match="speculated already"):
            free.speculate(pipe)
    run.remove()
    assert (type(pipe), pipe.scheduler, dict(pipe.config)) == own[:3]
    assert pipe.scheduler.__dict__.keys() == own[4].keys()
    with pytest.raises(RuntimeError, match="not called"):
        _ = free.speculate(diffusion()[0]).stats


def test_an_exception_in_a_round_puts_everything_back_and_the_next_call_works() -> None:
    pipe, call = diffusion()
    scheduler, forward, calls = pipe.scheduler, pipe.unet.forward, []

    @functools.wraps(forward)
    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise OSError("out of luck")
        return forward(*args, **kwargs)

    with free.speculate(pipe, window=3) as run:
        pipe.unet.forward = failing
        with pytest.raises(OSError, match="luck"):
            pipe(**call)
        del pipe.unet.forward
        assert pipe.scheduler is scheduler
        assert "_compiled_call_impl" not in pipe.unet.__dict__
        assert not run.history
        pipe(**call)
        assert run.stats.rounds.max() <= 6


def test_calls_are_reproducible_and_counted_each() -> None:
    pipe = class_pipeline()
    with free.speculate(pipe, window=4) as run:
        first, again, other = draw(pipe, [1, 2]), draw(pipe, [1, 2]), draw(pipe, [1, 2], seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(run.history) == 3
    assert "DDPMScheduler" in run.stats.summary()


def test_seeds_of_the_caller_are_the_keys() -> None:
    pipe = class_pipeline()
    drawn = []
    for seed in ([1, 2], [1, 3]):
        with free.speculate(pipe, window=4, seed=seed):
            drawn.append(draw(pipe, [1, 1]))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][1], drawn[1][1])
    with free.speculate(pipe, seed=[1]), pytest.raises(ValueError, match="seed speaks of 1 samples; the pipeline draws 2"):
        draw(pipe, [1, 1])


def test_a_callback_sees_settled_samples_each_round_and_changes_nothing() -> None:
    pipe, call = diffusion()
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def callback(shown: Any, number: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert shown is pipe
        assert set(tensors) == {"latents"}
        seen.append((number, timestep, tensors["latents"].clone()))
        return tensors

    with free.speculate(pipe, window=3) as run:
        samples = pipe(**call, callback_on_step_end=callback).images
        without = pipe(**call | {"generator": torch.Generator().manual_seed(0)}).images
        rounds = run.stats.rounds.max()
    assert [number for number, *_ in seen] == list(range(rounds))
    assert all(latents.shape == samples.shape and type(latents) is torch.Tensor for *_, latents in seen)
    assert all(timestep.shape == (2,) for _, timestep, _ in seen)
    assert torch.equal(seen[-1][2], samples)
    assert torch.equal(samples, without)

    with free.speculate(pipe), pytest.raises(free.UnsupportedPipelineError, match="returned another 'latents'"):
        pipe(**call, callback_on_step_end=lambda *given: {"latents": given[3]["latents"] + 1})


def test_an_interrupted_pipeline_returns_what_is_settled() -> None:
    pipe, call = diffusion(steps=8)
    settled = []

    def callback(shown: Any, number: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        settled.append(tensors["latents"].clone())
        shown._interrupt = number == 2
        return tensors

    with free.speculate(pipe, window=3) as run:
        samples = pipe(**call, callback_on_step_end=callback).images
        assert len(settled) == 3
        assert samples.shape == (2, 4, 2, 2)
        assert torch.equal(samples, settled[-1])
        assert run.stats.rounds.tolist() == [3, 3]
        assert pipe(**call).images.shape == samples.shape


def test_components_are_shared_with_a_pipeline_that_is_not_speculated() -> None:
    pipe, call = diffusion()
    other = assemble(
        "StableDiffusionPipeline", unet=pipe.unet, scheduler=copy.deepcopy(pipe.scheduler), requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    before = other(**call).images
    within = []

    def callback(*given: Any) -> dict[str, Any]:
        within.append(other(**call | {"generator": torch.Generator().manual_seed(0)}).images)
        return {}

    with free.speculate(pipe, window=3):
        pipe(**call | {"generator": torch.Generator().manual_seed(0)}, callback_on_step_end=callback)
    assert all(torch.equal(drawn, before) for drawn in within)


def test_several_images_a_prompt() -> None:
    pipe, call = diffusion(num_images_per_prompt=3)
    check = free.check_pipeline(pipe, verbose=False, **call)
    assert check.passed
    assert len(check.stats.rounds) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    pipe, call = CASES["StableDiffusion3Pipeline"].make()
    pipe.to(dtype)
    call = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    with pytest.warns(UserWarning, match="deterministic"):
        check = free.check_pipeline(pipe, verbose=False, **call | {"num_inference_steps": 5})
    assert check.passed, str(check)


def test_pipelines_that_carry_rows_over_return_plain_tensors() -> None:
    pipe, call = CASES["LTXImageToVideoPipeline"].make()
    with free.speculate(pipe, eta=1.0):
        frames = pipe(**call).frames
    assert type(frames) is torch.Tensor
    assert len(frames) == 2


def test_latents_that_a_pipeline_rounds_are_not_edited_ones() -> None:
    pipe, call = CASES["MochiPipeline"].make()
    pipe.to(torch.bfloat16)
    call = {name: value.bfloat16() if "embeds" in name else value for name, value in call.items()}
    with free.speculate(pipe, eta=1.0, window=3) as run:
        assert pipe(**call | {"num_inference_steps": 5}).frames.dtype == torch.bfloat16
    assert run.stats.tested.sum() > 0


def test_a_network_with_a_hook_of_accelerate() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            assert not any(type(value) is not torch.Tensor for value in args if isinstance(value, torch.Tensor))
            return args, kwargs

    pipe, call = diffusion()
    add_hook_to_module(pipe.unet, Counting())
    assert free.check_pipeline(pipe, verbose=False, **call).passed
    assert Counting.calls > 6


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_network_stays_compiled_and_sees_plain_tensors(in_place: bool) -> None:
    torch.compiler.reset()
    pipe, kinds = class_pipeline(), set()
    expected = draw_speculatively(pipe)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        kinds.update(type(value) for value in inputs)
        return graph.forward

    options = {"backend": backend, "fullgraph": True, "dynamic": True}
    if in_place:
        pipe.transformer.compile(**options)
    else:
        pipe.transformer = torch.compile(pipe.transformer, **options)
    compiled = pipe.transformer._compiled_call_impl
    drawn = draw_speculatively(pipe)
    torch.testing.assert_close(drawn, expected)
    assert pipe.transformer._compiled_call_impl is compiled
    assert kinds
    assert kinds <= {torch.Tensor, torch.nn.Parameter, torch.SymInt, int}


def draw_speculatively(pipe: Any) -> torch.Tensor:
    with free.speculate(pipe, window=4):
        return draw(pipe, [1, 2, 3])


def test_a_relaxed_run_and_a_plan() -> None:
    pipe = class_pipeline()
    relaxation = free.Relaxation(strength=3.0, uncertainty="residual")
    with free.speculate(pipe, window=4, relaxation=relaxation) as run:
        draw(pipe, [1, 2, 3])
        assert run.stats.total_variation_bound > 0
    plan = free.WindowPlan(torch.tensor([1, 2, 3, 4, 4, 4, 4, 4, 4, 3, 2, 1]).numpy())
    with free.speculate(pipe, window=plan, drafter="hold-output") as run:
        draw(pipe, [1, 2, 3])
        assert run.stats.window == "plan"
        assert run.stats.drafter == "hold-output"
