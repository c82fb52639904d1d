"""The one table that describes every supported reverse process.

Every sampler here is linear in the state x and in the raw (guided) network output y, with isotropic noise:

    x[k+1] = state_coef[k] * x[k] + model_coef[k] * y[k] + std[k] * z[k],    z ~ N(0, I)

Prediction type, variance, spacing and stochasticity are choices of the constructors; nothing after them knows which. A
process of second order has one column more: its mean takes an estimate of x0 that leans on the one of the step before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from free.checks import on_cpu
from free.processes.ddpm import ddpm_scheduler
from free.processes.euler import churn, edm_columns, flow_sde_columns
from free.processes.levels import Levels, kept_share, level_columns, level_std, second_order_memory, x0_columns
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

    With ``memory`` the process is of second order: its mean is that of first order with the x0 estimate m[k] replaced by
    ``m[k] + memory[k] * (m[k] - m[k-1])``, where m[k-1] is the estimate at the state before. (x[k], m[k-1]) is Markov.

    Raises:
        ValueError: columns of different lengths, not finite, a negative std, or a memory at the first step or of a clipped
            estimate.
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
    memory: torch.Tensor | None = None
    """[S]: what each step adds of the x0 estimate's last change; None is a process of first order."""
    initial_std: float = 1.0
    """Standard deviation of the initial state that the samplers draw; given latents are taken as they are."""
    memory_gain: torch.Tensor | None = field(init=False, repr=False, default=None)
    """float32 [S]: the same as a gain of the output, which ``y[k] + memory_gain[k] (m[k] - m[k-1])`` replaces, or None."""
    relative_log_variance: torch.Tensor | None = field(init=False, repr=False, default=None)
    """float32 [S, 2]: ``log_variance_range`` less the log of each step's own variance, or None."""
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
        self._check_log_variance_range()
        self._check_memory()
        if not 0 < self.initial_std < float("inf"):
            raise ValueError(f"initial_std is {self.initial_std}; allowed is a positive number")
        if (self.std < 0).any():
            raise ValueError(f"std is {self.std.min().item()} at one step; allowed is 0 or more")
        never_drafted = self.std == 0
        never_drafted[-1] = True
        step = torch.arange(self.num_steps, device=self.std.device)
        candidates = torch.where(never_drafted, step, self.num_steps)
        object.__setattr__(self, "exact_step", candidates.flip(0).cummin(0).values.flip(0))
        signal, noise_ratio = signal_and_noise(
            self.state_coef, self.model_coef, self.std, self.x0_state_coef, self.x0_model_coef, self.initial_std
        )
        object.__setattr__(self, "signal", signal)
        object.__setattr__(self, "noise_ratio", noise_ratio)

    def _check_log_variance_range(self) -> None:
        logs = self.log_variance_range
        if logs is None:
            return
        if logs.shape != (self.num_steps, 2):
            raise ValueError(f"log_variance_range has shape {tuple(logs.shape)}; allowed is ({self.num_steps}, 2)")
        if not torch.isfinite(logs).all():
            raise ValueError("log_variance_range holds NaN or infinity; allowed are finite numbers")
        logs = logs.detach().to(torch.float32)
        own = self.std.clamp(min=torch.finfo(torch.float32).tiny).log()  # finite at a step without noise
        object.__setattr__(self, "log_variance_range", logs)
        object.__setattr__(self, "relative_log_variance", logs - 2 * own[:, None])

    def _check_memory(self) -> None:
        memory = self.memory
        if memory is None or not bool(memory.any()):
            object.__setattr__(self, "memory", None)
            return
        if memory.shape != self.timestep.shape or not bool(torch.isfinite(memory).all()):
            raise ValueError(
                f"memory has shape {tuple(memory.shape)} or is not finite; allowed are {self.num_steps} finite numbers"
            )
        if bool(memory[0] != 0):
            raise ValueError(f"memory is {memory[0].item()} at the first step, which has none before it; allowed is 0")
        if self.clip_range is not None:
            raise ValueError(f"clip_range is {self.clip_range} with memory; allowed is one of them: no sampler clamps both")
        memory = memory.detach().to(self.std.device, torch.float64)
        object.__setattr__(self, "memory", memory.float())
        object.__setattr__(self, "memory_gain", (memory / self.x0_model_coef.double()).float())

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
            self.memory_gain,
        )

    def fingerprint(self) -> bytes:
        """Equal for equal processes; waits for the device."""
        columns = torch.stack([column.double() for column in (self.timestep, *self.table.columns)])
        optional = (self.log_variance_range, self.memory)
        more = [b"none" if values is None else values.cpu().numpy().tobytes() for values in optional]
        return columns.cpu().numpy().tobytes() + b"".join(more) + repr((self.clip_range, self.initial_std)).encode()

    def to(self, device: torch.device | str) -> ReverseProcess:
        """The same process on another device."""
        if self.std.device == torch.device(device):
            return self
        columns = {name: getattr(self, name).to(device) for name in ("timestep", *_COLUMNS)}
        for name in ("log_variance_range", "memory"):
            optional = getattr(self, name)
            columns[name] = None if optional is None else optional.to(device)
        return ReverseProcess(**columns, clip_range=self.clip_range, initial_std=self.initial_std)

    @classmethod
    @on_cpu
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
    @on_cpu
    def from_levels(
        cls,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
        timestep: torch.Tensor,
        prediction_type: str = "epsilon",
        *,
        eta: float = 1.0,
        order: int = 1,
        solver_type: str = "midpoint",
        initial_std: float | None = None,
    ) -> ReverseProcess:
        """The DDIM family over any noise levels: states ``x[k] = alpha[k] x0 + sigma[k] eps`` as the network sees them.

        A step is ``x' = alpha' x0 + sqrt(sigma'² - s²) eps + s z`` with ``s = eta * sigma' * sqrt(1 - ratio²)``, ratio being
        (sigma'/alpha') / (sigma/alpha) (Song et al. 2021, eq. 12). eta = 1 is the posterior of the forward process: DDPM,
        Euler ancestral (alpha = 1 / sqrt(sigma_k² + 1)), SDE-DPM-Solver++, and flow matching's (alpha = 1 - sigma,
        ``"flow_prediction"``); eta = 0 is the deterministic DDIM, or FlowMatchEuler, which leaves nothing to draft.

        Args:
            alpha, sigma: the levels [S + 1], finite, 0 or more, sigma / alpha falling; alpha may be 0 at the first point and
                sigma at the last.
            timestep: what the network is told, [S]; ints or floats, passed on as they are.
            prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow_prediction"`` (eps - x0).
            eta: 0 … 1.
            order: 2 is DPM-Solver++ 2M and its SDE (Lu et al. 2022).
            solver_type: of second order, ``"midpoint"`` or ``"heun"``.
            initial_std: of the initial state; sigma[0] if left out.

        Raises:
            ValueError: an argument that is not among what is listed here, named.
        """
        if order not in (1, 2):
            raise ValueError(f"order is {order!r}; allowed are 1 and 2")
        levels = Levels.of(alpha, sigma)
        kept = kept_share(levels, eta)
        columns: dict[str, Any] = {
            **level_columns(levels, x0_columns(levels, prediction_type), kept, level_std(levels, eta)),
            "memory": second_order_memory(levels, kept, solver_type) if order == 2 else None,
            "initial_std": float(levels.sigma[0]) if initial_std is None else initial_std,
        }
        return cls(timestep.detach().cpu(), **columns)

    @classmethod
    @on_cpu
    def flow_sde(
        cls, sigma: torch.Tensor, timestep: torch.Tensor, weight: str | torch.Tensor = "sigma", noise_level: float = 1.0
    ) -> ReverseProcess:
        """A flow-matching model's SDE by Euler-Maruyama: ``dx = y dsigma + w score dt + sqrt(2 w) dW``.

        The network predicts eps - x0, and x = (1 - sigma) x0 + sigma eps. The step that ends at sigma = 0 takes the mean.

        Args:
            sigma: [S + 1], falling within [0, 1].
            timestep: what the network is told, [S].
            weight: w, of SiT (Ma et al. 2024): ``"sigma"``, ``"sbdm"`` (sigma / (1 - sigma)), ``"constant"`` (1), times
                ``noise_level``; ``"flow-grpo"`` (Liu et al. 2025): noise_level² sigma / (2 (1 - sigma)); or w itself, [S].
            noise_level: see ``weight``.

        Raises:
            ValueError: levels that rise or leave [0, 1], an unknown weight, or one that is infinite or negative.
        """
        if sigma.dim() == 1 and bool((sigma > 1).any()):
            raise ValueError(f"sigma holds {sigma.max().item()}; allowed are levels of flow matching, 0 … 1")
        return cls(timestep.detach().cpu(), **flow_sde_columns(sigma, weight, noise_level))

    @classmethod
    @on_cpu
    def edm(
        cls,
        sigma: torch.Tensor,
        *,
        s_churn: float = 40.0,
        s_min: float = 0.0,
        s_max: float = float("inf"),
        s_noise: float = 1.003,
        gamma: torch.Tensor | None = None,
        step_scale: float = 1.0,
        sigma_data: float | None = 0.5,
        time: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> ReverseProcess:
        """EDM's stochastic sampler (Karras et al. 2022, algorithm 2) by Euler steps, one evaluation each.

        The algorithm raises x from sigma to sigma (1 + gamma) by noise, and steps down from there. Here the raised x is the
        state, so that the noise which raises the next state belongs to this step; the first one's is in ``initial_std``.
        The state is scaled as the network sees it: by 1 / sqrt(raised² + sigma_data²), and the sample not at all.

        AlphaFold 3's sampler is ``gamma=torch.where(sigma[1:] > 1.0, 0.8, 0.0)``, ``s_noise=1.003``, ``step_scale=1.5``.
        Steps whose next state is not raised have no noise and cost a round each, which is warned of.

        Args:
            sigma: [S + 1], falling.
            s_churn, s_min, s_max, s_noise: of the paper.
            gamma: [S], instead of what ``s_churn``, ``s_min`` and ``s_max`` make.
            step_scale: a factor of the step down.
            sigma_data: of the preconditioning: the network is EDM's raw F, given the scaled state and log(raised) / 4. None
                is a denoiser, given the state itself and the raised sigma.
            time: of a network that predicts the noise of states of unit variance, as one trained for DDPM does (the paper's
                column VP): what it is told of raised levels [S]. Its state is x / sqrt(raised² + 1), whatever sigma_data is.

        Raises:
            ValueError: levels that rise, or a constant out of range.
        """
        if not 0 <= s_churn < float("inf"):
            raise ValueError(f"s_churn is {s_churn}; allowed is 0 or more")
        gamma = churn(sigma, s_churn, s_min, s_max) if gamma is None else gamma
        return cls(**edm_columns(sigma, gamma, s_noise, step_scale, sigma_data, time))

    @classmethod
    @on_cpu
    def from_scheduler(
        cls,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        variance: str | torch.Tensor | None = None,
        stochasticity: float = 1.0,
        *,
        eta: float | None = None,
        mu: float | None = None,
    ) -> ReverseProcess:
        """The process that a diffusers scheduler stands for: the law of its own ``step``, for those that draw noise.

        ``DDPMScheduler``, ``EulerAncestralDiscreteScheduler``, ``DPMSolverMultistepScheduler`` and
        ``EDMDPMSolverMultistepScheduler`` of ``algorithm_type="sde-dpmsolver++"`` (order 1, 2), ``CogVideoXDPMScheduler``,
        and ``FlowMatchEulerDiscreteScheduler`` with ``stochastic_sampling``. One that draws none has no step to draft, and
        becomes its stochastic counterpart, with a warning that says which: a ``DDIMScheduler`` the DDPM of its
        configuration, ``CogVideoXDDIMScheduler``, ``EulerDiscreteScheduler``, ``EDMEulerScheduler`` and
        ``FlowMatchEulerDiscreteScheduler`` the posterior of their levels, ``"dpmsolver++"`` its SDE. The scheduler is only
        read.

        The states are what the network sees (``scheduler.scale_model_input``), which at the end is the sample.

        Args:
            scheduler: one of the above.
            num_inference_steps: S; None takes the timesteps that were set on the scheduler.
            variance: of DDPM and DDIM, as in :meth:`ddpm`; None takes the scheduler's (``fixed_small`` is posterior,
                ``fixed_large`` beta).
            stochasticity: of DDPM and DDIM, as in :meth:`ddpm`.
            eta: how much of a step's noise is fresh, 0 … 1, as in :meth:`from_levels`; with ``DDIMScheduler`` the process is
                its own ``step`` of that eta (with clipping, ``use_clipped_model_output=True``).
            mu: of the schedulers with ``use_dynamic_shifting``.

        Raises:
            ValueError: another scheduler, or a configuration that cannot be coupled, with the reason; or an argument out of
                range.
        """
        return cls(**scheduler_columns(scheduler, num_inference_steps, variance, stochasticity, eta, mu))
