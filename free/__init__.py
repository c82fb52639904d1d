"""Lossless speculative sampling for Diffusion Transformers.

``free.speculative_sample(model)`` draws samples with the law of the model's step-by-step sampler in far fewer rounds of
sequential work.
"""

from free.calibration import calibrate
from free.drafters import (
    Anchor,
    Drafter,
    FeatureDrafter,
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
from free.process import ReverseProcess
from free.sampling import SamplingOutput, ancestral_sample, speculative_sample
from free.statistics import SamplingStatistics
from free.targets import CallableTarget, DiTTarget, Target, TargetOutput, as_target
from free.version import __version__

__all__ = [
    "Anchor",
    "CallableTarget",
    "DiTTarget",
    "Drafter",
    "FeatureDrafter",
    "Fresh",
    "HoldOutput",
    "HoldX0",
    "LastWindow",
    "LinearDrafter",
    "ModelDrafter",
    "NonFiniteOutputError",
    "ReverseProcess",
    "SamplingOutput",
    "SamplingStatistics",
    "Situation",
    "StepDrafter",
    "Target",
    "TargetOutput",
    "__version__",
    "ancestral_sample",
    "as_drafter",
    "as_target",
    "calibrate",
    "speculative_sample",
]
