"""What vLLM is started with, found out anew at each start: where the weights are, where caches go. Then the start.

A start whose weights have to come from the hub is one process as any other: it downloads, then becomes vLLM
(weights/download.py). The next one finds them in the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.engine.process import EngineProcess
from supervisor.engine.remains import Guard, Workspace
from supervisor.lines import Form
from supervisor.output import Output
from supervisor.settings import volume
from supervisor.settings.command import Command, Serving, build
from supervisor.settings.sources import Settings
from supervisor.weights import find, snapshot

if TYPE_CHECKING:
    from supervisor.around.caches import Caches
    from supervisor.around.prefetch import Prefetch

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
# Less is read faster than threads are started.
PREFETCH_FROM = 256_000_000


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


class Spawn:
    """Starts vLLM: `spawn()`, for the first time before the event loop, and again after each crash."""

    def __init__(self, settings: Settings, workspace: Workspace, guard: Guard, caches: Caches | None) -> None:
        self.settings = settings
        self.workspace = workspace
        self.guard = guard
        self.caches = caches
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
        self.has_foot = terminal and not self.form.as_json
        self.stderr = Output(2, self.form.lost)
        self.stdout = self.stderr if terminal else Output(1, self.form.lost)
        self.command = build(settings, str(workspace.socket), str(workspace.temporary))  # as a person may see it
        self.latest: EngineProcess | None = None
        self.weights = find.Weights("not looked for yet")
        self.prefetch: Prefetch | None = None
        self._noted: set[str] | None = None

    def __call__(self) -> EngineProcess:
        """Raises OSError."""
        self.weights = weights_of(self.settings)
        self.latest = EngineProcess(self._command(self.weights), self.form, (self.stdout, self.stderr))
        self._read_ahead(self.weights)
        self._noted = None
        self.note(self.latest)
        return self.latest

    def _command(self, weights: find.Weights) -> Command:
        settings, temporary = self.settings, str(self.workspace.temporary)
        environ = volume.hub_environment(settings.volume, settings.environ, temporary)
        if self.caches is not None:
            environ |= self.caches.environment(settings.environ)
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

    def _read_ahead(self, weights: find.Weights) -> None:
        if self.prefetch is not None:
            self.prefetch.stop()
        if weights.folder is None or weights.download:
            return
        load_format = str(self.settings.option("load_format") or "auto")
        with contextlib.suppress(OSError):  # what is missing, or no folder, is vLLM's to tell
            names = {path.name for path in weights.folder.iterdir()}
            wanted = snapshot.weights(names, load_format, lambda _: None) or ()
            files = [weights.folder / name for name in wanted if name in names]
            if sum(path.stat().st_size for path in files) >= PREFETCH_FROM:
                from supervisor.around.prefetch import Prefetch  # noqa: PLC0415  # for models that are worth it

                self.prefetch = Prefetch(files)

    def close(self) -> None:
        """Writes what is still to be written."""
        for output in {self.stdout, self.stderr}:
            output.close()

    def note(self, process: EngineProcess) -> None:
        """Tells the guard, and a later start, what would have to be removed."""
        if self._noted != process.segments:
            self._noted = set(process.segments)
            self.guard.watch(process.pid, process.segments)
            self.workspace.remember(process.pid, process.segments)
