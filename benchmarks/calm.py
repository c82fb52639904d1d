"""How much of the machine other processes take while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path


class Others:
    """What processes other than ``pids`` do, as Linux counts it; 0 where nobody counts."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._own = [Path(f"/proc/{pid}/stat") for pid in pids]
        self.begin()

    def begin(self) -> None:
        """From here on."""
        self._begin = time.perf_counter()
        self._before = self._ticks()

    def share(self) -> float:
        """Cores that they took since; a tick more or less is nothing."""
        ticks = self._ticks() - self._before - 1
        return max(0.0, ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - self._begin))

    def _ticks(self) -> int:
        """Of everybody but our own processes, the host of a virtual machine included."""
        everybody = Path("/proc/stat")
        if not everybody.exists():
            return 0
        # interrupts are nobody's, and may well be our own messages
        counts = [int(count) for count in everybody.read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _idle, _waiting, _interrupts, _soft_interrupts, stolen = counts
        own = 0
        for file in self._own:
            fields = file.read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])  # in its own code, and in the system's for it
        return user + nice + system + stolen - own
