"""Whole chains, seen from outside: what a run says of its noise, and what must be true of it if the law is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import free
from free.drafters import Drafter, LastWindow, Situation
from free_kernels import LATENT_STREAM, normal
from tests.featured import FeaturedTarget
from tests.statistical import laws
from tests.statistical.cases import (
    CASES,
    DIM,
    Case,
    centers,
    make_drafter,
    make_process,
    make_relaxation,
    make_target,
    shaped,
)
from tests.statistical.laws import PValues, bonferroni, chi2_p, normal_p, spread_p, success_p, unit
from tests.statistical.one_step import exact_mean


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
    """n chains of S steps, seen from outside: noise recovered from the states, and how each step was settled. float64.

    T of the steps have noise: all but the last, and those whose variance was given as 0.
    """

    process: free.ReverseProcess
    trajectory: torch.Tensor
    """[n, S+1, D]."""
    stats: list[free.SamplingStatistics]
    """Of each call."""
    innovation: torch.Tensor
    """[n, T, D]: (x[k+1] - target_mean(x[k])) / std[k]; iid N(0, I) for an exact sampler."""
    noiseless_error: torch.Tensor
    """[n, S-T, D]: x[k+1] - target_mean(x[k]) of the others."""
    delta: torch.Tensor
    """[n, T, D] of the draft that was tested; zeros where none was."""
    tested: torch.Tensor
    """bool [n, T]: settled by a test, not as the exact last step of a window."""
    accepted: torch.Tensor
    """bool [n, T]."""
    redrafted: torch.Tensor
    """bool [n, T]: tested just after a rejection, with noise that an abandoned path has seen."""


def run_chain(case: Case, impl: str = "reference", device: str = "cpu") -> Chain:
    """Samples, and reconstructs what an exact sampler would have done with unknown noise."""
    model, process = make_target(case), make_process(case)
    count, last, base = case.samples, case.steps - 1, case.seed * 2**32
    guided, conditions = case.guidance_scale != 1.0, centers(case)
    conditioning = {}
    if conditions is not None:
        conditioning["center"] = conditions[torch.arange(count) % len(conditions)].to(device)
    recorder = Recorder(make_drafter(case, model, process, device))
    sampled = model if case.shape == (DIM,) else shaped(model, case.shape)
    if recorder.needs_features:
        sampled = FeaturedTarget(model)
    target = free.as_target(sampled, null_conditioning={"center": torch.zeros(DIM)}) if guided else free.as_target(sampled)
    outputs = []
    for rows in torch.arange(count).chunk(case.calls):
        seeds = (rows + base).to(device)
        # a callable does not say where it is: on a GPU the latents do
        latents = normal(seeds, torch.zeros_like(seeds), DIM, stream=LATENT_STREAM).unflatten(1, case.shape)
        outputs.append(
            free.speculative_sample(
                target,
                recorder,
                conditioning={name: values[rows] for name, values in conditioning.items()},
                process=process,
                guidance_scale=case.guidance_scale,
                window=case.window,
                relaxation=make_relaxation(case),
                seed=seeds.tolist(),
                shape=case.shape,
                latents=None if device == "cpu" else latents,
                impl=impl,
                return_trajectory=True,
            )
        )
    trajectory = torch.cat([output.trajectory for output in outputs]).flatten(2).double()

    target_output = torch.empty(count, last + 1, DIM, dtype=torch.float64, device=device)
    for k in range(last + 1):
        timestep = process.timestep[k].expand(count).to(device)
        target_output[:, k] = model(trajectory[:, k], timestep, **conditioning)
        if guided:
            null = model(trajectory[:, k], timestep)
            target_output[:, k] = null + case.guidance_scale * (target_output[:, k] - null)
    steps = torch.arange(last + 1, device=device).expand(count, last + 1)
    target_output = effective(process, trajectory[:, :-1], target_output)
    mean = exact_mean(process, steps, trajectory[:, :-1], target_output)
    error = trajectory[:, 1:] - mean

    rounds = torch.cat([torch.from_numpy(output.stats.rounds) for output in outputs]).to(device)
    draft_output, tested, accepted = _settled_drafts(recorder, process, case, base, rounds)
    noisy = process.std.to(device) > 0
    std = process.std.to(device)[noisy].double()[:, None]
    drafted_mean = exact_mean(process, steps, trajectory[:, :-1], draft_output)
    delta = torch.where(tested[..., None], drafted_mean - mean, 0.0)[:, noisy] / std
    redrafted = torch.zeros_like(tested)
    redrafted[:, 1:] = tested[:, 1:] & tested[:, :-1] & ~accepted[:, :-1]
    return Chain(
        process,
        trajectory,
        [output.stats for output in outputs],
        error[:, noisy] / std,
        error[:, ~noisy],
        delta,
        *(settled[:, noisy] for settled in (tested, accepted, redrafted)),
    )


def effective(process: free.ReverseProcess, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The outputs [n, S, D] as they stand in the mean of a process of second order; those of first order as they are."""
    if process.memory is None:
        return output
    memory, of_state, of_model = (
        column.to(states)[:, None] for column in (process.memory, process.x0_state_coef, process.x0_model_coef)
    )
    x0 = of_state * states + of_model * output
    change = torch.cat((torch.zeros_like(x0[:, :1]), x0[:, 1:] - x0[:, :-1]), 1)
    return output + memory / of_model * change


