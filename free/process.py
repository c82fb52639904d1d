"""The one table that describes every supported reverse process.

Every sampler here is linear in the state x and in the raw (guided) network output y, with isotropic noise:

    x[k+1] = state_coef[k] * x[k] + model_coef[k] * y[k] + std[k] * z[k],    z ~ N(0, I)

Prediction type, variance, spacing and stochasticity are choices of the constructors; nothing after them knows which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from free_kernels import StepTable

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
VARIANCES = ("posterior", "beta", "geometric")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")

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
        from diffusers import DDPMScheduler

        trained_betas = None
        if isinstance(beta_schedule, torch.Tensor):
            trained_betas = _check_betas(beta_schedule, num_train_timesteps)
            num_train_timesteps = len(trained_betas)
        elif beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is {beta_schedule!r}; known are {_known(BETA_SCHEDULES)} or a tensor of betas")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; known are {_known(PREDICTION_TYPES)}")
        if timestep_spacing not in TIMESTEP_SPACINGS:
            raise ValueError(f"timestep_spacing is {timestep_spacing!r}; known are {_known(TIMESTEP_SPACINGS)}")
        scheduler = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule if trained_betas is None else "linear",
            trained_betas=trained_betas,
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
        from diffusers import DDIMScheduler, DDPMScheduler

        if not isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
            raise ValueError(
                f"scheduler is a {type(scheduler).__name__}; allowed are DDPMScheduler and DDIMScheduler "
                "(DDPMScheduler.from_config(scheduler.config) often serves), or a ReverseProcess with columns of your own"
            )
        config = scheduler.config
        if config.thresholding:
            raise ValueError(
                "scheduler has thresholding=True: dynamic thresholding is not a Gaussian step that can be coupled; "
                "use clip_sample=True with a clip_sample_range instead"
            )
        if variance is None:
            variance = _scheduler_variance(config)
        if not isinstance(variance, torch.Tensor) and variance not in VARIANCES:
            raise ValueError(f"variance is {variance!r}; known are {_known(VARIANCES)} or a tensor of variances")
        steps = _check_count("num_inference_steps", num_inference_steps, config.num_train_timesteps)
        _check_noise_level(stochasticity, eta, variance)

        # a scheduler of our own: set_timesteps would change the user's
        # (from_config would forget what was given to the scheduler by position: diffusers counts it as a default)
        values = {name: value for name, value in config.items() if name != "_use_default_values"}
        scheduler = DDPMScheduler.from_config(values, variance_type="fixed_small")
        scheduler.set_timesteps(steps)
        timestep = scheduler.timesteps.clone()
        if timestep.max() >= config.num_train_timesteps:
            raise ValueError(
                f"steps_offset is {config.steps_offset}: the first timestep would be {int(timestep.max())}, "
                f"beyond the {config.num_train_timesteps} trained ones"
            )
        return cls(
            timestep=timestep,
            clip_range=float(config.clip_sample_range) if config.clip_sample else None,
            **_ddpm_columns(scheduler.betas.double(), timestep, config.prediction_type, variance, stochasticity, eta),
        )


def _ddpm_columns(
    betas: torch.Tensor,
    timestep: torch.Tensor,
    prediction_type: str,
    variance: str | torch.Tensor,
    stochasticity: float,
    eta: float | None,
) -> dict[str, torch.Tensor]:
    """All columns in float64, from the cumulative alphas at each timestep and at the one after it in sampling order."""
    signal = (1 - betas).cumprod(0)[timestep]  # alpha-bar of x[k], [S]
    next_signal = torch.cat((signal[1:], signal.new_ones(1)))  # of x[k+1]; the last step ends at the data
    alpha = signal / next_signal
    beta = 1 - alpha

    posterior = beta * (1 - next_signal) / (1 - signal)
    if isinstance(variance, torch.Tensor):
        std = _check_variance(variance, len(timestep)).sqrt()
    else:
        std = {"posterior": posterior, "beta": beta, "geometric": (posterior * beta).sqrt()}[variance].sqrt()
        std = torch.where(timestep > 0, std, 0.0)  # as DDPMScheduler.step: no noise on the way to timestep -1 from 0

    # the mean in terms of the state and of x0
    if eta is None:
        std = stochasticity * std
        # the noise estimate is (x - sqrt(signal) x0) / sqrt(1 - signal); DDPM's mean takes it off x / sqrt(alpha)
        drift = (1 + stochasticity**2) / 2 * beta / (alpha.sqrt() * (1 - signal))
        clip_state_coef = alpha.rsqrt() - drift
        clip_x0_coef = drift * signal.sqrt()
        if stochasticity == 1:
            # the same numbers without the division by a small alpha
            clip_state_coef = alpha.sqrt() * (1 - next_signal) / (1 - signal)
            clip_x0_coef = next_signal.sqrt() * beta / (1 - signal)
    else:
        std = eta * posterior.clamp(min=0).sqrt()
        clip_state_coef = ((1 - next_signal - std**2).clamp(min=0) / (1 - signal)).sqrt()
        clip_x0_coef = next_signal.sqrt() - signal.sqrt() * clip_state_coef

    x0_state_coef, x0_model_coef = {
        "epsilon": (signal.rsqrt(), -((1 - signal) / signal).sqrt()),
        "v_prediction": (signal.sqrt(), -(1 - signal).sqrt()),
        "sample": (torch.zeros_like(signal), torch.ones_like(signal)),
    }[prediction_type]
    return {
        "state_coef": clip_state_coef + clip_x0_coef * x0_state_coef,
        "model_coef": clip_x0_coef * x0_model_coef,
        "std": std,
        "x0_state_coef": x0_state_coef,
        "x0_model_coef": x0_model_coef,
        "clip_state_coef": clip_state_coef,
        "clip_x0_coef": clip_x0_coef,
        # the last posterior variance is 0: its logarithm is cut off where diffusers does it
        "log_variance_range": torch.stack((posterior, beta), -1).clamp(min=1e-20).log(),
    }


def _scheduler_variance(config: Any) -> str:
    """The named variance of a scheduler's ``variance_type``; DDIM has none and takes the posterior's."""
    variance_type = config.get("variance_type", "fixed_small")
    if variance_type.startswith("learned"):
        raise ValueError(
            f"scheduler has variance_type={variance_type!r}: draft and target must share a fixed std; give "
            f"variance={_known(VARIANCES)} or a tensor of variances ('geometric' is the middle of a learned range)"
        )
    return "beta" if variance_type.startswith("fixed_large") else "posterior"


def _check_betas(betas: torch.Tensor, num_train_timesteps: int) -> list[float]:
    if betas.dim() != 1 or not len(betas) or not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(
            f"beta_schedule is a tensor of shape {tuple(betas.shape)}; allowed are one dimension and betas in (0, 1]"
        )
    if num_train_timesteps not in (1000, len(betas)):
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; beta_schedule holds {len(betas)} betas")
    return betas.double().tolist()


def _check_variance(variance: torch.Tensor, num_steps: int) -> torch.Tensor:
    if variance.shape != (num_steps,):
        raise ValueError(f"variance has shape {tuple(variance.shape)}; allowed is ({num_steps},), one for each step")
    variance = variance.detach().cpu().double()
    if not bool((torch.isfinite(variance) & (variance >= 0)).all()):
        raise ValueError("variance holds a value that is negative or not finite; allowed is 0 or more")
    return variance


def _check_count(name: str, count: int, most: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ValueError(f"{name} is {count!r}; allowed is an int, 1 … {most}")
    if not 1 <= count <= most:
        raise ValueError(f"{name} is {count}; allowed is 1 … {most}, the steps that the process has")
    return count


def _check_noise_level(stochasticity: float, eta: float | None, variance: str | torch.Tensor) -> None:
    if not 0 <= stochasticity < float("inf"):
        raise ValueError(f"stochasticity is {stochasticity}; allowed is 0 or more")
    if eta is None:
        return
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; allowed is 0 … 1")
    if stochasticity != 1:
        raise ValueError(f"stochasticity is {stochasticity} and eta is {eta}; give one of them")
    if not isinstance(variance, str) or variance != "posterior":
        raise ValueError(f"eta is {eta} with variance {variance!r}; eta scales the posterior variance, leave variance out")


def _known(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
