"""Speculation inside any diffusers pipeline. ``speculate.py`` has the door, ``loop.py`` the rounds."""

from free.pipelines.check import PipelineCheck, check_pipeline
from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.speculate import speculate
from free.pipelines.speculation import Speculation

__all__ = ["PipelineCheck", "Speculation", "UnsupportedPipelineError", "check_pipeline", "speculate"]
