"""Gains learned from a run: how samples are cut, what pairs teach, and that no draft knows more than it may."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import free
from free import Gains, LastWindow, ReverseProcess, Situation
from free.drafters.base import Anchor
from free.drafters.patches import each_number, patches_of, rings
from free_kernels import Proposal, Scales, effective_output, gain_correction, learn_gains
from tests.unit.helpers import GaussianModel

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- patches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (3, 40, 24), (4, 64, 64), (20, 8, 8), (2, 4, 6, 10), (16, 33), (37,), (1, 1)], ids=str
)
@pytest.mark.parametrize("cut", [rings, each_number])
def test_frequencies_are_another_orthonormal_basis(cut: Any, shape: tuple[int, ...]) -> None:
    patches, numel = cut(shape, CPU), torch.Size(shape).numel()
    values = randn(2, 3, numel)
    frequencies = patches.forward(values)
    torch.testing.assert_close(patches.inverse(frequencies), values, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(frequencies.square().sum(-1), values.square().sum(-1), atol=0.0, rtol=1e-5)
    # every number is of one band, and the shares are the bands' numbers
    torch.testing.assert_close(
        patches.sums(torch.ones(numel)) / numel, patches.share.repeat(patches.groups) / patches.groups
    )
    bands = torch.arange(float(patches.bands))
    expected = (patches.sums(torch.ones(numel)) * bands).sum()
    torch.testing.assert_close(patches.spread(bands, numel).sum(), expected)


def test_a_smooth_image_is_in_the_low_bands_of_its_brightness() -> None:
    patches = patches_of((3, 32, 32), CPU)
    slope = torch.linspace(-1, 1, 32).expand(3, 32, 32).flatten()
    power = patches.sums(patches.forward(slope).square())
    assert power[:4].sum() > 0.98 * power.sum()
    # and in another channel's bands if it is a difference of two colours
    red = torch.cat((slope[:1024], torch.zeros(1024), -slope[:1024]))
    power = patches.sums(patches.forward(red).square()).view(3, -1).sum(1)
    assert power[1] > 0.99 * power.sum()


def test_channels_have_bands_of_their_own_and_few_numbers_each_one() -> None:
    assert patches_of((4, 32, 32), CPU).groups == 4
    assert patches_of((64, 32, 32), CPU).groups == 1
    assert patches_of((16, 2), CPU).bands == 32
    assert patches_of((3, 32, 32), CPU) is patches_of((3, 32, 32), CPU)


# --- what pairs teach ---------------------------------------------------------------------------------------------------


def test_sums_are_those_of_the_formula() -> None:
    """One sample, number by number, column by column."""
    process, numel, anchors, window = ReverseProcess.ddpm(12), 5, 4, 4
    scales, patches = Scales(process.signal.double(), process.noise_ratio.double()), each_number((numel,), CPU)
    known_step, step, known_length, length = 3, 5, 4, 3
    known, before = [randn(anchors, numel, seed=i) for i in range(2)], randn(anchors, 2, 2, numel, seed=2).abs()
    states, outputs = randn(window, numel, seed=3), randn(window, numel, seed=4)
    one = lambda number: torch.tensor([number])  # noqa: E731
    v, x0, sums = learn_gains(
        states[None], outputs[None], one(step), one(length), known[0][None], known[1][None], before[None], one(known_step),
        one(known_length), process.table, scales, patches, forgetting=(0.6, 0.9),
    )  # fmt: skip
    expected = before[step - known_step - 1].clone()  # of the last settled step
    for j in range(length):
        k = step + j
        r = float(scales.noise_ratio[k])
        torch.testing.assert_close(v[0, j], states[j] / scales.signal[k])
        torch.testing.assert_close(x0[0, j], process.x0_state_coef[k] * states[j] + process.x0_model_coef[k] * outputs[j])
        pairs = []
        if k - known_step < known_length:
            at = k - known_step
            pairs.append((0, 0.6, v[0, j] - known[0][at], x0[0, j] - known[1][at]))
        if j:
            shrunk = (r / float(scales.noise_ratio[k - 1])) ** 2
            d = v[0, j] - x0[0, j - 1] - shrunk * (v[0, j - 1] - x0[0, j - 1])
            pairs.append((1, 0.9, d, x0[0, j] - x0[0, j - 1]))
        for kind, kept, d, e in pairs:
            expected[kind] = kept * expected[kind] + torch.stack((e * d, (d - e) * d / r)) / d.square().sum()
        torch.testing.assert_close(sums[0, j], expected)


def test_a_target_that_answers_band_by_band_is_learned() -> None:
    """Its x0 is linear in each number of the state, as gains are: three quarters of what hold-x0 misses is learned."""
    common: dict[str, Any] = {"process": ReverseProcess.ddpm(100), "shape": (6,), "num_samples": 200, "seed": 3, "window": 8}
    hold, learned = (free.speculative_sample(GaussianModel(), drafter, **common).stats for drafter in ("hold-x0", "gains"))
    assert learned.mean_delta[30:99].mean() < 0.25 * hold.mean_delta[30:99].mean()
    assert learned.rounds.mean() < 0.85 * hold.rounds.mean()


@pytest.mark.parametrize("second_order", [False, True])
def test_drafts_answer_to_the_states_that_they_lead_to(second_order: bool) -> None:
    """What corrects a column is what its own state asks for, though it was made from the path that hold-x0 drafts."""
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    process = ReverseProcess.from_scheduler(scheduler, 20) if second_order else ReverseProcess.ddpm(20)
    drafter, shape = Watching(), (3, 8, 8)
    free.speculative_sample(GaussianModel(scale=3.0), drafter, process=process, shape=shape, seed=[1, 2], window=6)
    window = drafter.situations[1]
    assert (window.step < window.last.step + window.last.length - 1).any()  # after a rejection, with several anchors
    states, outputs = drafter.propose(window)
    anchors = window.anchor(window.step[:, None] + torch.arange(5))
    scales, patches = Scales(process.signal, process.noise_ratio), patches_of(shape, CPU)
    before, moved = window.x0, 0.0
    for j in range(5):
        step = window.step + j
        correction = gain_correction(
            states[:, j : j + 2], step, window.memory.states, window.memory.x0, window.memory.sums, window.last.step,
            window.last.length, process.table, scales, patches, ridge=0.01,
        )[:, 0]  # fmt: skip
        own = Anchor(anchors.step[:, j], anchors.state[:, j], anchors.output[:, j], None)
        draft = own.hold_x0(states[:, j], step, process) + correction
        if second_order:
            assert before is not None
            draft, before = effective_output(states[:, j], draft, before, step, process.table)
        torch.testing.assert_close(outputs[:, j], draft, atol=1e-4, rtol=1e-4)
        moved = max(moved, correction.abs().max().item())
    assert moved > 0.05


# --- what a draft may know ----------------------------------------------------------------------------------------------


class Watching(Gains):
    """Keeps its situations, and what it remembered."""

    def __init__(self) -> None:
        self.situations: list[Situation] = []

    def propose(self, situation: Situation) -> Proposal:
        self.situations.append(situation)
        return super().propose(situation)


@pytest.mark.parametrize("shape", [(6,), (3, 12, 16)], ids=str)
def test_a_draft_knows_no_evaluation_of_a_later_step(shape: tuple[int, ...]) -> None:
    """Other outputs at one column of two windows: no draft changes before the step of the earlier of them."""
    drafter = Watching()
    process, window = ReverseProcess.ddpm(30), 6
    free.speculative_sample(GaussianModel(), drafter, process=process, shape=shape, seed=[1, 2], window=window)
    known = 0
    for first, second, third in zip(drafter.situations[1:], drafter.situations[2:], drafter.situations[3:], strict=False):
        if not len(first.step) == len(third.step) == 2:
            break
        drafts = Gains().propose(third).draft_output
        for column in range(window):
            # the memory of the window before is made again from other outputs there
            output = second.last.output.clone()
            output[:, column] += 3.0
            other = replace(second, last=replace(second.last, output=output))
            other.memory = Gains().remember(first, other.last)
            changed = third.last.output.clone()
            late = (second.last.step + column - third.last.step).clamp(min=0)
            changed[torch.arange(2), late.clamp(max=window - 1)] += 3.0
            changed = torch.where((late < window)[:, None, None], changed, third.last.output)
            last = replace(third.last, output=changed)
            memory = Gains().remember(other, last)
            others = Gains().propose(replace(third, last=last, memory=memory)).draft_output
            for row in range(2):
                step = int(second.last.step[row]) + column
                before = max(0, step - int(third.step[row]))
                assert torch.equal(others[row, :before], drafts[row, :before])
                known += int(not torch.equal(others[row], drafts[row]))
    assert known > 10


def test_correction_needs_a_draft() -> None:
    process, patches = ReverseProcess.ddpm(4), each_number((3,), CPU)
    index, values = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 3)
    arguments = (values, index, values, values, torch.zeros(1, 1, 2, 2, 3), index, index + 1, process.table)
    with pytest.raises(ValueError, match="path has 1 column"):
        gain_correction(*arguments, Scales(process.signal, process.noise_ratio), patches, ridge=0.1)


def test_an_overflow_teaches_nothing() -> None:
    drafter, process = Gains(), ReverseProcess.ddpm(10)
    last = LastWindow(*(torch.tensor([n]) for n in (0, 1)), *(torch.zeros(1, 4, 3) for _ in range(2)), None)
    memory = drafter.begin(last, (3,))
    situation = Situation(
        torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]), 4, last, None, process, free.as_target(GaussianModel()), {},
        (3,), 1.0, "reference", memory=memory,
    )  # fmt: skip
    output = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    output[0, 2:] = torch.inf
    states = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(2))
    window = LastWindow(torch.tensor([0]), torch.tensor([2]), states, output, None)
    sums = drafter.remember(situation, window).sums
    assert sums.isfinite().all()
    assert sums[:, 1].abs().sum() > 0


def test_signal_and_noise_are_those_of_the_schedule() -> None:
    process = ReverseProcess.ddpm(250)
    signal = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[process.timestep].sqrt()
    torch.testing.assert_close(process.signal[100:].double(), signal[100:], rtol=2e-2, atol=0.0)
    ratio = (1 - signal**2).sqrt() / signal
    torch.testing.assert_close(process.noise_ratio[100:].double(), ratio[100:], rtol=2e-2, atol=0.0)
    assert (process.signal > 0).all()
    assert process.noise_ratio.isfinite().all()


# --- fresh noise --------------------------------------------------------------------------------------------------------


class Disturbed(free.Fresh):
    """Asks its drafter again with other numbers in place of what abandoned states have taught."""

    asked = 0

    def remember(self, situation: Situation, window: LastWindow) -> Any:
        memory = super().remember(situation, window)
        settled = (situation.step - situation.last.step).clamp(min=1)
        abandoned = torch.arange(situation.memory.states.shape[1]) >= settled[:, None]
        other = replace(
            situation.memory,
            **{
                field.name: torch.where(abandoned.view(*abandoned.shape, *(1,) * (held.dim() - 2)), 3.0 * held + 1.0, held)
                for field in fields(situation.memory)
                for held in (getattr(situation.memory, field.name),)
            },
        )
        again = super().remember(replace(situation, memory=other), window)
        for field in fields(memory):
            assert torch.equal(getattr(again, field.name), getattr(memory, field.name)), field.name
        self.asked += int(abandoned.any())
        return memory


def test_fresh_gains_learn_nothing_of_abandoned_states() -> None:
    drafter = Disturbed(Gains())
    free.speculative_sample(GaussianModel(), drafter, shape=(3, 8, 8), window=6, num_inference_steps=20, seed=[1, 2, 3])
    assert drafter.asked > 3


@pytest.mark.parametrize("other", ["gains", GaussianModel(), None])
def test_what_is_no_drafter_has_no_fresh_noise(other: Any) -> None:
    with pytest.raises(TypeError, match=r"drafter is a .*; allowed is a Drafter, as free.as_drafter makes it"):
        free.Fresh(other)
