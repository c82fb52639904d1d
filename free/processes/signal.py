"""How much of a state is signal and how much noise, read off the steps that lead to it."""

from __future__ import annotations

import torch

_LEAST = 1e-4
"""Lower bound of both columns: drafters divide by them."""


def signal_and_noise(
    state_coef: torch.Tensor,
    model_coef: torch.Tensor,
    std: torch.Tensor,
    x0_state_coef: torch.Tensor,
    x0_model_coef: torch.Tensor,
    initial_std: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of x0 in the state of each step, and the noise's standard deviation over it; float32 [S] both.

    From pure noise of standard deviation ``initial_std``, a step that knew x0 would go to
    ``x0_coef * x0 + slope * x + std * z``; both follow by recursion. That forgets the little signal that a schedule has at
    step 0, which matters to the first steps only.
    """
    x0_coef = model_coef.double() / x0_model_coef.double()
    slope = state_coef.double() - x0_coef * x0_state_coef.double()
    signals, noises = [0.0], [initial_std]
    for by_x0, by_state, spread in zip(x0_coef.tolist(), slope.tolist(), std.tolist(), strict=True):
        signals.append(by_state * signals[-1] + by_x0)
        noises.append((by_state**2 * noises[-1] ** 2 + spread**2) ** 0.5)
    signals[0] = signals[1] / 2  # of its own order; zero would make it infinitely noisy
    signal = torch.tensor(signals[:-1], dtype=torch.float64).nan_to_num().clamp(min=_LEAST)
    noise_ratio = (torch.tensor(noises[:-1], dtype=torch.float64) / signal).nan_to_num(nan=1.0).clamp(_LEAST, 1 / _LEAST)
    return signal.float().to(std.device), noise_ratio.float().to(std.device)
