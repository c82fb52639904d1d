"""What holds to the bit on a target whose arithmetic is the same in every batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import free
from free_kernels import LATENT_STREAM, NOISE_STREAM, TEST_STREAM, normal, uniform
from tests.analytic import ElementwiseTarget, ShiftedModel

STEPS = 11
SEEDS = [5, 2**41 + 3, -17, 6, 1234567, 2**63 - 1, 0]
SHAPES = [(6,), (2, 3, 4), (301,)]
LARGE = (4, 32, 32)
"""Large enough for torch to split a reduction or a loop among threads."""
FORMS = ["plain", "clipped", "second order"]
DRAFTERS = ["hold-x0", "hold-output", "gains", "shifted"]


def make_process(form: str = "plain") -> free.ReverseProcess:
    if form == "second order":
        angle = torch.linspace(1.5, 0.0, STEPS + 1, dtype=torch.float64)
        return free.ReverseProcess.from_levels(angle.cos(), angle.sin(), free.ReverseProcess.ddpm(STEPS).timestep, order=2)
    return free.ReverseProcess.ddpm(STEPS, clip_sample=form == "clipped")


def make_drafter(name: str, process: free.ReverseProcess) -> object:
    if name != "shifted":
        return name

    def shifted(x: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        # elementwise, so that the draft has the same bits in every batch too
        gap = 0.7 * ShiftedModel(None, process).shift[timestep].view(-1, *(1,) * (x.dim() - 1)) / math.sqrt(x[0].numel())
        return ElementwiseTarget()(x, timestep, **conditioning) + gap

    return shifted


def assert_same(first: free.SamplingOutput, second: free.SamplingOutput, rows: list[int] | slice = slice(None)) -> None:
    assert first.trajectory is not None
    assert second.trajectory is not None
    assert torch.equal(first.trajectory[rows], second.trajectory)
    assert torch.equal(first.samples[rows], second.samples)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 4), LARGE])
def test_a_drafter_that_is_the_target_is_always_accepted(shape: tuple[int, ...], window: int, form: str) -> None:
    model, process = ElementwiseTarget(), make_process(form)
    arguments = {"process": process, "shape": shape, "seed": SEEDS, "return_trajectory": True}
    ancestral = free.ancestral_sample(model, **arguments)
    output = free.speculative_sample(model, ElementwiseTarget(), window=window, **arguments)
    assert (output.stats.accepted == output.stats.tested).all()
    assert output.stats.tested.sum() > 0
    # full windows, then one that ends with the last step
    assert (output.stats.rounds == math.ceil(STEPS / window)).all()
    assert_same(ancestral, output)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_window_of_one_is_the_ancestral_sampler(shape: tuple[int, ...], drafter: str, form: str) -> None:
    model, process = ElementwiseTarget(), make_process(form)
    arguments = {"process": process, "shape": shape, "seed": SEEDS, "return_trajectory": True}
    output = free.speculative_sample(model, make_drafter(drafter, process), window=1, **arguments)
    assert (output.stats.rounds == STEPS).all()
    assert_same(free.ancestral_sample(model, **arguments), output)


@pytest.mark.parametrize(
    ("shape", "drafter", "guidance_scale"),
    [
        *itertools.product(SHAPES, DRAFTERS, [1.0, 2.0]),
        (LARGE, "hold-x0", 1.0),
        (LARGE, "gains", 1.0),
        (LARGE, "shifted", 2.0),
    ],
)
@pytest.mark.parametrize("form", ["plain", "second order"])
def test_a_sample_does_not_depend_on_its_batch(
    shape: tuple[int, ...], drafter: str, guidance_scale: float, form: str
) -> None:
    process = make_process(form)
    scale = torch.linspace(0.5, 1.5, len(SEEDS)).view(-1, *(1,) * len(shape)).expand(-1, *shape).contiguous()
    null = {"scale": torch.ones(shape)}
    model = free.as_target(ElementwiseTarget(), null_conditioning=null)
    draft_model = make_drafter(drafter, process)
    if drafter == "shifted":
        draft_model = free.ModelDrafter(free.as_target(draft_model, null_conditioning=null))

    def sample(rows: list[int], model: free.Target = model) -> free.SamplingOutput:
        return free.speculative_sample(
            model,
            draft_model,
            conditioning={"scale": scale[rows]},
            process=process,
            shape=shape,
            seed=[SEEDS[row] for row in rows],
            guidance_scale=guidance_scale,
            window=4,
            return_trajectory=True,
        )

    everyone = list(range(len(SEEDS)))
    together = sample(everyone)
    # noise reuse is only put to the test if samples are rejected, at different steps
    assert len(set(together.stats.rounds.tolist())) > 1 or shape[-1] > 6
    assert together.stats.accepted.sum() < together.stats.tested.sum()
    for rows in ([0], [3], [5], [0, 1], [6, 2, 4], everyone[::-1]):
        assert_same(together, sample(rows), rows)
    in_parts = free.as_target(ElementwiseTarget(), null_conditioning=null, max_forward_batch=5)
    assert_same(together, sample(everyone, in_parts))


def test_the_same_seed_gives_the_same_sample_twice() -> None:
    arguments = {"process": make_process(), "shape": (6,), "seed": SEEDS, "window": 4, "return_trajectory": True}
    assert_same(*(free.speculative_sample(ElementwiseTarget(), **arguments) for _ in range(2)))


@pytest.mark.parametrize("stream", [NOISE_STREAM, LATENT_STREAM])
@pytest.mark.parametrize("numel", [1, 6, 24, 301, 4096])
def test_noise_is_the_same_in_one_call_or_many(numel: int, stream: int) -> None:
    seed, step = torch.tensor(SEEDS), torch.arange(5)
    together = normal(seed[:, None], step, numel, stream=stream)
    for i, one_seed in enumerate(SEEDS):
        for k in range(len(step)):
            alone = normal(torch.tensor(one_seed), torch.tensor(k), numel, stream=stream)
            assert torch.equal(alone, together[i, k])
            assert torch.equal(normal(torch.tensor([[one_seed]]), step[k], numel, stream=stream)[0, 0], together[i, k])
    # a longer sample begins with a shorter one's noise
    assert torch.equal(normal(seed[:, None], step, numel + 9, stream=stream)[..., :numel], together)
    flat = normal(seed.repeat_interleave(len(step)), step.repeat(len(SEEDS)), numel, stream=stream)
    assert torch.equal(flat.view_as(together), together)


def test_uniforms_are_the_same_in_one_call_or_many() -> None:
    seed, step = torch.tensor(SEEDS), torch.arange(50)
    together = uniform(seed[:, None], step, stream=TEST_STREAM)
    for i, one_seed in enumerate(SEEDS):
        alone = [uniform(torch.tensor(one_seed), k, stream=TEST_STREAM) for k in step]
        assert torch.equal(torch.stack(alone), together[i])
