"""Picard iteration (ParaDiGMS: Shih et al. 2023, algorithm 1), the peer that is parallel in time and not exact.

``python -m benchmarks.picard --model benchmarks/weights/photo_dit --steps 50 250 --windows 8`` appends a row each to
``results/picard.jsonl``: rounds, and how far the samples are from those of the same noise step by step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import free
from benchmarks.rows import RESULTS, write_row
from free.sampling.request import Options, Request, check_request
from free.sampling.statistics import standard_error
from free.targets.base import take_rows
from free.targets.loading import load_target
from free_kernels import guided, normal


@torch.no_grad()
def picard_sample(request: Request, window: int, tolerance: float) -> tuple[torch.Tensor, np.ndarray]:
    """Samples float32 [B, D] and rounds int64 [B].

    The states of a window are all evaluated where the last iteration left them, and each becomes the first one plus the sum
    of the steps before it, with noise that stays. The window slides past those that moved by less than ``tolerance``
    standard deviations of their step, in root mean square, and past the first one always, which is the step-by-step
    sampler's.
    """
    process, target = request.process, request.target
    steps, batch = process.num_steps, request.batch
    first = request.initial_state()
    noise = normal(request.seed[:, None], torch.arange(steps), first.shape[1])  # [B, S, D]
    states = first[:, None].repeat(1, steps + 1, 1)  # [B, S + 1, D]
    start, rounds = torch.zeros(batch, dtype=torch.int64), np.zeros(batch, np.int64)
    while bool((start < steps).any()):
        row = (start < steps).nonzero()[:, 0]
        step = start[row, None] + torch.arange(window)  # [B', W]
        inside, step = step < steps, step.clamp(max=steps - 1)
        here = states[row[:, None], step]  # [B', W, D]
        flat = step.flatten()
        answer = target.evaluate(
            here.flatten(0, 1).view(-1, *request.sample_shape),
            process.timestep[flat],
            take_rows(request.conditioning, row.repeat_interleave(window)),
            request.guided,
        )
        unconditional = None if answer.unconditional is None else answer.unconditional.flatten(1)
        output = guided(answer.output.flatten(1), unconditional, request.guidance_scale, torch.float32).view_as(here)
        state_coef, model_coef, std = (
            column[step][..., None] for column in (process.state_coef, process.model_coef, process.std)
        )
        moved = state_coef * here + model_coef * output + std * noise[row[:, None], step] - here
        after = here[:, :1] + torch.where(inside[..., None], moved, 0.0).cumsum(1)  # of step + 1
        change = (after - states[row[:, None], step + 1]).square().mean(-1).sqrt()
        settled = (change <= tolerance * std[..., 0]) & inside
        settled[:, 0] = True
        advance = settled.int().cumprod(1).sum(1)
        for i, sample in enumerate(row.tolist()):
            begin, count = int(start[sample]), int(inside[i].sum())
            states[sample, begin + 1 : begin + count + 1] = after[i, :count]
            states[sample, begin + count + 1 :] = after[i, count - 1]  # where the next windows begin
        start[row] += advance
        rounds[row.numpy()] += 1
    return states[:, -1], rounds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 250])
    parser.add_argument("--windows", nargs="+", type=int, default=[8])
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    target = load_target(given.model)
    labels = [i % target.null_class for i in range(given.samples)]
    for steps in given.steps:
        common: dict[str, Any] = {
            "class_labels": labels,
            "process": free.ReverseProcess.ddpm(steps),
            "guidance_scale": given.guidance_scale,
            "seed": list(range(given.samples)),
        }
        exact = free.ancestral_sample(target, **common).samples.flatten(1)
        request = check_request(target, Options(**common))
        for window in given.windows:
            samples, rounds = picard_sample(request, window, given.tolerance)
            efficiency = steps / rounds
            row = {
                "benchmark": "picard", "model": given.model.resolve().name, "steps": steps, "window": window,
                "tolerance": given.tolerance, "guidance_scale": given.guidance_scale, "samples": given.samples,
                "rounds": float(rounds.mean()), "parallel_efficiency": float(efficiency.mean()),
                "standard_error": standard_error(efficiency),
                "error_over_std": float((samples - exact).square().mean().sqrt() / exact.std()),
            }  # fmt: skip
            write_row("picard", row, given.results)
            print({name: row[name] for name in ("steps", "window", "rounds", "parallel_efficiency", "error_over_std")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
