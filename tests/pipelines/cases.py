"""All cases of the zoo, by name."""

from tests.pipelines import conditioned, controlled, counted, flows, images, videos  # noqa: F401
from tests.pipelines.parts import CASES

__all__ = ["CASES"]
