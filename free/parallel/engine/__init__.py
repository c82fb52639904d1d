"""``free.Engine``: a batch that samples join and leave. ``core.py`` has the engine, ``batch.py`` who is in it."""

from free.parallel.engine.core import Engine

__all__ = ["Engine"]
