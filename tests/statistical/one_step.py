"""One drafted step under a magnifying glass: the sharpest test of a coupling."""

from __future__ import annotations

import torch

import free
from free_kernels import TEST_STREAM, normal, posterior, uniform, verify
from tests.statistical import laws
from tests.statistical.laws import PValues, bonferroni, chi2_p, normal_p, spearman_p, spread_p, success_p, unit

ROWS = 100_000
DIM = 6


def one_step(form: str = "plain", impl: str = "reference", device: str = "cpu", seed: int = 1) -> PValues:
    """One drafted step with a large gap, then the exact one: the law of both innovations, eq. 40, and u against z.

    Args:
        form: ``"plain"``, ``"guided"`` or ``"clipped"`` (clamped x0 on either side of the bound).
        impl: of the operations.
        device: of the tensors.
        seed: of the rows.
    """
    process = free.ReverseProcess.ddpm(12, clip_sample=form == "clipped", clip_sample_range=0.8)
    table = process.to(device).table
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    # steps of their own, so that a gather by the wrong row shows; neither of the two is the last, which has no noise
    step = torch.randint(0, process.num_steps - 2, (ROWS,), generator=generator).to(device)
    seeds = torch.arange(ROWS, device=device) + seed * 2**40
    state, both = random(ROWS, DIM), torch.stack((step, step + 1), 1)
    columns = {name: getattr(table, name)[both][..., None] for name in table._fields[:7]}  # [B, 2, 1]

    # a gap of 1.5, part of it along one axis in all rows (to see that axis's noise) and part of it the row's own
    gap = 1.5 * unit(random(ROWS, DIM) + torch.linspace(2.0, 0.0, DIM, device=device))
    if form == "clipped":
        # 2.4 before clamping is about 1.5 after it
        target_x0 = 0.8 * random(ROWS, 2, DIM)
        draft_x0 = target_x0[:, 0] + 1.6 * gap * columns["std"][:, 0] / columns["clip_x0_coef"][:, 0]
        x0_state_coef, x0_model_coef = columns["x0_state_coef"], columns["x0_model_coef"]
        draft_output = (draft_x0 - x0_state_coef[:, 0] * state) / x0_model_coef[:, 0]
        output = (target_x0 - x0_state_coef * state[:, None]) / x0_model_coef
    else:
        output = random(ROWS, 2, DIM)
        draft_output = output[:, 0] + gap * columns["std"][:, 0] / columns["model_coef"][:, 0]
    guidance_scale, conditional, unconditional = 1.0, output, None
    if form == "guided":
        guidance_scale, unconditional = 2.5, random(ROWS, 2, DIM)
        conditional = unconditional + (output - unconditional) / guidance_scale

    drafted = posterior(state, draft_output, seeds, step, table, impl=impl)
    states = torch.stack((state, drafted), 1)
    outcome = verify(
        states,
        conditional,
        draft_output[:, None],
        seeds,
        step,
        torch.full_like(step, 2),
        table,
        unconditional_output=unconditional,
        guidance_scale=guidance_scale,
        impl=impl,
    )

    accepted = ~outcome.rejected
    settled = torch.where(accepted[:, None], drafted, outcome.next_state)
    mean = exact_mean(process, both, states, output)
    std = columns["std"].double()
    delta = (exact_mean(process, step, state, draft_output) - mean[:, 0]) / std[:, 0]
    moved = delta.norm(dim=-1) > 1e-3  # a draft clamped as the target is has no direction
    direction = torch.where(moved[:, None], unit(delta), unit(gap).double())
    innovation = (settled - mean[:, 0]) / std[:, 0]
    second = ((outcome.next_state - mean[:, 1]) / std[:, 1])[accepted]
    orthogonal = laws.orthogonal_to(direction)

    u = uniform(seeds, step, stream=TEST_STREAM)
    across = normal(seeds, step, DIM).double()
    across = across - (across * direction).sum(-1, keepdim=True) * direction
    rejected = outcome.rejected

    return {
        "along delta": normal_p((innovation * direction).sum(-1)),
        "along delta, delta to the first axis": normal_p((innovation * direction).sum(-1)[direction[:, 0] > 0.8]),
        "orthogonal to delta": normal_p((innovation * orthogonal).sum(-1)),
        "first axis": normal_p(innovation[:, 0]),
        "|z|²": chi2_p(innovation.square().sum(-1), DIM),
        "sum of |z|²": spread_p(innovation),
        "exact step along the last delta": normal_p((second * direction[accepted]).sum(-1)),
        "exact step along the last z": normal_p((second * unit(innovation[accepted])).sum(-1)),
        "exact step |z|²": chi2_p(second.square().sum(-1), DIM),
        "acceptance, eq. 40": success_p(accepted, laws.acceptance_probability(delta.norm(dim=-1))),
        # what the decision looked at was <z, delta> alone
        "u against |z across delta|², accepted": spearman_p(u[accepted], across[accepted].square().sum(-1)),
        "u against |z across delta|², rejected": spearman_p(u[rejected], across[rejected].square().sum(-1)),
        "u against z across delta, accepted": bonferroni([spearman_p(u[accepted], z) for z in across[accepted].T]),
        "u against z across delta, rejected": bonferroni([spearman_p(u[rejected], z) for z in across[rejected].T]),
    }


def exact_mean(process: free.ReverseProcess, step: torch.Tensor, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Mean of x[k+1] in float64, written from the definition of the table and not with the package's own helper."""

    def column(name: str) -> torch.Tensor:
        return getattr(process, name).to(step.device)[step].double()[..., None]

    state, output = state.double(), output.double()
    if process.clip_range is None:
        return column("state_coef") * state + column("model_coef") * output
    x0 = column("x0_state_coef") * state + column("x0_model_coef") * output
    return column("clip_state_coef") * state + column("clip_x0_coef") * x0.clamp(-process.clip_range, process.clip_range)
