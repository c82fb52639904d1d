"""What is raised where speculation inside a pipeline would sample something else."""

from __future__ import annotations


class UnsupportedPipelineError(ValueError):
    """The pipeline, or an argument of its call, cannot be speculated; the message names it and says why."""
