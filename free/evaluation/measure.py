"""What a comparison counts of one configuration: rounds, acceptance, operations, milliseconds, distances."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from free.drafters import Drafter, Fresh, LastWindow, Situation
from free.evaluation.configuration import Configuration
from free.evaluation.quality import Judge
from free.processes import ReverseProcess
from free.sampling.confidence import total_variation_limit
from free.sampling.loop import Run
from free.sampling.request import Options, check_request
from free.sampling.samplers import speculative_sample
from free.sampling.statistics import SamplingStatistics, standard_error, total_variation
from free.sampling.window import Setup
from free.targets import DiTTarget, Target
from free.windows import FixedWindow
from free_kernels import Proposal


def measure(
    target: DiTTarget, configuration: Configuration, described: dict[str, Any], judge: Judge | None, bar: Any
) -> dict[str, Any]:
    """Sample one configuration; returns what its row says beside what it is."""
    samples, batch_size = described["samples"], described["batch_size"]
    contender, window, scale = configuration.contender, configuration.window, configuration.guidance_scale
    process, relaxation = configuration.process(target), configuration.relaxation
    labels = [i % target.null_class for i in range(samples)]
    seeds = [described["seed"] + i for i in range(samples)]
    target_flops, drafter_flops = _count_flops(
        target,
        contender.drafter,
        window,
        labels[:batch_size],
        process=process,
        guidance_scale=scale,
    )
    runs: list[SamplingStatistics] = []
    drawn: list[torch.Tensor] = []
    for first in range(0, samples, batch_size):
        part = slice(first, first + batch_size)
        output = speculative_sample(
            target,
            contender.drafter,
            class_labels=labels[part],
            seed=seeds[part],
            window=window,
            process=process,
            guidance_scale=scale,
            relaxation=relaxation if relaxation.strength else None,
            capture=False,  # of a captured round the drafts' share is not known
        )
        runs.append(output.stats)
        drawn.append(output.samples)
        bar.update(len(labels[part]))

    efficiency = np.concatenate([stats.efficiency_per_sample for stats in runs])
    tested = np.sum([stats.tested for stats in runs], axis=0)
    accepted = np.sum([stats.accepted for stats in runs], axis=0)
    delta = np.sum([stats.delta_sum for stats in runs], axis=0)
    tests = int(tested.sum())
    excess = np.concatenate([stats.excess_acceptance for stats in runs])
    divergence = np.concatenate([stats.divergence for stats in runs])
    saved = np.concatenate([stats.saved_rejections for stats in runs])
    # what is not independent within a run is not, and runs have keys of their own
    block = np.concatenate([first + stats.block for first, stats in zip(range(0, samples, batch_size), runs, strict=True)])
    bound, bound_error = total_variation(excess, divergence)
    return {
        **({} if judge is None else asdict(judge(torch.cat(drawn)))),
        "total_variation_bound": bound,
        "total_variation_error": bound_error if samples > 1 else None,
        "total_variation_limit": total_variation_limit(excess, divergence, saved, runs[0].budget, block),
        "excess_acceptance": float(excess.mean()),
        "saved_rejections": float(saved.mean()),
        "parallel_efficiency": float(efficiency.mean()),
        "standard_error": standard_error(efficiency) if len(efficiency) > 1 else None,
        "rounds": float(np.concatenate([stats.rounds for stats in runs]).mean()),
        "acceptance_rate": int(accepted.sum()) / tests if tests else None,
        "mean_delta": float(delta.sum()) / tests if tests else None,
        "tested_by_step": tested.tolist(),
        "accepted_by_step": accepted.tolist(),
        "mean_delta_by_step": [
            float(f"{total / count:.4g}") if count else None
            for total, count in zip(delta.tolist(), tested.tolist(), strict=True)
        ],
        "target_parameters": sum(parameter.numel() for parameter in target.transformer.parameters()),
        "drafter_parameters": sum(tensor.numel() for tensor in contender.learned),
        "target_flops": target_flops,
        "drafter_flops": drafter_flops,
        "target_milliseconds": 1e3 * sum(stats.seconds["target"] for stats in runs) / sum(stats.forwards for stats in runs),
        "draft_milliseconds": 1e3 * sum(stats.seconds["draft"] for stats in runs) / sum(stats.draft_calls for stats in runs),
        "seconds": sum(stats.total_seconds for stats in runs),
    }


@torch.no_grad()
def _count_flops(
    target: DiTTarget, drafter: Drafter, window: int, labels: list[int], *, process: ReverseProcess, guidance_scale: float
) -> tuple[int, int]:
    """Of one evaluation of one state (both guidance halves), and of one drafted window of one sample.

    Two rounds at the batch size of the run, which warm its shapes up as well: the first window has no anchors, so the
    second one counts.
    """
    request = check_request(target, Options(class_labels=labels, process=process, guidance_scale=guidance_scale, seed=0))
    watched = _Watched(drafter)
    with request.running(watched):
        for _ in itertools.islice(Run(Setup.of(request, watched, window, "auto")).turns(FixedWindow(window)), 2):
            pass
    state = request.initial_state()[:1].view(1, *request.sample_shape)
    conditioning = {name: value[:1] for name, value in request.conditioning.items()}
    with _Flops() as counter:
        target.evaluate(state, request.process.timestep[:1], conditioning, request.guided)
    return counter.total, watched.flops // len(labels)


class _Watched(Drafter):
    """A drafter whose floating-point operations are counted, those of drafting and remembering the latest window."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.name, self.needs_features = drafter.name, drafter.needs_features
        self.flops = 0

    def running(self, *, compile: bool = False, **options: Any) -> AbstractContextManager[None]:
        return self.drafter.running(compile=compile, **options)

    def propose(self, situation: Situation) -> Proposal:
        with _Flops() as counter:
            proposal = self.drafter.propose(situation)
        self.flops = counter.total
        return proposal

    def begin(self, last: LastWindow, sample_shape: tuple[int, ...]) -> Any:
        return self.drafter.begin(last, sample_shape)

    def remember(self, situation: Situation, window: LastWindow) -> Any:
        with _Flops() as counter:
            memory = self.drafter.remember(situation, window)
        self.flops += counter.total
        return memory


class _Flops:
    """Counts the operations of matrix products and convolutions; attention is spelled out, or a CPU's would be missed."""

    def __enter__(self) -> _Flops:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        self._attention = sdpa_kernel(SDPBackend.MATH)
        self._counter = FlopCounterMode(display=False)
        self._attention.__enter__()
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)
        self._attention.__exit__(*error)
        self.total = int(self._counter.get_total_flops())


def learned_tensors(drafter: Drafter, target: DiTTarget) -> list[torch.Tensor]:
    """The numbers that a drafter learned: parameters, and tensors that it holds itself; never the target's."""
    found: dict[int, torch.Tensor] = {}
    drafter = drafter.drafter if isinstance(drafter, Fresh) else drafter
    for part in (drafter, *vars(drafter).values()):
        module = part.module if isinstance(part, Target) else part
        if isinstance(module, torch.nn.Module):
            found.update({id(parameter): parameter for parameter in module.parameters()})
        elif isinstance(module, torch.Tensor):
            found[id(module)] = module
    targets = {id(parameter) for parameter in target.transformer.parameters()}
    return [tensor for identity, tensor in found.items() if identity not in targets]
