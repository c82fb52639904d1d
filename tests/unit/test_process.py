"""The table of a reverse process, against diffusers where that is right and against closed forms in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from free import ReverseProcess
from free_kernels import posterior

SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
VARIANCE_TYPES = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "beta"}

# a column is rounded to float32 (2**-24 = 6e-8 relative); two of them enter a mean, and the reference is float64
ROUNDING = 2.5e-7


@pytest.fixture
def reference_noise(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The constant that DDPMScheduler.step takes for its noise, in a list that a test may change."""
    level = [0.0]
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda shape, dtype, **_: torch.full(tuple(shape), level[0], dtype=dtype)
    )
    return level


def in_double(scheduler: DDPMScheduler | DDIMScheduler, num_steps: int) -> Any:
    """The scheduler with its float32 betas taken as exact and everything after them in float64.

    In float32 its own step is off by up to 1e-3 at small t, where 1 - alpha_bar cancels.
    """
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    else:
        scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(num_steps)
    return scheduler


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | float) -> None:
    """Equal up to the rounding of the table's columns; ``scale`` is the size of the terms that were added."""
    error = (actual.double() - expected.double()).abs()
    assert (error <= ROUNDING * scale).all(), f"off by {(error / scale).max().item():.3g} of the size of the terms"


def assert_table_is_the_schedulers_step(process: ReverseProcess, scheduler: Any, noise: list[float]) -> None:
    assert process.num_steps == len(scheduler.timesteps)
    assert torch.equal(process.timestep, scheduler.timesteps)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    columns: dict[str, list[torch.Tensor]] = {"state_coef": [], "model_coef": [], "std": [], "x0_state": [], "x0_model": []}
    for timestep in scheduler.timesteps:
        noise[0] = 0.0
        of_state = scheduler.step(zero, timestep, one)
        of_model = scheduler.step(one, timestep, zero)
        noise[0] = 1.0
        columns["std"].append(scheduler.step(zero, timestep, zero).prev_sample)
        columns["state_coef"].append(of_state.prev_sample)
        columns["model_coef"].append(of_model.prev_sample)
        columns["x0_state"].append(of_state.pred_original_sample)
        columns["x0_model"].append(of_model.pred_original_sample)
    expected = {name: torch.cat(values).flatten() for name, values in columns.items()}
    # diffusers floors the variance at 1e-20, where the exact one is 0
    assert_close(process.std, expected["std"], expected["std"] + 1e-3)
    for name in ("state_coef", "model_coef"):
        assert_close(getattr(process, name), expected[name], expected[name].abs() + 1e-6)
    assert_close(process.x0_state_coef, expected["x0_state"], expected["x0_state"].abs())
    assert_close(process.x0_model_coef, expected["x0_model"], expected["x0_model"].abs())


@pytest.mark.parametrize("num_steps", [1, 10, 50, 250])
@pytest.mark.parametrize(("spacing", "prediction"), itertools.product(SPACINGS, PREDICTIONS))
def test_ddpm_is_diffusers_step(num_steps: int, spacing: str, prediction: str, reference_noise: list[float]) -> None:
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler = DDPMScheduler(
            timestep_spacing=spacing, prediction_type=prediction, variance_type=variance_type, clip_sample=False
        )
        process = ReverseProcess.ddpm(
            num_steps, variance=VARIANCE_TYPES[variance_type], prediction_type=prediction, timestep_spacing=spacing
        )
        assert_table_is_the_schedulers_step(process, in_double(scheduler, num_steps), reference_noise)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_is_diffusers_step_at_all_1000_steps(spacing: str, reference_noise: list[float]) -> None:
    scheduler = in_double(DDPMScheduler(timestep_spacing=spacing, clip_sample=False), 1000)
    process = ReverseProcess.ddpm(1000, timestep_spacing=spacing)
    assert_table_is_the_schedulers_step(process, scheduler, reference_noise)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_from_scheduler_is_that_schedulers_step(schedule: str, variance_type: str, reference_noise: list[float]) -> None:
    scheduler = DDPMScheduler(
        num_train_timesteps=100, beta_schedule=schedule, variance_type=variance_type, clip_sample=False, steps_offset=1
    )
    process = ReverseProcess.from_scheduler(scheduler, 20)
    assert process.clip_range is None
    assert_table_is_the_schedulers_step(process, in_double(scheduler, 20), reference_noise)


