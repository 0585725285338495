"""`supervisor up`: binds the port, launches vLLM, then runs the gateway until the engine is gone.

The order matters: settings and sockets come first, so that every mistake of the user is told before anything starts;
then vLLM, whose start takes longest; and only then our own imports (uvicorn, uvloop), while vLLM loads. A launch whose
disk does not answer is left to itself: the port and SIGTERM do not wait for it.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor import packages
from supervisor.around.startup_plan import ENVIRONMENT, make_startup_plan
from supervisor.bounded import Call
from supervisor.engine.guard import Guard
from supervisor.engine.workspace import Workspace, clean_leftovers, temporary_folder
from supervisor.launch import SIGNALS, Launch
from supervisor.lines import LineStyle
from supervisor.listen import bind
from supervisor.repositories import python
from supervisor.settings.settings import Settings, SettingsError

if TYPE_CHECKING:
    from supervisor.around.caches import Caches
    from supervisor.around.prefork import Prefork

EXIT_UNFIT = 3  # it is the code of an engine that can't start: the same settings may do on another machine
# A launch is waited for this long: it takes some milliseconds, and our imports beside it would make it slower.
LAUNCH_PATIENCE = 0.3


def up(settings: Settings) -> int:
    """Serves until told to stop; returns the exit code. Raises SettingsError where it can't begin."""
    settings = packages.check(settings)
    base = temporary_folder(settings.environ)
    if settings.mode == "queue" and not _is_fit(settings, base):
        return EXIT_UNFIT
    listeners = bind(settings)
    # Signals wait here until the engine's owner listens.
    pending_signals: list[int] = []
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` asks
            signal.signal(number, lambda number, _: pending_signals.append(number))
    clean_leftovers(base)
    try:
        workspace = Workspace.create(base)
    except OSError as error:
        raise SettingsError([f"no folder can be made in {base} ({error.strerror}): set TMPDIR"]) from error
    guard = Guard(workspace)
    launch = forker = None
    try:
        caches, plan, forker = _make_caches(settings), make_startup_plan(settings), _make_prefork(settings, workspace)
        environ = caches.environment(settings.environ) if caches else {}
        launch = Launch(settings, workspace, guard, environ | (ENVIRONMENT if plan else {}), forker)
        first_call = Call(launch)
        try:
            if first_call.wait(LAUNCH_PATIENCE):
                first_call.result()
        except OSError as error:
            text = f"{settings.vllm.command[0]} can't be executed ({error.strerror}): check SUPERVISOR_VLLM"
            raise SettingsError([text]) from error
        from supervisor.serve import Start, serve  # noqa: PLC0415  # vLLM is importing by now: this costs no time

        return serve(Start(settings, launch, first_call, caches, plan, forker, listeners, pending_signals))
    finally:
        if launch is not None:
            launch.close()  # where this fails (no files, no threads), the guard is not dismissed, and does it
        if forker is not None:
            forker.close()
        workspace.remove()
        guard.dismiss()


def _make_caches(settings: Settings) -> Caches | None:
    """Returns a cache of compiled code where there is a volume, or a folder for it; else vLLM's own folders do."""
    is_kept = (settings.volume is not None and settings.volume.is_writable) or settings.knobs.cache_dir
    if not is_kept or settings.is_demo:
        return None
    from supervisor.around.caches import Caches  # noqa: PLC0415

    model, version = str(settings.model.value).strip("/"), settings.vllm.version
    try:
        return Caches(temporary_folder(settings.environ), settings.cache / "compiled", version=version, model=model)
    except OSError:  # a full disk, or somebody else's folder: vLLM's own folders do
        return None


def _make_prefork(settings: Settings, workspace: Workspace) -> Prefork | None:
    """Returns None for engines of several machines, and for Ray's: these start in ways of their own."""
    ray = settings.option("distributed_executor_backend") == "ray"
    if not settings.knobs.fast_restart or settings.cluster is not None or ray or sys.platform != "linux":
        return None
    from supervisor.around.prefork import make_prefork  # noqa: PLC0415

    return make_prefork(python(settings), settings.vllm.command, workspace.path)


def _is_fit(settings: Settings, folder: Path) -> bool:
    from supervisor.around import fitness  # noqa: PLC0415  # only queue mode needs it

    found = fitness.check(settings.environ, folder)
    if found is None:
        return True
    name, reason = found
    style = LineStyle(settings.mask, as_json=settings.knobs.log_format == "json", queue_mode=True)
    print(
        style.line("ERROR", "supervisor", f"this machine is not fit ({name}): {reason}", time.time()), file=sys.stderr
    )
    fitness.report(settings.environ, name, reason)
    return False
