"""FeatureDrafter: what it knows, how it walks and sweeps, its size, its files, its refusals; and Fresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
from free import FeatureDrafter, Fresh, Gains, HoldX0, Situation
from free.drafters import as_drafter
from free_kernels import Proposal, normal
from tests.unit.helpers import GaussianModel

STEPS = 12
LABELS = [0, 3, 4]


def random_weights(drafter: FeatureDrafter, scale: float = 0.3) -> FeatureDrafter:
    """Numbers everywhere, the layers that begin at zero too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return drafter


class Watching(Gains):
    """A drafter with a memory that shows others its situations."""

    needs_features = True

    def __init__(self, look: Callable[[Situation], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def propose(self, situation: Situation) -> Proposal:
        self.seen.append(self.look(situation))
        return super().propose(situation)


def in_every_round(model: DiTTransformer2DModel, look: Callable[[Situation], Any], window: int = 5) -> list[Any]:
    """What ``look`` returns in each round of one run of three samples."""
    watching = Watching(look)
    free.speculative_sample(
        model, watching, class_labels=LABELS, guidance_scale=1.5, num_inference_steps=STEPS, window=window, seed=2
    )
    assert len(watching.seen) > 2
    return watching.seen


# --- what it proposes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweeps", [0, 1, 2])
@pytest.mark.parametrize("base", ["gains", "hold-x0"])
def test_untrained_it_drafts_as_its_base(dit: DiTTransformer2DModel, base: Any, sweeps: int) -> None:
    drafter = FeatureDrafter.from_target(dit, base=base, sweeps=sweeps)
    other = as_drafter(base)
    for ours, theirs in in_every_round(dit, lambda situation: (drafter.propose(situation), other.propose(situation))):
        torch.testing.assert_close(ours.states, theirs.states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.draft_output, theirs.draft_output, atol=1e-2, rtol=1e-2)  # divided by x0_model_coef


@pytest.mark.slow
def test_compiled_it_drafts_the_same(dit: DiTTransformer2DModel) -> None:
    """In one piece, what makes its inputs included; and it is as it was afterwards."""
    torch._dynamo.reset()
    drafter = random_weights(FeatureDrafter.from_target(dit))
    situations = in_every_round(dit, lambda situation: situation, window=3)[1:3]
    with torch.no_grad():
        proposals = [drafter.propose(situation) for situation in situations]
        # through a wrapper too
        with Fresh(drafter).running(compile=True, backend="aot_eager"):
            assert "predict" in vars(drafter)
            again = [drafter.propose(situation) for situation in situations]
    assert "predict" not in vars(drafter)
    for ours, theirs in zip(again, proposals, strict=True):
        torch.testing.assert_close(ours.states, theirs.states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("base", ["gains", "hold-x0"])
def test_as_many_sweeps_as_drafts_are_a_walk(dit: DiTTransformer2DModel, base: Any, window: int) -> None:
    """The first state of a path is given, and each sweep makes one state more what the walk makes it: gains too answer to
    the path that the block's corrections lead to.
    """
    walking = random_weights(FeatureDrafter.from_target(dit, base=base, sweeps=0))
    sweeping = random_weights(FeatureDrafter.from_target(dit, base=base, sweeps=max(1, window - 1)))
    fewer = random_weights(FeatureDrafter.from_target(dit, base=base, sweeps=1))
    worst = 0.0
    for first, second, third in in_every_round(
        dit, lambda situation: [drafter.propose(situation) for drafter in (walking, sweeping, fewer)], window
    ):
        torch.testing.assert_close(second.states, first.states, atol=1e-3, rtol=1e-3)
        worst = max(worst, float((third.states - first.states).abs().max()))
    assert (worst > 1e-2) == (window > 2)


@pytest.mark.parametrize(
    ("base", "sweeps"), [("gains", 0), ("gains", 2), ("hold-x0", 0), ("hold-x0", 1), ("hold-x0", 2), (None, 0), (None, 1)]
)
def test_a_draft_knows_no_noise_of_its_own_step(dit: DiTTransformer2DModel, base: Any, sweeps: int) -> None:
    drafter = random_weights(FeatureDrafter.from_target(dit, base=base, sweeps=sweeps))

    def look(situation: Situation) -> None:
        noise = normal(situation.seed[:, None], situation.step[:, None] + torch.arange(5), situation.state.shape[1])
        drafts = drafter.propose(replace(situation, noise=noise)).draft_output
        for j in range(4):
            changed = noise.clone()
            changed[:, j:] += 1.0
            others = drafter.propose(replace(situation, noise=changed)).draft_output
            torch.testing.assert_close(others[:, : j + 1], drafts[:, : j + 1], atol=1e-5, rtol=1e-5)
            if j < 3 and (situation.step + j + 1 < STEPS - 1).all():
                assert (others[:, j + 1] - drafts[:, j + 1]).abs().max() > 1e-3

    in_every_round(dit, look)


def test_the_anchor_is_a_control_variate_at_its_own_step(dit: DiTTransformer2DModel) -> None:
    """Where the state is the anchor's there is nothing to add to what the target said; an older anchor controls nothing."""
    drafter = random_weights(FeatureDrafter.from_target(dit))

    def look(situation: Situation) -> bool:
        label = situation.target.label_embedding(situation.conditioning)
        anchor = situation.anchor(situation.step)
        answer = drafter.answer(situation, anchor.state, anchor.step)
        assert answer is not None
        assert answer.abs().max() < 1e-4  # to no way from the anchor
        missing, feature = drafter.predict(
            anchor.state, anchor.step, anchor, label, situation.process, answer=torch.zeros_like(answer)
        )
        assert feature is None
        assert missing.abs().max() < 1e-5
        later = (anchor.step + 1).clamp(max=STEPS - 1)
        old, _ = drafter.predict(anchor.state, later, anchor, label, situation.process, answer=answer)
        assert old[later > anchor.step].abs().sum() > 1e-2 or (later == anchor.step).all()
        # a state a little off the anchor's has a draft a little off the target's word
        near, _ = drafter.predict(anchor.state + 1e-4, anchor.step, anchor, label, situation.process, answer=answer)
        return bool(near.abs().max() < 1e-1)

    assert all(in_every_round(dit, look))


def test_the_papers_drafter_leans_on_its_own_features(dit: DiTTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's feature at the last settled step for the first draft, then what the block itself predicted."""
    drafter = random_weights(FeatureDrafter.from_target(dit, base=None))
    original, given, made = FeatureDrafter.forward, [], []

    def forward(self: FeatureDrafter, images: Any, timestep: Any, gap: Any, label: Any, feature: Any) -> Any:
        output, own = original(self, images, timestep, gap, label, feature)
        given.append((feature, gap))
        made.append(own)
        return output, own

    monkeypatch.setattr(FeatureDrafter, "forward", forward)

    def look(situation: Situation) -> None:
        given.clear()
        made.clear()
        drafter.propose(situation)
        assert len(given) == 4
        last = situation.last
        settled = (situation.step - last.step - 1).clamp(min=0)
        assert last.feature is not None
        assert torch.equal(given[0][0], last.feature[torch.arange(len(settled)), settled])
        for (feature, _), own in zip(given[1:], made[:-1], strict=True):
            assert feature is own
        timestep, step = situation.process.timestep, situation.step
        assert torch.equal(given[0][1], timestep[(step - 1).clamp(min=0)] - timestep[step])

    in_every_round(dit, look)


def test_it_asks_for_the_label_and_the_feature_of_the_target(dit: DiTTransformer2DModel) -> None:
    """Both reach the output: other labels or features, other drafts."""
    drafter = random_weights(FeatureDrafter.from_target(dit))

    def look(situation: Situation) -> bool:
        if len(situation.step) < len(LABELS):  # the last one's last window is far from all that the block has seen
            return False
        drafts = drafter.propose(situation).draft_output
        other = replace(situation, conditioning={"class_labels": situation.conditioning["class_labels"] * 0 + 1})
        assert (drafter.propose(other).draft_output - drafts).abs().max() > 1e-3
        assert situation.last.feature is not None
        last = replace(situation.last, feature=situation.last.feature + torch.randn_like(situation.last.feature))
        assert (drafter.propose(replace(situation, last=last)).draft_output - drafts).abs().max() > 1e-3
        return True

    assert sum(in_every_round(dit, look)) > 2


def test_the_label_embedding_is_the_targets(dit: DiTTransformer2DModel) -> None:
    target = free.as_target(dit)
    labels = torch.tensor([0, 4, 5])  # the last is the null class
    embedded = target.label_embedding({"class_labels": labels})
    assert torch.equal(embedded, dit.transformer_blocks[0].norm1.emb.class_embedder.embedding_table(labels))
    with pytest.raises(ValueError, match="CallableTarget has none"):
        free.as_target(GaussianModel()).label_embedding({})


# --- its size, its files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "gains"])
def test_at_xl_2_it_has_a_twentieth_of_the_targets_parameters(base: Any) -> None:
    with torch.device("meta"):
        target = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        drafter = FeatureDrafter(16, 72, 4, 32, 2, base=base)
    parameters, of_target = (sum(p.numel() for p in model.parameters()) for model in (drafter, target))
    assert 30e6 < parameters < 34e6
    assert parameters / of_target < 0.05


def test_it_has_the_device_and_dtype_of_its_target(dit: DiTTransformer2DModel) -> None:
    drafter = FeatureDrafter.from_target(dit.to(torch.bfloat16))
    assert drafter.dtype == torch.bfloat16
    assert not drafter.training
    output = free.speculative_sample(dit, drafter, class_labels=[1], num_inference_steps=6, window=4, seed=0)
    assert output.samples.dtype == torch.float32


@pytest.mark.parametrize(("base", "sweeps"), [(None, 0), ("hold-x0", 2), ("gains", 1)])
def test_what_is_saved_is_loaded(dit: DiTTransformer2DModel, tmp_path: Path, base: Any, sweeps: int) -> None:
    drafter = random_weights(FeatureDrafter.from_target(dit, base=base, sweeps=sweeps))
    drafter.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = FeatureDrafter.from_pretrained(tmp_path)
    assert (loaded.base, loaded.sweeps) == (base, sweeps)
    arguments = {"class_labels": LABELS, "guidance_scale": 1.5, "num_inference_steps": STEPS, "window": 4, "seed": 5}
    first, second = (free.speculative_sample(dit, one, **arguments).samples for one in (drafter, loaded))
    assert torch.equal(first, second)


def test_a_samples_law_needs_no_trained_drafter(dit: DiTTransformer2DModel) -> None:
    """Drafts that are never right still end in samples, one step a round."""
    drafter = random_weights(FeatureDrafter.from_target(dit), scale=3.0)
    arguments = {"class_labels": LABELS, "num_inference_steps": STEPS, "seed": 5}
    output = free.speculative_sample(dit, drafter, window=4, **arguments)
    assert output.stats.acceptance_rate < 0.2
    assert torch.isfinite(output.samples).all()


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_head_dim": 16}, r"\(16, 32\); the target's are \(16, 16\)"),
        ({"patch_size": 4}, r"\(4, 16\); the target's are \(16, 16\)"),
        ({"in_channels": 3}, r"\(3, 8, 8\); the target's are \(2, 8, 8\)"),
        ({"sample_size": 16, "patch_size": 4}, r"\(2, 16, 16\); the target's are \(2, 8, 8\)"),
    ],
)
def test_a_drafter_that_does_not_fit(dit: DiTTransformer2DModel, changed: dict[str, int], message: str) -> None:
    fitting = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "sample_size": 8, "patch_size": 2}
    drafter = FeatureDrafter(**(fitting | changed))
    with pytest.raises(ValueError, match=message):
        free.speculative_sample(dit, drafter, class_labels=LABELS)


def test_a_target_without_features(dit: DiTTransformer2DModel) -> None:
    with pytest.raises(ValueError, match="CallableTarget has none"):
        free.speculative_sample(GaussianModel(), FeatureDrafter.from_target(dit), shape=(2, 8, 8))
    with pytest.raises(ValueError, match="CallableTarget has none"):
        FeatureDrafter.from_target(GaussianModel())


@pytest.mark.parametrize("wrong", [{"base": "hold-output"}, {"sweeps": -1}, {"sweeps": 1.5}, {"sweeps": True}])
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*allowed"):
        FeatureDrafter(2, 8, 2, 8, 2, **wrong)


# --- fresh noise --------------------------------------------------------------------------------------------------------


def test_fresh_hides_abandoned_states(dit: DiTTransformer2DModel) -> None:
    def look(situation: Situation) -> bool:
        steps = situation.step[:, None] + torch.arange(4)
        hidden = Watching(lambda seen: seen.anchor(steps).step)
        Fresh(hidden).propose(situation)
        begun = situation.step > 0
        assert (hidden.seen[0] < situation.step[:, None])[begun].all()
        assert (hidden.seen[0] == situation.step[:, None] - 1)[begun].all()
        return bool((situation.anchor(steps).step >= situation.step[:, None])[begun].any())

    assert any(in_every_round(dit, look))  # without it there were such anchors to lean on
    assert Fresh(HoldX0()).name == "hold-x0, fresh noise"


def test_fresh_passes_checks_and_features_on(dit: DiTTransformer2DModel) -> None:
    drafter = Fresh(FeatureDrafter.from_target(dit))
    assert drafter.needs_features
    with pytest.raises(ValueError, match="CallableTarget has none"):
        free.speculative_sample(GaussianModel(), drafter, shape=(2, 8, 8))
    output = free.speculative_sample(dit, drafter, class_labels=LABELS, num_inference_steps=STEPS, window=4, seed=5)
    assert torch.isfinite(output.samples).all()
