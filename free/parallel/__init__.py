"""A target over several processes, as torchrun starts them."""

from free.parallel.group import RankError
from free.parallel.window import WindowParallel

__all__ = ["RankError", "WindowParallel"]
