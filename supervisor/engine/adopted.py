"""An adopted process was forked by somebody else; it is our child because we adopt orphans (PR_SET_CHILD_SUBREAPER)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import IO

LOOK_INTERVAL = 0.005  # seconds between two looks at the child: there is no other way to wait for it with a time limit


class AdoptedProcess:
    """As much of `subprocess.Popen` as an engine needs."""

    def __init__(self, pid: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid = pid
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end, and returns the exit code, -N for signal N. Raises TimeoutExpired."""
        deadline = time.monotonic() + timeout if timeout is not None else None
        while self.returncode is None:
            pid, status = self.pid, 0
            with contextlib.suppress(ChildProcessError):  # somebody else reaped it: as for Popen, it went well
                pid, status = os.waitpid(self.pid, os.WNOHANG if deadline is not None else 0)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            else:
                time.sleep(LOOK_INTERVAL)
        return self.returncode
