"""Lossless speculative sampling for Diffusion Transformers.

``free.speculative_sample(model)`` draws samples with the law of the model's step-by-step sampler in far fewer rounds of
sequential work.

Names are imported when they are asked for: torch and diffusers take seconds, which ``free-dit --version`` need not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from free.version import __version__

if TYPE_CHECKING:
    from free.drafters import (
        Anchor,
        Drafter,
        FeatureDrafter,
        Fresh,
        Gains,
        HoldOutput,
        HoldX0,
        LastWindow,
        ModelDrafter,
        Situation,
        StepDrafter,
        as_drafter,
    )
    from free.parallel import RankError, WindowParallel
    from free.parallel.engine import Engine
    from free.pipelines import PipelineCheck, Speculation, UnsupportedPipelineError, check_pipeline, speculate
    from free.policies import Sampler
    from free.processes import ReverseProcess
    from free.sampling.loop import NonFiniteOutputError
    from free.sampling.planning import plan_window
    from free.sampling.relaxation import DraftedSteps, Relaxation
    from free.sampling.samplers import SamplingOutput, ancestral_sample, speculative_sample
    from free.sampling.statistics import SamplingStatistics
    from free.sampling.variance import average_learned_variance
    from free.targets import CallableTarget, DiTTarget, KnownEntries, Target, TargetOutput, as_target
    from free.windows import WindowPlan

__all__ = [
    "Anchor",
    "CallableTarget",
    "DiTTarget",
    "DraftedSteps",
    "Drafter",
    "Engine",
    "FeatureDrafter",
    "Fresh",
    "Gains",
    "HoldOutput",
    "HoldX0",
    "KnownEntries",
    "LastWindow",
    "ModelDrafter",
    "NonFiniteOutputError",
    "PipelineCheck",
    "RankError",
    "Relaxation",
    "ReverseProcess",
    "Sampler",
    "SamplingOutput",
    "SamplingStatistics",
    "Situation",
    "Speculation",
    "StepDrafter",
    "Target",
    "TargetOutput",
    "UnsupportedPipelineError",
    "WindowParallel",
    "WindowPlan",
    "__version__",
    "ancestral_sample",
    "as_drafter",
    "as_target",
    "average_learned_variance",
    "check_pipeline",
    "plan_window",
    "speculate",
    "speculative_sample",
]

_HOME = {
    "Anchor": "free.drafters",
    "Drafter": "free.drafters",
    "FeatureDrafter": "free.drafters",
    "Fresh": "free.drafters",
    "Gains": "free.drafters",
    "HoldOutput": "free.drafters",
    "HoldX0": "free.drafters",
    "LastWindow": "free.drafters",
    "ModelDrafter": "free.drafters",
    "Situation": "free.drafters",
    "StepDrafter": "free.drafters",
    "as_drafter": "free.drafters",
    "RankError": "free.parallel",
    "WindowParallel": "free.parallel",
    "Engine": "free.parallel.engine",
    "PipelineCheck": "free.pipelines",
    "Speculation": "free.pipelines",
    "UnsupportedPipelineError": "free.pipelines",
    "check_pipeline": "free.pipelines",
    "speculate": "free.pipelines",
    "Sampler": "free.policies",
    "ReverseProcess": "free.processes",
    "NonFiniteOutputError": "free.sampling.loop",
    "plan_window": "free.sampling.planning",
    "DraftedSteps": "free.sampling.relaxation",
    "Relaxation": "free.sampling.relaxation",
    "SamplingOutput": "free.sampling.samplers",
    "ancestral_sample": "free.sampling.samplers",
    "speculative_sample": "free.sampling.samplers",
    "SamplingStatistics": "free.sampling.statistics",
    "average_learned_variance": "free.sampling.variance",
    "CallableTarget": "free.targets",
    "DiTTarget": "free.targets",
    "KnownEntries": "free.targets",
    "Target": "free.targets",
    "TargetOutput": "free.targets",
    "as_target": "free.targets",
    "WindowPlan": "free.windows",
}
_ROOMS = (
    "data",
    "demo",
    "drafters",
    "evaluation",
    "parallel",
    "pipelines",
    "policies",
    "processes",
    "sampling",
    "targets",
    "training",
    "windows",
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _ROOMS:
        return import_module(f"free.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
