"""Targets whose chains are known in closed form, or whose arithmetic is the same in every batch.

Each is a plain callable ``model(x, timestep, ...) -> epsilon`` for :func:`free.as_target`, and computes in the dtype of x:
the sampler evaluates it in float32, the tests in float64.
"""

from __future__ import annotations

import torch

from free import ReverseProcess


def signal_level(timestep: torch.Tensor) -> torch.Tensor:
    """alpha-bar of the original DiT's schedule (1000 linear betas), float64, written without the package."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=timestep.device)
    return (1 - betas).cumprod(0)[timestep]


def rotation(dim: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q


class GaussianTarget:
    """The exact epsilon network of N(mean, covariance) data: linear in x, so every state of the chain is Gaussian.

    ``center`` [N, D], if given, is added to the mean, row by row: conditioning, for guidance.
    """

    def __init__(self, mean: torch.Tensor, eigenvalues: torch.Tensor, basis: torch.Tensor) -> None:
        self.mean = mean.double()
        self.eigenvalues = eigenvalues.double()
        self.basis = basis.double()
        """Columns are the eigenvectors of the covariance."""

    @classmethod
    def example(cls, dim: int = 6, smallest: float = 0.01) -> GaussianTarget:
        """Variances from ``smallest`` to 1.5 along oblique axes."""
        return cls(torch.linspace(-1.0, 0.8, dim), torch.logspace(-2, 0.2, dim).clamp(min=smallest), rotation(dim, 5))

    def linear(self, timestep: int, center: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``gain`` [D, D] and ``offset`` [D], float64: the output is ``gain @ x + offset``."""
        signal = signal_level(torch.tensor(timestep))
        gain = self.basis @ torch.diag((1 - signal).sqrt() / (signal * self.eigenvalues + 1 - signal)) @ self.basis.T
        mean = self.mean if center is None else self.mean + center.double()
        return gain, -gain @ (signal.sqrt() * mean)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
        signal = signal_level(timestep)[:, None]
        basis, mean, eigenvalues = (value.to(x) for value in (self.basis, self.mean, self.eigenvalues))
        if center is not None:
            mean = mean + center.to(x)
        scale = ((1 - signal).sqrt() / (signal * eigenvalues + 1 - signal)).to(x)
        return ((x - signal.sqrt().to(x) * mean) @ basis * scale) @ basis.T

    def chain_moments(
        self, process: ReverseProcess, center: torch.Tensor | None = None, guidance_scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [D] and covariance [D, D] of the ancestral sampler's sample, by recursion over the table, float64.

        The recursion is of the state and the x0 estimate of the step before, which a process of second order leans on.
        """
        dim = len(self.mean)
        identity, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        mean = torch.zeros(2 * dim, dtype=torch.float64)
        covariance = torch.block_diag(process.initial_std**2 * identity, zero)
        for k in range(process.num_steps):
            timestep = int(process.timestep[k])
            gain, offset = self.linear(timestep, center)
            if guidance_scale != 1.0:
                null_gain, null_offset = self.linear(timestep)
                gain = null_gain + guidance_scale * (gain - null_gain)
                offset = null_offset + guidance_scale * (offset - null_offset)
            state_coef, model_coef, std, x0_state, x0_model = (column[k].double() for column in process.table.columns[:5])
            memory = 0.0 if process.memory is None else process.memory[k].double()
            of_x0 = model_coef / x0_model  # the mean's coefficient of the x0 estimate
            x0, x0_offset = x0_state * identity + x0_model * gain, x0_model * offset
            step = state_coef * identity + model_coef * gain + of_x0 * memory * x0
            joint = torch.cat((torch.cat((step, -of_x0 * memory * identity), 1), torch.cat((x0, zero), 1)))
            moved = torch.cat((model_coef * offset + of_x0 * memory * x0_offset, x0_offset))
            mean = joint @ mean + moved
            covariance = joint @ covariance @ joint.T + torch.block_diag(std**2 * identity, zero)
        return mean[:dim], covariance[:dim, :dim]


class VelocityTarget(GaussianTarget):
    """The same data, and a network that predicts v = (epsilon - sigma x) / alpha."""

    def linear(self, timestep: int, center: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        gain, offset = super().linear(timestep, center)
        signal = signal_level(torch.tensor(timestep))
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        return (gain - (1 - signal).sqrt() * identity) / signal.sqrt(), offset / signal.sqrt()

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
        signal = signal_level(timestep)[:, None]
        epsilon = super().__call__(x, timestep, center)
        return (epsilon - (1 - signal).sqrt().to(x) * x) / signal.sqrt().to(x)


class CliffTarget(GaussianTarget):
    """The same data, and a network that overflows where no chain of its own goes: beyond ``cliff`` on the first axis."""

    cliff = 9.0

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
        return torch.where(x[:, :1] > self.cliff, torch.inf, super().__call__(x, timestep, center))


class MixtureTarget:
    """The exact epsilon network of a mixture of axis-aligned Gaussians."""

    def __init__(self, weights: torch.Tensor, centers: torch.Tensor, variances: torch.Tensor) -> None:
        self.weights, self.centers, self.variances = weights.double(), centers.double(), variances.double()

    @classmethod
    def example(cls, dim: int = 6, ill_conditioned: bool = False) -> MixtureTarget:
        """Three well separated components; ill-conditioned has variances from 1e-4 to 1, so held drafts are poor."""
        generator = torch.Generator().manual_seed(11)
        centers = 1.2 * torch.randn(3, dim, generator=generator)
        if ill_conditioned:
            variances = torch.stack([torch.logspace(-4, 0, dim).roll(i) for i in range(3)])
        else:
            variances = torch.tensor([0.04, 0.1, 0.3])[:, None].expand(3, dim)
        return cls(torch.tensor([0.5, 0.3, 0.2]), centers, variances)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        signal = signal_level(timestep)[:, None, None]  # [N, 1, 1]
        weights, centers, variances = (value.to(x) for value in (self.weights, self.centers, self.variances))
        spread = signal.to(x) * variances + (1 - signal).to(x)  # [N, M, D]
        offset = x[:, None] - signal.sqrt().to(x) * centers
        logits = weights.log() - (offset.square() / spread + spread.log()).sum(-1) / 2
        share = logits.softmax(-1)[..., None]
        return (1 - signal[:, 0]).sqrt().to(x) * (share * offset / spread).sum(1)


class ElementwiseTarget:
    """Products and sums of single elements: an output has the same bits whatever else is in the batch.

    ``scale`` [N, D], if given, is conditioning.
    """

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        level = (timestep.to(x) * 2.0**-10).view(-1, *(1,) * (x.dim() - 1))
        squashed = x.clamp(-3, 3)
        output = squashed * (0.5 + 0.5 * level) + (1 - level) * squashed * squashed * 0.25
        return output if scale is None else output * scale


class ShiftedModel:
    """A bad draft of ``target``: at every state its mean is ``norm`` standard deviations off, in a direction that turns."""

    def __init__(self, target: object, process: ReverseProcess, norm: float = 1.5) -> None:
        self.target, self.norm = target, norm
        ratio = process.std / process.model_coef
        self.shift = torch.zeros(1000).index_put((process.timestep.cpu(),), ratio.cpu())
        """By timestep: what one standard deviation of the step is in the network's output."""

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        shift = self.norm * self.shift.to(x)[timestep][:, None]
        return self.target(x, timestep, **conditioning) + shift * turning_direction(x)


def turning_direction(x: torch.Tensor) -> torch.Tensor:
    """A unit vector for each row, a rough function of the row, on average along the first axes."""
    direction = torch.sin(3 * x.roll(1, -1)) + torch.linspace(1.0, 0.0, x.shape[-1]).to(x)
    return direction / direction.norm(dim=-1, keepdim=True)
