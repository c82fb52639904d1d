"""Lossless speculative sampling for Diffusion Transformers.

``free.speculative_sample(model)`` draws samples with the law of the model's step-by-step sampler in far fewer rounds of
sequential work.
"""

from typing import TYPE_CHECKING, Any

from free.drafters import (
    Anchor,
    Drafter,
    Fresh,
    Gains,
    HoldOutput,
    HoldX0,
    LastWindow,
    LinearDrafter,
    ModelDrafter,
    Situation,
    StepDrafter,
    as_drafter,
)
from free.processes import ReverseProcess
from free.sampling.loop import NonFiniteOutputError
from free.sampling.planning import plan_window
from free.sampling.relaxation import DraftedSteps, Relaxation
from free.sampling.samplers import SamplingOutput, ancestral_sample, speculative_sample
from free.sampling.statistics import SamplingStatistics
from free.sampling.variance import average_learned_variance
from free.targets import CallableTarget, DiTTarget, Target, TargetOutput, as_target
from free.version import __version__
from free.windows import WindowPlan

if TYPE_CHECKING:
    from free.drafters import FeatureDrafter
    from free.training.calibration import calibrate

__all__ = [
    "Anchor",
    "CallableTarget",
    "DiTTarget",
    "DraftedSteps",
    "Drafter",
    "FeatureDrafter",
    "Fresh",
    "Gains",
    "HoldOutput",
    "HoldX0",
    "LastWindow",
    "LinearDrafter",
    "ModelDrafter",
    "NonFiniteOutputError",
    "Relaxation",
    "ReverseProcess",
    "SamplingOutput",
    "SamplingStatistics",
    "Situation",
    "StepDrafter",
    "Target",
    "TargetOutput",
    "WindowPlan",
    "__version__",
    "ancestral_sample",
    "as_drafter",
    "as_target",
    "average_learned_variance",
    "calibrate",
    "plan_window",
    "speculative_sample",
]


def __getattr__(name: str) -> Any:
    # when they are asked for: they import diffusers' layers, which import triton
    if name == "FeatureDrafter":
        from free.drafters import FeatureDrafter

        return FeatureDrafter
    if name == "calibrate":
        from free.training.calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
