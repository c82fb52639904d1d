"""Many at once: a window over several processes, slots that samples join and leave, samples shared out in shards."""

from free.parallel.group import RankError
from free.parallel.window import WindowParallel

__all__ = ["RankError", "WindowParallel"]
