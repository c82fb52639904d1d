"""The checks: plain functions that return {name: p-value}. pytest asserts on them, the mutation gate reuses them.

How many numbers. Kolmogorov-Smirnov rejects at 1e-6 where the sup distance of the distribution functions exceeds
2.7 / sqrt(n); to fall short of that with probability below 1e-6 too, the true distance must be twice that:
n >= 29 / distance².
The weakest biases that have to be seen, at |delta| = 1.5, where 55 % of the drafts are rejected:

- 5 % of rejections leaked: 2.7 % of the mass moves across delta / 2, a distance of 0.027: n >= 4e4.
- std off by 3 % on the 55 % of steps that verification settles: |z|² of D = 6 scales by 1.06 there, a distance of
  0.55 * 0.06 * max(x f(x)) = 0.55 * 0.06 * 0.69 = 0.023: n >= 5.5e4. Its sum of squares has a relative error of
  sqrt(2 / (6 n)) against a bias of 0.033: 10 errors at n = 3.1e4.

Hence ONE_STEP = 1e5 rows of one step, and chains of n samples with n * (S - 1) >= 7e4 innovations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import free
from free.drafters import Drafter, LastWindow, Situation, StepDrafter
from free.drafters.base import walk
from free_kernels import LATENT_STREAM, NOISE_STREAM, TEST_STREAM, anchor_index, normal, posterior, uniform, verify
from tests.analytic import GaussianTarget, MixtureTarget, ShiftedModel, turning_direction
from tests.featured import WIDTH, FeaturedTarget, feature_drafter
from tests.statistical import laws
from tests.statistical.laws import bonferroni, chi2_p, normal_p, spearman_p, spread_p, success_p, unit

ONE_STEP = 100_000
DIM = 6

PValues = dict[str, float]


# ---------------------------------------------------------------------------------------------------------- streams


def streams() -> PValues:
    """The noise, the tests' uniforms and the latents: laws, and independence across elements, steps, seeds and streams."""
    seed = torch.arange(ONE_STEP) + 2**41
    step = torch.arange(3)
    noise = normal(seed[:, None], step, DIM, stream=NOISE_STREAM)  # [B, 3, D]
    test = uniform(seed[:, None], step, stream=TEST_STREAM)  # [B, 3]
    latent = normal(seed, torch.zeros_like(seed), DIM, stream=LATENT_STREAM)
    first = noise[:, 0]

    def against_test(values: torch.Tensor) -> float:
        return spearman_p(test[:, 0], values)

    return {
        "u: uniform": laws.uniform_p(test[:, 0]),
        "z: normal": bonferroni([normal_p(column) for column in first.T]),
        "z: |z|²": chi2_p(first.double().square().sum(-1), DIM),
        "latents: normal": bonferroni([normal_p(column) for column in latent.T]),
        "u against z": bonferroni([against_test(column) for column in first.T]),
        "u against |z| of one element": bonferroni([against_test(column.abs()) for column in first.T]),
        "u against |z|²": against_test(first.square().sum(-1)),
        "u against z of the next step": bonferroni([against_test(column) for column in noise[:, 1].T]),
        "u against u of the next step": against_test(test[:, 1]),
        "u against latents": bonferroni([against_test(column) for column in latent.T]),
        "z against z of the next step": _independent_p(first, noise[:, 1]),
        "z against z two steps on": _independent_p(first, noise[:, 2]),
        "z against latents": _independent_p(first, latent),
        "z against z of the next seed": _independent_p(first[:-1], first[1:]),
        "elements of z": laws.moments_p(first)["x_i x_j"],
    }


def _independent_p(first: torch.Tensor, second: torch.Tensor) -> float:
    """The second along the first is N(0, 1), and so is the product of each pair of elements in the mean."""
    first, second = first.double(), second.double()
    products = first.T @ second / len(first) ** 0.5
    pairs = [laws.z_score_p(float(value)) for value in products.flatten()]
    return bonferroni([normal_p((unit(first) * second).sum(-1)), bonferroni(pairs)])


