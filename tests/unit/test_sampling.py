"""The two samplers as a user meets them: arguments, seeds, results, statistics, memory, imports."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import free
from free import ReverseProcess, SamplingOutput
from free_kernels import LATENT_STREAM, normal, posterior
from tests.unit.helpers import GaussianModel, Recorder

Sampler = Callable[..., SamplingOutput]
SAMPLERS = [free.speculative_sample, free.ancestral_sample]


@pytest.fixture
def gaussian() -> GaussianModel:
    return GaussianModel()


# --- calls --------------------------------------------------------------------------------------------------------------


def test_the_default_call(dit: DiTTransformer2DModel) -> None:
    out = free.speculative_sample(dit)
    assert out.samples.shape == (1, 2, 8, 8)
    assert out.samples.dtype == torch.float32
    assert not out.samples.requires_grad
    assert torch.isfinite(out.samples).all()
    assert out.trajectory is None
    assert out.stats.steps == 250
    assert out.stats.window == 8
    assert out.stats.drafter == "gains"


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ({}, 1),
        ({"num_samples": 3}, 3),
        ({"seed": 5, "num_samples": 2}, 2),
        ({"seed": [5, 6]}, 2),
        ({"seed": 5}, 1),
        ({"generator": torch.Generator().manual_seed(0), "num_samples": 2}, 2),
        ({"generator": [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]}, 2),
        ({"latents": torch.zeros(4, 3)}, 4),
        ({"conditioning": {"goal": torch.zeros(3, 9)}}, 3),
        ({"conditioning": {"goal": "none", "level": torch.tensor(0.5)}}, 1),
        ({"class_labels": [1, 2]}, 2),
        ({"class_labels": 1, "num_samples": 2}, 2),
        ({"class_labels": 1, "seed": [1, 2, 3]}, 3),
    ],
)
def test_the_number_of_samples_follows_from_what_speaks_of_it(sample: Sampler, given: dict[str, Any], batch: int) -> None:
    out = sample(Recorder(), shape=(3,), num_inference_steps=5, **given)
    assert out.samples.shape == (batch, 3)
    assert len(out.stats.rounds) == batch


@pytest.mark.parametrize("sample", SAMPLERS)
def test_labels_of_a_dit_broadcast(dit: DiTTransformer2DModel, sample: Sampler) -> None:
    common: dict[str, Any] = {"num_inference_steps": 4, "seed": [1, 2], "guidance_scale": 1.5}
    one = sample(dit, class_labels=3, **common).samples
    assert one.shape == (2, 2, 8, 8)
    for labels in ([3, 3], np.array([3, 3]), torch.tensor([3, 3], dtype=torch.int32)):
        assert torch.equal(sample(dit, class_labels=labels, **common).samples, one)
    assert not torch.equal(sample(dit, class_labels=[3, 4], **common).samples, one)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_the_process_may_be_a_table_or_a_scheduler(sample: Sampler, gaussian: GaussianModel) -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    common: dict[str, Any] = {"shape": (3,), "seed": 1}
    by_scheduler = sample(gaussian, process=scheduler, num_inference_steps=20, **common)
    by_table = sample(gaussian, process=ReverseProcess.from_scheduler(scheduler, 20), **common)
    assert torch.equal(by_scheduler.samples, by_table.samples)
    assert by_table.stats.steps == 20
    named = sample(gaussian, process=ReverseProcess.ddpm(20), num_inference_steps=20, **common)
    assert torch.equal(named.samples, sample(gaussian, num_inference_steps=20, **common).samples)


@pytest.mark.parametrize("window", [1, 2, 100])
@pytest.mark.parametrize("sample", [free.speculative_sample])
def test_one_step(sample: Sampler, gaussian: GaussianModel, window: int) -> None:
    out = sample(gaussian, shape=(3,), num_inference_steps=1, window=window, seed=[4, 5])
    expected = free.ancestral_sample(gaussian, shape=(3,), num_inference_steps=1, seed=[4, 5])
    assert torch.equal(out.samples, expected.samples)
    assert out.stats.rounds.tolist() == [1, 1]
    assert out.stats.tested.tolist() == [0]
    assert np.isnan(out.stats.acceptance_rate)
    assert json.loads(json.dumps(out.stats.to_dict(), allow_nan=False))["acceptance_rate"] is None


@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output"])
def test_a_window_longer_than_the_process(gaussian: GaussianModel, drafter: str) -> None:
    common: dict[str, Any] = {"shape": (3,), "num_inference_steps": 12, "seed": [4, 5]}
    longer = free.speculative_sample(gaussian, drafter, window=1000, **common)
    assert torch.equal(longer.samples, free.speculative_sample(gaussian, drafter, window=12, **common).samples)
    assert longer.stats.window == 1000
    assert max(longer.stats.forward_batch_sizes) <= 2 * 12


@pytest.mark.parametrize("shape", [(3,), (5, 7)])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("process", [{}, {"variance": "beta"}, {"clip_sample": True}, {"eta": 0.5}], ids=str)
def test_a_window_of_one_is_the_ancestral_sampler(
    gaussian: GaussianModel, shape: tuple[int, ...], num_samples: int, process: dict[str, Any]
) -> None:
    common: dict[str, Any] = {
        "shape": shape,
        "seed": 8,
        "num_samples": num_samples,
        "process": ReverseProcess.ddpm(25, **process),
        "return_trajectory": True,
    }
    speculative = free.speculative_sample(gaussian, window=1, **common)
    ancestral = free.ancestral_sample(gaussian, **common)
    assert torch.equal(speculative.samples, ancestral.samples)
    assert torch.equal(speculative.trajectory, ancestral.trajectory)
    assert speculative.stats.rounds.tolist() == ancestral.stats.rounds.tolist() == [25] * num_samples


def test_a_window_of_one_on_a_dit_with_guidance_is_the_ancestral_sampler(dit: DiTTransformer2DModel) -> None:
    common: dict[str, Any] = {"class_labels": [1, 2], "guidance_scale": 1.5, "seed": 3, "num_inference_steps": 6}
    speculative, ancestral = free.speculative_sample(dit, window=1, **common), free.ancestral_sample(dit, **common)
    assert torch.equal(speculative.samples, ancestral.samples)


def test_the_ancestral_sampler_is_the_update_of_the_table_step_by_step(gaussian: GaussianModel) -> None:
    """By hand, from the noise of seed and step."""
    process, seed = ReverseProcess.ddpm(15), torch.tensor([11, 12])
    state = normal(seed, torch.zeros_like(seed), 4, stream=LATENT_STREAM)
    for k in range(15):
        at = torch.full_like(seed, k)
        noise = normal(seed, at, 4)
        output = gaussian(state, process.timestep[at])
        state = process.state_coef[k] * state + process.model_coef[k] * output + process.std[k] * noise
    out = free.ancestral_sample(gaussian, shape=(4,), process=process, seed=[11, 12])
    torch.testing.assert_close(out.samples, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_no_gradients_are_kept(sample: Sampler) -> None:
    net = torch.nn.Linear(3, 3).eval()
    out = sample(lambda x, timestep: net(x), shape=(3,), num_inference_steps=5, seed=0)
    assert not out.samples.requires_grad


# --- a sample does not depend on its batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [{}, {"clip_sample": True}], ids=str)
@pytest.mark.parametrize("window", [3, 8])
def test_a_sample_does_not_depend_on_the_others_in_its_batch(
    gaussian: GaussianModel, window: int, process: dict[str, Any]
) -> None:
    table = ReverseProcess.ddpm(40, **process)
    common: dict[str, Any] = {"shape": (5,), "process": table, "window": window, "return_trajectory": True}
    seeds = [3, 14, 15, 92, 65]
    together = free.speculative_sample(gaussian, seed=seeds, **common)
    assert len(set(together.stats.rounds.tolist())) > 1
    for i, seed in enumerate(seeds):
        alone = free.speculative_sample(gaussian, seed=[seed], **common)
        assert torch.equal(together.samples[i], alone.samples[0])
        assert torch.equal(together.trajectory[i], alone.trajectory[0])
        assert together.stats.rounds[i] == alone.stats.rounds[0]


# --- seeds --------------------------------------------------------------------------------------------------------------


def draw(sample: Sampler = free.speculative_sample, **given: Any) -> torch.Tensor:
    return sample(GaussianModel(), shape=(4,), num_inference_steps=6, **given).samples


@pytest.mark.parametrize("sample", SAMPLERS)
def test_equal_seeds_give_equal_samples(sample: Sampler) -> None:
    assert torch.equal(draw(sample, seed=3), draw(sample, seed=3))
    assert torch.equal(draw(sample, seed=[3, 4]), draw(sample, seed=[3, 4]))
    assert not torch.equal(draw(sample, seed=3), draw(sample, seed=4))
    rows = draw(sample, seed=[3, 4, 3])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize(
    "seed", [np.int64(7), np.uint8(7), torch.tensor(7), [7], (7,), [np.int32(7)], np.array([7])], ids=repr
)
def test_an_integer_is_an_integer(sample: Sampler, seed: Any) -> None:
    assert torch.equal(draw(sample, seed=seed), draw(sample, seed=7))


def test_several_integers_of_any_kind() -> None:
    expected = draw(seed=[7, 8])
    assert torch.equal(draw(seed=np.array([7, 8])), expected)
    assert torch.equal(draw(seed=torch.tensor([7, 8])), expected)
    assert torch.equal(draw(seed=range(7, 9)), expected)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 1, -(2**63)])
def test_the_first_sample_of_an_int_seed_is_that_of_a_list(seed: int) -> None:
    both = draw(seed=seed, num_samples=2)
    assert torch.equal(both[:1], draw(seed=[seed]))
    assert torch.equal(both[:1], draw(seed=seed))
    assert not torch.equal(both[0], both[1])


def test_seeds_are_taken_modulo_64_bits() -> None:
    assert torch.equal(draw(seed=2**64 + 5), draw(seed=5))
    assert torch.equal(draw(seed=-1), draw(seed=2**64 - 1))
    assert not torch.equal(draw(seed=2**32 + 5), draw(seed=5))


def test_int_seeds_share_no_sample() -> None:
    """Neighbouring seeds with large batches: were the keys seed + i, seeds 0 and 1 would share all but one sample."""
    rows = torch.cat([draw(seed=seed, num_samples=12) for seed in range(15)])
    assert len(torch.unique(rows, dim=0)) == 15 * 12


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_generator_gives_the_seeds_and_moves_on(sample: Sampler) -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = draw(sample, generator=generator, num_samples=2), draw(sample, generator=generator, num_samples=2)
    again = draw(sample, generator=torch.Generator().manual_seed(5), num_samples=2)
    assert torch.equal(first, again)
    assert len(torch.unique(torch.cat((first, second)), dim=0)) == 4


def test_a_list_of_generators_gives_one_seed_each() -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    rows = draw(generator=[generator(5), generator(6)])
    assert torch.equal(rows[:1], draw(generator=generator(5)))
    assert torch.equal(rows[1:], draw(generator=[generator(6)]))
    assert not torch.equal(rows[0], rows[1])


def test_without_seed_torchs_own_generator_decides() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = draw(num_samples=2), draw(num_samples=2)
        torch.manual_seed(5)
        again = draw(num_samples=2)
    assert torch.equal(first, again)
    assert len(torch.unique(torch.cat((first, second)), dim=0)) == 4


def test_with_a_seed_torchs_own_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw(seed=1)
    draw(generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_samples_of_a_seed_are_what_they_were() -> None:
    """Seeds are kept in papers and bug reports: a change of the noise must be noticed. Philox of torch's own words."""
    from torch import tensor

    seed = torch.tensor([0])
    noise = normal(seed, torch.tensor([0]), 4)
    assert noise.shape == (1, 4)
    # philox4x32-10 of key 0, counter 0 (Random123's known answers): 6627e8d5 e169c58d bc57ac4c 9b00dbd8
    words = tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=torch.float64)
    radius = (-2 * ((words[[0, 2]] + 0.5) / 2**32).log()).sqrt()
    angle = 2 * torch.pi * words[[1, 3]] / 2**32
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()
    torch.testing.assert_close(noise[0].double(), expected, rtol=0, atol=2e-6)


