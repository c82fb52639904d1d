"""What a call of a sampler asks for, checked before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from free.checks import check_count, check_number, is_int, on_cpu
from free.drafters import Drafter
from free.processes import ReverseProcess
from free.sampling.keys import check_seeds, pilot_keys, seed_count
from free.sampling.relaxation import Relaxation
from free.sampling.sharing import COMPILER, exclusively, shared_by
from free.targets import Target, as_target
from free.targets.base import has_rows
from free_kernels import LATENT_STREAM, normal
from free_kernels.dispatch import resolve
from free_kernels.launch import on_device

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Callback = Callable[[Any, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], Any]

DEFAULT_STEPS = 250
LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """B samples of one target under one process; tensors are on the target's device."""

    target: Target
    process: ReverseProcess
    conditioning: dict[str, Any]
    guidance_scale: float
    sample_shape: tuple[int, ...]
    seed: torch.Tensor
    """int64 [B], the key of each sample's noise."""
    latents: torch.Tensor | None
    """float32 [B, D], where the caller gave the initial states."""

    @property
    def batch(self) -> int:
        return len(self.seed)

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def keys(self) -> list[int]:
        """The keys on the host; waits for the device."""
        return self.seed.tolist()

    def pilot(self) -> Request:
        """The same request under keys of a root of their own: for all that is measured so that a choice may follow from it.

        No choice may have seen a noise of the key that it is made for. Each row has another key, also where two rows of
        the request share one.
        """
        return replace(self, seed=torch.tensor(pilot_keys(self.keys), dtype=torch.int64, device=self.seed.device))

    @contextmanager
    def running(
        self,
        drafter: Drafter | None = None,
        relaxation: Relaxation | None = None,
        *,
        compile: bool = False,
        **settings: Any,
    ) -> Iterator[None]:
        """Within this context the target may be evaluated, on its own device, and windows be drafted and relaxed: with the
        features and variances that those take, compiled if asked for.

        Other threads that want to run the same model, or a model or drafter that ``drafter`` holds, wait until it ends.
        Where several processes run the target together, ``settings`` are what else they must have been asked alike.
        """
        target, features = self.target, drafter is not None and drafter.needs_features
        asked = {"features": features, "compile": compile, "relaxation": relaxation, **settings}
        with ExitStack() as during:
            during.enter_context(exclusively(*shared_by(target, drafter), *([COMPILER] if compile else ())))
            during.enter_context(target.ranks.call(self, drafter, **asked))
            during.enter_context(target.in_use())
            during.enter_context(on_device(self.seed))
            if features:
                during.enter_context(target.capture_features())
            if compile:
                during.enter_context(target.compile())
            if drafter is not None:
                during.enter_context(drafter.running(compile=compile))
            if relaxation is not None:
                during.enter_context(relaxation.capture(target))
            yield

    def initial_state(self) -> torch.Tensor:
        """float32 [B, D]: the caller's latents, or normal noise of the seeds' own stream, of the process's initial std."""
        if self.latents is not None:
            return self.latents.clone()
        numel = int(np.prod(self.sample_shape))
        noise = normal(self.seed, torch.zeros_like(self.seed), numel, stream=LATENT_STREAM)
        return noise if self.process.initial_std == 1 else noise.mul_(self.process.initial_std)


