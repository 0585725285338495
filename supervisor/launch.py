"""What vLLM is started with, found out anew at each start: where the weights are, where caches go. Then the start.

A start whose weights have to come from the hub is one process as any other: it downloads, then becomes vLLM
(weights/download.py). The next one finds them in the cache. The look for them reads a volume, which may hang: so each
start is a call of its own (bounded.py), the first one before there is an event loop.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from supervisor.engine.child import Child, Fork
from supervisor.engine.guard import Guard
from supervisor.engine.session import Session
from supervisor.engine.workspace import Workspace
from supervisor.lines import Form
from supervisor.output import Output
from supervisor.repositories import Repository, asks_the_hub, beside_the_model, fetch_command, hub_env, model_of, python
from supervisor.settings.command import Command, Start, build
from supervisor.settings.settings import Settings
from supervisor.terminal import Terminal
from supervisor.weights import find, snapshot

# From the spawn on they must not end us, or vLLM would stay. SIGHUP too: when the terminal is closed, vLLM in its own
# session would not hear of it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds that the end waits for a start that is just being made.
END_PATIENCE = 1.0


class Fast(Protocol):
    """How starts are made faster (around/prefork.py), where they are."""

    def program(self, argv: tuple[str, ...]) -> tuple[str, ...]: ...  # that is run in the place of this one
    def fork(self, command: Command, output: int, errors: int) -> int | None: ...  # or is not run at all


class Launch:
    """`launch()` starts vLLM: for the first time, and again after each crash. It may hang, and be called from any
    thread; `close()` ends what it started, and lets it start nothing more."""

    def __init__(
        self, settings: Settings, workspace: Workspace, guard: Guard, environ: Mapping[str, str], fast: Fast | None
    ) -> None:
        """`environ`: for vLLM, below what the user set."""
        self.settings = settings
        self.workspace = workspace
        self.guard = guard
        self.environ = environ
        self.fast = fast
        self.mask = settings.mask  # the only one: keys that are read again become secrets of every line
        knobs = settings.knobs
        self.form = Form(
            self.mask,
            as_json=knobs.log_format == "json",
            queue=settings.mode == "queue",
            colour=not settings.environ.get("NO_COLOR"),
            terminal=os.isatty(2),
            folds=knobs.log_level != "debug",
        )
        # On a terminal the start is shown below the log; "dumb" ones can't go back a line.
        terminal = all(map(os.isatty, (1, 2))) and settings.environ.get("TERM") != "dumb"
        has_foot = terminal and not self.form.as_json
        self.foot = Terminal(2, self.form.lost) if has_foot else None
        self.stderr = self.foot or Output(2, self.form.lost)
        self.stdout = self.stderr if terminal else Output(1, self.form.lost)
        self.command = build(settings, str(workspace.socket), str(workspace.temporary))  # as a person may see it
        self.weights = find.Weights("not looked for yet")
        self.found: Callable[[find.Weights], object] = lambda _: None  # called at each start, from its thread
        self._latest: Child | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self) -> Child:
        """Raises OSError."""
        model = model_of(self.settings)
        self.weights = weights = model.weights
        command = self._command(model)
        fork: Fork = self.fast.fork if self.fast is not None else lambda *_: None
        with self._lock:
            if self._closed:
                raise OSError("the server is shutting down")
            if self._latest is not None:
                self.workspace.clear()  # of what that one left
            self._latest = child = Child(command, self.form, (self.stdout, self.stderr), self._remember, fork)
        self.found(weights)
        return child

    def _command(self, model: Repository) -> Command:
        socket, temporary = str(self.workspace.socket), str(self.workspace.temporary)
        environ = hub_env(self.settings.volume, self.settings.environ, temporary) | dict(self.environ)
        beside, settings = beside_the_model(self.settings)
        wanted = [each for each in (model, *beside) if each.weights.download or each.weights.gguf]
        fetches = bool(wanted and python(settings))
        folder = model.weights.folder
        ours = model.weights.download or (
            folder is not None and folder != Path(model.name) and snapshot.self_contained(folder)
        )
        alone = ours and not asks_the_hub(settings, beside)
        if alone and not fetches:
            environ["HF_HUB_OFFLINE"] = "1"
        command = build(settings, socket, temporary, Start(model.stands_as(fetched=fetches), environ))
        self.command = command if not fetches else build(self.settings, socket, temporary, Start(model.name, environ))
        argv = self.fast.program(command.argv) if self.fast is not None else command.argv
        before = (*fetch_command(settings, wanted, offline=alone), "--") if fetches else ()
        return dataclasses.replace(command, argv=(*before, *argv), fetches=fetches)

    def _remember(self, session: Session | None) -> None:
        """Tells the guard, and a later start, what would have to be removed if we died now."""
        self.guard.watch(session)
        self.workspace.remember(session)

    def close(self) -> None:
        """Ends the last one, if it is still there, and writes what is still to be written."""
        taken = self._lock.acquire(timeout=END_PATIENCE)
        self._closed = True
        if taken:
            self._lock.release()
        if self._latest is not None:
            self._latest.end_now()
        for output in {self.stdout, self.stderr}:
            output.close()
