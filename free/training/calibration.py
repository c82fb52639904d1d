"""Fits :class:`free.LinearDrafter` to a target by least squares, on the windows that real runs visit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from free.checks import check_count
from free.drafters.hold import HoldX0
from free.drafters.linear import Bands, LinearDrafter
from free.processes import ReverseProcess
from free.sampling.loop import Run, Turn
from free.sampling.request import DEFAULT_STEPS, Options, Request, check_request
from free.sampling.samplers import speculative_sample
from free.sampling.statistics import standard_error
from free.sampling.window import Setup
from free.windows import FixedWindow
from free_kernels import guided

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

GAP_EDGES = (1, 3)
"""Ages of the anchor that are told apart: 0 (it was abandoned at this very step), 1 … 2, and 3 on."""
MAX_BANDS = 16

# drafts that the pull towards hold-x0 counts for, and the steps to either side that a step is averaged with, of all steps
_RIDGE = 4.0
_SMOOTHING = 0.02


@torch.no_grad()
def calibrate(
    model: Any,
    *,
    process: ReverseProcess | SchedulerMixin | None = None,
    class_labels: int | Sequence[int] | torch.Tensor | None = None,
    conditioning: dict[str, Any] | None = None,
    shape: Sequence[int] | None = None,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = 1.0,
    num_trajectories: int = 32,
    seed: int = 0,
    window: int = 8,
    num_bands: int | None = None,
    impl: str = "auto",
    progress: bool = False,
) -> LinearDrafter:
    """Fit a :class:`free.LinearDrafter` for one model, process and guidance scale, in closed form.

    Runs the speculative sampler with hold-x0, and regresses the target's outputs at the drafted states on the two drafts
    that the linear one blends, by step, age of the anchor and band. Only sums are kept. What it is fitted on (labels,
    window) changes how often its drafts are accepted, never the law: the trajectories draw from keys of a root of their own,
    so that it has seen no noise of a sample, whatever its seed.

    Args:
        model, process, conditioning, shape, num_inference_steps, guidance_scale, impl: as in
            :func:`free.speculative_sample`.
        class_labels: one, or several that the trajectories take in turn.
        num_trajectories: B; all run in one batch.
        seed: of the trajectories.
        window: W that the drafter will be used with; at least 2.
        num_bands: N; left out, the longer side of an image-shaped sample, at most 16, and 1 for other samples.
        progress: show a bar that counts steps.

    Raises:
        ValueError: a wrong argument, named, before any work is done.
        NonFiniteOutputError: the model returned NaN or infinity.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"window is {window!r}; allowed is an int, 2 or more: a window of 1 drafts nothing")
    num_trajectories = check_count("num_trajectories", num_trajectories)
    if num_bands is not None and (isinstance(num_bands, bool) or not isinstance(num_bands, int) or num_bands < 1):
        raise ValueError(f"num_bands is {num_bands!r}; allowed is an int, 1 or more, or None")
    request = _request(
        model,
        Options(
            class_labels=_in_turn(class_labels, num_trajectories),
            conditioning=conditioning,
            num_samples=num_trajectories,
            shape=shape,
            process=process,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            impl=impl,
        ),
    )
    request = request.pilot()
    sample_shape, steps = request.sample_shape, request.process.num_steps
    image = len(sample_shape) == 3
    if num_bands is None:
        num_bands = min(max(sample_shape[1:]), MAX_BANDS) if image else 1
    if num_bands > 1 and not image:
        raise ValueError(f"num_bands is {num_bands}; samples of shape {sample_shape} have 1, as they are no images")

    bands = Bands(sample_shape, num_bands).to(request.seed.device)
    with tqdm(total=request.batch * steps, disable=not progress, unit="step", desc="calibrate") as bar:
        weight = _run(request, min(window, steps), impl, bands, bar).solve()
    return LinearDrafter(weight, request.process.timestep, sample_shape, GAP_EDGES)


def _request(model: Any, options: Options) -> Request:
    """Its samples are trajectories here."""
    try:
        return check_request(model, options)
    except ValueError as error:
        raise ValueError(str(error).replace("num_samples", "num_trajectories")) from error


def _run(request: Request, window: int, impl: str, bands: Bands, bar: tqdm) -> _Sums:
    """The sums over one run of the trajectories, drafted by hold-x0."""
    sums = _Sums(request, bands)
    with request.running():
        for turn in Run(Setup.of(request, HoldX0(), window, impl)).turns(FixedWindow(window)):
            sums.add(turn)
            bar.update(int(turn.known.step.sum()) - bar.n)
    return sums


