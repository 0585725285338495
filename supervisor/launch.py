"""A start of vLLM. What vLLM is started with is found out anew each time: where the weights are, where caches go.

A start whose weights have to come from the hub is one process as any other: it downloads, then becomes vLLM
(weights/download.py). The next start finds them in the cache. To look for them is to read a volume, which may hang: so
each start is a call of its own (bounded.py), and the first one begins before there is an event loop.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from supervisor.engine.child import Child, Fork
from supervisor.engine.guard import Guard
from supervisor.engine.session import Session
from supervisor.engine.workspace import Workspace
from supervisor.lines import LineStyle
from supervisor.output import Output
from supervisor.repositories import Repository, fetch_command, find_companions, find_model, hub_env, needs_hub, python
from supervisor.settings.command import Command, Start, build
from supervisor.settings.settings import Settings
from supervisor.terminal import Terminal
from supervisor.weights import find, snapshot

# From the spawn on these signals must not end us, or vLLM would stay. SIGHUP is one of them: when the terminal is
# closed, vLLM does not get it in its own session.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
END_PATIENCE = 1.0  # at the end a start that is just being made is waited for so many seconds


class Forker(Protocol):
    """What makes starts faster (around/prefork.py), where something does."""

    def program(self, argv: tuple[str, ...]) -> tuple[str, ...]: ...  # returns what to run
    def fork(self, command: Command, output: int, errors: int) -> int | None: ...  # returns the pid of a fork, or None


class Launch:
    """A callable that starts vLLM, for the first time and after each crash. It may hang, and may be called from any
    thread. `close()` ends the vLLM that was started, and lets nothing more be started."""

    def __init__(
        self, settings: Settings, workspace: Workspace, guard: Guard, environ: Mapping[str, str], forker: Forker | None
    ) -> None:
        """`environ` is for vLLM, and yields to what the user set."""
        self.settings = settings
        self.workspace = workspace
        self.guard = guard
        self.environ = environ
        self.forker = forker
        self.mask = settings.mask  # there is only this one: keys that are read again are masked in every line
        knobs = settings.knobs
        self.style = LineStyle(
            self.mask,
            as_json=knobs.log_format == "json",
            queue_mode=settings.mode == "queue",
            colour=not settings.environ.get("NO_COLOR"),
            is_terminal=os.isatty(2),
            fold=knobs.log_level != "debug",
        )
        # On a terminal the start is shown below the log; "dumb" ones can't go back a line.
        terminal = all(map(os.isatty, (1, 2))) and settings.environ.get("TERM") != "dumb"
        has_foot = terminal and not self.style.as_json
        self.foot = Terminal(2, self.style.lost_line) if has_foot else None
        self.stderr = self.foot or Output(2, self.style.lost_line)
        self.stdout = self.stderr if terminal else Output(1, self.style.lost_line)
        self.command = build(settings, str(workspace.socket), str(workspace.temp_folder))  # this one is shown
        self.weights = find.Weights("not looked for yet")
        self._latest_child: Child | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self) -> Child:
        """Returns the child that was started. Raises OSError."""
        model = find_model(self.settings)
        self.weights = model.weights
        command = self._command(model)
        fork: Fork = self.forker.fork if self.forker is not None else lambda *_: None
        with self._lock:
            if self._closed:
                raise OSError("the server is shutting down")
            if self._latest_child is not None:
                self.workspace.clear()  # what the last one left
            self._latest_child = child = Child(command, self.style, (self.stdout, self.stderr), self._remember, fork)
        return child

    def _command(self, model: Repository) -> Command:
        socket, temporary = str(self.workspace.socket), str(self.workspace.temp_folder)
        environ = hub_env(self.settings.volume, self.settings.environ, temporary) | dict(self.environ)
        companions, settings = find_companions(self.settings)
        downloads = [each for each in (model, *companions) if each.weights.needs_download or each.weights.is_gguf]
        fetches = bool(downloads and python(settings))
        folder = model.weights.folder
        is_snapshot = model.weights.needs_download or (
            folder is not None and folder != Path(model.name) and snapshot.is_self_contained(folder)
        )
        offline = is_snapshot and not needs_hub(settings, companions)
        if offline and not fetches:
            environ["HF_HUB_OFFLINE"] = "1"
        command = build(settings, socket, temporary, Start(model.argument(can_fetch=fetches), environ))
        self.command = command if not fetches else build(self.settings, socket, temporary, Start(model.name, environ))
        argv = self.forker.program(command.argv) if self.forker is not None else command.argv
        prefix = (*fetch_command(settings, downloads, offline=offline), "--") if fetches else ()
        return dataclasses.replace(command, argv=(*prefix, *argv), fetches=fetches)

    def _remember(self, session: Session | None) -> None:
        """Tells the guard, and a later start, what would have to be removed if we died now."""
        self.guard.remember(session)
        self.workspace.remember(session)

    def close(self) -> None:
        """Ends the last child, if it is still there, and writes the output that is still to be written."""
        acquired = self._lock.acquire(timeout=END_PATIENCE)
        self._closed = True
        if acquired:
            self._lock.release()
        if self._latest_child is not None:
            self._latest_child.end_sync()
        for output in {self.stdout, self.stderr}:
            output.close()