def test_arguments_given_to_the_scheduler_by_position(reference_noise: list[float]) -> None:
    for make in (DDPMScheduler, DDIMScheduler):
        process = ReverseProcess.from_scheduler(make(100, 0.001, 0.05, "scaled_linear", clip_sample=False), 20)
        scheduler = DDPMScheduler(
            num_train_timesteps=100, beta_start=0.001, beta_end=0.05, beta_schedule="scaled_linear", clip_sample=False
        )
        assert_table_is_the_schedulers_step(process, in_double(scheduler, 20), reference_noise)


def test_leading_with_offset_takes_noise_on_its_last_step_as_diffusers_does(reference_noise: list[float]) -> None:
    scheduler = DDPMScheduler(timestep_spacing="leading", steps_offset=1, variance_type="fixed_large", clip_sample=False)
    process = ReverseProcess.ddpm(50, variance="beta", timestep_spacing="leading", steps_offset=1)
    assert process.timestep[-1] == 1
    assert process.std[-1] > 0
    assert_table_is_the_schedulers_step(process, in_double(scheduler, 50), reference_noise)


def test_betas_given_as_a_tensor(reference_noise: list[float]) -> None:
    betas = torch.linspace(0.001, 0.3, 40, dtype=torch.float64) ** 1.5
    scheduler = DDPMScheduler(40, trained_betas=betas.tolist(), clip_sample=False, timestep_spacing="linspace")
    in_double(scheduler, 8)
    process = ReverseProcess.ddpm(8, beta_schedule=betas)
    assert_table_is_the_schedulers_step(process, scheduler, reference_noise)
    longer = ReverseProcess.ddpm(40, num_train_timesteps=40, beta_schedule=betas)
    assert longer.timestep.tolist() == list(range(39, -1, -1))


@pytest.mark.parametrize("clip_range", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("prediction", "schedule"), itertools.product(PREDICTIONS, ("linear", "squaredcos_cap_v2")))
def test_clip_sample_is_diffusers_step(
    clip_range: float, prediction: str, schedule: str, reference_noise: list[float]
) -> None:
    scheduler = DDPMScheduler(
        num_train_timesteps=100,
        beta_schedule=schedule,
        prediction_type=prediction,
        clip_sample=True,
        clip_sample_range=clip_range,
    )
    process = ReverseProcess.from_scheduler(scheduler, 25)
    assert process.clip_range == clip_range
    in_double(scheduler, 25)
    draw = torch.Generator().manual_seed(0)
    clipped = 0
    for step, timestep in enumerate(scheduler.timesteps):
        x, y = clip_range * torch.randn(2, 64, 3, generator=draw, dtype=torch.float64)
        expected = scheduler.step(y, timestep, x)
        at = torch.full((64,), step)
        actual = posterior(x, y, torch.zeros_like(at), at, process.table, noise=torch.zeros_like(x))
        clipped += int((expected.pred_original_sample.abs() == clip_range).sum())
        # where x0 is within its range its two terms may be large and cancel
        scale = 1 + process.clip_x0_coef[step].double() * (
            process.x0_state_coef[step] * x.abs() + process.x0_model_coef[step].abs() * y.abs()
        )
        assert_close(actual, expected.prev_sample, 4 * scale)
    assert 100 < clipped < 64 * 3 * 25 - 100


def test_unclipped_columns_do_the_same_as_the_clipping_ones_within_the_range() -> None:
    process = ReverseProcess.ddpm(50, prediction_type="v_prediction")
    x0 = [process.x0_state_coef.double(), process.x0_model_coef.double()]
    through_x0 = [process.clip_state_coef + process.clip_x0_coef * x0[0], process.clip_x0_coef * x0[1]]
    assert_close(through_x0[0], process.state_coef, 2.0)
    assert_close(through_x0[1], process.model_coef, 2.0)


# --- closed forms, from alpha-bar alone ---------------------------------------------------------------------------------


def own_betas(schedule: str, count: int = 1000) -> np.ndarray:
    """The named schedules as their papers define them, in float64."""
    if schedule == "linear":
        return np.linspace(0.0001, 0.02, count)
    if schedule == "scaled_linear":
        return np.linspace(0.0001**0.5, 0.02**0.5, count) ** 2
    level = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - level[1:] / level[:-1], 0.999)


