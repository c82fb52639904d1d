"""The one table that describes every supported reverse process.

Every sampler here is linear in the state x and in the raw (guided) network output y, with isotropic noise:

    x[k+1] = state_coef[k] * x[k] + model_coef[k] * y[k] + std[k] * z[k],    z ~ N(0, I)

Prediction type, variance, spacing and stochasticity are choices of the constructors; nothing after them knows which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from free.processes.ddpm import ddpm_scheduler
from free.processes.schedulers import scheduler_columns
from free.processes.signal import signal_and_noise
from free_kernels import StepTable

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_COLUMNS = (
    "state_coef",
    "model_coef",
    "std",
    "x0_state_coef",
    "x0_model_coef",
    "clip_state_coef",
    "clip_x0_coef",
)


@dataclass(frozen=True, eq=False)
class ReverseProcess:
    """A reverse process of S steps, from noise (step 0) to data (step S-1).

    All columns are [S]; the coefficients are computed in float64 and held in float32. The x0 estimate of step k is
    ``x0_state_coef[k] * x + x0_model_coef[k] * y``. With ``clip_range`` the mean of step k is
    ``clip_state_coef[k] * x + clip_x0_coef[k] * clamp(x0, ±clip_range)`` instead of ``state_coef * x + model_coef * y``;
    without clamping the two are the same. A process of one's own is made by giving the columns.

    Raises:
        ValueError: columns of different lengths, not finite, or a negative std.
    """

    timestep: torch.Tensor
    """What the network is told at step k (int64, or float for networks in continuous time)."""
    state_coef: torch.Tensor
    model_coef: torch.Tensor
    std: torch.Tensor
    x0_state_coef: torch.Tensor
    x0_model_coef: torch.Tensor
    clip_state_coef: torch.Tensor | None = None
    clip_x0_coef: torch.Tensor | None = None
    clip_range: float | None = None
    """Bound of the x0 estimate (diffusers' ``clip_sample_range``), or None for no clipping."""
    log_variance_range: torch.Tensor | None = None
    """[S, 2]: log posterior variance and log beta of each step, between which a learned variance lies (Nichol & Dhariwal
    2021, eq. 15); None where the process says nothing of them."""
    exact_step: torch.Tensor = field(init=False, repr=False)
    """int64 [S]: the first step >= k that is never drafted, because its std is 0 or it is the last."""
    signal: torch.Tensor = field(init=False, repr=False)
    """[S]: the state of step k is signal * x0 + noise in the mean."""
    noise_ratio: torch.Tensor = field(init=False, repr=False)
    """[S]: the standard deviation of that noise over ``signal``."""

    def __post_init__(self) -> None:
        if self.clip_range is not None:
            if self.clip_state_coef is None or self.clip_x0_coef is None:
                raise ValueError(f"clip_range is {self.clip_range} without clip_state_coef and clip_x0_coef")
            if not self.clip_range > 0:
                raise ValueError(f"clip_range is {self.clip_range}; allowed is a positive number or None")
        if self.timestep.dim() != 1 or not self.timestep.numel():
            raise ValueError(f"timestep has shape {tuple(self.timestep.shape)}; allowed is (steps,) with at least one step")
        for name in _COLUMNS:
            column = getattr(self, name)
            if column is None:
                column = torch.zeros_like(self.std)
            if column.shape != self.timestep.shape:
                raise ValueError(
                    f"{name} has shape {tuple(column.shape)}; timestep has {tuple(self.timestep.shape)}: all must agree"
                )
            if not torch.isfinite(column).all():
                worst = int((~torch.isfinite(column)).nonzero()[0])
                raise ValueError(
                    f"{name} is {column[worst].item()} at step {worst}: this process has no finite table "
                    "(epsilon prediction at zero terminal SNR, for one; use v_prediction there)"
                )
            object.__setattr__(self, name, column.detach().to(torch.float32))
        if self.log_variance_range is not None:
            self._check_log_variance_range(self.log_variance_range)
        if (self.std < 0).any():
            raise ValueError(f"std is {self.std.min().item()} at one step; allowed is 0 or more")
        never_drafted = self.std == 0
        never_drafted[-1] = True
        step = torch.arange(self.num_steps, device=self.std.device)
        candidates = torch.where(never_drafted, step, self.num_steps)
        object.__setattr__(self, "exact_step", candidates.flip(0).cummin(0).values.flip(0))
        signal, noise_ratio = signal_and_noise(
            self.state_coef, self.model_coef, self.std, self.x0_state_coef, self.x0_model_coef
        )
        object.__setattr__(self, "signal", signal)
        object.__setattr__(self, "noise_ratio", noise_ratio)

    def _check_log_variance_range(self, logs: torch.Tensor) -> None:
        if logs.shape != (self.num_steps, 2):
            raise ValueError(f"log_variance_range has shape {tuple(logs.shape)}; allowed is ({self.num_steps}, 2)")
        if not torch.isfinite(logs).all():
            raise ValueError("log_variance_range holds NaN or infinity; allowed are finite numbers")
        object.__setattr__(self, "log_variance_range", logs.detach().to(torch.float32))

    @property
    def num_steps(self) -> int:
        """S."""
        return self.timestep.shape[0]

    @property
    def table(self) -> StepTable:
        """The coefficients as the operations of :mod:`free_kernels` take them."""
        assert self.clip_state_coef is not None  # both filled in by __post_init__
        assert self.clip_x0_coef is not None
        return StepTable(
            self.state_coef,
            self.model_coef,
            self.std,
            self.x0_state_coef,
            self.x0_model_coef,
            self.clip_state_coef,
            self.clip_x0_coef,
            self.clip_range,
        )

    def fingerprint(self) -> bytes:
        """Equal for equal processes; waits for the device."""
        columns = torch.stack([column.double() for column in (self.timestep, *self.table[:-1])])
        logs = b"" if self.log_variance_range is None else self.log_variance_range.cpu().numpy().tobytes()
        return columns.cpu().numpy().tobytes() + logs + repr(self.clip_range).encode()

    def to(self, device: torch.device | str) -> ReverseProcess:
        """The same process on another device."""
        if self.std.device == torch.device(device):
            return self
        columns = {name: getattr(self, name).to(device) for name in ("timestep", *_COLUMNS)}
        logs = None if self.log_variance_range is None else self.log_variance_range.to(device)
        return ReverseProcess(**columns, clip_range=self.clip_range, log_variance_range=logs)

    @classmethod
    def ddpm(
        cls,
        num_inference_steps: int = 250,
        num_train_timesteps: int = 1000,
        beta_schedule: str | torch.Tensor = "linear",
        variance: str | torch.Tensor = "posterior",
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        stochasticity: float = 1.0,
        *,
        eta: float | None = None,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        steps_offset: int = 0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ) -> ReverseProcess:
        """The ancestral sampler of Ho et al. 2020 on a respaced schedule. Defaults are those of the original DiT.

        Args:
            num_inference_steps: S, at most ``num_train_timesteps``.
            num_train_timesteps: length of the schedule that the network was trained with; a tensor of betas brings its own.
            beta_schedule: ``"linear"``, ``"scaled_linear"``, ``"squaredcos_cap_v2"``, or the betas [num_train_timesteps].
            variance: ``"posterior"`` (Ho et al. eq. 7), ``"beta"``, ``"geometric"`` (the geometric mean of the two), or
                the variances of the S steps as a tensor, 0 or more, such as :func:`free.average_learned_variance` makes.
                FREE (arXiv 2511.20390), supplement C.
            prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
            timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"``, as diffusers defines them.
            stochasticity: epsilon of the reverse SDE with noise scaled by epsilon and drift ``(1 + epsilon²) / 2`` times
                the score's (FREE, supplement D, eqs. 37-39); 1 is DDPM.
            eta: DDIM's marginal-preserving noise instead: std = eta times the posterior's, and the mean moves so that
                every marginal stays (Song et al. 2021, eq. 16); 1 is DDPM, 0 is DDIM. With clipping, the noise estimate
                is derived from the clamped x0 (diffusers' ``use_clipped_model_output=True``).
            beta_start, beta_end: ends of the named linear schedules.
            steps_offset: added to the timesteps of ``"leading"``.
            clip_sample: clamp the x0 estimate to ±``clip_sample_range``, as most pixel and policy models expect.
            clip_sample_range: see ``clip_sample``.

        Raises:
            ValueError: an argument that is not among what is listed here, named.
        """
        scheduler = ddpm_scheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            clip_sample=clip_sample,
            clip_sample_range=clip_sample_range,
            prediction_type=prediction_type,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
        )
        return cls.from_scheduler(scheduler, num_inference_steps, variance, stochasticity, eta=eta)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        variance: str | torch.Tensor | None = None,
        stochasticity: float = 1.0,
        *,
        eta: float | None = None,
    ) -> ReverseProcess:
        """The process that a diffusers DDPM or DDIM scheduler stands for.

        A ``DDPMScheduler`` gives exactly the law of its own ``step``. A ``DDIMScheduler`` gives the DDPM of the same
        configuration (``DDPMScheduler.from_config``): as it is shipped it draws no noise, which leaves nothing to couple.
        The scheduler is only read.

        Args:
            scheduler: ``DDPMScheduler`` or ``DDIMScheduler``.
            num_inference_steps: S.
            variance: as in :meth:`ddpm`; None takes the scheduler's (``fixed_small`` is posterior, ``fixed_large`` beta).
            stochasticity, eta: as in :meth:`ddpm`.

        Raises:
            ValueError: another scheduler, dynamic thresholding, learned variance with ``variance=None``, or an argument
                out of range.
        """
        return cls(**scheduler_columns(scheduler, num_inference_steps, variance, stochasticity, eta))