# --- latents, trajectory, callback, progress ----------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLERS)
def test_latents_are_the_initial_states(sample: Sampler, gaussian: GaussianModel) -> None:
    latents = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    kept = latents.clone()
    out = sample(gaussian, latents=latents, num_inference_steps=9, seed=[1, 2], return_trajectory=True)
    assert out.samples.shape == (2, 3, 4)
    assert torch.equal(out.trajectory[:, 0], latents)
    assert torch.equal(latents, kept)  # and are not written to
    # with the latents that the seeds themselves give, nothing changes
    seeds = torch.tensor([1, 2])
    own = normal(seeds, torch.zeros_like(seeds), 12, stream=LATENT_STREAM).view(2, 3, 4)
    given, drawn = (
        sample(gaussian, latents=latents, shape=(3, 4), num_inference_steps=9, seed=[1, 2]).samples
        for latents in (own, None)
    )
    assert torch.equal(given, drawn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_half_precision_are_widened(gaussian: GaussianModel, dtype: torch.dtype) -> None:
    latents = torch.linspace(-1, 1, 6).view(2, 3).to(dtype)
    out = free.speculative_sample(gaussian, latents=latents, num_inference_steps=9, seed=1)
    wide = free.speculative_sample(gaussian, latents=latents.float(), num_inference_steps=9, seed=1)
    assert out.samples.dtype == torch.float32
    assert torch.equal(out.samples, wide.samples)


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_trajectory(window: int) -> None:
    """Every settled state, in its place: each follows from the one before by a step of the process, up to its noise."""
    process, model = ReverseProcess.ddpm(20), GaussianModel()
    common: dict[str, Any] = {"shape": (6,), "process": process, "seed": [1, 2, 3]}
    out = free.speculative_sample(model, window=window, return_trajectory=True, **common)
    path = out.trajectory
    assert path.shape == (3, 21, 6)
    assert path.dtype == torch.float32
    seeds = torch.tensor([1, 2, 3])
    assert torch.equal(path[:, 0], normal(seeds, torch.zeros_like(seeds), 6, stream=LATENT_STREAM))
    assert torch.equal(path[:, -1], out.samples)
    assert torch.equal(free.speculative_sample(model, window=window, **common).samples, out.samples)
    # where a draft was accepted or a window ended, the step's noise is that of its seed or a reflection of it: its norm
    # differs from the target's view of it by at most |delta|, and it is never far from a chi with 6 degrees of freedom
    for k in range(20):
        at = torch.full_like(seeds, k)
        mean = posterior(path[:, k], model(path[:, k], process.timestep[at]), seeds, at, process.table, noise=0 * path[:, k])
        residual = (path[:, k + 1] - mean).norm(dim=1)
        if process.std[k] == 0:
            assert residual.max() == 0
        else:
            assert (residual / process.std[k]).max() < 7  # a chi of 6 exceeds this with probability 1e-8


class Listener:
    """Keeps what a callback is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, model: Any, step: torch.Tensor, timestep: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        assert list(values) == ["latents"]
        self.calls.append((model, step.clone(), timestep.clone(), values["latents"].clone()))
        values["latents"].fill_(1e9)  # what is handed out is a copy
        step.fill_(-5)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_callback(sample: Sampler, gaussian: GaussianModel) -> None:
    process, listener = ReverseProcess.ddpm(30), Listener()
    common: dict[str, Any] = {"shape": (2, 3), "process": process, "seed": [1, 2, 3], "return_trajectory": True}
    out = sample(gaussian, callback_on_step_end=listener, **common)
    assert torch.equal(out.samples, sample(gaussian, **common).samples)
    assert len(listener.calls) == max(out.stats.rounds)
    settled = torch.full((3,), -1)
    for model, step, timestep, latents in listener.calls:
        assert model is gaussian
        assert step.shape == (3,)
        assert step.dtype == torch.int64
        # unfinished samples move on in each round, finished ones stay
        assert ((step > settled) | ((step == 29) & (settled == 29))).all()
        assert torch.equal(timestep, process.timestep[step])
        assert torch.equal(latents, out.trajectory[torch.arange(3), step + 1])
        settled = step
    assert settled.tolist() == [29, 29, 29]


@pytest.mark.parametrize("sample", SAMPLERS)
def test_progress_bar(sample: Sampler, gaussian: GaussianModel, capsys: pytest.CaptureFixture[str]) -> None:
    common: dict[str, Any] = {"shape": (3,), "num_inference_steps": 10, "seed": [1, 2]}
    quiet = sample(gaussian, **common)
    assert capsys.readouterr() == ("", "")
    shown = sample(gaussian, progress=True, **common)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert torch.equal(shown.samples, quiet.samples)
    if sample is free.speculative_sample:
        assert "20/20" in captured.err  # steps of both samples
        assert f"efficiency {20 / shown.stats.rounds.sum():.2f}" in captured.err
    else:
        assert "10/10" in captured.err


# --- statistics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["hold-x0", "hold-output"])
@pytest.mark.parametrize("window", [1, 4, 16])
def test_statistics_are_the_account_of_what_was_done(drafter: str, window: int) -> None:
    process, batch = ReverseProcess.ddpm(50), 4
    model, listener = Recorder(), Listener()
    conditioning = {"who": torch.arange(batch)}
    out = free.speculative_sample(
        model,
        drafter,
        process=process,
        shape=(6,),
        conditioning=conditioning,
        seed=list(range(batch)),
        window=window,
        callback_on_step_end=listener,
    )
    stats = out.stats
    assert (stats.steps, stats.window, stats.drafter) == (50, window, drafter)

    # what the model saw
    assert stats.forwards == len(model.rows) == len(listener.calls) == stats.draft_calls == max(stats.rounds)
    assert stats.target_evaluations == sum(model.rows)
    assert stats.forward_batch_sizes == Counter(model.rows)
    took_part = Counter(who for call in model.conditioning for who in set(call["who"].tolist()))
    assert [took_part[who] for who in range(batch)] == stats.rounds.tolist()

    # finished samples leave the forward; a window ends with the process
    step = torch.zeros(batch, dtype=torch.int64)
    for call, timestep, (_, settled, _, _) in zip(model.conditioning, model.timesteps, listener.calls, strict=True):
        length = (50 - step).clamp(max=window)
        assert torch.bincount(call["who"], minlength=batch).tolist() == length.tolist()
        expected = [process.timestep[step[who] + j] for who in range(batch) for j in range(length[who])]
        assert timestep.tolist() == [int(value) for value in expected]
        step = settled + 1
    assert (step == 50).all()

    # every round settles its accepted steps and one more
    assert stats.accepted.sum() + stats.rounds.sum() == batch * 50
    assert (stats.accepted <= stats.tested).all()
    assert (stats.tested <= batch).all()
    assert stats.tested[-1] == 0  # the last step has no noise, so it is never drafted
    assert stats.efficiency_per_sample == pytest.approx(50 / stats.rounds)
    assert stats.parallel_efficiency == pytest.approx(np.mean(50 / stats.rounds))
    if window == 1:
        assert stats.tested.sum() == 0
        assert stats.parallel_efficiency == 1
        assert np.isnan(stats.mean_delta).all()
    else:
        assert 0 < stats.acceptance_rate < 1
        assert stats.acceptance_rate == stats.accepted.sum() / stats.tested.sum()
        assert np.isnan(stats.mean_delta).tolist() == (stats.tested == 0).tolist()
        assert (stats.mean_delta[stats.tested > 0] > 0).all()
        assert stats.mean_delta[stats.tested > 0] * stats.tested[stats.tested > 0] == pytest.approx(
            stats.delta_sum[stats.tested > 0]
        )


def test_mean_delta_is_the_gap_of_the_means_over_the_noise() -> None:
    """A drafter that is off by a known amount: |delta| = |model_coef| / std * |offset|, at every tested step."""
    offset = 0.05
    gaussian = GaussianModel()

    def near(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return gaussian(x, timestep) + offset

    process = ReverseProcess.ddpm(30)
    stats = free.speculative_sample(gaussian, near, process=process, shape=(4,), seed=list(range(8)), window=4).stats
    tested = stats.tested > 0
    assert tested.sum() > 20
    expected = (process.model_coef.abs() / process.std * offset * 4**0.5).numpy()
    assert stats.mean_delta[tested] == pytest.approx(expected[tested], rel=1e-3)


def test_ancestral_statistics() -> None:
    model = Recorder()
    stats = free.ancestral_sample(model, shape=(3,), num_samples=2, num_inference_steps=15, seed=0).stats
    assert stats.drafter == "none"
    assert (stats.steps, stats.window, stats.forwards, stats.draft_calls) == (15, 1, 15, 0)
    assert stats.target_evaluations == sum(model.rows) == 30
    assert stats.forward_batch_sizes == {2: 15}
    assert stats.parallel_efficiency == 1
    assert np.isnan(stats.acceptance_rate)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_to_dict_is_ready_for_json(sample: Sampler, gaussian: GaussianModel) -> None:
    stats = sample(gaussian, shape=(3,), num_samples=2, num_inference_steps=15, seed=0).stats
    read = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert read == stats.to_dict()
    assert read["rounds"] == stats.rounds.tolist()
    assert read["tested"] == stats.tested.tolist()
    assert read["accepted"] == stats.accepted.tolist()
    assert len(read["mean_delta"]) == 15
    assert read["parallel_efficiency"] == stats.parallel_efficiency
    assert set(read["seconds"]) == {"draft", "target", "verification"}
    assert sum(read["forward_batch_sizes"].values()) == stats.forwards
    assert 0 < sum(stats.seconds.values()) <= stats.total_seconds


@pytest.mark.parametrize("sample", SAMPLERS)
def test_summary(sample: Sampler, gaussian: GaussianModel) -> None:
    stats = sample(gaussian, shape=(3,), num_samples=2, num_inference_steps=15, seed=0).stats
    lines = dict(line.split("  ", 1) for line in stats.summary().splitlines())
    assert lines["samples"].strip() == "2"
    assert lines["steps"].strip() == "15"
    assert f"{stats.rounds.mean():.1f}" in lines["rounds per sample"]
    assert f"{stats.parallel_efficiency:.2f}" in lines["parallel efficiency"]
    assert f"{stats.accepted.sum()} of {stats.tested.sum()}" in lines["drafts accepted"]
    assert str(stats.forwards) in lines["target forwards"]
    assert str(stats.target_evaluations) in lines["target evaluations"]
    stats.forward_batch_sizes = Counter(range(1, 7))  # more than are shown
    assert "(states x forwards: … 3 x 1, 4 x 1, 5 x 1, 6 x 1)" in stats.summary()


# --- memory and imports ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return out


def live_bytes() -> int:
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("sample", SAMPLERS)
def test_no_tensor_grows_with_the_number_of_steps(sample: Sampler, gaussian: GaussianModel) -> None:
    largest = {}
    for steps in (40, 80):
        process = ReverseProcess.ddpm(steps)
        with Largest() as watch:
            sample(gaussian, process=process, shape=(2**10,), num_samples=2, seed=0)
        largest[steps] = watch.nbytes
    assert largest[40] == largest[80]
    # and the watch does see one that grows
    with Largest() as watch:
        sample(gaussian, process=process, shape=(2**10,), num_samples=2, seed=0, return_trajectory=True)
    assert watch.nbytes >= 2 * 80 * 2**10 * 4


@pytest.mark.parametrize("sample", SAMPLERS)
def test_what_is_kept_does_not_grow_from_round_to_round(sample: Sampler, gaussian: GaussianModel) -> None:
    kept: list[int] = []

    def measure(_model: Any, step: torch.Tensor, _timestep: torch.Tensor, _values: Any) -> None:
        early, late = len(kept) in (4, 5), int(step.max()) > 76
        kept.append(live_bytes() if early or late else 0)

    sample(gaussian, num_inference_steps=80, shape=(2**10,), num_samples=1, seed=0, callback_on_step_end=measure)
    early, late = max(kept[4:6]), max(kept[6:])
    assert early > 2**10 * 4
    assert 0 < late < early + 2**10 * 4  # not one state more


def test_importing_free_is_light() -> None:
    """No Triton, no CUDA context, none of the demo's libraries, no console noise."""
    code = (
        "import sys, torch\n"
        "import free, free_kernels\n"
        "heavy = [name for name in ('triton', 'sklearn', 'matplotlib', 'scipy') if name in sys.modules]\n"
        "print(heavy, torch.cuda.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == "[] False"


def test_free_kernels_knows_nothing_of_free() -> None:
    code = "import sys, free_kernels\nprint([name for name in sys.modules if name == 'free' or name.startswith('free.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_names_are_there() -> None:
    import free_kernels

    for package in (free, free_kernels):
        for name in package.__all__:
            assert getattr(package, name) is not None
    assert free.__version__.count(".") == 2
