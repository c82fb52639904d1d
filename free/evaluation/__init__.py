"""What samplers are worth: compared, judged by real data, shown to be exact, reported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from free.evaluation.exactness import ExactnessCheck, check_exactness
    from free.evaluation.fidelity import Fidelity, evaluate

__all__ = ["ExactnessCheck", "Fidelity", "check_exactness", "evaluate"]


def __getattr__(name: str) -> Any:
    # when they are asked for: a room that imports all of itself makes circles
    if name in ("ExactnessCheck", "check_exactness"):
        from free.evaluation import exactness

        return getattr(exactness, name)
    if name in ("Fidelity", "evaluate"):
        from free.evaluation import fidelity

        return getattr(fidelity, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
