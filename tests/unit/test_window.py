"""The round: noise that is drawn once, anchors that never look ahead, and drafters of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import free
import free.sampling.noise
from free import Drafter, HoldX0, ModelDrafter, ReverseProcess, Situation, StepDrafter
from free.sampling.window import NoiseWindow
from free_kernels import NOISE_STREAM, TEST_STREAM, Proposal, normal, posterior, uniform
from tests.unit.helpers import GaussianModel, Recorder

# --- the noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5, 8])
@pytest.mark.parametrize("numel", [1, 7, 6000])
def test_noise_is_that_of_seed_and_step_and_is_drawn_once(monkeypatch: pytest.MonkeyPatch, window: int, numel: int) -> None:
    """Any pattern of advances, samples that finish on the way, few numbers (drawn ahead) and many (not)."""
    drawn: Counter[tuple[int, int]] = Counter()
    tested: Counter[tuple[int, int]] = Counter()

    def counting(draw: Callable[..., torch.Tensor], count: Counter[tuple[int, int]]) -> Callable[..., torch.Tensor]:
        def counted(seed: torch.Tensor, step: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
            pairs = torch.broadcast_tensors(seed, step)
            count.update(zip(pairs[0].flatten().tolist(), pairs[1].flatten().tolist(), strict=True))
            return draw(seed, step, *rest, **keywords)

        return counted

    monkeypatch.setattr(free.sampling.noise, "normal", counting(normal, drawn))
    monkeypatch.setattr(free.sampling.noise, "uniform", counting(uniform, tested))
    chance = torch.Generator().manual_seed(window)
    seed, step = torch.tensor([7, -3, 2**62]), torch.zeros(3, dtype=torch.int64)
    noise = NoiseWindow.empty(seed, window, numel)
    for turn in range(25):
        z, u = noise.reach(seed, step, window)
        steps = step[:, None] + torch.arange(window)
        assert torch.equal(z, normal(seed[:, None], steps, numel, stream=NOISE_STREAM))
        assert torch.equal(u, uniform(seed[:, None], steps, stream=TEST_STREAM))
        step = step + torch.randint(1, window + 1, step.shape, generator=chance)
        if turn == 12:
            rows = torch.tensor([2, 0])
            noise, seed, step = noise.keep(rows), seed[rows], step[rows]
    for counts in (drawn, tested):
        assert set(counts.values()) == {1}
        assert {key for key, _ in counts} == {7, -3, 2**62}


def test_the_numbers_drawn_ahead_are_bounded() -> None:
    for numel in (1, 100, 10**5):
        noise = NoiseWindow.empty(torch.zeros(4, dtype=torch.int64), 8, numel)
        assert noise.noise.numel() <= max(4 * 8 * numel, 2**16)


# --- what a drafter sees ------------------------------------------------------------------------------------------------


class Watching(HoldX0):
    """hold-x0 that keeps the situations it met, and what it proposed."""

    def __init__(self, needs_features: bool = False) -> None:
        self.needs_features = needs_features
        self.situations: list[Situation] = []
        self.proposals: list[Proposal] = []

    def propose(self, situation: Situation) -> Proposal:
        proposal = super().propose(situation)
        self.situations.append(situation)
        self.proposals.append(proposal)
        return proposal


@pytest.mark.parametrize("window", [2, 5, 8])
def test_an_anchor_is_the_latest_evaluation_at_a_step_not_beyond_the_drafts(window: int) -> None:
    drafter, model = Watching(), GaussianModel()
    process = ReverseProcess.ddpm(40)
    free.speculative_sample(model, drafter, process=process, shape=(3,), seed=[1, 2, 3, 4], window=window)
    assert len(drafter.situations) > 3
    at_its_own_step = 0
    for round_number, situation in enumerate(drafter.situations):
        last = situation.last
        for ahead in range(window - 1):
            step = situation.step + ahead
            anchor = situation.anchor(step)
            assert (anchor.step <= step).all()
            row = torch.arange(len(step))
            column = anchor.step - last.step
            assert (column >= 0).all()
            assert (column < last.length).all()
            # the latest: it is at the step itself, or the last one that was evaluated
            assert ((anchor.step == step) | (column == last.length - 1)).all()
            assert torch.equal(anchor.state, last.states[row, column])
            if round_number:
                assert torch.equal(anchor.output, model(anchor.state, process.timestep[anchor.step]))
                at_its_own_step += int((anchor.step == step).sum())
    assert at_its_own_step > 0  # abandoned states were leant on


def test_the_last_window_is_what_was_proposed_and_evaluated_abandoned_states_included() -> None:
    drafter, model = Watching(), GaussianModel()
    process = ReverseProcess.ddpm(30)
    out = free.speculative_sample(model, drafter, process=process, shape=(3,), seed=5, window=6)
    first = drafter.situations[0].last
    assert first.length.tolist() == [1]
    assert first.step.tolist() == [0]
    assert not first.states.any()
    assert not first.output.any()
    assert first.unconditional is None
    abandoned = 0
    for before, proposal, after in zip(drafter.situations, drafter.proposals, drafter.situations[1:], strict=False):
        last = after.last
        assert torch.equal(last.step, before.step)
        assert last.length.tolist() == [min(6, 30 - int(before.step))]
        evaluated = int(last.length)
        assert torch.equal(last.states[:, :evaluated], proposal.states[:, :evaluated])
        timesteps = process.timestep[before.step + torch.arange(evaluated)]
        assert torch.equal(last.output[0, :evaluated], model(last.states[0, :evaluated], timesteps))
        abandoned += evaluated - int(after.step - before.step)
    assert abandoned > 0
    assert len(drafter.situations) == out.stats.rounds[0]


def test_a_drafter_sees_the_live_samples_only_each_with_its_own_conditioning() -> None:
    drafter, seeds = Watching(), [31, 41, 59, 26]
    conditioning = {"who": torch.tensor(seeds), "all": "the same"}
    process = ReverseProcess.ddpm(40)
    out = free.speculative_sample(
        Recorder(), drafter, conditioning=conditioning, process=process, shape=(3,), seed=seeds, window=4
    )
    for situation in drafter.situations:
        assert torch.equal(situation.conditioning["who"], situation.seed)
        assert situation.conditioning["all"] == "the same"
        assert len(situation.step) == len(situation.state) == len(situation.last.states) == len(situation.seed)
        assert (situation.step < 40).all()
    turns = [seed for situation in drafter.situations for seed in situation.seed.tolist()]
    assert [turns.count(seed) for seed in seeds] == out.stats.rounds.tolist()
    assert len(drafter.situations[-1].seed) < 4  # some were finished before others


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_features_reach_the_drafter_when_it_asks(dit: DiTTransformer2DModel, guidance_scale: float) -> None:
    drafter = Watching(needs_features=True)
    common: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 10, "window": 4, "seed": 0}
    free.speculative_sample(dit, drafter, guidance_scale=guidance_scale, **common)
    assert not dit.transformer_blocks[-1]._forward_hooks
    assert len(drafter.situations) > 2
    for situation in drafter.situations[1:]:
        assert situation.last.feature.shape == (len(situation.step), 4, 16, 16)  # [B, A, tokens, width]
        anchor = situation.anchor(situation.step)
        assert anchor.feature.shape == (len(situation.step), 16, 16)
        # it is the feature of the anchor's own state, of the conditional half
        target = free.as_target(dit)
        with torch.no_grad(), target.capture_features():
            again = target.evaluate(
                anchor.state.view(-1, 2, 8, 8), situation.process.timestep[anchor.step], situation.conditioning, False
            )
        torch.testing.assert_close(anchor.feature, again.feature, rtol=1e-4, atol=1e-4)
    plain = Watching()
    free.speculative_sample(dit, plain, guidance_scale=guidance_scale, **common)
    assert all(situation.last.feature is None for situation in plain.situations)


def test_under_guidance_the_anchor_is_guided(dit: DiTTransformer2DModel) -> None:
    drafter = Watching()
    free.speculative_sample(dit, drafter, class_labels=3, guidance_scale=2.5, num_inference_steps=10, window=4, seed=1)
    for situation in drafter.situations[1:]:
        last, anchor = situation.last, situation.anchor(situation.step)
        column = int(anchor.step - last.step)
        unconditional = last.unconditional[:, column]
        expected = unconditional + 2.5 * (last.output[:, column] - unconditional)
        torch.testing.assert_close(anchor.output, expected, rtol=1e-6, atol=1e-6)
        assert (anchor.output - last.output[:, column]).abs().max() > 1e-4


# --- drafters of one's own ----------------------------------------------------------------------------------------------


class HoldByHand(StepDrafter):
    """hold-x0 as a user would write it, one step at a time."""

    name = "by hand"

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        anchor, process = situation.anchor(step), situation.process
        x0 = (
            process.x0_state_coef[anchor.step, None] * anchor.state
            + process.x0_model_coef[anchor.step, None] * anchor.output
        )
        return (x0 - process.x0_state_coef[step, None] * state) / process.x0_model_coef[step, None]


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_drafter_can_be_hold_x0(clip: bool) -> None:
    process = ReverseProcess.ddpm(50, clip_sample=clip, clip_sample_range=0.8)
    common: dict[str, Any] = {"process": process, "shape": (4,), "seed": [3, 4, 5], "window": 6}
    by_hand = free.speculative_sample(GaussianModel(), HoldByHand(), **common)
    by_name = free.speculative_sample(GaussianModel(), "hold-x0", **common)
    assert by_hand.stats.drafter == "by hand"
    assert by_hand.stats.rounds.tolist() == by_name.stats.rounds.tolist()
    torch.testing.assert_close(by_hand.samples, by_name.samples, rtol=1e-4, atol=1e-4)


def test_a_step_drafters_path_is_the_processs_own() -> None:
    """Its states follow from its outputs by the table and the noise of seed and step."""

    class Keeping(HoldByHand):
        def __init__(self) -> None:
            self.kept: list[tuple[Situation, Proposal]] = []

        def propose(self, situation: Situation) -> Proposal:
            proposal = super().propose(situation)
            self.kept.append((situation, proposal))
            return proposal

    drafter = Keeping()
    free.speculative_sample(GaussianModel(), drafter, num_inference_steps=20, shape=(3,), seed=[1, 2], window=4)
    for situation, (states, outputs) in drafter.kept:
        assert states.shape == (len(situation.step), 4, 3)
        assert outputs.shape == (len(situation.step), 3, 3)
        assert torch.equal(states[:, 0], situation.state)
        for j in range(3):
            step = situation.step + j
            expected = posterior(states[:, j], outputs[:, j], situation.seed, step, situation.process.table)
            inside = step < situation.process.num_steps
            torch.testing.assert_close(states[inside, j + 1], expected[inside], rtol=1e-6, atol=1e-6)


def test_a_window_of_one_is_never_drafted() -> None:
    class Never(StepDrafter):
        def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
            raise AssertionError("there is nothing to draft")

    out = free.speculative_sample(GaussianModel(), Never(), num_inference_steps=9, shape=(3,), seed=1, window=1)
    assert torch.equal(
        out.samples, free.ancestral_sample(GaussianModel(), num_inference_steps=9, shape=(3,), seed=1).samples
    )


def test_a_drafter_that_proposes_the_whole_window_itself() -> None:
    class AtOnce(Drafter):
        def propose(self, situation: Situation) -> Proposal:
            batch, numel = situation.state.shape
            states = situation.state[:, None].expand(-1, situation.window, -1).clone()
            outputs = situation.state.new_zeros(batch, situation.window - 1, numel)
            for j in range(situation.window - 1):
                step = (situation.step + j).clamp(max=situation.process.num_steps - 1)
                states[:, j + 1] = posterior(states[:, j], outputs[:, j], situation.seed, step, situation.process.table)
            return Proposal(states, outputs)

    out = free.speculative_sample(GaussianModel(), AtOnce(), num_inference_steps=30, shape=(3,), seed=1)
    assert out.stats.drafter == "custom"
    assert out.stats.tested.sum() > 0
    assert torch.isfinite(out.samples).all()


@pytest.mark.parametrize("window", [2, 8, 40])
def test_the_target_as_its_own_drafter_is_always_accepted_and_equals_the_ancestral_sampler(window: int) -> None:
    model = GaussianModel()
    common: dict[str, Any] = {"num_inference_steps": 40, "shape": (3, 2), "seed": [1, 2, 3]}
    out = free.speculative_sample(model, ModelDrafter(model), window=window, **common)
    assert out.stats.drafter == "model"
    assert out.stats.rounds.tolist() == [-(-40 // window)] * 3
    assert out.stats.acceptance_rate == 1.0
    assert not out.stats.delta_sum.any()
    assert torch.equal(out.samples, free.ancestral_sample(model, **common).samples)


def test_a_model_as_drafter_sees_steps_and_conditioning_of_the_target() -> None:
    """Given as it is, as a target, or wrapped; a good approximation is accepted nearly always."""
    near = GaussianModel(mean=0.601)
    common: dict[str, Any] = {"num_inference_steps": 40, "shape": (3,), "window": 5}
    common["conditioning"] = {"who": torch.arange(2)}
    common["seed"] = [6, 7]
    results = []
    for wrap in (lambda model: model, free.as_target, ModelDrafter):
        drafter = Recorder(near)
        results.append(free.speculative_sample(Recorder(), wrap(drafter), **common))
        process = ReverseProcess.ddpm(40)
        assert all(timestep in process.timestep for timestep in torch.cat(drafter.timesteps).tolist())
        for timesteps, conditioning in zip(drafter.timesteps, drafter.conditioning, strict=True):
            assert len(conditioning["who"]) == len(timesteps)
        assert drafter.rows[0] == 2
    assert results[0].stats.acceptance_rate > 0.9
    assert all(torch.equal(result.samples, results[0].samples) for result in results)


def test_a_dit_drafts_for_a_dit_with_guidance(make_dit: Callable[..., DiTTransformer2DModel]) -> None:
    target = make_dit()
    common: dict[str, Any] = {
        "class_labels": [1, 4],
        "guidance_scale": 1.5,
        "num_inference_steps": 12,
        "seed": 0,
        "window": 4,
    }
    same = free.speculative_sample(target, make_dit(), **common)
    assert same.stats.rounds.tolist() == [3, 3]  # the same weights in another object
    other = free.speculative_sample(target, make_dit(seed=1), **common)
    assert other.stats.rounds.min() > 3