class _Sums:
    """Of the least squares, by step, age of the anchor and band: float64 [S, G, N] each, whatever the trajectories are."""

    def __init__(self, request: Request, bands: Bands) -> None:
        process = request.process
        self.process, self.guidance_scale, self.bands = process, request.guidance_scale, bands
        self.edges = torch.tensor(GAP_EDGES, device=process.std.device)
        cells = process.num_steps, len(GAP_EDGES) + 1
        self.square = torch.zeros(*cells, bands.count, dtype=torch.float64, device=process.std.device)
        self.product = torch.zeros_like(self.square)
        self.count = torch.zeros(*cells, 1, dtype=torch.float64, device=process.std.device)
        """Of the drafts' weights, [S, G, 1]."""

    def add(self, turn: Turn) -> None:
        """A round: its states, and the target's guided outputs there."""
        process, situation, done, last = self.process, turn.done.situation, turn.done, turn.live.last
        output = guided(last.output, last.unconditional, self.guidance_scale, torch.float32)  # [B, W, D]
        column = torch.arange(output.shape[1], device=output.device)
        # those that a test looked at: the abandoned rest of a window was never a choice between accepting and rejecting
        tested = column < (done.verification.advance - 1 + done.verification.rejected)[:, None]
        steps = (done.step[:, None] + column).clamp(max=process.num_steps - 1)
        anchor = situation.anchor(steps)
        hold_x0 = anchor.hold_x0(done.states, steps, process)
        row = tested.nonzero(as_tuple=True)
        step, age = steps[row], torch.bucketize((steps - anchor.step)[row], self.edges, right=True)
        # in units of the step's noise, in which a step is like its neighbours
        scale = (process.model_coef / process.std)[step][:, None]
        held, wanted = (scale * (y - anchor.output)[row] for y in (hold_x0, output))
        # a draft that is far off is rejected whatever becomes of it: weigh as log(1 + |delta|²) does
        weight = 1 / (1 + done.verification.squared_norm[row][:, None])  # [n, 1]
        held, wanted = self.bands.forward(held).double(), self.bands.forward(wanted).double()
        for sums, values in ((self.square, held * held), (self.product, held * wanted)):
            by_band = values.new_zeros(len(step), self.bands.count).index_add_(1, self.bands.index, weight * values)
            sums.index_put_((step, age), by_band, accumulate=True)
        self.count.index_put_((step, age), weight.double(), accumulate=True)

    def solve(self) -> torch.Tensor:
        """w, float32 [S, G, N]: smoothed over steps, drawn to hold-x0 (w = 1) where there was little to learn from."""
        reach = round(_SMOOTHING * self.process.num_steps)
        square, product, count = (_smooth(sums, reach) for sums in (self.square, self.product, self.count))
        # counted with their weights: where hold-x0's drafts are far off, few of them decide, and they are no guide
        ridge = _RIDGE * square / count.clamp(min=1e-9)
        weight = torch.where(square > 0, (product + ridge) / (square + ridge).clamp(min=1e-30), 1.0)
        return weight.float().cpu()


def held_out_table(
    model: Any, drafter: LinearDrafter, *, class_labels: Sequence[int], num_samples: int, seed: int, **sampling: Any
) -> str:
    """Parallel efficiency of hold-x0 and of ``drafter``, with standard errors, on the same seeds, away from ``seed``'s own.

    Args:
        model: the target.
        drafter: what :func:`calibrate` returned.
        class_labels: taken in turn.
        num_samples: of each drafter.
        seed: that of the calibration.
        sampling: other keywords of :func:`free.speculative_sample`.
    """
    labels = _in_turn(class_labels, num_samples)
    # keys derived from another root than the calibration's are other keys
    seeds = [int(key) for key in np.random.SeedSequence([seed % 2**64, 1]).generate_state(num_samples, np.uint64)]
    runs = [speculative_sample(model, one, class_labels=labels, seed=seeds, **sampling).stats for one in (HoldX0(), drafter)]
    lines = [f"{'drafter':<10}{'efficiency':>12}{'± error':>10}{'accepted':>10}{'draft s':>10}"]
    for stats in runs:
        lines.append(
            f"{stats.drafter:<10}{stats.parallel_efficiency:>12.3f}{standard_error(stats.efficiency_per_sample):>10.3f}"
            f"{stats.acceptance_rate:>10.1%}{stats.seconds['draft']:>10.2f}"
        )
    gain = runs[1].efficiency_per_sample - runs[0].efficiency_per_sample
    lines.append(f"{'gain':<10}{gain.mean():>+12.3f}{standard_error(gain):>10.3f}")
    lines.append(f"S={runs[0].steps}, W={runs[0].window}, {num_samples} held-out seeds, the same for both")
    return "\n".join(lines)


def _smooth(sums: torch.Tensor, reach: int) -> torch.Tensor:
    """Sums [S, ...] over steps, weighed by a triangle of ``reach`` steps to either side."""
    result = sums.clone()
    for distance in range(1, reach + 1):
        share = 1 - distance / (reach + 1)
        if distance < len(sums):
            result[distance:] += share * sums[:-distance]
            result[:-distance] += share * sums[distance:]
    return result


def _in_turn(class_labels: Any, count: int) -> Any:
    """Labels for ``count`` trajectories: several are repeated in their order, one or none is left to the request."""
    if isinstance(class_labels, torch.Tensor):
        class_labels = class_labels.tolist()
    if not isinstance(class_labels, (list, tuple, range)) or not len(class_labels):
        return class_labels
    return [class_labels[i % len(class_labels)] for i in range(count)]
