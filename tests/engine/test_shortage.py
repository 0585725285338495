"""A supervisor that gets no more files or threads, a signal that is ignored, a temporary folder with a long name."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from supervisor.engine import workspace
from supervisor.engine.workspace import temporary_folder
from tests.harness import Supervisor, session_pids, wait_until


class Starved(Supervisor):
    """One that ends by a fault that is not its own, and may say so."""

    def faults(self) -> list[str]:
        return []


@pytest.mark.slow  # it tries for ten seconds
def test_without_files_an_engine_that_crashed_is_not_left_behind() -> None:
    """The guard has files of its own. It was sent away though the end had failed, and two processes kept the GPU."""
    with Starved("m") as supervisor:
        supervisor.ready()
        pid = supervisor.engine()
        resource.prlimit(supervisor.process.pid, resource.RLIMIT_NOFILE, (4, 4))
        os.kill(pid, signal.SIGKILL)
        supervisor.exit_code(30)
        wait_until(lambda: not session_pids(pid), "the engine's parts to be gone")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_stays_ignored(number: int) -> None:
    ignored = f"trap '' {signal.Signals(number).name.removeprefix('SIG')}; exec \"$@\""
    with Supervisor("m", within=("sh", "-c", ignored, "sh")) as supervisor:
        supervisor.ready()
        supervisor.signal(number)
        assert supervisor.client.get("/health").status_code == 200
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code() == 0
        assert signal.Signals(number).name not in supervisor.output


@pytest.mark.parametrize("over", [0, 1, 5])
def test_a_long_name_of_the_temporary_folder(tmp_path: Path, over: int) -> None:
    length = workspace.LONGEST_FOLDER + over
    name = "/tmp/" + "é" * ((length - 5) // 2) + "a" * ((length - 5) % 2)
    folder = temporary_folder({"TMPDIR": name})
    assert (str(folder) == name) == (over == 0)
    made = workspace.Workspace(folder / f"{workspace.PREFIX}12345678")
    assert max(len(os.fsencode(made.gateway_socket)), len(os.fsencode(made.socket))) <= 107
