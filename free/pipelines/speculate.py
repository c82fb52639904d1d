"""The door: a pipeline in, a pipeline whose calls are speculated out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from free.drafters import Drafter, ModelDrafter, as_drafter
from free.pipelines.batch import MODES
from free.pipelines.process import ProcessOptions
from free.pipelines.speculation import Speculation
from free.sampling.keys import check_seeds, seed_count
from free.sampling.relaxation import Relaxation
from free.windows import WindowPlan, check_window, schedule_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def speculate(
    pipe: DiffusionPipeline,
    *,
    window: int | str | WindowPlan = 8,
    mode: str = "ragged",
    drafter: str | Drafter | Any = "gains",
    relaxation: Relaxation | None = None,
    seed: Sequence[int] | None = None,
    variance: str | torch.Tensor | None = None,
    stochasticity: float | None = None,
    eta: float | None = None,
    impl: str = "auto",
) -> Speculation:
    """Speculate every call of a diffusers pipeline, whose ``__call__`` stays in charge of prompts, guidance and decoding.

        with free.speculate(pipe, window=8) as run:
            images = pipe(prompt, num_inference_steps=50, generator=generator).images
        print(run.stats.summary())

    Until the context ends, or ``run.remove()``, a call draws samples with the law of the step-by-step sampler that
    :meth:`free.ReverseProcess.from_scheduler` makes of the pipeline's scheduler, as the call has set it (steps, shift, mu,
    sigmas). A scheduler that draws no noise (DDIM, DPM-Solver, FlowMatchEuler) becomes its stochastic counterpart, with a
    warning: exactness is relative to that. The pipeline's networks are shown W states a sample in one forward; each row
    meets the conditioning of its sample and a timestep of its own. :func:`free.check_pipeline` shows whether a pipeline
    allows it.

    Args:
        pipe: any ``DiffusionPipeline`` with one scheduler; what cannot be speculated is refused by name.
        window: W, states of a sample evaluated in one round, or a plan of :func:`free.plan_window`; the first round of a
            call has one. ``"auto"`` chooses, of 1 … 64, what settles most steps a second here: it times the rounds that it
            takes, wider ones as long as they might pay, and remembers them with the networks. A call whose latents were
            drawn before begins without that memory.
        mode: ``"ragged"`` shows the pipeline as many states as there are, which changes from round to round. ``"batch"`` is
            for pipelines that forbid it (perturbed attention guidance, Z-Image with guidance): they are asked for W times as
            many samples of each prompt and have a row for each state of every round, those that do not count included. The
            caller's arguments, ``latents`` and generators are of B samples as ever, and B samples are decoded.
        drafter: ``"gains"``, ``"hold-x0"``, ``"hold-output"`` or a :class:`free.Drafter` that leans on the target's outputs
            only.
        relaxation: as in :func:`free.speculative_sample`; not ``"learned"``, as a pipeline drops the learned variance.
        seed: the keys of the samples' noise, one a sample of each call. Left out, they are made of the initial latents: the
            same latents give the same sample, whatever else is in the batch and whatever generator the call is given.
        variance, stochasticity, eta: of the process, as in :meth:`free.ReverseProcess.from_scheduler`. An ``eta`` that the
            pipeline's call gives its scheduler counts as given here.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``, of :mod:`free_kernels`.

    Returns:
        :class:`Speculation`: ``stats`` of the last call, ``process``, ``remove()``; a context.

    Raises:
        TypeError: something that is no pipeline, drafter or relaxation.
        ValueError: a wrong argument, named; a network in train mode or with a cache (when the pipeline is called).
        UnsupportedPipelineError: a pipeline, or an argument of its call, that cannot be speculated, with the reason. It is a
            ``ValueError``.
    """
    if relaxation is not None and not isinstance(relaxation, Relaxation):
        raise TypeError(f"relaxation is a {type(relaxation).__name__}; allowed is a free.Relaxation, or None")
    if relaxation is not None and relaxation.uncertainty == "learned":
        raise ValueError(
            "relaxation is by learned variance, which a pipeline does not hand on; use 'residual' or a callable"
        )
    check_window(window)
    schedule = schedule_of(window)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(map(repr, MODES))}")
    if schedule is None and mode == "batch":
        raise ValueError(
            "window is 'auto'; where mode is 'batch', which has as many rows in each round, allowed is an int or a plan"
        )
    drafter = as_drafter(drafter)
    if isinstance(drafter, ModelDrafter) or drafter.needs_features:
        raise ValueError(
            f"drafter {drafter.name!r} asks for the target's conditioning or features, which a pipeline keeps to itself; "
            "use 'hold-x0' or another that leans on outputs only"
        )
    if seed is not None:
        if not seed_count(seed):
            raise ValueError(f"seed is {seed!r}; allowed are ints, one a sample of each call, or None")
        seed = check_seeds(seed, None, len(seed))
    options = ProcessOptions(variance, stochasticity, eta)
    return Speculation(pipe, schedule, drafter, relaxation, seed, options, impl, mode)
