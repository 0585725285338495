"""Tells by the kernel's own count whether it killed something here while a run lived, because memory ran out."""

from __future__ import annotations

from supervisor.around.machine import Machine
from supervisor.engine.run import Observer, Run


class OomKills(Observer):
    """Notes kills in this container at the run, before its end is judged; none, where the kernel does not tell."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.run: Run | None = None
        self.baseline = 0

    def run_began(self, run: Run) -> None:
        self.run, self.baseline = run, self._count_kills()

    def run_removed(self) -> None:
        if self.run is not None:
            self.run.oom_killed = self._count_kills() > self.baseline

    def _count_kills(self) -> int:
        return self.machine.cgroup().get("oom_kills", 0)