def alpha_bars(process: ReverseProcess, betas: np.ndarray | torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """alpha-bar before and after each step, float64."""
    level = np.cumprod(1 - np.asarray(betas, np.float64))[process.timestep.numpy()]
    return level, np.append(level[1:], 1.0)


def default_alpha_bars(process: ReverseProcess) -> tuple[np.ndarray, np.ndarray]:
    return alpha_bars(process, DDPMScheduler().betas.double())


def x0_terms(prediction: str, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a x + b y, solved from x = sqrt(level) x0 + sqrt(1 - level) noise and what y stands for."""
    signal, noise = np.sqrt(level), np.sqrt(1 - level)
    if prediction == "sample":
        return np.zeros_like(level), np.ones_like(level)
    # [x; y] = M [x0; noise], so the first row of M's inverse is what is wanted
    lower = {"epsilon": (np.zeros_like(level), np.ones_like(level)), "v_prediction": (-noise, signal)}[prediction]
    matrices = np.stack([np.stack([signal, noise], -1), np.stack(lower, -1)], -2)
    inverse = np.linalg.inv(matrices)
    return inverse[:, 0, 0], inverse[:, 0, 1]


def bayes(level: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (terms of x and of x0) and variance of x[k+1] given x[k] and x0, by adding precisions."""
    ratio = level / after
    with np.errstate(divide="ignore", invalid="ignore"):
        prior, likelihood = 1 / (1 - after), ratio / (1 - ratio)
        variance = 1 / (prior + likelihood)
        of_state = variance * np.sqrt(ratio) / (1 - ratio)
        of_x0 = variance * prior * np.sqrt(after)
    # the last step ends at the data: no variance left, x[S] = x0
    final = after == 1
    return np.where(final, 0.0, of_state), np.where(final, 1.0, of_x0), np.where(final, 0.0, variance)


def assert_column(column: torch.Tensor, expected: np.ndarray, relative: float = 1e-6) -> None:
    np.testing.assert_allclose(column.double().numpy(), expected, rtol=relative, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 10, 250, 1000])
def test_ddpm_is_bayes_rule(prediction: str, spacing: str, num_steps: int) -> None:
    process = ReverseProcess.ddpm(num_steps, prediction_type=prediction, timestep_spacing=spacing)
    level, after = default_alpha_bars(process)
    of_state, of_x0, variance = bayes(level, after)
    x0_state, x0_model = x0_terms(prediction, level)
    assert_column(process.x0_state_coef, x0_state)
    assert_column(process.x0_model_coef, x0_model)
    assert_column(process.clip_state_coef, of_state)
    assert_column(process.clip_x0_coef, of_x0)
    assert_column(process.state_coef, of_state + of_x0 * x0_state)
    assert_column(process.model_coef, of_x0 * x0_model)
    assert_column(process.std, np.sqrt(variance))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_named_schedules(schedule: str) -> None:
    process = ReverseProcess.ddpm(50, beta_schedule=schedule, prediction_type="v_prediction")
    level, _ = alpha_bars(process, own_betas(schedule))
    # diffusers holds betas in float32; 1 - beta = 0.001 at the end of the cosine schedule loses 2**-24 / 0.001 of itself
    assert_column(process.x0_state_coef, np.sqrt(level), relative=1e-4)


@pytest.mark.parametrize("num_steps", [10, 250])
def test_geometric_variance_is_halfway_in_the_logarithm(num_steps: int) -> None:
    process = ReverseProcess.ddpm(num_steps, variance="geometric")
    level, after = default_alpha_bars(process)
    smallest, largest = bayes(level, after)[2], 1 - level / after
    with np.errstate(divide="ignore"):
        expected = np.exp(0.25 * (np.log(smallest) + np.log(largest)))
    assert_column(process.std, expected)
    # and so it is what a learned range gives where the network says 0
    scheduler = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace")
    in_double(scheduler, num_steps)
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        log_variance = scheduler._get_variance(timestep, predicted_variance=torch.zeros((), dtype=torch.float64))
        assert float(process.std[step]) == pytest.approx(float((log_variance / 2).exp()), rel=1e-6)


def test_variance_given_by_the_user() -> None:
    variance = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)
    process = ReverseProcess.ddpm(10, variance=variance)
    assert_column(process.std, np.sqrt(variance.numpy()))
    plain = ReverseProcess.ddpm(10)
    assert torch.equal(process.state_coef, plain.state_coef)
    assert torch.equal(process.model_coef, plain.model_coef)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 0.8, 1.0, 1.3])