# --------------------------------------------------------------------------------------------------------- one step


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
    step = torch.randint(0, process.num_steps - 2, (ONE_STEP,), generator=generator).to(device)
    seeds = torch.arange(ONE_STEP, device=device) + seed * 2**40
    state, both = random(ONE_STEP, DIM), torch.stack((step, step + 1), 1)
    columns = {name: getattr(table, name)[both][..., None] for name in table._fields[:-1]}  # [B, 2, 1]

    # a gap of 1.5, part of it along one axis in all rows (to see that axis's noise) and part of it the row's own
    gap = 1.5 * unit(random(ONE_STEP, DIM) + torch.linspace(2.0, 0.0, DIM, device=device))
    if form == "clipped":
        # 2.4 before clamping is about 1.5 after it
        target_x0 = 0.8 * random(ONE_STEP, 2, DIM)
        draft_x0 = target_x0[:, 0] + 1.6 * gap * columns["std"][:, 0] / columns["clip_x0_coef"][:, 0]
        x0_state_coef, x0_model_coef = columns["x0_state_coef"], columns["x0_model_coef"]
        draft_output = (draft_x0 - x0_state_coef[:, 0] * state) / x0_model_coef[:, 0]
        output = (target_x0 - x0_state_coef * state[:, None]) / x0_model_coef
    else:
        output = random(ONE_STEP, 2, DIM)
        draft_output = output[:, 0] + gap * columns["std"][:, 0] / columns["model_coef"][:, 0]
    guidance_scale, conditional, unconditional = 1.0, output, None
    if form == "guided":
        guidance_scale, unconditional = 2.5, random(ONE_STEP, 2, DIM)
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


# ----------------------------------------------------------------------------------------------------- whole chains


class LeaningDrafter(StepDrafter):
    """A legal draft that leans on the anchor as hard as it can: |delta| = 1.5 from here towards the anchor's state.

    An anchor at step k+1 lies where the noise of step k threw it, and this draft would point along that noise.
    """

    name = "leaning"

    def __init__(self, model: Callable[..., torch.Tensor], norm: float = 1.5) -> None:
        self.model, self.norm = model, norm

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process = situation.process
        towards = situation.anchor(step).state - state
        towards = torch.where(towards.norm(dim=-1, keepdim=True) > 1e-6, towards, turning_direction(state))
        scale = (process.std / process.model_coef)[step][:, None]
        return self.model(state, process.timestep[step], **situation.conditioning) + self.norm * scale * unit(towards)


class RememberingDrafter(free.Gains):
    """A legal draft that leans on its memory as hard as it can: |delta| = 1.5 along the numbers that lately moved most.

    An evaluation at step k+1 was moved by the noise of step k; a memory that has absorbed it would show where.
    """

    name = "remembering"
    forgetting = (0.5, 0.5)

    def __init__(self, model: Callable[..., torch.Tensor], norm: float = 1.5) -> None:
        self.model, self.norm = model, norm

    def propose(self, situation: Situation) -> Any:
        return walk(situation, lambda state, step: self.draft(state, step, situation))

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        process, last = situation.process, situation.last
        column = anchor_index(step[:, None], last.step, last.length)[:, 0]
        answered, unanswered = situation.memory.sums[torch.arange(len(step)), column, 1].unbind(1)  # of neighbours
        moved = answered + process.noise_ratio[step][:, None] * unanswered
        moved = torch.where(moved.norm(dim=-1, keepdim=True) > 1e-6, moved, turning_direction(state))
        scale = (process.std / process.model_coef)[step][:, None]
        return self.model(state, process.timestep[step], **situation.conditioning) + self.norm * scale * unit(moved)


class Recorder(Drafter):
    """Drafts as another drafter does, and remembers each round's start and draft outputs."""

    def __init__(self, drafter: Any) -> None:
        self.drafter = free.as_drafter(drafter)
        self.name, self.needs_features = self.drafter.name, self.drafter.needs_features
        self.rounds: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def check(self, target: free.Target) -> None:
        self.drafter.check(target)

    def begin(self, last: LastWindow, sample_shape: tuple[int, ...]) -> Any:
        return self.drafter.begin(last, sample_shape)

    def remember(self, situation: Situation, window: LastWindow) -> Any:
        return self.drafter.remember(situation, window)

    def propose(self, situation: Situation) -> Any:
        proposal = self.drafter.propose(situation)
        self.rounds.append((situation.seed, situation.step, proposal.draft_output))
        return proposal


