"""What adapts a model: the DiT, its pipeline, and any callable."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    apply_layerwise_casting,
    apply_pyramid_attention_broadcast,
)

import free
from free import CallableTarget, DiTTarget, ReverseProcess
from tests.unit.helpers import GaussianModel, Recorder

MakeDiT = Callable[..., DiTTransformer2DModel]

# networks of two small blocks: float32 sums in another order differ by a few units in the last place
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


TIMESTEPS = torch.tensor([999, 3, 500, 250])
LABELS = torch.tensor([0, 4, 2, 1])


def evaluate(target: free.Target, states: torch.Tensor, guided: bool = False, **conditioning: Any) -> Any:
    with torch.no_grad():
        return target.evaluate(states, TIMESTEPS[: len(states)], conditioning, guided)


# --- the DiT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_channels", [None, 2, 4])
def test_dit_gives_the_models_own_output(make_dit: MakeDiT, states: torch.Tensor, out_channels: int | None) -> None:
    model = make_dit(out_channels)
    target = free.as_target(model)
    assert isinstance(target, DiTTarget)
    assert target.sample_shape == (2, 8, 8)
    got = evaluate(target, states, class_labels=LABELS)
    with torch.no_grad():
        expected = model(states, TIMESTEPS, LABELS).sample
    assert expected.shape[1] == (out_channels or 2)
    assert torch.equal(got.output, expected[:, :2])  # learned variance is dropped
    assert got.unconditional is None
    assert got.feature is None


def test_each_sample_has_a_timestep_and_a_label_of_its_own(dit: DiTTransformer2DModel, states: torch.Tensor) -> None:
    together = evaluate(free.as_target(dit), states, class_labels=LABELS).output
    with torch.no_grad():
        alone = [dit(states[i : i + 1], TIMESTEPS[i : i + 1], LABELS[i : i + 1]).sample for i in range(4)]
        wrong_time = dit(states, TIMESTEPS[:1].expand(4), LABELS).sample
        wrong_label = dit(states, TIMESTEPS, LABELS[:1].expand(4)).sample
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)
    # and both matter, or the comparison above would say nothing
    assert (together - wrong_time)[1:].flatten(1).abs().amax(1).min() > 1e-3
    assert (together - wrong_label)[1:].flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("out_channels", [None, 4])
def test_guidance_halves_are_both_outputs_of_one_forward(
    make_dit: MakeDiT, states: torch.Tensor, out_channels: int | None
) -> None:
    model = make_dit(out_channels, num_classes=7)
    calls: list[int] = []
    model.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    got = evaluate(free.as_target(model), states, guided=True, class_labels=LABELS)
    assert calls == [8]
    with torch.no_grad():
        null = torch.full_like(LABELS, 7)  # num_embeds_ada_norm of this model, not ImageNet's 1000
        torch.testing.assert_close(got.output, model(states, TIMESTEPS, LABELS).sample[:, :2], **CLOSE)
        torch.testing.assert_close(got.unconditional, model(states, TIMESTEPS, null).sample[:, :2], **CLOSE)
    assert (got.output - got.unconditional).abs().max() > 1e-3


def test_without_labels_the_class_is_null(dit: DiTTransformer2DModel) -> None:
    target = free.as_target(dit)
    assert target.null_class == 5
    seen: list[torch.Tensor] = []
    dit.register_forward_pre_hook(
        lambda _module, _inputs, keywords: seen.append(keywords["class_labels"].clone()), with_kwargs=True
    )
    free.speculative_sample(dit, num_samples=3, num_inference_steps=2, seed=0)
    assert seen
    assert all((labels == 5).all() for labels in seen)


@pytest.mark.parametrize(
    ("limit", "guided", "sizes"), [(3, False, [3, 1]), (1, False, [1] * 4), (4, True, [4, 4]), (5, True, [4, 4])]
)
def test_max_forward_batch_splits_and_changes_nothing(
    dit: DiTTransformer2DModel, states: torch.Tensor, limit: int, guided: bool, sizes: list[int]
) -> None:
    whole = evaluate(free.as_target(dit), states, guided, class_labels=LABELS)
    calls: list[int] = []
    dit.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    target = free.as_target(dit, max_forward_batch=limit)
    with target.capture_features():
        parts = evaluate(target, states, guided, class_labels=LABELS)
    assert calls == sizes
    torch.testing.assert_close(parts.output, whole.output, **CLOSE)
    assert parts.feature.shape == (4, 16, 16)
    if guided:
        torch.testing.assert_close(parts.unconditional, whole.unconditional, **CLOSE)
    else:
        assert parts.unconditional is None


@pytest.mark.parametrize("guided", [False, True])
def test_feature_is_the_top_blocks_of_the_conditional_half(
    dit: DiTTransformer2DModel, states: torch.Tensor, guided: bool
) -> None:
    target = free.as_target(dit)
    with target.capture_features():
        feature = evaluate(target, states, guided, class_labels=LABELS).feature
    seen: list[torch.Tensor] = []
    handle = dit.transformer_blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        dit(states, TIMESTEPS, LABELS)
    handle.remove()
    assert feature.shape == (4, 16, 16)  # [N, tokens, width]
    torch.testing.assert_close(feature, seen[0], **CLOSE)


def test_the_feature_hook_is_removed(dit: DiTTransformer2DModel, states: torch.Tensor) -> None:
    target = free.as_target(dit)
    with target.capture_features():
        assert len(dit.transformer_blocks[-1]._forward_hooks) == 1
    assert not dit.transformer_blocks[-1]._forward_hooks
    with pytest.raises(RuntimeError, match="stop"), target.capture_features():
        raise RuntimeError("stop")
    assert not dit.transformer_blocks[-1]._forward_hooks
    assert evaluate(target, states, class_labels=LABELS).feature is None


def test_a_compiled_dit_is_a_dit(dit: DiTTransformer2DModel, states: torch.Tensor) -> None:
    compiled = torch.compile(dit, backend="eager")
    target = free.as_target(compiled)
    assert isinstance(target, DiTTarget)
    assert target.model is compiled  # what is called is the compiled one
    assert target.sample_shape == (2, 8, 8)
    with target.capture_features():
        got = evaluate(target, states, class_labels=LABELS)
    expected = evaluate(free.as_target(dit), states, class_labels=LABELS)
    torch.testing.assert_close(got.output, expected.output, **CLOSE)
    assert got.feature.shape == (4, 16, 16)
    with pytest.raises(ValueError, match="train mode"):
        free.as_target(torch.compile(dit.train(), backend="eager"))


def test_a_half_precision_dit_is_fed_half_and_sampled_in_float32(dit: DiTTransformer2DModel) -> None:
    dit = dit.to(torch.bfloat16)
    seen: list[torch.dtype] = []
    dit.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].dtype))
    out = free.speculative_sample(dit, class_labels=[1, 2], guidance_scale=2.0, num_inference_steps=6, seed=0)
    assert set(seen) == {torch.bfloat16}
    assert out.samples.dtype == torch.float32
    assert torch.isfinite(out.samples).all()


# --- the pipeline -------------------------------------------------------------------------------------------------------


def make_pipeline(transformer: DiTTransformer2DModel, scheduler: Any) -> DiTPipeline:
    vae = AutoencoderKL(latent_channels=2, block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    pipe = DiTPipeline(transformer, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        DDPMScheduler(
            clip_sample=True, clip_sample_range=2.0, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large"
        ),
    ],
    ids=["ddim", "ddpm"],
)
def test_a_pipeline_is_its_transformer_and_its_scheduler(make_dit: MakeDiT, scheduler: Any) -> None:
    transformer = make_dit()
    pipe = make_pipeline(transformer, scheduler)
    target = free.as_target(pipe)
    assert isinstance(target, DiTTarget)
    assert target.model is transformer
    process, expected = target.default_process(13), ReverseProcess.from_scheduler(scheduler, 13)
    assert torch.equal(process.timestep, expected.timestep)
    assert torch.equal(process.std, expected.std)
    assert process.clip_range == expected.clip_range
    common: dict[str, Any] = {"class_labels": [1, 3], "num_inference_steps": 13, "guidance_scale": 1.5, "seed": [1, 2]}
    for sample in (free.ancestral_sample, free.speculative_sample):
        from_pipe, from_parts = sample(pipe, **common), sample(transformer, process=scheduler, **common)
        assert torch.equal(from_pipe.samples, from_parts.samples)
        # the transformer alone is sampled as the original DiT was
        assert not torch.equal(from_pipe.samples, sample(transformer, **common).samples)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("out_channels", [None, 4])
def test_without_noise_the_result_is_the_pipelines_own(
    make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch, guidance_scale: float, out_channels: int | None
) -> None:
    """At eta=0 the process is DDIM, which is deterministic: guidance, null class, channels and steps must all agree."""
    # the pipeline has ImageNet's null class built in, and halves out_channels whatever they are
    model = make_dit(out_channels or 2, num_classes=1000)
    pipe = make_pipeline(model, DDIMScheduler(clip_sample=False))
    made: list[torch.Tensor] = []

    def keep(latents: torch.Tensor) -> SimpleNamespace:
        made.append(latents * pipe.vae.config.scaling_factor)
        return SimpleNamespace(sample=latents)

    monkeypatch.setattr(pipe.vae, "decode", keep)
    labels = [3, 998]
    pipe(labels, guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(0), num_inference_steps=20)
    latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    out = free.speculative_sample(
        pipe,
        class_labels=labels,
        guidance_scale=guidance_scale,
        latents=latents,
        process=ReverseProcess.from_scheduler(pipe.scheduler, 20, eta=0.0),
        seed=0,
    )
    torch.testing.assert_close(out.samples, made[0], rtol=1e-3, atol=1e-3 * float(made[0].abs().max()))


# --- any callable -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (16, 7), (3, 4, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("sample", [free.speculative_sample, free.ancestral_sample])
def test_states_of_any_rank(shape: tuple[int, ...], sample: Callable[..., free.SamplingOutput]) -> None:
    model = Recorder(lambda x, timestep: GaussianModel()(x, timestep) + 0 * x.new_zeros(len(x), *shape))
    out = sample(model, shape=shape, num_samples=2, num_inference_steps=10, seed=0)
    assert out.samples.shape == (2, *shape)
    assert out.samples.dtype == torch.float32
    assert all(timestep.dtype == torch.int64 and timestep.dim() == 1 for timestep in model.timesteps)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda output: SimpleNamespace(sample=output),
        lambda output: (output,),
        lambda output: (output, "anything"),
        lambda output: output.double(),
    ],
    ids=["sample", "tuple", "longer-tuple", "float64"],
)
def test_outputs_are_unpacked(wrap: Callable[[torch.Tensor], Any]) -> None:
    plain = GaussianModel()
    common: dict[str, Any] = {"shape": (6,), "num_samples": 2, "num_inference_steps": 20, "seed": 3}
    expected = free.speculative_sample(plain, **common)
    got = free.speculative_sample(lambda x, timestep: wrap(plain(x, timestep)), **common)
    assert torch.equal(got.samples, expected.samples)


class Conditioned:
    """Data N(goal, 0.5²) with a goal for each sample, and a keyword that has no rows."""

    def __init__(self) -> None:
        self.gaussian = GaussianModel(mean=0.0)
        self.styles: set[Any] = set()

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, goal: torch.Tensor, style: Any = None) -> torch.Tensor:
        assert goal.shape == x.shape
        self.styles.add(style)
        return self.gaussian(x, timestep) - self.gaussian.slope[timestep][:, None] * goal


@pytest.mark.parametrize("window", [1, 3, 8])
def test_conditioning_rows_follow_their_samples(window: int) -> None:
    """Samples advance at a pace of their own, and each keeps its conditioning: alone or in a batch, to the bit."""
    model = Conditioned()
    goal = torch.tensor([[-3.0, 1.0, 0.0], [0.0, 2.0, 5.0], [9.0, 9.0, 9.0], [-1.0, -1.0, 7.0]])
    common: dict[str, Any] = {"shape": (3,), "num_inference_steps": 40, "window": window}
    seeds = [5, 6, 7, 8]
    together = free.speculative_sample(model, conditioning={"goal": goal, "style": "any"}, seed=seeds, **common)
    for i in range(4):
        alone = free.speculative_sample(
            model, conditioning={"goal": goal[i : i + 1], "style": "any"}, seed=seeds[i : i + 1], **common
        )
        assert torch.equal(together.samples[i], alone.samples[0])
        assert together.stats.rounds[i] == alone.stats.rounds[0]
    assert model.styles == {"any"}
    if window > 1:
        assert len(set(together.stats.rounds.tolist())) > 1  # they did get out of step


@pytest.mark.parametrize("null", [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0.0, 1.0, 2.0]]), [0.0, 1.0, 2.0]])
def test_guidance_of_a_callable_by_its_null_conditioning(null: Any) -> None:
    """Two Gaussians of one width: guiding from one to the other moves the mean and nothing else."""
    model = Conditioned()
    target = free.as_target(model, null_conditioning={"goal": null, "style": None})
    assert isinstance(target, CallableTarget)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    goal = torch.arange(12.0).view(4, 3)
    got = evaluate(target, x, guided=True, goal=goal, style="any")
    assert torch.equal(got.output, model(x, TIMESTEPS, goal))
    assert torch.equal(got.unconditional, model(x, TIMESTEPS, torch.tensor([0.0, 1.0, 2.0]).expand(4, 3)))
    common: dict[str, Any] = {"shape": (3,), "num_inference_steps": 30, "seed": [1, 2, 3, 4]}
    moved = torch.as_tensor(null) + 1.5 * (goal - torch.as_tensor(null))
    guided = free.ancestral_sample(target, conditioning={"goal": goal, "style": "any"}, guidance_scale=1.5, **common)
    plain = free.ancestral_sample(model, conditioning={"goal": moved, "style": "any"}, **common)
    torch.testing.assert_close(guided.samples, plain.samples, rtol=1e-4, atol=1e-4)


def test_class_labels_of_a_callable() -> None:
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        seen.append(class_labels)
        return 0.1 * x

    common: dict[str, Any] = {"shape": (2,), "num_inference_steps": 3, "window": 1, "seed": 0}
    free.speculative_sample(model, class_labels=[4, 7], **common)
    assert all(labels.tolist() == [4, 7] for labels in seen)
    seen.clear()
    assert free.speculative_sample(model, class_labels=4, num_samples=3, **common).samples.shape == (3, 2)
    assert all(labels.tolist() == [4, 4, 4] for labels in seen)


def test_max_forward_batch_of_a_callable() -> None:
    model = Recorder()
    target = free.as_target(model, max_forward_batch=5)
    common: dict[str, Any] = {"shape": (3,), "num_samples": 2, "num_inference_steps": 20, "seed": 4}
    bounded = free.speculative_sample(target, **common)
    assert max(model.rows) == 5
    assert torch.equal(bounded.samples, free.speculative_sample(GaussianModel(), **common).samples)
    assert bounded.stats.forwards == len(model.rows)
    assert {size: model.rows.count(size) for size in set(model.rows)} == dict(bounded.stats.forward_batch_sizes)


def test_a_module_of_another_dtype_is_fed_that_dtype() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.bfloat16
            return x * self.scale

    target = free.as_target(Net().eval())
    assert target.dtype == torch.bfloat16
    assert target.device == torch.device("cpu")
    out = free.speculative_sample(target, shape=(4,), num_inference_steps=5, seed=0)
    assert out.samples.dtype == torch.float32


def test_a_target_stands_for_itself() -> None:
    target = free.as_target(GaussianModel())
    assert free.as_target(target) is target


# --- models that are refused --------------------------------------------------------------------------------------------


def test_train_mode_is_refused_also_when_only_a_part_is_in_it(dit: DiTTransformer2DModel) -> None:
    dit.transformer_blocks[1].train()
    with pytest.raises(ValueError, match=r"train mode.*model\.eval\(\)"):
        free.as_target(dit)
    with pytest.raises(ValueError, match="train mode"):
        free.as_target(torch.nn.Linear(3, 3))


def test_train_mode_after_the_target_was_made_is_refused_too(dit: DiTTransformer2DModel) -> None:
    target = free.as_target(dit)
    dit.train()
    with pytest.raises(ValueError, match="train mode"):
        free.speculative_sample(target, num_inference_steps=2)
    with pytest.raises(ValueError, match="train mode"):
        free.ancestral_sample(target, num_inference_steps=2)


def test_a_cache_of_diffusers_is_refused(dit: DiTTransformer2DModel) -> None:
    target = free.as_target(dit)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 5,
    )
    apply_pyramid_attention_broadcast(dit, config)
    with pytest.raises(ValueError, match=r"cache hook \(pyramid_attention_broadcast\)"):
        free.as_target(dit)
    with pytest.raises(ValueError, match="cache hook"):
        free.speculative_sample(target, num_inference_steps=2)


class StatefulHook(ModelHook):
    _is_stateful = True

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        return module


def test_any_stateful_hook_is_refused_and_removing_it_helps(dit: DiTTransformer2DModel) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(dit.transformer_blocks[0])
    registry.register_hook(StatefulHook(), "some_cache")
    with pytest.raises(ValueError, match=r"cache hook \(some_cache\)"):
        free.as_target(dit)
    registry.remove_hook("some_cache", recurse=False)
    assert isinstance(free.as_target(dit), DiTTarget)


def test_enable_cache_of_a_model_is_refused() -> None:
    class Cached(torch.nn.Module):
        is_cache_enabled = True

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="enable_cache"):
        free.as_target(Cached().eval())


def test_stateless_hooks_are_allowed(dit: DiTTransformer2DModel, states: torch.Tensor) -> None:
    expected = evaluate(free.as_target(dit), states, class_labels=LABELS).output
    apply_layerwise_casting(dit, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    got = evaluate(free.as_target(dit), states, class_labels=LABELS).output
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)


def test_a_model_of_several_dtypes_is_shown_what_it_says_it_takes() -> None:
    class Mixed(torch.nn.Module):
        """As diffusers' models that keep some modules in float32, which may be the first ones."""

        dtype = torch.bfloat16

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(3))
            self.layer = torch.nn.Linear(3, 3).bfloat16()

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.table

    class Encoded(torch.nn.Module):
        """As a policy with a small encoder in half precision beside it."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Linear(2, 2).bfloat16()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    for model, dtype in ((Mixed(), torch.bfloat16), (Encoded(), torch.float32)):
        assert free.as_target(model.eval()).dtype == dtype
        samples = free.speculative_sample(model, shape=(3,), num_inference_steps=6, window=3, seed=0).samples
        assert samples.isfinite().all()