@dataclass(frozen=True)
class Options:
    """What a caller may ask of a model, as in :func:`free.speculative_sample`: the arguments that all entry points share."""

    class_labels: Any = None
    conditioning: dict[str, Any] | None = None
    num_samples: int | None = None
    shape: Sequence[int] | None = None
    process: ReverseProcess | SchedulerMixin | None = None
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = 1.0
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    impl: str = "auto"
    callback_on_step_end: Callback | None = None

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Options:
        """Those of an entry point's ``locals()``, before it made others; what it does not have stays as it is here."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})


@on_cpu
def check_request(model: Any, options: Options) -> Request:
    """Check all that is asked for before any work is done.

    Raises:
        ValueError: a wrong argument, named, with what was given and what is allowed.
        TypeError: a model that is none of those allowed.
    """
    return check_samples(*check_model(model, options), options)


@on_cpu
def check_model(model: Any, options: Options) -> tuple[Target, ReverseProcess, float]:
    """What the samples of a call share: target, process and guidance scale. Errors as of :func:`check_request`."""
    target = as_target(model)
    target.check_ready()
    callback = options.callback_on_step_end
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end is a {type(callback).__name__}; allowed is a callable or None")
    guidance_scale = check_number("guidance_scale", options.guidance_scale, "1 (no guidance) or more", 1)
    process = _check_process(target, options.process, options.num_inference_steps)
    if process.clip_range is not None and target.of_latents:
        warnings.warn(
            f"process clips the estimate of x0 to ±{process.clip_range:g} (clip_sample), but the model's samples have "
            f"{(target.sample_shape or (0,))[0]} channels, as latents do, which go beyond: give a scheduler with "
            "clip_sample=False, unless the model was trained so",
            UserWarning,
            stacklevel=6,
        )
    return target, process, guidance_scale


@on_cpu
def check_samples(target: Target, process: ReverseProcess, guidance_scale: float, options: Options) -> Request:
    """The samples that are asked for of a checked model; asks nothing of the model, which may be running.

    Raises:
        ValueError: as of :func:`check_request`.
    """
    latents, num_samples = options.latents, options.num_samples
    if latents is not None:
        _check_latents(latents)
    if num_samples is not None:
        num_samples = check_count("num_samples", num_samples)

    # every argument that speaks of a number of samples must speak of the same one
    spoken = {
        "num_samples": num_samples,
        "seed": seed_count(options.seed),
        "generator": len(options.generator) if isinstance(options.generator, (list, tuple)) else None,
        "latents": None if latents is None else len(latents),
    }
    hint = next((count for count in spoken.values() if count is not None), None)
    checked, spoken["class_labels" if options.class_labels is not None else "conditioning"] = target.check_conditioning(
        options.class_labels, options.conditioning, guidance_scale, hint
    )
    counts = {name: count for name, count in spoken.items() if count is not None}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{name} speaks of {count}" for name, count in counts.items())
        raise ValueError(f"the number of samples is unclear: {given}; they must agree")
    batch = next(iter(counts.values()), 1)
    if batch < 1:
        raise ValueError(f"{next(iter(counts))} is empty; at least one sample must be asked for")

    sample_shape = check_shape(target, options.shape, latents)
    device = _device(target, latents, checked)
    resolve(options.impl, device)
    return Request(
        target,
        process.to(device),
        _on(device, checked),
        guidance_scale,
        sample_shape,
        torch.tensor(check_seeds(options.seed, options.generator, batch), dtype=torch.int64, device=device),
        None if latents is None else latents.to(device, torch.float32).flatten(1),
    )


def _on(device: torch.device, conditioning: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in conditioning.items()}


def _check_latents(latents: Any) -> None:
    """A dense, finite, floating tensor of samples."""
    if not isinstance(latents, torch.Tensor) or latents.dtype not in LATENT_DTYPES:
        given = f"dtype {latents.dtype}" if isinstance(latents, torch.Tensor) else f"type {type(latents).__name__}"
        raise ValueError(f"latents has {given}; allowed are {', '.join(map(str, LATENT_DTYPES))}")
    if latents.layout != torch.strided or latents.is_meta:
        given = "on the meta device" if latents.is_meta else f"of layout {latents.layout}"
        raise ValueError(f"latents is a tensor {given}; allowed is a dense one that holds numbers")
    if latents.dim() < 2:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; allowed is (samples, *shape of one sample)")
    if not torch.isfinite(latents).all():
        raise ValueError("latents holds NaN or infinity; allowed are finite numbers")


def _check_process(
    target: Target, process: ReverseProcess | SchedulerMixin | None, num_inference_steps: int
) -> ReverseProcess:
    if isinstance(process, ReverseProcess):
        num_inference_steps = check_count("num_inference_steps", num_inference_steps)
        if num_inference_steps not in (DEFAULT_STEPS, process.num_steps):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; process has {process.num_steps} steps: leave it out"
            )
        return process
    if process is not None:
        return ReverseProcess.from_scheduler(process, num_inference_steps)
    return target.default_process(num_inference_steps)


def check_shape(target: Target, shape: Sequence[int] | None, latents: torch.Tensor | None) -> tuple[int, ...]:
    """The shape of one sample, on which the model, ``shape`` and ``latents`` must agree."""
    if shape is not None:
        given, shape = shape, tuple(shape) if hasattr(shape, "__iter__") else ()
        if not shape or any(not is_int(size) or size < 1 for size in shape):
            raise ValueError(f"shape is {given}; allowed are positive ints, the shape of one sample without a batch axis")
        shape = tuple(map(int, shape))
    expected = target.sample_shape or shape or (tuple(latents.shape[1:]) if latents is not None else None)
    if not expected:
        raise ValueError("shape is missing: a callable model does not say what one sample looks like; give shape or latents")
    if shape is not None and shape != expected:
        raise ValueError(f"shape is {shape}; the model's samples are {expected}")
    if latents is not None and tuple(latents.shape[1:]) != expected:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; allowed is (samples, {', '.join(map(str, expected))})")
    return expected


def _device(target: Target, latents: torch.Tensor | None, conditioning: dict[str, Any]) -> torch.device:
    """The model's; for a model without parameters that of the tensors it is given."""
    if target.device is not None:
        return target.device
    if latents is not None:
        return latents.device
    return next((value.device for value in conditioning.values() if has_rows(value)), torch.device("cpu"))