@pytest.mark.parametrize("variance", ["posterior", "beta", "geometric"])
def test_stochasticity_is_supplement_d(epsilon: float, variance: str) -> None:
    process = ReverseProcess.ddpm(50, variance=variance, stochasticity=epsilon)
    level, after = default_alpha_bars(process)
    ratio = level / after
    # x[k+1] = x / sqrt(ratio) + (1 + epsilon²) / 2 * (1 - ratio) / sqrt(ratio) * score + epsilon * std * z, and the
    # score is -noise / sqrt(1 - level)
    assert_column(process.state_coef, 1 / np.sqrt(ratio))
    assert_column(process.model_coef, -(1 + epsilon**2) / 2 * (1 - ratio) / np.sqrt(ratio * (1 - level)))
    assert_column(process.std, epsilon * ReverseProcess.ddpm(50, variance=variance).std.double().numpy())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eta_keeps_every_marginal(eta: float, spacing: str, schedule: str) -> None:
    process = ReverseProcess.ddpm(40, beta_schedule=schedule, timestep_spacing=spacing, eta=eta, num_train_timesteps=200)
    level, after = alpha_bars(process, DDPMScheduler(200, beta_schedule=schedule).betas.double())
    # x[k] ~ N(sqrt(level) x0, (1 - level) I) and an exact x0: then x[k+1] ~ N(sqrt(after) x0, (1 - after) I)
    of_state, of_x0 = process.clip_state_coef.double().numpy(), process.clip_x0_coef.double().numpy()
    np.testing.assert_allclose(of_state * np.sqrt(level) + of_x0, np.sqrt(after), rtol=0, atol=ROUNDING)
    variance = of_state**2 * (1 - level) + process.std.double().numpy() ** 2
    np.testing.assert_allclose(variance, 1 - after, rtol=2 * ROUNDING, atol=1e-12)
    assert_column(process.std, eta * np.sqrt(bayes(level, after)[2]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eta_one_is_ddpm(prediction: str, schedule: str) -> None:
    common: dict[str, Any] = {"num_inference_steps": 40, "prediction_type": prediction, "beta_schedule": schedule}
    with_eta, ddpm = ReverseProcess.ddpm(**common, eta=1.0), ReverseProcess.ddpm(**common)
    for name in ("state_coef", "model_coef", "std", "x0_state_coef", "x0_model_coef", "clip_state_coef", "clip_x0_coef"):
        expected = getattr(ddpm, name)
        assert_close(getattr(with_eta, name), expected, expected.abs() + 1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eta_is_ddims_step(eta: float, clip_sample: bool, prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=clip_sample, clip_sample_range=0.7)
    process = ReverseProcess.from_scheduler(scheduler, 20, eta=eta)
    in_double(scheduler, 20)
    draw = torch.Generator().manual_seed(1)
    x, y, z = torch.randn(3, 32, 2, generator=draw, dtype=torch.float64)
    for step, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(
            y, timestep, x, eta=eta, use_clipped_model_output=True, variance_noise=z if eta > 0 else None
        ).prev_sample
        at = torch.full((32,), step)
        actual = posterior(x, y, torch.zeros_like(at), at, process.table, noise=z)
        scale = 1 + process.clip_x0_coef[step].double() * (
            process.x0_state_coef[step] * x.abs() + process.x0_model_coef[step].abs() * y.abs()
        )
        assert_close(actual, expected, 8 * scale)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("noise_level", [{}, {"stochasticity": 0.6}, {"eta": 0.3}])
def test_x0_columns_recover_x0_from_exact_outputs(prediction: str, schedule: str, noise_level: dict[str, float]) -> None:
    process = ReverseProcess.ddpm(30, prediction_type=prediction, beta_schedule=schedule, **noise_level)
    level = torch.from_numpy(alpha_bars(process, DDPMScheduler(beta_schedule=schedule).betas.double())[0])[:, None]
    x0, noise = torch.randn(2, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = level.sqrt() * x0 + (1 - level).sqrt() * noise
    y = {"epsilon": noise, "sample": x0, "v_prediction": level.sqrt() * noise - (1 - level).sqrt() * x0}[prediction]
    of_state, of_model = process.x0_state_coef[:, None] * x, process.x0_model_coef[:, None] * y
    assert_close(of_state + of_model, x0, of_state.abs() + of_model.abs() + x0.abs())


# --- schedulers ---------------------------------------------------------------------------------------------------------


def test_ddim_becomes_the_stochastic_process_of_its_configuration(reference_noise: list[float]) -> None:
    # the scheduler that the released DiT pipelines ship
    ddim = DDIMScheduler(clip_sample=False, beta_start=0.0001, beta_end=0.02)
    process = ReverseProcess.from_scheduler(ddim, 50)
    assert (process.std[:-1] > 0).all()
    ddpm = in_double(DDPMScheduler.from_config(ddim.config), 50)
    assert_table_is_the_schedulers_step(process, ddpm, reference_noise)
    assert process.timestep[0] == 980  # DDIM's own default spacing is "leading"


@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler])
def test_the_scheduler_is_only_read(make: type) -> None:
    scheduler = make(clip_sample=False)
    scheduler.set_timesteps(7)
    timesteps, config = scheduler.timesteps.clone(), dict(scheduler.config)
    ReverseProcess.from_scheduler(scheduler, 33, variance="beta")
    assert torch.equal(scheduler.timesteps, timesteps)
    assert scheduler.num_inference_steps == 7
    assert dict(scheduler.config) == config


@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler])
def test_zero_terminal_snr(make: type, reference_noise: list[float]) -> None:
    settings: dict[str, Any] = {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    process = ReverseProcess.from_scheduler(make(**settings), 25)
    assert process.timestep[0] == 999
    assert process.x0_state_coef[0] == 0  # the first state is pure noise
    assert_table_is_the_schedulers_step(process, in_double(DDPMScheduler(**settings), 25), reference_noise)


def test_variance_of_the_scheduler_can_be_overruled() -> None:
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    process = ReverseProcess.from_scheduler(scheduler, 20, variance="geometric")
    expected = ReverseProcess.ddpm(20, variance="geometric", timestep_spacing="leading")
    assert torch.equal(process.std, expected.std)


# --- the table itself ---------------------------------------------------------------------------------------------------


def own_table(std: list[float], **changes: Any) -> ReverseProcess:
    """A flow of one's own: S steps of x + y / S in continuous time."""
    steps = len(std)
    columns: dict[str, Any] = {
        "timestep": torch.linspace(1, 0, steps),
        "state_coef": torch.ones(steps),
        "model_coef": torch.full((steps,), 1 / steps),
        "std": torch.tensor(std, dtype=torch.float64),
        "x0_state_coef": torch.ones(steps),
        "x0_model_coef": torch.linspace(1, 0.1, steps),
    }
    return ReverseProcess(**{**columns, **changes})


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.0], [3, 3, 3, 3]),
        ([0.5, 0.5, 0.5, 0.5], [3, 3, 3, 3]),
        ([0.5, 0.0, 0.5, 0.5, 0.0, 0.0, 0.1], [1, 1, 4, 4, 4, 5, 6]),
        ([0.0, 0.0], [0, 1]),
        ([0.3], [0]),
    ],
)
def test_exact_step_is_the_next_step_that_is_never_drafted(std: list[float], expected: list[int]) -> None:
    assert own_table(std).exact_step.tolist() == expected


