"""A fixed schedule of variances, from those that a target learned, along ancestral trajectories (FREE, supplement C)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from free.checks import check_count
from free.processes import ReverseProcess, learned_log_variance
from free.sampling.ancestral import Chain, step_on
from free.sampling.request import DEFAULT_STEPS, Options, check_request
from free.sampling.statistics import Stopwatch

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@torch.no_grad()
def average_learned_variance(
    model: Any,
    num_inference_steps: int = DEFAULT_STEPS,
    *,
    process: ReverseProcess | SchedulerMixin | None = None,
    class_labels: Any = None,
    guidance_scale: float = 1.0,
    num_trajectories: int = 8,
    seed: int = 0,
    impl: str = "auto",
    progress: bool = False,
) -> torch.Tensor:
    """A fixed schedule of variances from the target's learned ones, for ``ReverseProcess.ddpm(variance=...)``.

    The learned log variance of each step, averaged over the elements of the states of a few ancestral trajectories: draft
    and target must share one std, which a variance of their own at each state does not allow.

    Args:
        model: a ``DiTTransformer2DModel`` with learned variance, a pipeline or target of one.
        num_inference_steps: S, where ``process`` does not say.
        process: whose trajectories are looked at and whose posterior and beta are interpolated; the DDPM with geometric
            variances, the middle of the learned range, if left out.
        class_labels, guidance_scale, impl: as in :func:`free.speculative_sample`.
        num_trajectories: all run in one batch; with several labels, one each.
        seed: of the trajectories.
        progress: show a bar that counts steps.

    Returns:
        float64 [S]; 0 at steps without noise.

    Raises:
        ValueError: a model that learned no variance, or another wrong argument, named, before any work is done.
    """
    num_trajectories = check_count("num_trajectories", num_trajectories)
    one_label = class_labels is None or not hasattr(class_labels, "__len__")
    request = check_request(
        model,
        Options(
            class_labels=class_labels,
            num_samples=num_trajectories if one_label else None,
            process=ReverseProcess.ddpm(num_inference_steps, variance="geometric") if process is None else process,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            impl=impl,
        ),
    )
    request = request.pilot()  # its variances are chosen for samples whose noise they may not have seen
    target, process = request.target, request.process
    target.check_learned_variance()
    if process.log_variance_range is None:
        raise ValueError("process has no log_variance_range, between which a learned variance lies")

    chain, watch = Chain.begin(request), Stopwatch(request.seed.device)
    log_variance = torch.zeros(process.num_steps, dtype=torch.float64, device=request.seed.device)
    with request.running(), target.capture_variance():
        for k in tqdm(range(process.num_steps), disable=not progress, unit="step"):
            step = chain.step
            chain, output = step_on(chain, request, None, impl, watch)
            assert output.variance_share is not None
            log_variance[k] = learned_log_variance(output.variance_share, process, step).double().mean()
    return torch.where(process.std > 0, log_variance.exp(), 0.0).cpu()
