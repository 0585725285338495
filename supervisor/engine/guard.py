"""The guard removes what a supervisor leaves that was killed without a word.

It is a fork made before anything else, and sleeps on a pipe. When the supervisor dies, it removes the session that it
was told of last, and the workspace. If the guard was killed as well, the next start does this (workspace.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal

from supervisor.engine.session import Session
from supervisor.engine.workspace import Workspace


class Guard:
    """`Guard(workspace)` forks; `remember` tells it what to remove; `dismiss` sends it away."""

    def __init__(self, workspace: Workspace) -> None:
        reader, self.pipe = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _stand_guard(reader, workspace)
            finally:
                os._exit(0)
        os.close(reader)

    def remember(self, session: Session | None) -> None:
        """Tells the guard which session to remove; None: no engine lives, and there is nothing to kill."""
        self._send_note(session.to_note() if session is not None else {})

    def dismiss(self) -> None:
        self._send_note(None)
        os.close(self.pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _send_note(self, note: object) -> None:
        with contextlib.suppress(OSError):  # somebody killed it: the next start cleans up instead
            os.write(self.pipe, json.dumps(note).encode() + b"\n")


def _stand_guard(reader: int, workspace: Workspace) -> None:
    os.setsid()  # Ctrl-C and a closing terminal are for the supervisor
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # It must hold nothing open that somebody waits to see closed: our output, the listening sockets, its own pipe.
    os.dup2(reader, 0)
    os.dup2(workspace.lock, 3)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.closerange(4, 1 << 20)
    buffer = b""
    while data := os.read(0, 65536):
        buffer = (buffer + data)[-(1 << 20) :]  # the last line is all that counts
    lines = buffer.split(b"\n")
    note = json.loads(lines[-2]) if len(lines) > 1 else {}
    if note:
        Session.from_note(note).remove()
    if note is not None:
        workspace.remove()