def _settled_drafts(
    recorder: Recorder, process: free.ReverseProcess, case: Case, base: int, rounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The draft output [n, S, D] that each step was tested with, whether it was tested, and whether it was accepted.

    A round settles the steps up to where the same sample's next round begins; it ended in a rejection iff it settled
    fewer steps than its window had. All of this is known before the noise of the step is looked at. Only the first
    ``rounds`` int64 [n] of a sample are rounds: on a device finished ones stay in the batch for a while.
    """
    count, steps, device = case.samples, process.num_steps, rounds.device
    # a window ends at the first step without noise, the last one at the latest
    exact_steps = [k for k in range(steps) if process.std[k] == 0 or k == steps - 1]
    reach = torch.tensor([next(exact for exact in exact_steps if exact >= k) for k in range(steps)], device=device)
    draft_output = torch.zeros(count, steps, DIM, dtype=torch.float64, device=device)
    tested = torch.zeros(count, steps, dtype=torch.bool, device=device)
    accepted = torch.zeros_like(tested)
    following = torch.full((count,), steps, device=device)
    number = torch.zeros(count, dtype=torch.int64, device=device)
    for seed, _, _ in recorder.rounds:
        number[seed - base] += 1
    for seed, start, drafted in reversed(recorder.rounds):
        row = seed - base
        under_way = number[row] <= rounds[row]
        number[row] -= 1
        row, start, drafted = row[under_way], start[under_way], drafted[under_way]
        advance = following[row] - start
        following[row] = start
        length = (reach[start] - start + 1).clamp(max=case.window)
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
    previous = torch.cat((chain.trajectory[:, :1], z[:, :-1]), 1)  # the initial state comes before all
    both = moved[:, 1:] & moved[:, :-1]
    far = moved & (norm > 1)
    probability = laws.acceptance_probability(norm)
    result = {
        "initial state": normal_p(chain.trajectory[:, 0]),
        "along delta": normal_p(along[moved]),
        "along delta, |delta| > 1": normal_p(along[far]),
        "along delta, redrafted": normal_p(along[chain.redrafted & moved]),
        "orthogonal to delta": normal_p((z[moved] * laws.orthogonal_to(direction)).sum(-1)),
        "|z|²": chi2_p(z.square().sum(-1), DIM),
        "|z|², redrafted": chi2_p(z[chain.redrafted].square().sum(-1), DIM),
        "sum of |z|²": spread_p(z),
        "along the last z": normal_p((z * unit(previous)).sum(-1)),
        "z against z of all steps": laws.lags_p(z, z.shape[1] - 1),
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
    target, conditions, samples = make_target(case), centers(case), chain.trajectory[:, -1].cpu()
    whitened = torch.empty_like(samples)
    rows = [None] if conditions is None else list(conditions)
    for i, row in enumerate(rows):
        moments = target.chain_moments(chain.process, row, case.guidance_scale)
        whitened[i :: len(rows)] = laws.whiten(samples[i :: len(rows)], *moments)
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
    result = {}
    for name, k in (("halfway", chain.process.num_steps // 2), ("sample", chain.process.num_steps)):
        ours, theirs = chain.trajectory[:, k].cpu(), ancestral.trajectory[:, k].double()
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


def chain(name: str, impl: str = "reference", device: str = "cpu") -> PValues:
    """All that is tested of one case."""
    case = CASES[name]
    run = run_chain(case, impl, device)
    if case.calls > 1:
        return innovations(run)  # moments of so few samples are not normal far out
    known = hasattr(make_target(case), "chain_moments") and case.clip is None
    end = closed_form(run, case) if known else against_ancestral(run, case)
    return innovations(run) | end
