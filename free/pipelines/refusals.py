"""What is refused by name before any work is done, because it would silently sample something else.

In a pipeline's loop the counter counts rounds, not steps, and the rows of a round are states of different steps. What a
pipeline decides by its counter, or by the timestep as a number, is therefore wrong while it is speculated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from free.pipelines.errors import UnsupportedPipelineError


def _none(value: Any) -> bool:
    return value is None


def _zero(value: Any) -> bool:
    return value is None or (not value if not isinstance(value, (list, tuple)) else not any(value))


def _one(value: Any) -> bool:
    return value is None or (value == 1 if not isinstance(value, (list, tuple)) else all(one == 1 for one in value))


def _at_least_one(value: Any) -> bool:
    return value is None or value >= 1


ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "skip_guidance_layers": (_none, "None", "layers are skipped by the number of the step"),
    "cfg_trunc_ratio": (_at_least_one, "1", "guidance ends by the number of the step"),
    "cfg_truncation": (_at_least_one, "1", "guidance ends by the timestep"),
    "control_guidance_start": (_zero, "0", "the ControlNet begins by the number of the step"),
    "control_guidance_end": (_one, "1", "the ControlNet ends by the number of the step"),
    "adapter_conditioning_factor": (_one, "1", "the adapter ends by the number of the step"),
    "use_dynamic_cfg": (_zero, "False", "the guidance scale follows the timestep"),
    "pag_adaptive_scale": (_zero, "0", "the guidance scale follows the timestep"),
    "guidance_schedule": (_none, "None", "the guidance scale follows the number of the step"),
    "callback_steps": (lambda value: value in (None, 1), "1", "the callback is called by the number of the step"),
    "enable_temporal_reasoning": (_zero, "False", "frames are dropped at a step's number"),
    "gligen_scheduled_sampling_beta": (_one, "1", "grounding ends by the number of the step"),
    "cfg_interval_start": (_zero, "0", "guidance begins by the number of the step"),
    "cfg_interval_end": (_one, "1", "guidance ends by the number of the step"),
    "scaling_watershed": (_one, "1", "rotary embeddings change by the timestep as a number"),
    "use_kv_cache": (_zero, "False", "keys and values of the first step are kept for its rows"),
}
"""Argument of a call: what is allowed, in words, and why the rest is not."""

PIPELINES: dict[str, str] = {
    "Cosmos": "it scales the network's input and output by sigmas[i], i being the number of the step",
    "LTX2": "two schedulers, of pictures and of sound, have to go at one pace",
    "StableVideoDiffusion": "its scheduler is EDM's in continuous time, with a network preconditioned by it",
    "BriaFibo2": "where its caption has text it stops guiding by the timestep as a number",
    "LEditsPP": "it edits by the number of the step",
    "StableDiffusionLatentUpscale": "it preconditions the network by sigmas[i], i being the number of the step",
    "AnyFlow": "its network is told where the step ends, by the number of the step",
    "KandinskyPrior": "it looks up the next timestep by the number of the step",
    "KandinskyV22Prior": "it looks up the next timestep by the number of the step",
    "Ideogram4": "the guidance scale follows the number of the step",
    "HeliosPyramid": "it changes what it does by the number of the step",
    "Flux2KleinKV": "its network keeps keys and values of the first step",
    "SemanticStableDiffusion": "it edits by the number of the step, and remembers by how much",
    "StableDiffusionAttendAndExcite": "it moves the latents by a gradient before some steps",
    "FluxControlInpaint": "it blends the latents with the picture between two steps",
    "KandinskyV22Inpaint": "it blends the latents with the picture between two steps",
    "QwenImageInpaint": "it blends the latents with the picture between two steps",
    "QwenImageEditInpaint": "it blends the latents with the picture between two steps",
}
"""Beginning of a class's name, and why such a pipeline cannot be speculated."""


PERTURBED = "perturbed attention guidance copies latents by the number of prompts; allowed is mode='batch'"
"""Why pipelines of PAG are refused where the number of rows varies, whatever their name begins with."""


