"""What a speculated pipeline draws: the native chain at W = 1, the same law at any W."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import free
from free.sampling.keys import keys_of_states
from free_kernels import normal
from tests.pipelines.cases import CASES
from tests.pipelines.parts import Case, assemble, ddpm
from tests.pipelines.stubs import Passing, class_pipeline, draw

P_VALUE = 1e-6


def test_exact_drafts_are_all_accepted_and_the_sample_is_that_of_one_step_a_round() -> None:
    drawn = {}
    for window in (1, 5):
        pipe = class_pipeline(scale=0.0)
        with free.speculate(pipe, window=window) as run:
            drawn[window] = draw(pipe, [1, 2, 3], steps=20)
        rounds = run.stats.rounds
    # one step in the first round, four windows of five cover nineteen, of which the last is of what is left
    assert rounds.tolist() == [5, 5, 5]
    assert run.stats.acceptance_rate == 1
    torch.testing.assert_close(drawn[5], drawn[1], rtol=1e-4, atol=1e-4)


def _native_noise(monkeypatch: pytest.MonkeyPatch, module: str, keys: list[int]) -> None:
    """The native scheduler draws the noise that the keys have."""
    step = iter(range(1000))

    def noise(shape: Any, **_: Any) -> torch.Tensor:
        seeds = torch.tensor(keys)
        return normal(seeds, torch.full_like(seeds, next(step)), int(np.prod(shape[1:]))).view(shape)

    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", noise)


@pytest.mark.parametrize(
    ("case", "module"),
    [
        ("StableDiffusionXLControlNetPipeline", "scheduling_ddpm"),
        ("StableDiffusionPipeline", "scheduling_euler_ancestral_discrete"),
    ],
)
def test_one_step_a_round_is_the_native_chain(case: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Case = CASES[case]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    pipe, call = made.make()
    call = call | {"num_inference_steps": 8, "latents": latents}
    with free.speculate(pipe, window=1) as run:
        keys: list[int] = []
        run.watch = lambda proposed, answer, turn: keys.extend(turn.live.seed.tolist()) if not keys else None
        speculated = pipe(**call).images
    assert run.stats.rounds.tolist() == [8, 8]
    _native_noise(monkeypatch, module, keys)
    native = pipe(**call).images
    torch.testing.assert_close(speculated, native, rtol=1e-3, atol=1e-3 * float(native.abs().max()))


def test_the_law_does_not_depend_on_the_window() -> None:
    samples, tested = 4000, 0
    drawn = {}
    for window in (1, 5):
        pipe = class_pipeline(size=1)
        with free.speculate(pipe, window=window) as run:
            drawn[window] = draw(pipe, [0, 3] * (samples // 2), steps=10, seed=window).flatten(1).numpy()
        tested = int(run.stats.tested.sum() - run.stats.accepted.sum())
    assert tested > samples  # there were rejections to get wrong
    for label in (0, 1):
        one, five = drawn[1][label::2], drawn[5][label::2]
        for of in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x.sum(1), lambda x: np.ptp(x, 1)):
            assert stats.ks_2samp(of(one), of(five)).pvalue > P_VALUE


def test_keys_are_of_the_latents_alone_and_equal_latents_have_keys_of_their_own() -> None:
    states = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    keys = keys_of_states(states)
    assert keys_of_states(states[2:]) == keys[2:]
    repeated = keys_of_states(states[[1, 1, 0, 1]])
    assert repeated[0] == keys[1]
    assert repeated[2] == keys[0]
    assert len(set(repeated)) == 4


def test_a_sample_does_not_depend_on_its_batch() -> None:
    pipe = class_pipeline()
    drawn = {}
    for labels in ([1], [1, 2, 3]):
        generators = [torch.Generator().manual_seed(label) for label in labels]
        with free.speculate(pipe, window=4):
            drawn[len(labels)] = draw(pipe, labels, generator=generators)
    torch.testing.assert_close(drawn[1][0], drawn[3][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drafter", ["hold-x0", "gains"])
def test_rounds_on_the_digits_are_those_of_the_sampler(drafter: str) -> None:
    from free.data.digits import load_digits_dit

    model = load_digits_dit().cpu()
    model.register_to_config(out_channels=model.config.in_channels)  # the pipeline asks for it
    batch, steps = 16, 50
    latents = torch.randn(batch, *free.as_target(model).sample_shape, generator=torch.Generator().manual_seed(0))
    process = free.ReverseProcess.from_scheduler(ddpm(), steps)
    labels = [label % 10 for label in range(batch)]
    sampled = free.speculative_sample(
        model,
        drafter,
        class_labels=labels,
        process=process,
        window=8,
        latents=latents,
        seed=keys_of_states(latents.flatten(1)),
    )
    pipe = assemble("DiTPipeline", transformer=model, vae=Passing().eval(), scheduler=ddpm())
    pipe.set_progress_bar_config(disable=True)
    with free.speculate(pipe, window=8, drafter=drafter) as run:
        draw(pipe, labels, steps=steps, seed=0)
    extra = run.stats.rounds.mean() - sampled.stats.rounds.mean()
    assert abs(extra) <= 0.05 * sampled.stats.rounds.mean() + 1
