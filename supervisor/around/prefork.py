"""Forks the next engine from a process that has vLLM's modules imported, where there is one (zygote.py).

A start is `zygote.py ... vllm serve`, which leaves that process behind. After a start that fails before it serves
comes a plain `vllm serve`; after another such failure, all further starts are plain.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisor.around import zygote
from supervisor.around.machine import Machine
from supervisor.engine.run import Observer, Run
from supervisor.settings.command import Command

if TYPE_CHECKING:
    from supervisor.engine.diagnosis import Diagnosis

PATIENCE = 5.0  # the zygote has so many seconds for an answer, which takes 0.1 s
MIN_MEMORY_BYTES = 2_000_000_000  # so much has to be free: what a zygote does not share with an engine is 0.2 to 0.5 GB
MAX_FAILURES = 2  # these are starts that failed before they served, where none between them came to serve
# Such an error is no mistake of the user's where we forked.
FORK_ERROR = re.compile("forked subprocess|fork method|after fork", re.I)
NO_FORK, SILENCE = "vLLM is started anew, not forked: %s", "the process that keeps its modules imported does not answer"
UCRED = struct.Struct("3i")  # pid, uid, gid


class Zygote:
    """The zygote, as it is seen from here, is a connection that it made, and our child by adoption."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises OSError or ValueError where the zygote is gone, or says nothing; then it is ended."""
        self.connection = connection
        connection.settimeout(PATIENCE)
        pid, _, _ = UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        self.pidfd = os.pidfd_open(pid)
        try:
            self.hello = zygote.receive(connection)
        except (OSError, ValueError):
            self.end()
            raise

    def fork(self, request: object, descriptors: Sequence[int]) -> dict[str, Any]:
        """Returns `{"pid": ...}` of the child that is ours now, or `{"why": ...}`."""
        with contextlib.suppress(OSError, ValueError):
            zygote.send(self.connection, request, descriptors)
            if answer := zygote.receive(self.connection):
                return answer[0]
        return {"why": SILENCE}

    def end(self) -> None:
        """Ends the zygote at once, even if it hangs."""
        self.connection.close()
        with contextlib.suppress(OSError):  # it was reaped; or is no child of ours, and not ours to kill
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)  # what was stopped ends as well
        os.close(self.pidfd)


class Prefork(Observer):
    """`program` and `fork` are for a start, and are called from its thread; there is one start at a time."""

    def __init__(self, python: Sequence[str], script: str, folder: Path) -> None:
        """`script` is vLLM's; `folder` is where the zygote finds us. Raises OSError."""
        self.log = logging.getLogger("supervisor.prefork")
        address = folder / "zygote.sock"
        self.prefix = (*python, str(Path(zygote.__file__)), str(address), script)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(address))
        self.listener.listen()
        self.listener.setblocking(False)
        self.zygote: Zygote | None = None
        self.is_next_plain = False  # the next start is a plain `vllm serve`
        self.failures = 0
        self.has_served = False

    def program(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        """Returns what is run in the place of `vllm serve ...`."""
        if self.is_next_plain or self.failures >= MAX_FAILURES:
            self._accept()
            self.end_zygote()
            return argv
        if Machine().spare_memory() < MIN_MEMORY_BYTES:
            self.log.debug("memory is short: vLLM is started as it is")
            return argv
        return (*self.prefix, *argv[1:])

    def fork(self, command: Command, output: int, errors: int) -> int | None:
        """Returns the pid of the start, which is our child by adoption; None where the command has to be run."""
        prefix_length = len(self.prefix)
        self._accept()
        if command.argv[:prefix_length] != self.prefix or self.zygote is None:
            return None
        request = {"argv": command.argv[prefix_length:], "environ": dict(command.environ), "parent": os.getpid()}
        answer = self.zygote.fork(request, (output, errors))
        pid = answer.get("pid")
        if isinstance(pid, int):
            self.log.info("vLLM is forked: its modules were kept imported")
            return pid
        self.log.info(NO_FORK, answer.get("why"))
        self.end_zygote()
        return None

    def _accept(self) -> None:
        """Takes the latest zygote. Each comes by itself, when it is made."""
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self.listener.accept()
                self.end_zygote()
                try:
                    self.zygote = Zygote(connection)
                except (OSError, ValueError):
                    self.log.info(NO_FORK, SILENCE)
                else:
                    self.log.debug("modules are kept imported; threads beside that: %s", self.zygote.hello)

    def end_zygote(self) -> None:
        zygote, self.zygote = self.zygote, None  # once: a start's thread may do it while `close` does
        if zygote is not None:
            zygote.end()

    def close(self) -> None:
        """Ends the zygote and the listener: nothing is left of them."""
        with contextlib.suppress(OSError):
            self._accept()
        self.end_zygote()
        self.listener.close()

    # What the engine tells

    async def run_answered(self, run: Run) -> None:
        self.is_next_plain, self.has_served = False, True
        if self._has_zygote(run):
            self.failures = 0

    def run_judged(self, run: Run, diagnosis: Diagnosis) -> None:
        if run.was_ready or not self._has_zygote(run):
            return
        if run.end_reason is None and run.code == -signal.SIGKILL:
            return  # somebody else did it: nothing of ours ends so
        is_certain = diagnosis.known and diagnosis.permanent and not diagnosis.vague
        if is_certain and not self.has_served and not any(FORK_ERROR.search(line) for line in run.log):
            return  # it is a mistake of the user's, who is not to wait for it twice
        self.is_next_plain = run.has_suspect_start = True
        self.failures += 1
        scope = "all further ones are" if self.failures >= MAX_FAILURES else "the next one is"
        self.log.warning("a start with modules kept imported failed: %s a plain `vllm serve`", scope)

    def _has_zygote(self, run: Run) -> bool:
        return run.child is not None and self.prefix[-2] in run.child.command.argv


def make_prefork(python: Sequence[str], command: Sequence[str], folder: Path) -> Prefork | None:
    """Returns a Prefork where `vllm` is the script that pip writes; else None."""
    with contextlib.suppress(OSError, ValueError):
        if python and len(command) == 1 and zygote.SCRIPT_PATTERN.search(Path(command[0]).read_text()):
            return Prefork(python, command[0], folder)
    return None