def check_pipeline_class(pipe: Any, mode: str) -> None:
    """Raise for a pipeline that cannot be speculated, in this mode, whatever it is asked for."""
    from diffusers import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe is a {type(pipe).__name__}; allowed is a diffusers DiffusionPipeline")
    name = type(pipe).__name__
    if "PAG" in name and mode == "ragged":
        raise UnsupportedPipelineError(f"pipe is a {name}, which cannot be speculated: {PERTURBED}")
    for beginning, reason in PIPELINES.items():
        if name.startswith(beginning):
            raise UnsupportedPipelineError(f"pipe is a {name}, which cannot be speculated: {reason}")
    schedulers = [key for key, value in pipe.components.items() if isinstance(value, SchedulerMixin)]
    # a low_res_scheduler only adds noise to what the pipeline starts from
    if [key for key in schedulers if key != "low_res_scheduler"] != ["scheduler"]:
        raise UnsupportedPipelineError(f"pipe is a {name} with the schedulers {schedulers}; allowed is one, 'scheduler'")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise for arguments of a pipeline's call that cannot be speculated."""
    for name, (allowed, words, reason) in ARGUMENTS.items():
        if name in arguments and not allowed(arguments[name]):
            raise UnsupportedPipelineError(f"{name} is {arguments[name]!r}; while speculating allowed is {words}: {reason}")


def check_blending(pipe: Any, arguments: dict[str, Any]) -> None:
    """Raise where a picture is filled in by blending it into the latents between two steps: where the network is not given
    mask and picture beside the latents.
    """
    name, mask = type(pipe).__name__, arguments.get("mask_image")
    networks = (getattr(pipe, part, None) for part in ("transformer", "unet"))
    network = next((one for one in networks if one is not None), None)
    if "Inpaint" not in name or mask is None or network is None:
        return
    config = getattr(network, "config", {})
    taken, given = config.get("in_channels"), config.get("out_channels")
    if taken is not None and taken <= (given or taken):
        raise UnsupportedPipelineError(
            f"mask_image is given, and a {name} whose network takes {taken} channels, none beside the latents', blends the "
            "latents with the picture between two steps, which cannot be speculated; allowed is a network that takes mask "
            "and picture too"
        )


def check_scheduler(scheduler: Any) -> None:
    """Raise for a scheduler that a pipeline treats in a way of its own."""
    if "CogVideoXDPM" in type(scheduler).__name__:
        raise UnsupportedPipelineError(
            "scheduler is a CogVideoXDPMScheduler, which pipelines hand their last estimate and the timestep before, looked "
            "up by the number of the step; while speculating allowed is a CogVideoXDDIMScheduler, or another"
        )


def check_clipped_noise(scheduler: Any, eta: float | None, arguments: dict[str, Any]) -> None:
    """Raise where DDIM's step keeps the noise that the network saw though it clips x0: unless it is told to follow x0.

    Args:
        scheduler: the pipeline's own.
        eta: of its steps, if given.
        arguments: of its ``step``.
    """
    clips = "DDIM" in type(scheduler).__name__ and scheduler.config.get("clip_sample", False)
    if clips and eta and not arguments.get("use_clipped_model_output"):
        raise UnsupportedPipelineError(
            f"the scheduler clips the estimate of x0, of which DDIM's step with eta {eta} keeps the noise as it was: no "
            "table has that; allowed are use_clipped_model_output=True in the call, clip_sample=False in the scheduler's "
            "configuration, or no eta"
        )


GUIDERS = ("ClassifierFreeGuidance", "TangentialClassifierFreeGuidance")
"""Those whose guidance is a function of the two answers alone."""


def check_guiders(components: dict[str, Any]) -> None:
    """Raise for a guider that follows the number of the step, or remembers."""
    from diffusers.guiders.guider_utils import BaseGuidance

    for key, guider in components.items():
        if not isinstance(guider, BaseGuidance):
            continue
        name, start, stop = type(guider).__name__, guider._start, guider._stop
        if name not in GUIDERS:
            raise UnsupportedPipelineError(f"{key} is a {name}; while speculating allowed are {', '.join(GUIDERS)}")
        if start > 0 or stop < 1:
            raise UnsupportedPipelineError(
                f"{key} guides from {start} to {stop} of the steps; while speculating allowed is 0 to 1: it counts rounds"
            )
