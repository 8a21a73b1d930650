"""The peak of a process's own memory, for benchmarks that give each contender a process."""

from __future__ import annotations

import threading
from pathlib import Path

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which malloc gives every freed tensor back at once: peaks are of what is in use,
not of fragments."""


class Watch:
    """Looks at this process's anonymous memory, again and again."""

    def __init__(self) -> None:
        self.first = self.peak = self._now()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> int:
        """Return the most that was seen, in bytes."""
        self._ends.set()
        self._thread.join()
        return self.peak

    def _look(self) -> None:
        while not self._ends.wait(0.003):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