def test_a_table_of_ones_own_is_held_in_float32() -> None:
    process = own_table([0.5, 0.4, 0.3])
    assert process.num_steps == 3
    assert process.timestep.tolist() == [1, 0.5, 0]
    for name in ("state_coef", "model_coef", "std", "x0_state_coef", "x0_model_coef", "clip_state_coef", "clip_x0_coef"):
        assert getattr(process, name).dtype == torch.float32
    assert process.clip_range is None
    assert process.table.num_steps == 3


def test_to_the_device_it_is_on_already_is_the_same_object() -> None:
    process = own_table([0.5, 0.0])
    assert process.to("cpu") is process


@pytest.mark.gpu
def test_to_another_device_and_back() -> None:
    process = ReverseProcess.ddpm(10, clip_sample=True, clip_sample_range=0.5)
    moved = process.to("cuda")
    assert all(column.is_cuda for column in (moved.timestep, moved.exact_step, *moved.table.columns))
    back = moved.to("cpu")
    assert back.clip_range == 0.5
    assert torch.equal(back.timestep, process.timestep)
    assert torch.equal(back.exact_step, process.exact_step)
    for before, after in zip(process.table.columns, back.table.columns, strict=True):
        assert torch.equal(before, after)


def test_defaults_are_the_original_dits() -> None:
    """OpenAI's respacing of 1000 steps to 250, linear betas, posterior variance."""
    process = ReverseProcess.ddpm()
    expected = [round(999 / 249 * step) for step in range(250)][::-1]
    assert process.timestep.tolist() == expected
    assert process.clip_range is None
    assert process.std[-1] == 0
