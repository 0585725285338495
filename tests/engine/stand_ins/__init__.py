"""What stands for hung drivers and disks, for strangers and for other users, in the tests beside this folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from tests.harness import Supervisor, wait_until

STAND_INS = Path(__file__).parent


def missing(text: str) -> NoReturn:
    """Skips, loudly; where it could have been installed, fails."""
    if "CI" in os.environ and os.geteuid() == 0 and Path("/etc/debian_version").exists():
        pytest.fail(text)
    pytest.skip(text)


class Watched(Supervisor):
    """One in whose log a traceback is a failure."""

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        assert kind is not None or "Traceback" not in self.output, self.output[-5000:]

    def leaves(self, code: int, seconds: float, why: str) -> None:
        wait_until(lambda: self.process.poll() is not None, f"its end, {why}", seconds)
        assert self.exit_code() == code
