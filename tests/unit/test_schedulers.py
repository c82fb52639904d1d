"""Every scheduler that becomes a process, against one ``scheduler.step`` of its own given the same noise."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import free
from free import ReverseProcess
from free_kernels import normal

# diffusers steps in float32
PRECISION = 1e-4


@dataclass(frozen=True)
class Configuration:
    """A scheduler, and what is asked of it."""

    make: type
    steps: int
    config: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None
    mu: float | None = None

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.config.items())
        return f"{self.make.__name__}({said}), S={self.steps}, eta={self.eta}, mu={self.mu}"

    def scheduler(self) -> Any:
        return self.make(**self.config)


def configurations() -> Iterator[Configuration]:
    spacings = ("linspace", "leading", "trailing")
    for spacing, prediction, steps, eta in itertools.product(
        spacings, ("epsilon", "v_prediction", "sample"), (7, 20), (0.0, 0.5, 1.0)
    ):
        yield Configuration(DDIMScheduler, steps, {"timestep_spacing": spacing, "prediction_type": prediction}, eta)
    yield Configuration(DDIMScheduler, 10, {"set_alpha_to_one": False, "steps_offset": 1}, 1.0)

    for spacing, prediction, steps in itertools.product(spacings, ("epsilon", "v_prediction"), (1, 12)):
        config = {"timestep_spacing": spacing, "prediction_type": prediction}
        yield Configuration(EulerAncestralDiscreteScheduler, steps, config)
        yield Configuration(EulerDiscreteScheduler, steps, config, 0.0)
    zero_snr = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    yield Configuration(EulerAncestralDiscreteScheduler, 20, zero_snr)
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        yield Configuration(EulerDiscreteScheduler, 12, {name: True}, 0.0)

    # the multistep solver: every grid of sigmas, both orders, both ways to end
    grids: tuple[dict[str, Any], ...] = (
        {},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_lu_lambdas": True},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    )
    for grid, order, steps in itertools.product(grids, ("first", "midpoint", "heun"), (8, 20)):
        config = {**grid, "algorithm_type": "sde-dpmsolver++", "solver_order": 1 if order == "first" else 2}
        config["solver_type"] = "heun" if order == "heun" else "midpoint"
        yield Configuration(DPMSolverMultistepScheduler, steps, config)
        if not grid.get("use_lu_lambdas"):
            yield Configuration(DPMSolverMultistepScheduler, steps, {**config, "final_sigmas_type": "sigma_min"})
    for order, prediction in itertools.product((1, 2), ("epsilon", "v_prediction", "sample")):
        config = {"solver_order": order, "prediction_type": prediction, "euler_at_final": True}
        yield Configuration(DPMSolverMultistepScheduler, 20, {**config, "algorithm_type": "sde-dpmsolver++"})
        yield Configuration(DPMSolverMultistepScheduler, 20, {**config, "algorithm_type": "dpmsolver++"}, 0.0)
    yield Configuration(DPMSolverMultistepScheduler, 9, {"solver_type": "heun", "algorithm_type": "dpmsolver++"}, 0.0)
    shifted = {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    yield Configuration(DPMSolverMultistepScheduler, 9, {**shifted, "algorithm_type": "sde-dpmsolver++"}, mu=0.8)

    for grid, order, prediction in itertools.product(("karras", "exponential"), (1, 2), ("epsilon", "v_prediction")):
        config = {"sigma_schedule": grid, "solver_order": order, "prediction_type": prediction}
        for solver_type, steps in (("midpoint", 18), ("heun", 9)):
            of_sde = {**config, "solver_type": solver_type, "algorithm_type": "sde-dpmsolver++"}
            yield Configuration(EDMDPMSolverMultistepScheduler, steps, of_sde)
            yield Configuration(EDMDPMSolverMultistepScheduler, steps, {**of_sde, "final_sigmas_type": "sigma_min"})
    yield Configuration(EDMEulerScheduler, 10, {}, 0.0)

    flows: tuple[dict[str, Any], ...] = (
        {},
        {"shift": 3.0},
        {"shift": 3.0, "use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    )
    for flow, stochastic, steps in itertools.product(flows, (False, True), (1, 16)):
        if steps == 1 and len(flow):
            continue
        mu = 1.15 if flow.get("use_dynamic_shifting") else None
        eta = None if stochastic else 0.0
        yield Configuration(FlowMatchEulerDiscreteScheduler, steps, {**flow, "stochastic_sampling": stochastic}, eta, mu)

    for spacing, prediction, zero in itertools.product(spacings, ("epsilon", "v_prediction"), (False, True)):
        if zero and prediction == "epsilon" and spacing != "leading":
            continue  # nothing is left of the sample at the first step
        config = {"timestep_spacing": spacing, "prediction_type": prediction, "rescale_betas_zero_snr": zero}
        yield Configuration(CogVideoXDDIMScheduler, 13, config, 0.0)
        yield Configuration(CogVideoXDPMScheduler, 13, config)


CONFIGURATIONS = list(configurations())


def scheduler_step(own: Any, k: int, states: tuple[torch.Tensor, ...], eta: float | None) -> torch.Tensor:
    """What ``own.step`` makes of its step k: of a state, an output, the estimate of x0 at the step before, and noise."""
    (x, y, before, z), t = states, own.timesteps[k]
    noise = mock.patch(f"{type(own).__module__}.randn_tensor", return_value=z, create=True)
    if isinstance(own, DDIMScheduler):
        given = {"eta": eta, "use_clipped_model_output": True, "variance_noise": z if eta else None}
        return own.step(y, t, x, **given).prev_sample
    if isinstance(own, CogVideoXDDIMScheduler):
        return own.step(y, t, x).prev_sample
    if isinstance(own, CogVideoXDPMScheduler):
        with noise:
            return own.step(y, before if k else None, t, own.timesteps[k - 1] if k else None, x)[0]
    own._step_index = k
    if hasattr(own, "model_outputs"):
        own.model_outputs = [before] * own.config.solver_order
        own.lower_order_nums = min(k, own.config.solver_order)
    own.is_scale_input_called = True
    if isinstance(own, DPMSolverMultistepScheduler):
        return own.step(y, t, x, variance_noise=z).prev_sample
    with noise:
        return own.step(y, t, x).prev_sample


def network_scale(own: Any, k: int) -> float:
    """What the state of step k is multiplied by for the network; the sample is not."""
    if k == len(own.timesteps) or not hasattr(own, "scale_model_input"):
        return 1.0
    own._step_index = k
    return float(own.scale_model_input(torch.ones(1), own.timesteps[k]))


def worst_error(configuration: Configuration) -> float:
    """Over all steps, relative to the largest element of the step's result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        given, own = configuration.scheduler(), configuration.scheduler()
    process = ReverseProcess.from_scheduler(given, configuration.steps, eta=configuration.eta, mu=configuration.mu)
    own.set_timesteps(configuration.steps, **({} if configuration.mu is None else {"mu": configuration.mu}))
    assert torch.equal(process.timestep, own.timesteps)
    assert process.timestep.dtype == own.timesteps.dtype
    if not isinstance(own, (DDIMScheduler, FlowMatchEulerDiscreteScheduler)):
        assert process.initial_std == pytest.approx(float(own.init_noise_sigma) * network_scale(own, 0), rel=1e-6)
    draw = torch.Generator().manual_seed(0)
    worst = 0.0
    for k in range(process.num_steps):
        x, y, before, z = torch.randn(4, 1, 64, generator=draw, dtype=torch.float64)
        scale, next_scale = network_scale(own, k), network_scale(own, k + 1)
        states = (x / scale).float(), y.float(), before.float(), z.float()
        expected = next_scale * scheduler_step(own, k, states, configuration.eta).double()
        x0 = process.x0_state_coef[k].double() * x + process.x0_model_coef[k].double() * y
        actual = process.state_coef[k].double() * x + process.model_coef[k].double() * y + process.std[k].double() * z
        if process.clip_range is not None:
            clamped = x0.clamp(-process.clip_range, process.clip_range)
            actual = process.clip_state_coef[k].double() * x + process.clip_x0_coef[k].double() * clamped
            actual = actual + process.std[k].double() * z
        if process.memory_gain is not None:
            actual = actual + process.model_coef[k].double() * process.memory_gain[k].double() * (x0 - before)
        worst = max(worst, float((actual - expected).abs().max() / expected.abs().max()))
    return worst