@dataclass
class Chain:
    """n chains of S steps, seen from outside: noise recovered from the states, and how each step was settled. float64."""

    process: free.ReverseProcess
    output: free.SamplingOutput
    window: int
    innovation: torch.Tensor
    """[n, S-1, D]: (x[k+1] - target_mean(x[k])) / std[k]; iid N(0, I) for an exact sampler. The last step has no noise, and
    where a step in mid-chain has none, this and what follows leave it out."""
    last_error: torch.Tensor
    """[n, D]: x[S] - target_mean(x[S-1])."""
    delta: torch.Tensor
    """[n, S-1, D] of the draft that was tested; zeros where none was."""
    tested: torch.Tensor
    """bool [n, S-1]: settled by a test, not as the exact last step of a window."""
    accepted: torch.Tensor
    """bool [n, S-1]."""
    redrafted: torch.Tensor
    """bool [n, S-1]: tested just after a rejection, with noise that an abandoned path has seen."""


@dataclass(frozen=True)
class Case:
    """One configuration of :func:`free.speculative_sample`."""

    target: str
    drafter: str
    window: int
    samples: int = 10_000
    steps: int = 10
    guidance_scale: float = 1.0
    clip: float | None = None
    seed: int = 1
    shape: tuple[int, ...] = (DIM,)
    """Of one sample, as the sampler and the drafter see it; the checks see it flattened."""
    quiet: int | None = None
    """A step in mid-chain that has no noise."""


def make_target(case: Case) -> Any:
    if case.target == "gaussian":
        return GaussianTarget.example(DIM)
    return MixtureTarget.example(DIM, ill_conditioned=case.target == "ill-conditioned")


def center(samples: int) -> torch.Tensor:
    """The conditioning of guided cases: all rows alike, so that the sample has one closed-form law."""
    return torch.linspace(0.6, -0.4, DIM).expand(samples, DIM)


def make_process(case: Case) -> free.ReverseProcess:
    if case.quiet is not None:
        process = free.ReverseProcess.ddpm(case.steps)
        std = process.std.clone()
        std[case.quiet] = 0
        return dataclasses.replace(process, std=std)
    if case.clip is None:
        return free.ReverseProcess.ddpm(case.steps)
    return free.ReverseProcess.ddpm(case.steps, clip_sample=True, clip_sample_range=case.clip)


def random_linear(case: Case) -> free.LinearDrafter:
    """A linear drafter that fits the case and nothing else: coefficients at random, beyond 0 and 1 too."""
    generator = torch.Generator().manual_seed(case.seed)
    bands = 4 if len(case.shape) == 3 else 1
    weight = 1.8 * torch.rand(case.steps, 3, bands, generator=generator) - 0.4
    return free.LinearDrafter(weight, make_process(case).timestep, case.shape, gap_edges=(1, 3))


@functools.cache
def trained_drafter(target: str, steps: int) -> free.FeatureDrafter:
    """A FeatureDrafter after a few dozen rounds of training on what its own windows visit."""
    from free.training.examples import VisitedWindows
    from free.training.loss import drafter_loss

    torch.manual_seed(0)
    featured, process = FeaturedTarget(make_target(Case(target, "", 8))), free.ReverseProcess.ddpm(steps)
    drafter = free.FeatureDrafter(1, WIDTH, DIM, 1, 1)
    visited = VisitedWindows(featured, process, 1.0, window=8, pool=64)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    for _ in range(150):
        examples = visited.draw(drafter, lambda: torch.randn(64, DIM, 1, 1), torch.zeros(64, dtype=torch.int64))
        optimizer.zero_grad()
        drafter_loss(drafter, examples)["loss"].backward()
        optimizer.step()
    return drafter.eval()


