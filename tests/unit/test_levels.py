"""Processes over noise levels, against closed forms in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import free
from free import ReverseProcess

STEPS = 12
ROUNDING = 2e-6  # columns are held in float32


def cosine(steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of a variance-preserving schedule that ends at the data."""
    angle = torch.linspace(1.5, 0.0, steps + 1, dtype=torch.float64)
    return angle.cos(), angle.sin()


def levels_of(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "variance preserving":
        return cosine()
    if kind == "flow":
        sigma = torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)
        return 1 - sigma, sigma
    sigma = torch.logspace(1.5, -2, STEPS + 1, dtype=torch.float64)
    scale = 1 / (sigma.square() + 0.25).sqrt() if kind == "EDM, scaled" else torch.ones_like(sigma)
    return scale, scale * sigma


def network_output(prediction: str, alpha: torch.Tensor, sigma: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> Any:
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
    }[prediction]


@pytest.mark.parametrize("kind", ["variance preserving", "flow", "variance exploding", "EDM, scaled"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_step_keeps_x0_and_the_marginal(kind: str, prediction: str, eta: float) -> None:
    alpha, sigma = levels_of(kind)
    first = 1 if kind == "flow" and prediction == "epsilon" else 0  # pure noise says nothing of x0
    alpha, sigma = alpha[first:], sigma[first:]
    process = ReverseProcess.from_levels(alpha, sigma, torch.arange(len(alpha) - 1), prediction, eta=eta)
    x0, eps = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(process.num_steps):
        x = alpha[k] * x0 + sigma[k] * eps
        y = network_output(prediction, alpha[k], sigma[k], x0, eps)
        mean = process.state_coef[k].double() * x + process.model_coef[k].double() * y
        std = process.std[k].double()
        expected = alpha[k + 1] * x0 + (sigma[k + 1].square() - std.square()).clamp(min=0).sqrt() * eps
        size = 1 + (process.model_coef[k].double() * y).abs().max()
        torch.testing.assert_close(mean, expected, rtol=0, atol=float(ROUNDING * size))
        estimate = process.x0_state_coef[k].double() * x + process.x0_model_coef[k].double() * y
        size = 1 + (process.x0_model_coef[k].double() * y).abs().max()
        torch.testing.assert_close(estimate, x0, rtol=0, atol=float(ROUNDING * size))
    assert process.initial_std == sigma[0]


def test_eta_one_is_ddpm_and_the_bayes_posterior() -> None:
    ddpm = ReverseProcess.ddpm(20)
    signal = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32).double()).cumprod(0)[ddpm.timestep]
    signal = torch.cat((signal, signal.new_ones(1)))
    own = ReverseProcess.from_levels(signal.sqrt(), (1 - signal).sqrt(), ddpm.timestep, initial_std=1.0)
    for name in ("state_coef", "model_coef", "std", "clip_state_coef", "clip_x0_coef"):
        torch.testing.assert_close(getattr(own, name), getattr(ddpm, name), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_memory_is_of_second_order(solver_type: str) -> None:
    """On x0(x) that is linear in lambda along the path, a step of Heun's is exact where one of first order is not."""
    alpha, sigma = cosine()
    process = ReverseProcess.from_levels(alpha, sigma, torch.arange(STEPS), order=2, solver_type=solver_type)
    assert process.memory is not None
    assert process.memory[0] == process.memory[-1] == 0
    log_snr = (alpha / sigma).log()
    h = log_snr[1:-1] - log_snr[:-2]
    growth = (h[1:] / h[:-1]).float()
    if solver_type == "midpoint":
        torch.testing.assert_close(process.memory[1:-1], growth / 2)
        return
    # the exact integral of alpha' e^(-2 lambda') 2 e^(2 lambda) x0(lambda), x0 = lambda - lambda[k], over a step
    for k in range(1, STEPS - 1):
        grid = torch.linspace(float(log_snr[k]), float(log_snr[k + 1]), 20001, dtype=torch.float64)
        integral = torch.trapezoid(2 * (2 * (grid - grid[-1])).exp() * (grid - grid[0]), grid)
        mine = (1 - (-2 * h[k]).exp()) * process.memory[k].double() * h[k - 1] if k < len(h) else integral
        torch.testing.assert_close(mine, integral, rtol=1e-5, atol=1e-9)


def sde_weights() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {
        "sigma": lambda sigma: 0.7 * sigma,
        "sbdm": lambda sigma: 0.7 * sigma / (1 - sigma),
        "constant": lambda sigma: 0.7 * torch.ones_like(sigma),
        "flow-grpo": lambda sigma: 0.49 * sigma / (2 * (1 - sigma)),
    }


@pytest.mark.parametrize("weight", sde_weights())
def test_flow_sde_is_euler_maruyama(weight: str) -> None:
    sigma = torch.linspace(0.9, 0.0, 11, dtype=torch.float64)
    process = ReverseProcess.flow_sde(sigma, 1000 * sigma[:-1], weight, noise_level=0.7)
    x, y = torch.randn(2, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    now, drop = sigma[:-1, None], (sigma[:-1] - sigma[1:])[:, None]
    w = sde_weights()[weight](now)
    score = -(x + (1 - now) * y) / now  # eps = x0 + y is x + (1 - sigma) y
    expected = x - drop * y + w * drop * score
    mean = process.state_coef[:, None].double() * x + process.model_coef[:, None].double() * y
    torch.testing.assert_close(mean, expected, rtol=0, atol=ROUNDING)
    std = (2 * w * drop).sqrt()[:, 0]
    std[-1] = 0  # the step to the data
    torch.testing.assert_close(process.std.double(), std, rtol=ROUNDING, atol=0)
    assert process.initial_std == pytest.approx(0.9)


def test_flow_grpo_begins_at_pure_noise() -> None:
    sigma = torch.linspace(1.0, 0.0, 11, dtype=torch.float64)
    process = ReverseProcess.flow_sde(sigma, sigma[:-1], "flow-grpo")
    assert float(process.std[0]) == pytest.approx(math.sqrt(2 * 0.1 / (2 * (1 - 0.9))))


@pytest.mark.parametrize("network", [{"sigma_data": None}, {"sigma_data": 0.5}, {"time": torch.sqrt}])
def test_edm_is_algorithm_2_without_its_second_evaluation(network: dict[str, Any]) -> None:
    """The state is the raised one: the algorithm as it is printed, with one noise a step, makes the same states."""
    # so much is under the root of a state's scale, beside raised²
    of_data: float | None = 1.0 if "time" in network else network["sigma_data"]
    sigma = torch.cat((torch.logspace(1.2, -1.5, 9, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    steps, s_noise, step_scale = 9, 1.003, 1.5
    gamma = torch.full((steps,), 0.3, dtype=torch.float64)
    process = ReverseProcess.edm(sigma, gamma=gamma, s_noise=s_noise, step_scale=step_scale, **network)
    draw = torch.Generator().manual_seed(2)
    initial, *noises = torch.randn(steps + 1, 16, dtype=torch.float64, generator=draw)
    outputs = torch.randn(steps, 16, dtype=torch.float64, generator=draw)  # of the network, whatever it is
    raised = sigma[:-1] * (1 + gamma)

    def denoised(k: int, x_hat: torch.Tensor) -> torch.Tensor:
        if of_data is None:
            return outputs[k]
        if "time" in network:  # the noise of x_hat = x0 + raised * noise
            return x_hat - raised[k] * outputs[k]
        total = raised[k].square() + of_data**2
        return of_data**2 / total * x_hat + raised[k] * of_data / total.sqrt() * outputs[k]

    x, states = sigma[0] * initial, []
    for k in range(steps):
        x_hat = x + s_noise * (raised[k].square() - sigma[k].square()).sqrt() * noises[k]
        states.append(x_hat if of_data is None else x_hat / (raised[k].square() + of_data**2).sqrt())
        x = x_hat + step_scale * (sigma[k + 1] - raised[k]) * (x_hat - denoised(k, x_hat)) / raised[k]
    state = states[0]
    for k in range(steps):
        torch.testing.assert_close(state, states[k], rtol=0, atol=2e-5)
        state = process.state_coef[k].double() * state + process.model_coef[k].double() * outputs[k]
        if k + 1 < steps:
            state = state + process.std[k].double() * noises[k + 1]
    torch.testing.assert_close(state, x, rtol=0, atol=2e-5)
    told = raised.sqrt() if "time" in network else raised if of_data is None else raised.log() / 4
    torch.testing.assert_close(process.timestep, told)
    scale = 1.0 if of_data is None else float((raised[0].square() + of_data**2).rsqrt())
    spread = sigma[0].square() + s_noise**2 * (raised[0].square() - sigma[0].square())
    assert process.initial_std == pytest.approx(scale * float(spread.sqrt()))


def test_edms_churn_is_within_its_bounds_and_quiet_steps_are_warned_of() -> None:
    sigma = torch.linspace(10.0, 0.0, 11, dtype=torch.float64)
    with pytest.warns(UserWarning, match="4 of 10 steps have no noise: each of them costs a round") as caught:
        process = ReverseProcess.edm(sigma, s_churn=3.0, s_min=4.5, s_max=9.5, s_noise=1.0, sigma_data=None)
    assert caught[0].filename == __file__
    churned = (sigma[:-1] >= 4.5) & (sigma[:-1] <= 9.5)
    torch.testing.assert_close(process.timestep, sigma[:-1] * torch.where(churned, 1.3, 1.0))
    assert torch.equal(process.std[:-1] > 0, churned[1:])


# --- the samplers draw the initial state, and pass timesteps on ----------------------------------------------------------


def test_both_samplers_draw_latents_of_the_initial_std_and_pass_float_timesteps_on() -> None:
    alpha, sigma = cosine()
    told: list[torch.Tensor] = []

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        told.append(timestep)
        return 0.3 * x

    timestep = torch.linspace(999.0, 0.5, STEPS)
    process = ReverseProcess.from_levels(alpha, sigma, timestep, initial_std=2.5)
    plain = ReverseProcess.from_levels(alpha, sigma, timestep, initial_std=1.0)
    given: dict[str, Any] = {"shape": (5,), "seed": 3, "num_samples": 2, "return_trajectory": True}
    for sample in (free.ancestral_sample, free.speculative_sample):
        first = sample(model, process=process, **given).trajectory[:, 0]
        assert torch.equal(first, 2.5 * sample(model, process=plain, **given).trajectory[:, 0])
        latents = torch.ones(2, 5)
        assert torch.equal(sample(model, process=process, latents=latents, **given).trajectory[:, 0], latents)
    assert all(times.dtype == torch.float32 for times in told)
    assert {round(float(t), 3) for times in told for t in times} == {round(float(t), 3) for t in timestep}


def test_a_dit_is_told_fractional_timesteps(dit: Any) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    told: list[torch.Tensor] = []
    handle = dit.register_forward_pre_hook(lambda _, __, named: told.append(named["timestep"]), with_kwargs=True)
    process = ReverseProcess.from_scheduler(EulerAncestralDiscreteScheduler(), 4)
    out = free.speculative_sample(dit, process=process, seed=0, window=2)
    handle.remove()
    assert torch.isfinite(out.samples).all()
    assert {float(t) for times in told for t in times} == {999.0, 666.0, 333.0, 0.0}
    assert all(times.is_floating_point() for times in told)


# --- bad input ----------------------------------------------------------------------------------------------------------


def from_levels(**given: Any) -> ReverseProcess:
    alpha, sigma = cosine(3)
    return ReverseProcess.from_levels(**{"alpha": alpha, "sigma": sigma, "timestep": torch.arange(3), **given})


def own_columns(**given: Any) -> ReverseProcess:
    ones = torch.ones(3)
    names = ("timestep", "state_coef", "model_coef", "std", "x0_state_coef", "x0_model_coef")
    return ReverseProcess(**{**dict.fromkeys(names, ones), **given})


FALLING = torch.tensor([0.9, 0.5, 0.2, 0.0])


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (from_levels, {"sigma": torch.tensor([0.9, 8.0, 0.1, 0.0])}, r"sigma / alpha rises from .* at step 0"),
        (from_levels, {"sigma": torch.tensor([0.9, 0.5, torch.nan, 0.0])}, "sigma holds nan; allowed are finite"),
        (from_levels, {"sigma": torch.tensor([torch.inf, 0.5, 0.2, 0.0])}, "sigma holds inf; allowed are finite"),
        (from_levels, {"alpha": torch.tensor([0.1, -0.5, 0.8, 1.0])}, "alpha holds -0.5; allowed are finite"),
        (from_levels, {"sigma": torch.tensor([0.9, 0.0, 0.0, 0.0])}, "sigma is 0 before step 1"),
        (from_levels, {"alpha": torch.tensor([0.0, 0.0, 0.8, 1.0])}, "alpha is 0 after a step"),
        (from_levels, {"alpha": torch.ones(5)}, "alpha has 5 points and sigma 4"),
        (from_levels, {"alpha": torch.ones(1)}, r"alpha has shape \(1,\); allowed is \(steps \+ 1,\)"),
        (from_levels, {"timestep": torch.arange(4)}, r"state_coef has shape \(3,\); timestep has \(4,\)"),
        (from_levels, {"eta": 1.2}, "eta is 1.2; allowed is 0"),
        (from_levels, {"eta": -0.1}, "eta is -0.1; allowed is 0"),
        (from_levels, {"prediction_type": "x0"}, "prediction_type is 'x0'; known are 'epsilon'"),
        (from_levels, {"order": 3}, "order is 3; allowed are 1 and 2"),
        (from_levels, {"order": 2, "solver_type": "bh2"}, "solver_type is 'bh2'; known are 'midpoint', 'heun'"),
        (from_levels, {"initial_std": 0.0}, "initial_std is 0.0; allowed is a positive number"),
        (from_levels, {"alpha": torch.tensor([0.0, 0.5, 0.8, 1.0])}, "x0_state_coef is inf at step 0|state_coef is"),
        (own_columns, {"memory": torch.tensor([0.5, 0.5, 0.0])}, "memory is 0.5 at the first step"),
        (own_columns, {"memory": torch.tensor([0.0, torch.nan, 0.0])}, "memory has shape .* or is not finite"),
        (own_columns, {"memory": torch.ones(2)}, r"memory has shape \(2,\) .*; allowed are 3 finite numbers"),
        (
            own_columns,
            {"memory": torch.tensor([0.0, 0.5, 0.0]), "clip_range": 1.0}
            | dict.fromkeys(("clip_state_coef", "clip_x0_coef"), torch.ones(3)),
            "clip_range is 1.0 with memory; allowed is one",
        ),
        (ReverseProcess.flow_sde, {"weight": "linear"}, "weight is 'linear'; known are 'sigma', 'sbdm'"),
        (ReverseProcess.flow_sde, {"sigma": torch.tensor([1.0, 0.5, 0.2, 0.0]), "weight": "sbdm"}, "'sbdm' is infinite"),
        (ReverseProcess.flow_sde, {"weight": -torch.ones(3)}, "weight of shape .* is negative"),
        (ReverseProcess.flow_sde, {"sigma": 2 * FALLING}, "sigma holds 1.79.*; allowed are levels of flow"),
        (ReverseProcess.flow_sde, {"noise_level": -1.0}, "noise_level is -1.0; allowed is 0 or more"),
        (ReverseProcess.edm, {"s_churn": -1.0}, "s_churn is -1.0; allowed is 0 or more"),
        (ReverseProcess.edm, {"gamma": torch.ones(4)}, r"gamma of shape \(4,\)"),
        (ReverseProcess.edm, {"s_noise": 0.0}, "s_noise is 0.0; allowed is a positive number"),
        (ReverseProcess.edm, {"sigma_data": -0.5}, "sigma_data is -0.5; allowed is a positive number"),
    ],
)
def test_wrong_levels(make: Callable[..., ReverseProcess], given: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {}
    if make == ReverseProcess.flow_sde:
        defaults = {"sigma": FALLING, "timestep": torch.arange(3)}
    if make == ReverseProcess.edm:
        defaults = {"sigma": FALLING}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            make(**{**defaults, **given})