def test_there_are_at_least_a_hundred() -> None:
    assert len({str(configuration) for configuration in CONFIGURATIONS}) == len(CONFIGURATIONS) >= 100


@pytest.mark.parametrize("make", sorted({c.make.__name__ for c in CONFIGURATIONS}))
def test_a_step_is_the_schedulers_own(make: str) -> None:
    errors = {str(c): worst_error(c) for c in CONFIGURATIONS if c.make.__name__ == make}
    off = {name: error for name, error in errors.items() if not error <= PRECISION}
    assert not off


@pytest.mark.parametrize("grid", [{}, {"use_karras_sigmas": True}, {"use_flow_sigmas": True, "flow_shift": 3.0}])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_a_whole_trajectory_of_second_order_is_the_schedulers_own(grid: dict[str, Any], solver_type: str) -> None:
    prediction = "flow_prediction" if grid.get("use_flow_sigmas") else "epsilon"
    config = {**grid, "prediction_type": prediction, "algorithm_type": "sde-dpmsolver++", "solver_type": solver_type}
    scheduler, seed, steps = DPMSolverMultistepScheduler(**config), torch.arange(5), 15

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * x) * (0.5 + timestep.to(x).view(-1, 1) / 1000)

    process = ReverseProcess.from_scheduler(scheduler, steps)
    ours = free.ancestral_sample(model, process=process, shape=(16,), seed=seed.tolist(), return_trajectory=True).trajectory
    assert ours is not None
    scheduler.set_timesteps(steps)
    for k, t in enumerate(scheduler.timesteps):
        # from our own state at each step, as differences grow; the scheduler remembers what it was given before
        x, noise = ours[:, k], normal(seed, torch.full_like(seed, k), 16)
        after = scheduler.step(model(x, t.expand(5)), t, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours[:, k + 1], after, rtol=1e-5, atol=1e-5)


