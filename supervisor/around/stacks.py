"""Logs where an engine that hangs stands, before it is killed; only where py-spy is installed."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Mapping

from supervisor.bounded import run_bounded
from supervisor.engine.run import Observer, Run

PATIENCE = 15.0


class Stacks(Observer):
    """Logs the stacks of each of the engine's processes."""

    def __init__(self) -> None:
        self.log = logging.getLogger("supervisor.engine")

    async def run_hung(self, run: Run) -> None:
        program = shutil.which("py-spy")
        if program is None or run.child is None:
            return
        try:
            parts = await run.child.survey()
            await run_bounded(PATIENCE, lambda: self._dump(program, parts))
        except TimeoutError:
            self.log.warning("the stacks were not to be had in %g s", PATIENCE)

    def _dump(self, program: str, parts: Mapping[int, str]) -> None:
        for pid, name in parts.items():
            try:
                result = subprocess.run(
                    [program, "dump", "--nonblocking", "--pid", str(pid)],
                    capture_output=True, errors="replace", timeout=10, check=False,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                self.log.warning("no stacks of %s: %s", name, error)
                continue
            self.log.warning("stacks of %s (pid %d):\n%s", name, pid, result.stdout or result.stderr)
