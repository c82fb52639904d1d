"""Processes of second order through all that stands around the round: plans, relaxation, trajectories, fitting, training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler

import free
from free import ReverseProcess
from free_kernels import Proposal, acceptance, posterior, posterior_with_memory, propose, verify
from tests.analytic import GaussianTarget

STEPS = 20


def second_order(steps: int = STEPS) -> ReverseProcess:
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    return ReverseProcess.from_scheduler(scheduler, steps)


def sample(drafter: Any = "hold-x0", **given: Any) -> free.SamplingOutput:
    common: dict[str, Any] = {"process": second_order(), "shape": (6,), "seed": list(range(30)), "window": 6}
    return free.speculative_sample(GaussianTarget.example(), drafter, **{**common, **given})


def test_hold_x0_has_something_to_lean_on_and_something_to_get_wrong() -> None:
    stats = sample().stats
    assert 0 < stats.accepted.sum() < stats.tested.sum()
    assert STEPS / 6 <= stats.rounds.mean() < STEPS


@pytest.mark.parametrize("budget", [None, 1.0])
def test_relaxation_of_strength_zero_is_exact_to_the_bit(budget: float | None) -> None:
    exact, relaxed = sample(), sample(relaxation=free.Relaxation(0.0, "residual", budget))
    assert torch.equal(relaxed.samples, exact.samples)
    assert relaxed.stats.total_variation_bound == 0


def test_a_budget_counts_the_gaps_of_the_effective_outputs() -> None:
    """What the ledger charges before a test is what verification then finds."""
    free_of_charge = sample(relaxation=free.Relaxation(50.0, "residual"))
    assert free_of_charge.stats.acceptance_rate > sample().stats.acceptance_rate
    for budget in (0.05, 0.4):
        bounded = sample(relaxation=free.Relaxation(50.0, "residual", budget))
        assert 0 < bounded.stats.excess_acceptance.max() <= budget + 1e-9


def test_plans_and_callbacks() -> None:
    model, seen = GaussianTarget.example(), []
    common: dict[str, Any] = {"process": second_order(), "shape": (6,), "seed": [1, 2, 3]}
    plan = free.plan_window(model, **common)
    out = free.speculative_sample(
        model,
        window=plan,
        return_trajectory=True,
        callback_on_step_end=lambda _, step, timestep, state: seen.append((step, timestep, state["latents"])),
        **common,
    )
    assert out.trajectory is not None
    for step, timestep, latents in seen:
        assert torch.equal(timestep, common["process"].timestep[step])
        assert torch.equal(latents, out.trajectory[torch.arange(3), step + 1])
    assert torch.isfinite(free.speculative_sample(model, window="auto", **common).samples).all()


def test_a_drafter_that_is_the_target_is_always_accepted_under_guidance() -> None:
    """It drafts the output, and the window makes the effective one of it."""
    null = {"center": torch.zeros(6)}
    target = free.as_target(GaussianTarget.example(), null_conditioning=null)
    given = {"conditioning": {"center": torch.ones(4, 6)}, "guidance_scale": 1.5, "seed": [1, 2, 3, 4], "shape": (6,)}
    stats = free.speculative_sample(target, free.ModelDrafter(target), process=second_order(), window=5, **given).stats
    assert (stats.rounds == 4).all()
    tested = stats.tested > 0
    assert tested.sum() == 16
    assert stats.mean_delta[tested].max() < 1e-3


def test_a_drafter_trains_on_rounds_of_second_order(make_dit: Callable[..., DiTTransformer2DModel]) -> None:
    from free.training.visited import VisitedWindows

    target = free.as_target(make_dit())
    drafter = free.FeatureDrafter.from_target(target)

    def draw() -> torch.Tensor:
        return torch.randn(4, 2, 8, 8)

    visited = VisitedWindows(target, second_order(8), 1.0, window=4, pool=4)
    labels = torch.zeros(4, dtype=torch.int64)
    for _ in range(6):  # samples end and begin again on the way
        examples = visited.draw(drafter, draw, labels)
        assert all(torch.isfinite(values).all() for values in (examples.state, examples.wanted))
    assert visited.live is not None
    assert visited.live.x0 is not None
    other = VisitedWindows(target, second_order(8), 1.0, window=4, pool=4)
    other.load_state_dict(visited.state_dict())
    # a copy goes on as the first one does; both move their live samples in place
    other.live = other.live.clone() if other.live else None
    drawn = []
    for one in (visited, other):
        torch.manual_seed(0)
        drawn.append(one.draw(drafter, draw, labels))
    assert torch.equal(drawn[0].state, drawn[1].state)


def test_the_process_keeps_its_memory() -> None:
    process, first_order = (
        second_order(),
        ReverseProcess.from_scheduler(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1), STEPS),
    )
    assert process.memory is not None
    assert first_order.memory is None
    assert torch.equal(process.std, first_order.std)
    assert process.fingerprint() != first_order.fingerprint()


# --- bad input ----------------------------------------------------------------------------------------------------------


def arguments(second: bool) -> dict[str, Any]:
    states, index = torch.randn(2, 3, 4), torch.tensor([0, 2])
    table = (second_order() if second else ReverseProcess.ddpm(STEPS)).table
    return {"states": states, "seed": index, "step": index, "table": table}


def call(name: str, second: bool, **given: Any) -> Any:
    at = arguments(second)
    states, rest = at["states"], (at["seed"], at["step"])
    if name == "posterior":
        return posterior(states[:, 0], states[:, 1], *rest, at["table"], **given)
    if name == "posterior_with_memory":
        return posterior_with_memory(states[:, 0], states[:, 1], states[:, 2], *rest, at["table"], **given)
    if name == "acceptance":
        return acceptance(states, states, states, *rest, at["table"], **given)
    if name == "propose":
        return propose(states[:, 0], *rest, 3, states, states, at["step"], torch.ones(2).long(), at["table"], **given)
    return verify(states, states, states[:, 1:], *rest, torch.tensor([3, 3]), at["table"], **given)


@pytest.mark.parametrize("name", ["posterior", "acceptance", "verify"])
def test_second_order_without_the_estimate_before(name: str) -> None:
    with pytest.raises(ValueError, match="previous_x0 is missing: table has a memory_gain; give the estimate"):
        call(name, second=True)


@pytest.mark.parametrize("name", ["acceptance", "verify", "propose"])
def test_an_estimate_that_first_order_has_no_use_for(name: str) -> None:
    with pytest.raises(ValueError, match="previous_x0 is given, but table has no memory_gain; leave it out"):
        call(name, second=False, previous_x0=torch.zeros(2, 4))


def test_posterior_with_memory_of_first_order() -> None:
    with pytest.raises(ValueError, match="table has no memory_gain"):
        call("posterior_with_memory", second=False)


@pytest.mark.parametrize("name", ["acceptance", "verify", "propose"])
def test_an_estimate_of_another_shape(name: str) -> None:
    with pytest.raises(ValueError, match=r"previous_x0 has shape \(2, 5\); allowed is \(2, 4\)"):
        call(name, second=True, previous_x0=torch.zeros(2, 5))


def test_what_is_held_stands_for_the_effective_output_unless_an_estimate_is_given() -> None:
    plain, with_estimate = call("propose", second=True), call("propose", second=True, previous_x0=torch.zeros(2, 4))
    assert isinstance(plain, Proposal)
    assert not torch.equal(plain.draft_output, with_estimate.draft_output)


def test_a_gain_beside_clipping() -> None:
    at = arguments(second=True)
    with pytest.raises(ValueError, match=r"table\.memory_gain is given with a clip_range of 1\.0; allowed is one of them"):
        posterior(at["states"][:, 0], at["states"][:, 1], at["seed"], at["step"], at["table"]._replace(clip_range=1.0))