# --- what a scheduler without noise becomes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "counterpart"),
    [
        (DDIMScheduler(clip_sample=False), "the DDPM of its configuration"),
        (CogVideoXDDIMScheduler(), r"DDIM with eta = 1"),
        (EulerDiscreteScheduler(), "EulerAncestralDiscreteScheduler's step"),
        (EDMEulerScheduler(), "EulerAncestralDiscreteScheduler's step"),
        (DPMSolverMultistepScheduler(), "algorithm_type='sde-dpmsolver\\+\\+'"),
        (EDMDPMSolverMultistepScheduler(), "algorithm_type='sde-dpmsolver\\+\\+'"),
        (FlowMatchEulerDiscreteScheduler(), "the posterior of flow matching"),
    ],
)
def test_a_deterministic_scheduler_says_what_it_becomes(scheduler: Any, counterpart: str) -> None:
    with pytest.warns(UserWarning, match=counterpart) as caught:
        process = ReverseProcess.from_scheduler(scheduler, 10)
    assert [str(one.filename) for one in caught if one.category is UserWarning] == [__file__]
    assert (process.std[:-1] > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quiet = ReverseProcess.from_scheduler(scheduler, 10, eta=0.5)
    assert (quiet.std < process.std).sum() == 9  # the last step has no noise either way


def test_a_counterpart_is_the_stochastic_scheduler() -> None:
    karras = {"use_karras_sigmas": True}
    with pytest.warns(UserWarning, match="deterministic"):
        becomes = ReverseProcess.from_scheduler(DPMSolverMultistepScheduler(**karras), 15)
    stochastic = DPMSolverMultistepScheduler(**karras, algorithm_type="sde-dpmsolver++")
    assert becomes.fingerprint() == ReverseProcess.from_scheduler(stochastic, 15).fingerprint()
    with pytest.warns(UserWarning, match="deterministic"):
        becomes = ReverseProcess.from_scheduler(EulerDiscreteScheduler(), 15)
    ancestral = EulerAncestralDiscreteScheduler()
    assert becomes.fingerprint() == ReverseProcess.from_scheduler(ancestral, 15).fingerprint()


def test_a_scheduler_that_was_set_before() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(ValueError, match="num_inference_steps is None, but the scheduler has no timesteps set"):
        ReverseProcess.from_scheduler(scheduler, None)
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    before = scheduler.timesteps.clone()
    assert ReverseProcess.from_scheduler(scheduler, 9).num_steps == 9
    assert torch.equal(scheduler.timesteps, before)
    own = ReverseProcess.from_scheduler(scheduler, None)
    assert torch.equal(own.timestep, before)
    torch.testing.assert_close(own.std, scheduler.sigmas[1:])
    ddpm = DDPMScheduler(clip_sample=False)
    ddpm.set_timesteps(timesteps=[900, 500, 20, 0])
    assert ReverseProcess.from_scheduler(ddpm, None).timestep.tolist() == [900, 500, 20, 0]


def test_flow_matching_without_noise_is_its_euler_step_to_the_bit() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = ReverseProcess.from_scheduler(scheduler, 50, eta=0.0)
    scheduler.set_timesteps(50)
    assert torch.equal(process.state_coef, torch.ones(50))
    assert torch.equal(process.model_coef, scheduler.sigmas[1:] - scheduler.sigmas[:-1])


class OtherScheduler(DDPMScheduler):
    """One that is a DDPMScheduler by inheritance."""


def test_a_subclass_is_read_as_its_base() -> None:
    own = ReverseProcess.from_scheduler(OtherScheduler(clip_sample=False), 10)
    assert own.fingerprint() == ReverseProcess.from_scheduler(DDPMScheduler(clip_sample=False), 10).fingerprint()


@pytest.mark.parametrize(
    ("scheduler", "given", "message"),
    [
        (diffusers.KDPM2AncestralDiscreteScheduler(), {}, "KDPM2AncestralDiscreteScheduler: it evaluates the network twice"),
        (diffusers.HeunDiscreteScheduler(), {}, "HeunDiscreteScheduler: it evaluates the network twice a step"),
        (diffusers.UniPCMultistepScheduler(), {}, "UniPCMultistepScheduler: its corrector"),
        (diffusers.LCMScheduler(), {}, "LCMScheduler: .*distilled"),
        (diffusers.TCDScheduler(), {}, "TCDScheduler: .*distilled"),
        (diffusers.PNDMScheduler(), {}, r"PNDMScheduler: .*from_config\(scheduler.config, algorithm_type='sde-dpmsolver"),
        (diffusers.DDIMInverseScheduler(), {}, "is a DDIMInverseScheduler; allowed are DDPMScheduler, .*from_levels"),
        (DPMSolverMultistepScheduler(solver_order=3), {}, "solver_order=3, .*; allowed are 1 and 2"),
        (DPMSolverMultistepScheduler(thresholding=True), {}, "thresholding=True"),
        (
            DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
            {},
            "algorithm_type='sde-dpmsolver', .*allowed is 'sde-dpmsolver\\+\\+'",
        ),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), {}, "prediction_type='flow_prediction', which"),
        (EulerAncestralDiscreteScheduler(prediction_type="sample"), {}, "prediction_type='sample', which .* cannot have"),
        (DDIMScheduler(prediction_type="flow"), {"eta": 1.0}, "prediction_type='flow', which"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, "mu is missing"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "invert_sigmas=True"),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            {"eta": 0.5},
            "eta is 0.5, but stochastic_sampling=True",
        ),
        (EulerAncestralDiscreteScheduler(), {"mu": 1.0}, "mu is 1.0, but a EulerAncestralDiscreteScheduler shifts nothing"),
        (DDPMScheduler(), {"mu": 1.0}, "mu is 1.0, but a DDPMScheduler shifts nothing"),
        (
            EulerAncestralDiscreteScheduler(),
            {"variance": "beta"},
            "variance is given with a EulerAncestralDiscreteScheduler",
        ),
        (EulerAncestralDiscreteScheduler(), {"stochasticity": 0.5}, "stochasticity is 0.5 with a EulerAncestral"),
        (EulerAncestralDiscreteScheduler(), {"eta": 1.5}, "eta is 1.5; allowed is 0 … 1"),
        (
            EDMDPMSolverMultistepScheduler(),
            {"num_inference_steps": 0},
            "num_inference_steps is 0; allowed is an int, 1 or more",
        ),
    ],
)
def test_refused_with_the_reason(scheduler: Any, given: dict[str, Any], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            ReverseProcess.from_scheduler(scheduler, **{"num_inference_steps": 10, **given})
