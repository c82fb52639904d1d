"""Lossless speculative sampling for Diffusion Transformers.

``free.speculative_sample(model)`` draws samples with the law of the model's step-by-step sampler in far fewer rounds of
sequential work.
"""

from typing import TYPE_CHECKING, Any

from free.calibration import calibrate
from free.drafters import (
    Anchor,
    Drafter,
    Fresh,
    HoldOutput,
    HoldX0,
    LastWindow,
    LinearDrafter,
    ModelDrafter,
    Situation,
    StepDrafter,
    as_drafter,
)
from free.loop import NonFiniteOutputError
from free.planner import plan_window
from free.process import ReverseProcess
from free.relaxation import DraftedSteps, Relaxation
from free.sampling import SamplingOutput, ancestral_sample, speculative_sample
from free.schedule import WindowPlan
from free.statistics import SamplingStatistics
from free.targets import CallableTarget, DiTTarget, Target, TargetOutput, as_target
from free.variance import average_learned_variance
from free.version import __version__

if TYPE_CHECKING:
    from free.drafters import FeatureDrafter

__all__ = [
    "Anchor",
    "CallableTarget",
    "DiTTarget",
    "DraftedSteps",
    "Drafter",
    "FeatureDrafter",
    "Fresh",
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
    if name == "FeatureDrafter":  # when it is asked for: diffusers' layers import triton
        from free.drafters import FeatureDrafter

        return FeatureDrafter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
