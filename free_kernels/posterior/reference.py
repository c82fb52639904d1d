"""The ancestral update in plain torch, and the helpers that the other references build on."""

from __future__ import annotations

import torch

from free_kernels.philox import NOISE_STREAM
from free_kernels.philox.reference import normal
from free_kernels.table import StepTable


def guided(output: torch.Tensor, unconditional: torch.Tensor | None, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Classifier-free guidance, combined in ``dtype``."""
    output = output.to(dtype)
    if unconditional is None:
        return output
    unconditional = unconditional.to(dtype)
    return unconditional + scale * (output - unconditional)


def at_step(column: torch.Tensor, step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A column of the table at each step, with a last axis of one: [*step.shape, 1]."""
    return torch.take(column, step).to(dtype).unsqueeze(-1)


def step_mean(state: torch.Tensor, output: torch.Tensor, step: torch.Tensor, table: StepTable) -> torch.Tensor:
    """Mean of x[k+1] given x[k] [*step.shape, D] and the guided output."""
    dtype = state.dtype
    if table.clip_range is None:
        return at_step(table.state_coef, step, dtype) * state + at_step(table.model_coef, step, dtype) * output
    x0 = x0_estimate(state, output, step, table).clamp(-table.clip_range, table.clip_range)
    return at_step(table.clip_state_coef, step, dtype) * state + at_step(table.clip_x0_coef, step, dtype) * x0


def x0_estimate(state: torch.Tensor, output: torch.Tensor, step: torch.Tensor, table: StepTable) -> torch.Tensor:
    """The clean sample that the output stands for, unclamped."""
    dtype = state.dtype
    return (at_step(table.x0_state_coef, step, dtype) * state).add_(at_step(table.x0_model_coef, step, dtype) * output)


def effective_output(
    state: torch.Tensor, output: torch.Tensor, previous_x0: torch.Tensor, step: torch.Tensor, table: StepTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guided output of a process of second order as it stands in the mean, and the estimate of x0; [*step.shape, D]."""
    assert table.memory_gain is not None
    x0 = x0_estimate(state, output, step, table)
    return output + at_step(table.memory_gain, step, state.dtype) * (x0 - previous_x0.to(state.dtype)), x0


def effective_window(
    states: torch.Tensor, output: torch.Tensor, previous_x0: torch.Tensor, steps: torch.Tensor, table: StepTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`effective_output` of successive steps [B, W], ``previous_x0`` [B, D] being of the step before the first."""
    x0 = x0_estimate(states, output, steps, table)
    before = torch.cat((previous_x0[:, None].to(x0.dtype), x0[:, :-1]), 1)
    return effective_output(states, output, before, steps, table)


def compute_dtype(state: torch.Tensor) -> torch.dtype:
    """States and noise are float32 whatever the network computes in; float64 stays float64, for tests."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32


def posterior(
    state: torch.Tensor,
    output: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    dtype = compute_dtype(state)
    step = step.clamp(max=table.num_steps - 1)
    if noise is None:
        noise = normal(seed, step, state.shape[-1], NOISE_STREAM, dtype)
    mean = step_mean(state.to(dtype), guided(output, unconditional_output, guidance_scale, dtype), step, table)
    return mean + at_step(table.std, step, dtype) * noise.to(dtype)


def posterior_with_memory(
    state: torch.Tensor,
    output: torch.Tensor,
    previous_x0: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    table: StepTable,
    unconditional_output: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(state)
    step = step.clamp(max=table.num_steps - 1)
    output = guided(output, unconditional_output, guidance_scale, dtype)
    output, x0 = effective_output(state.to(dtype), output, previous_x0, step, table)
    return posterior(state, output, seed, step, table, None, 1.0, noise), x0