def shaped(model: Any, shape: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    """A model of samples [DIM] as one of samples of ``shape``."""

    def reshaped(x: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        return model(x.flatten(1), timestep, **conditioning).unflatten(1, shape)

    return reshaped


def run_chain(case: Case, impl: str = "reference", device: str = "cpu") -> Chain:
    """Samples, and reconstructs what an exact sampler would have done with unknown noise."""
    model, process = make_target(case), make_process(case)
    guided = case.guidance_scale != 1.0
    drafter = {
        "shifted": lambda: ShiftedModel(model, process),
        "leaning": lambda: LeaningDrafter(model),
        "remembering": lambda: RememberingDrafter(model),
        "linear": lambda: random_linear(case),
        "feature, untrained, one sweep": lambda: feature_drafter("hold-x0", 1),
        "feature, untrained, two sweeps": lambda: feature_drafter(None, 2),
        "feature, untrained, walking": lambda: feature_drafter("hold-x0", 0),
        "the paper's, untrained": lambda: feature_drafter(None, 0),
        "feature, trained": lambda: trained_drafter(case.target, case.steps),
        "fresh hold-x0": lambda: free.Fresh(free.HoldX0()),
        "fresh gains": lambda: free.Fresh(free.Gains()),
    }.get(case.drafter)
    conditioning = {"center": center(case.samples).to(device)} if guided else {}
    if guided and case.drafter == "shifted":
        # the bad model is guided as the target is; one standard deviation of the guided output stays one
        drafted = ShiftedModel(model, process)
        recorder = Recorder(free.ModelDrafter(free.as_target(drafted, null_conditioning={"center": torch.zeros(DIM)})))
    else:
        recorder = Recorder(case.drafter if drafter is None else drafter())
    sampled = model if case.shape == (DIM,) else shaped(model, case.shape)
    if recorder.needs_features:
        sampled = FeaturedTarget(model)
    target = free.as_target(sampled, null_conditioning={"center": torch.zeros(DIM)}) if guided else free.as_target(sampled)
    base = case.seed * 2**32
    seeds = torch.arange(case.samples, device=device) + base
    output = free.speculative_sample(
        target,
        recorder,
        conditioning=conditioning,
        process=process,
        guidance_scale=case.guidance_scale,
        window=case.window,
        seed=seeds.tolist(),
        latents=normal(seeds, torch.zeros_like(seeds), DIM, stream=LATENT_STREAM).unflatten(1, case.shape),
        impl=impl,
        return_trajectory=True,
    )
    assert output.trajectory is not None
    output.samples, output.trajectory = output.samples.flatten(1), output.trajectory.flatten(2)
    trajectory = output.trajectory.double()
    count, last = case.samples, process.num_steps - 1

    target_output = torch.empty(count, last + 1, DIM, dtype=torch.float64, device=device)
    for k in range(last + 1):
        timestep = process.timestep[k].expand(count).to(device)
        target_output[:, k] = model(trajectory[:, k], timestep, **conditioning)
        if guided:
            null = model(trajectory[:, k], timestep)
            target_output[:, k] = null + case.guidance_scale * (target_output[:, k] - null)
    steps = torch.arange(last + 1, device=device).expand(count, last + 1)
    mean = exact_mean(process, steps, trajectory[:, :-1], target_output)
    error = trajectory[:, 1:] - mean

    draft_output, tested, accepted = _settled_drafts(recorder, process, case, base, device)
    std = process.std.to(device)[:last].double()[:, None]
    drafted_mean = exact_mean(process, steps[:, :last], trajectory[:, :last], draft_output)
    delta = torch.where(tested[..., None], (drafted_mean - mean[:, :last]) / std, 0.0)
    redrafted = torch.zeros_like(tested)
    redrafted[:, 1:] = tested[:, 1:] & tested[:, :-1] & ~accepted[:, :-1]
    noisy = std[:, 0] > 0
    by_step = ((error[:, :last] / std)[:, noisy], delta[:, noisy], tested[:, noisy], accepted[:, noisy], redrafted[:, noisy])
    return Chain(process, output, case.window, by_step[0], error[:, last], *by_step[1:])


def _settled_drafts(
    recorder: Recorder, process: free.ReverseProcess, case: Case, base: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The draft output [n, S-1, D] that each step was tested with, whether it was tested, and whether it was accepted.

    A round settles the steps up to where the same sample's next round begins; it ended in a rejection iff it settled
    fewer steps than its window had. All of this is known before the noise of the step is looked at.
    """
    count, last = case.samples, process.num_steps - 1
    draft_output = torch.zeros(count, last, DIM, dtype=torch.float64, device=device)
    tested = torch.zeros(count, last, dtype=torch.bool, device=device)
    accepted = torch.zeros_like(tested)
    following = torch.full((count,), last + 1, device=device)
    for seed, start, drafted in reversed(recorder.rounds):
        row = seed - base
        advance = following[row] - start
        following[row] = start
        length = (process.exact_step.to(device)[start] - start + 1).clamp(max=min(case.window, last + 1))
        for j in range(drafted.shape[1]):
            ends_here = advance == j + 1
            was_tested = (j < advance) & (j < length - 1)
            at, step = row[was_tested], (start + j)[was_tested]
            draft_output[at, step] = drafted[was_tested, j].double()
            tested[at, step] = True
            accepted[at, step] = ~ends_here[was_tested]
    return draft_output, tested, accepted


def innovations(chain: Chain) -> PValues:
    """The sharpest test of a chain: given the past, each innovation is N(0, I), and so is its component along any direction
    that the past determines, such as that of the draft which the step was tested with. Hence they are iid, over steps too.
    """
    z, tested = chain.innovation, chain.tested
    norm = chain.delta.norm(dim=-1)
    moved = tested & (norm > 1e-6)
    direction = unit(chain.delta[moved])
    along = torch.zeros_like(norm)
    along[moved] = (z[moved] * direction).sum(-1)
    previous = torch.cat((chain.output.trajectory[:, :1].double(), z[:, :-1]), 1)  # the initial state comes before all
    both = moved[:, 1:] & moved[:, :-1]
    far = moved & (norm > 1)
    probability = laws.acceptance_probability(norm)
    result = {
        "along delta": normal_p(along[moved]),
        "along delta, |delta| > 1": normal_p(along[far]),
        "along delta, redrafted": normal_p(along[chain.redrafted & moved]),
        "orthogonal to delta": normal_p((z[moved] * laws.orthogonal_to(direction)).sum(-1)),
        "|z|²": chi2_p(z.square().sum(-1), DIM),
        "|z|², redrafted": chi2_p(z[chain.redrafted].square().sum(-1), DIM),
        "sum of |z|²": spread_p(z),
        "along the last z": normal_p((z * unit(previous)).sum(-1)),
        "along delta, by the last one's sign": normal_p((along[:, 1:] * along[:, :-1].sign())[both]),
        "acceptance, eq. 40": success_p(chain.accepted[tested], probability[tested]),
        "acceptance, eq. 40, redrafted": success_p(chain.accepted[chain.redrafted], probability[chain.redrafted]),
    }
    after_accepted = torch.zeros_like(tested)
    after_accepted[:, 1:] = tested[:, 1:] & chain.accepted[:, :-1]
    if int(after_accepted.sum()) > 1000:
        result["acceptance, eq. 40, after an accepted step"] = success_p(
            chain.accepted[after_accepted], probability[after_accepted]
        )
    return result


def closed_form(chain: Chain, case: Case) -> PValues:
    """Moments of the samples of a Gaussian target, whitened by the closed form."""
    row = center(1)[0] if case.guidance_scale != 1.0 else None
    mean, covariance = make_target(case).chain_moments(chain.process, row, case.guidance_scale)
    samples = chain.output.samples.double().cpu()
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (samples - mean).T, upper=False).T
    return {f"sample: {name}": value for name, value in laws.moments_p(whitened).items()}


def against_ancestral(chain: Chain, case: Case) -> PValues:
    """Two-sample tests against the ancestral sampler, where there is no closed form: at the sample and halfway."""
    ancestral = free.ancestral_sample(
        free.as_target(make_target(case)),
        process=chain.process,
        shape=(DIM,),
        seed=list(range(case.samples)),
        return_trajectory=True,
        impl="reference",
    )
    assert ancestral.trajectory is not None
    assert chain.output.trajectory is not None
    result = {}
    for name, k in (("halfway", chain.process.num_steps // 2), ("sample", chain.process.num_steps)):
        ours, theirs = chain.output.trajectory[:, k].double().cpu(), ancestral.trajectory[:, k].double()
        # where the drafts of the second half were off on average: a bias of the coupling shows there
        along = unit(chain.delta[:, chain.delta.shape[1] // 2 :].mean((0, 1)).cpu())
        across = laws.orthogonal_to(along)
        result |= {
            f"{name}: along mean delta": laws.two_sample_p(ours @ along, theirs @ along),
            f"{name}: orthogonal": laws.two_sample_p(ours @ across, theirs @ across),
            f"{name}: |x|²": laws.two_sample_p(ours.square().sum(-1), theirs.square().sum(-1)),
            f"{name}: axes": bonferroni([laws.two_sample_p(ours[:, i], theirs[:, i]) for i in range(DIM)]),
        }
    return result


CASES: dict[str, Case] = {
    "gaussian, shifted, W=2": Case("gaussian", "shifted", 2),
    "gaussian, shifted, W=4": Case("gaussian", "shifted", 4, seed=2),
    "gaussian, shifted, W=8, guided": Case("gaussian", "shifted", 8, guidance_scale=1.5, seed=3),
    "gaussian, leaning, W=4": Case("gaussian", "leaning", 4, seed=4),
    "gaussian, hold-x0, W=8": Case("gaussian", "hold-x0", 8, seed=5),
    "gaussian, hold-output, W=4": Case("gaussian", "hold-output", 4, seed=6),
    "gaussian, hold-x0, W=4, guided": Case("gaussian", "hold-x0", 4, guidance_scale=2.0, seed=7),
    "mixture, hold-x0, W=4": Case("mixture", "hold-x0", 4, steps=20, samples=6000, seed=8),
    "mixture, hold-output, W=8": Case("mixture", "hold-output", 8, seed=9),
    "ill-conditioned, hold-x0, W=8": Case("ill-conditioned", "hold-x0", 8, seed=10),
    "ill-conditioned, shifted, W=4": Case("ill-conditioned", "shifted", 4, seed=11),
    "mixture, hold-x0, W=4, clipped": Case("mixture", "hold-x0", 4, clip=0.8, seed=12),
    "mixture, shifted, W=8, clipped": Case("mixture", "shifted", 8, clip=0.8, seed=13),
    "gaussian, gains, W=4": Case("gaussian", "gains", 4, seed=40),
    "gaussian, remembering, W=4": Case("gaussian", "remembering", 4, seed=46),
    "gaussian, gains, W=8, guided": Case("gaussian", "gains", 8, guidance_scale=2.0, seed=41),
    "gaussian, gains, W=8, a step without noise": Case("gaussian", "gains", 8, seed=42, steps=12, quiet=6),
    "gaussian, fresh gains, W=4": Case("gaussian", "fresh gains", 4, seed=43),
    "mixture, gains, W=8, clipped": Case("mixture", "gains", 8, clip=0.8, seed=44),
    "ill-conditioned, gains, W=8": Case("ill-conditioned", "gains", 8, steps=20, samples=6000, seed=45),
    "gaussian, linear, W=4": Case("gaussian", "linear", 4, seed=14, shape=(1, 2, 3)),
    "gaussian, linear, W=8, guided": Case("gaussian", "linear", 8, guidance_scale=2.0, seed=15),
    "mixture, linear, W=8, clipped": Case("mixture", "linear", 8, clip=0.8, seed=16, shape=(1, 3, 2)),
    **{
        f"{target}, {drafter}, W={window}{', clipped' if clip else ''}": Case(
            target, drafter, window, clip=clip, seed=17 + i, shape=FeaturedTarget.sample_shape
        )
        for i, (target, drafter, window, clip) in enumerate(
            (
                ("gaussian", "feature, untrained, one sweep", 4, None),
                ("mixture", "feature, untrained, two sweeps", 8, 0.8),
                ("gaussian", "feature, untrained, walking", 4, None),
                ("gaussian", "the paper's, untrained", 4, None),
                ("ill-conditioned", "feature, trained", 8, None),
                ("gaussian", "fresh hold-x0", 4, None),
            )
        )
    },
}


def chain(name: str, impl: str = "reference", device: str = "cpu") -> PValues:
    """All that is tested of one case."""
    case = CASES[name]
    run = run_chain(case, impl, device)
    end = closed_form(run, case) if case.target == "gaussian" and case.clip is None else against_ancestral(run, case)
    return innovations(run) | end


CHECKS: dict[str, Callable[[], PValues]] = {
    "streams": streams,
    **{f"one step, {form}": functools.partial(one_step, form) for form in ("plain", "guided", "clipped")},
    **{f"chain: {name}": functools.partial(chain, name) for name in CASES},
}
