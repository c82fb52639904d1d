"""Speculation inside any diffusers pipeline. ``speculate.py`` has the door, ``loop.py`` the rounds, ``rows.py`` the trick."""

from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.speculate import speculate
from free.pipelines.speculation import Speculation

__all__ = ["Speculation", "UnsupportedPipelineError", "speculate"]
