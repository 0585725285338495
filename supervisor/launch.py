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

from supervisor.engine.child import Child
from supervisor.engine.guard import Guard
from supervisor.engine.session import Session
from supervisor.engine.workspace import Workspace
from supervisor.lines import Form
from supervisor.output import Output
from supervisor.settings import volume
from supervisor.settings.command import Command, Serving, build
from supervisor.settings.settings import Settings
from supervisor.terminal import Terminal
from supervisor.weights import find, snapshot

# From the spawn on they must not end us, or vLLM would stay. SIGHUP too: when the terminal is closed, vLLM in its own
# session would not hear of it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DOWNLOAD = Path(find.__file__).with_name("download.py")
# Options that may name another repository, which then has to be asked for.
OTHER_REPOSITORIES = (
    "tokenizer", "hf_config_path", "speculative_config", "spec_model", "lora_modules", "generation_config",
)  # fmt: skip
# Seconds without a byte until a download is begun again, where SUPERVISOR_STALL_TIMEOUT does not say less.
STALL = 60.0
# Seconds that the end waits for a start that is just being made.
END_PATIENCE = 1.0


def weights_of(settings: Settings) -> find.Weights:
    environ = {**volume.hub_environment(settings.volume, settings.environ, ""), **settings.environ}
    among = find.places(environ, settings.volume.path if settings.volume else None, settings.option("download_dir"))
    revision, load_format = settings.option("revision"), settings.option("load_format") or "auto"
    return find.find(str(settings.model.value), revision, str(load_format), among, environ)


def python(settings: Settings) -> tuple[str, ...]:
    """vLLM's Python; empty where `vllm` is started by something else, a shell's script or `nice`."""
    words = settings.vllm.python or ()
    return words if any(Path(word).name.startswith("python") for word in words) else ()


def fetch_command(settings: Settings, weights: find.Weights, *more: str) -> tuple[str, ...]:
    """The program that downloads the model, in vLLM's environment. `more`: what it becomes then."""
    words = [*python(settings), str(DOWNLOAD), "--repo", str(settings.model.value)]
    given = {"--revision": settings.option("revision"), "--cache": settings.option("download_dir"),
             "--load-format": settings.option("load_format"), "--have": weights.folder,
             "--stall": min(STALL, settings.knobs.stall_timeout or STALL)}  # fmt: skip
    words += [word for name, value in given.items() if value for word in (name, str(value))]
    return (*words, *more)


class Launch:
    """`launch()` starts vLLM: for the first time, and again after each crash. It may hang, and be called from any
    thread; `close()` ends what it started, and lets it start nothing more."""

    def __init__(self, settings: Settings, workspace: Workspace, guard: Guard, environ: Mapping[str, str]) -> None:
        """`environ`: for vLLM, below what the user set."""
        self.settings = settings
        self.workspace = workspace
        self.guard = guard
        self.environ = environ
        self.mask = settings.mask
        knobs = settings.knobs
        self.form = Form(
            settings.mask,
            as_json=knobs.log_format == "json",
            queue=settings.mode == "queue",
            colour=not settings.environ.get("NO_COLOR"),
            terminal=os.isatty(2),
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
        self.weights = weights = weights_of(self.settings)
        command = self._command(weights)
        with self._lock:
            if self._closed:
                raise OSError("the server is shutting down")
            if self._latest is not None:
                self.workspace.clear()  # of what that one left
            self._latest = child = Child(command, self.form, (self.stdout, self.stderr), self._remember)
        self.found(weights)
        return child

    def _command(self, weights: find.Weights) -> Command:
        settings, temporary = self.settings, str(self.workspace.temporary)
        environ = volume.hub_environment(settings.volume, settings.environ, temporary) | dict(self.environ)
        name = str(settings.model.value)
        fetches = weights.download and bool(python(settings))
        alone = not any(settings.option(key) for key in OTHER_REPOSITORIES)
        alone = alone and not settings.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
        model = name
        if fetches:
            model = "{weights}"
        elif weights.folder is not None and weights.folder != Path(name):
            model = str(weights.folder)
            if alone and snapshot.self_contained(weights.folder):
                environ["HF_HUB_OFFLINE"] = "1"
        self.command = build(settings, str(self.workspace.socket), temporary, Serving(model, environ))
        if not fetches:
            return self.command
        before = fetch_command(settings, weights, *(["--offline"] if alone else []), "--")
        whole = dataclasses.replace(self.command, argv=(*before, *self.command.argv), fetches=True)
        self.command = build(settings, str(self.workspace.socket), temporary, Serving(name, environ))
        return whole

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
