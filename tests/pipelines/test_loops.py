"""A pipeline that runs through its scheduler more than once a call, as those that draw a video section by section do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.utils.torch_utils import randn_tensor
from scipy import stats

import free
from tests.pipelines.parts import ddpm
from tests.pipelines.stubs import ClassGaussian, Passing

COUNT = 1000


class Sections(DiTPipeline):
    """A loop for each number of ``sizes``, over as many samples: from latents of its own, or from the same ``again``."""

    @torch.no_grad()
    def __call__(
        self,
        sizes: list[int],
        generator: Any = None,
        again: bool = False,
        doubled: bool = False,
        guidance_scale: float = 1.0,
    ) -> Any:
        made = []
        for size in sizes:
            if again:
                generator = generator.manual_seed(generator.initial_seed())
            latents = randn_tensor((size, 2, 1, 1), generator=generator)
            latents = torch.cat((latents, -latents)) if doubled else latents
            labels = torch.zeros(len(latents), dtype=torch.int64)
            self.scheduler.set_timesteps(8)
            for timestep in self.scheduler.timesteps:
                output = self.transformer(latents, timestep=timestep[None].expand(len(latents)), class_labels=labels).sample
                latents = self.scheduler.step(output, timestep, latents).prev_sample
            made.append(latents)
        return made


@pytest.fixture
def sections() -> Sections:
    pipe = Sections(transformer=ClassGaussian(0.5, size=1).eval(), vae=Passing().eval(), scheduler=ddpm())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("seed", [None, list(range(COUNT))], ids=["keys of the latents", "given keys"])
def test_sections_share_no_noise(sections: Sections, seed: list[int] | None, window: int) -> None:
    with free.speculate(sections, window=window, seed=seed) as run:
        first, second = sections([COUNT, COUNT], generator=seeded())
        keys = run.stats.keys
    assert stats.pearsonr(first.flatten(), second.flatten()).pvalue > 1e-6
    first_keys = run.history[0].keys
    assert len(first_keys) == COUNT
    assert first_keys < keys  # a later section may have looked at what the first one made
    assert len(keys) == 2 * COUNT
    if seed is not None:
        assert first_keys == set(seed)


def test_the_same_latents_in_two_sections_share_no_noise(sections: Sections) -> None:
    with free.speculate(sections, window=4):
        (alone,) = sections([50], generator=seeded())
        first, second = sections([50, 50], generator=seeded(), again=True)
    assert torch.equal(first, alone)
    assert not torch.isclose(second, first).any()


def test_a_budget_and_its_certificate_are_of_the_whole_call(sections: Sections) -> None:
    budget = 0.3

    def wild(drafted: Any) -> torch.Tensor:
        return torch.ones(drafted.step.shape)

    with free.speculate(sections, window=4, relaxation=free.Relaxation(3.0, wild, budget=budget)) as run:
        sections([40, 40], generator=seeded())
        first, both = (one.excess_acceptance for one in run.history)
        assert (both >= first).all()
        assert both.mean() > 1.1 * first.mean()
        assert both.max() <= budget
        assert run.stats.total_variation_limit > run.history[0].total_variation_limit
        sections([40], generator=seeded())
        assert run.stats.excess_acceptance == pytest.approx(first)  # another call begins at nothing
        with pytest.raises(free.UnsupportedPipelineError, match="loops have 4 and 3 samples"):
            sections([4, 3])
    with free.speculate(sections, window=4):
        assert [len(made) for made in sections([4, 3])] == [4, 3]


def test_latents_that_are_no_copies_are_not_taken_for_copies(sections: Sections) -> None:
    with free.speculate(sections, window=4):
        with pytest.raises(free.UnsupportedPipelineError, match="should hold each sample 2 times"):
            sections([3], doubled=True, guidance_scale=4.0)
        assert len(sections([3], doubled=True)[0]) == 6


def test_a_guided_default_that_the_call_does_not_have_is_not_assumed() -> None:
    class Bare(Sections):
        def __call__(self, sizes: list[int], generator: Any = None) -> Any:
            return super().__call__(sizes, generator)

    pipe = Bare(transformer=ClassGaussian(0.5, size=1).eval(), vae=Passing().eval(), scheduler=ddpm())
    pipe.set_progress_bar_config(disable=True)
    with free.speculate(pipe, window=4) as run:
        assert len(pipe([6])[0].unique()) == 12
        assert len(run.stats.rounds) == 6


def test_every_loop_of_a_call_is_checked(sections: Sections) -> None:
    found = free.check_pipeline(sections, sizes=[3, 2], generator=seeded(), verbose=False)
    assert found.passed
    assert len(found.error) == 16


def test_a_loop_that_ends_early_is_not_passed(sections: Sections) -> None:
    class Early(Sections):
        def __call__(self, sizes: list[int], generator: Any = None) -> Any:
            latents = randn_tensor((sizes[0], 2, 1, 1), generator=generator)
            self.scheduler.set_timesteps(8)
            labels = torch.zeros(sizes[0], dtype=torch.int64)
            for i, timestep in enumerate(self.scheduler.timesteps):
                output = self.transformer(latents, timestep=timestep[None].expand(len(latents)), class_labels=labels).sample
                latents = self.scheduler.step(output, timestep, latents).prev_sample
                if i == 3:  # counted in rounds while it is speculated
                    break
            return latents

    pipe = Early(transformer=sections.transformer, vae=sections.vae, scheduler=ddpm())
    pipe.set_progress_bar_config(disable=True)
    with free.speculate(pipe, window=2), pytest.raises(free.UnsupportedPipelineError, match="left its loop before"):
        pipe([2], generator=seeded())  # four rounds of two do not finish eight steps
    # where they do, the untouched pipeline ends earlier
    pipe.transformer = ClassGaussian(0.0, size=1).eval()  # all drafts are right
    found = free.check_pipeline(pipe, drafter="hold-x0", sizes=[2], generator=seeded(), verbose=False)
    assert not found.passed
    assert "leaves out 4 of the steps" in str(found)


def test_a_pipeline_that_keeps_gradients_is_speculated_without(sections: Sections) -> None:
    class Differentiable(Sections):
        def __call__(self, sizes: list[int], generator: Any = None) -> Any:
            with torch.enable_grad():
                self.transformer.signal.requires_grad_()
                return super().__call__.__wrapped__(self, sizes, generator)

    pipe = Differentiable(transformer=sections.transformer, vae=sections.vae, scheduler=ddpm())
    pipe.set_progress_bar_config(disable=True)
    for drafter in ("gains", "hold-x0"):
        with free.speculate(pipe, window=4, drafter=drafter):
            (made,) = pipe([3], generator=seeded())
        assert made.isfinite().all()
