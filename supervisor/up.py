"""`supervisor up`: binds the port, spawns vLLM, then runs the gateway until the engine is gone.

The order is the point: settings and sockets first, so that every mistake of the user is told before anything starts;
then vLLM, whose start is the long one; and only then our own imports (uvicorn, uvloop), while vLLM loads.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.engine.remains import Guard, Workspace, clean_leftovers, temporary_folder
from supervisor.settings.command import served_name
from supervisor.settings.sources import Settings, SettingsError
from supervisor.settings.values import BadValue
from supervisor.spawn import Spawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervisor.engine.caches import Caches
    from supervisor.engine.process import EngineProcess
    from supervisor.gateway.app import Gateway
    from supervisor.gateway.tracing import Tracing
    from supervisor.logs import Log
    from supervisor.queue.child import Queue
    from supervisor.settings.secrets import Mask

# SIGHUP too: when the terminal is closed, vLLM in its own session would not hear of it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BACKLOG = 2048
# The own routes and clients' last bytes, after the last relayed request is done.
CLOSE_PATIENCE = 5
KEEP_ALIVE = 75.0
PROBE_TIMEOUT = 10.0
# vLLM leaves 0.6 s to 2 s after SIGTERM when nothing is in flight; one that has not left by then is killed. Who wants a
# short drain wants a short end, too.
TERMINATE_PATIENCE = 10.0
# As of an engine that can't start: the same settings may do on another machine.
EXIT_UNFIT = 3
# Of the drain timeout, at most: to report RunPod's jobs that are not done as failed.
LAST_REPORTS = 5.0
# States that the queue worker is told of; the end is told by `finish`.
TOLD = frozenset({"starting", "ready", "restarting", "failed"})


def up(settings: Settings) -> int:
    """Serves until told to stop; returns the exit code. Raises SettingsError where it can't begin."""
    base = temporary_folder(settings.environ)
    if settings.mode == "queue" and not _fit(settings, base):
        return EXIT_UNFIT
    listeners = bind(settings)
    # From the spawn on a signal must not end us, or vLLM would stay: until the engine's owner listens, they wait here.
    pending: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: pending.append(number))
    clean_leftovers(base)
    try:
        workspace = Workspace.create(base)
    except OSError as error:
        raise SettingsError([f"no folder can be made in {base} ({error.strerror}): set TMPDIR"]) from error
    guard = Guard(workspace)
    try:
        spawn = Spawn(settings, workspace, guard, _caches(settings))
        try:
            process = spawn()
        except OSError as error:
            program = settings.vllm.command[0]
            raise SettingsError([f"{program} can't be executed ({error.strerror}): check SUPERVISOR_VLLM"]) from error
        try:
            return _serve(_Start(settings, spawn, process, listeners, pending))
        finally:
            assert spawn.latest is not None
            spawn.latest.clean_up()
            spawn.close()
    finally:
        workspace.remove()
        guard.dismiss()


def _caches(settings: Settings) -> Caches | None:
    """Compiled code is kept where there is a volume, or a folder for it; elsewhere vLLM's own folders do."""
    kept = (settings.volume is not None and settings.volume.writable) or settings.knobs.cache_dir
    if not kept or settings.is_demo:
        return None
    from supervisor.engine.caches import Caches  # noqa: PLC0415

    model, version = str(settings.model.value).strip("/"), settings.vllm.version
    try:
        return Caches(temporary_folder(settings.environ), settings.cache / "compiled", version=version, model=model)
    except OSError:  # a full disk, or somebody else's folder: vLLM's own do
        return None


def _fit(settings: Settings, folder: Path) -> bool:
    from supervisor.queue import fitness  # noqa: PLC0415  # in queue mode only

    found = fitness.check(settings.environ, folder)
    if found is None:
        return True
    name, reason = found
    print(f"supervisor: this machine is not fit ({name}): {reason}", file=sys.stderr)
    fitness.report(settings.environ, name, reason)
    return False


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets. `front` is where clients come: the gateway's first, or the simulated RunPod's."""

    gateway: tuple[socket.socket, ...]
    simulator: socket.socket | None = None

    @property
    def front(self) -> socket.socket | None:
        return self.simulator or next(iter(self.gateway), None)


def bind(settings: Settings) -> Listeners:
    """The listening sockets. Raises SettingsError for a port that is taken or an address that is not ours.

    In queue mode the gateway has a port only where one was asked for: on RunPod's Hub, port 80 is the test runner's.
    Outside of RunPod the port is the simulator's.
    """
    knobs = settings.knobs
    health = [_listen(knobs.host, knobs.port_health)] if knobs.port_health not in (None, knobs.port) else []
    if settings.mode == "queue":
        if not settings.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
            return Listeners(tuple(health), simulator=_listen(knobs.host, knobs.port))
        if not settings.asked_for("PORT"):
            return Listeners(tuple(health))
    return Listeners((_listen(knobs.host, knobs.port), *health))


def _listen(host: str, port: int | None) -> socket.socket:
    assert port is not None
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise SettingsError(
            [f"can't listen on {host}, port {port} ({why}): set PORT (or --port), or SUPERVISOR_HOST"]
        ) from error
    listener.setblocking(False)
    return listener


def _listen_privately(path: Path) -> socket.socket:
    """For the queue worker and `supervisor status`. The folder is ours alone (0700)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


@dataclass(frozen=True, slots=True)
class _Start:
    """What is there once vLLM is spawned. `pending` holds signals that nobody has heard yet."""

    settings: Settings
    spawn: Spawn
    process: EngineProcess
    listeners: Listeners
    pending: list[int]


def _serve(start: _Start) -> int:
    import asyncio  # noqa: PLC0415  # from here on vLLM is importing too: this costs no time of the user's

    import uvloop  # noqa: PLC0415

    from supervisor import logs  # noqa: PLC0415

    knobs = start.settings.knobs
    log = logs.start(start.spawn.form, knobs.log_level, start.spawn.stderr)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(start, log))


async def _run(start: _Start, lines: Log) -> int:
    import asyncio  # noqa: PLC0415
    import logging  # noqa: PLC0415
    from functools import partial  # noqa: PLC0415

    from supervisor.engine import gpu  # noqa: PLC0415
    from supervisor.engine.engine import RANKS_INTERVAL, Collaborators, Engine, Limits  # noqa: PLC0415
    from supervisor.engine.postmortem import PostMortem  # noqa: PLC0415
    from supervisor.gateway import tracing  # noqa: PLC0415
    from supervisor.gateway.access import AccessLog  # noqa: PLC0415
    from supervisor.gateway.app import Admission, Gateway  # noqa: PLC0415
    from supervisor.gateway.counts import Jobs  # noqa: PLC0415
    from supervisor.gateway.policy import Policy, Routes  # noqa: PLC0415
    from supervisor.gateway.server import GatewayServer  # noqa: PLC0415
    from supervisor.gateway.upstream import Probe, Upstream, UpstreamError  # noqa: PLC0415
    from supervisor.settings import demo, explain  # noqa: PLC0415
    from supervisor.terminal import waterfall  # noqa: PLC0415

    settings, knobs, listeners, workspace = start.settings, start.settings.knobs, start.listeners, start.spawn.workspace
    log = logging.getLogger("supervisor")
    loop = asyncio.get_running_loop()
    upstream = Upstream(str(workspace.socket), loop)
    queue: Queue | None = None
    gpu_before = await asyncio.to_thread(gpu.used)

    async def ask(path: str, body: bytes = b"", *, patience: float = PROBE_TIMEOUT) -> tuple[int, bytes] | None:
        try:
            async with asyncio.timeout(patience):
                return await Probe.get(upstream, path, body)
        except (UpstreamError, TimeoutError):
            return None

    caches = start.spawn.caches

    async def tended(what: Callable[[], str | None]) -> None:
        try:
            if told := await asyncio.to_thread(what):
                log.info("%s", told)
        except Exception:  # a comfort: whatever is wrong with it, it must not end what serves
            log.exception("compiled code could not be looked after")

    warms_up = settings.is_demo or knobs.warm_up
    warm: EngineProcess | None = None

    cluster = settings.cluster

    async def health() -> int | None:
        if cluster is not None and cluster.headless:  # no port, and no word of readiness but its log's
            return 200 if engine.ranks is not None and engine.ranks.loaded else None
        if not workspace.socket.exists():  # one stat, so that a loading vLLM costs no connection
            return None
        nonlocal warm
        answer = await ask("/health")
        if warms_up and answer is not None and answer[0] == 200 and warm is not start.spawn.latest:
            warm = start.spawn.latest
            engine.phases.warm_up()
            await ask("/v1/completions", demo.WARM_UP, patience=knobs.startup_timeout)
            answer = await ask("/health")  # it may not have lived through it
        return answer[0] if answer is not None else None

    async def metrics() -> bytes | None:
        answer = await ask("/metrics")
        return answer[1] if answer is not None and answer[0] == 200 else None

    async def cleaned() -> None:
        upstream.close()
        workspace.clear()
        await gpu.freed(gpu_before)

    async def rank_0_gone() -> bool:
        """A whole that is stopped gets its signals at once: rank 0's last answers need this rank."""
        deadline = loop.time() + knobs.drain_timeout
        ranks = engine.ranks
        while ranks is not None and ranks.noted and loop.time() < deadline:
            if await asyncio.to_thread(ranks.gone) is not None:
                break
            await asyncio.sleep(RANKS_INTERVAL / 4)
        return True

    async def drain() -> bool:
        if cluster is not None and cluster.headless:
            return await rank_0_gone()
        try:
            async with asyncio.timeout(knobs.drain_timeout):
                if queue is not None:
                    reserve = min(LAST_REPORTS, knobs.drain_timeout / 4)
                    await queue.worker.finish(knobs.drain_timeout - reserve, reserve)
                await gateway.drained()
        except TimeoutError:
            limit = f"{knobs.drain_timeout:g} s (SUPERVISOR_DRAIN_TIMEOUT)"
            log.warning("%d requests were still running after %s: cut", gateway.in_flight, limit)
            gateway.cut("The server shut down before this request was done.")
            return False
        return True

    foot = start.spawn.stderr if start.spawn.has_foot else None

    def picture(*, running: bool = True) -> list[str]:
        phases = engine.phases
        if running and phases.finished is not None:
            return []  # between two runs
        return waterfall(phases.as_rows(), phases.progress, running=running, colour=start.spawn.form.colour)

    def tell_start() -> None:
        if foot is not None:
            lines.later(partial(picture, running=False))
        else:
            rows = engine.phases.as_rows()
            told = ", ".join(f"{row['name']} {row['seconds']:.1f} s" for row in rows)
            log.info("vLLM's start: %s", told, extra={"fields": {"phases": rows}})

    invited = False

    def changed() -> None:
        nonlocal invited
        gateway.engine_changed()
        if queue is not None and engine.state.value in TOLD:
            queue.worker.tell(engine.state.value)
        if engine.ready and caches is not None:
            group.create_task(tended(caches.keep))
        if foot is not None:
            foot.hide() if engine.ready or engine.over else foot.show(picture)
        if engine.ready:
            tell_start()
        if engine.ready and not invited:
            invited = True
            log.info("%s", invitation(settings, listeners, queue.simulator.url if queue and queue.simulator else ""))

    facts = {
        "model": settings.model.value,
        "mode": settings.mode,
        "vllm_version": settings.vllm.version,
        "simulator": f"http://{address(listeners.simulator)}/v2/local" if listeners.simulator else None,
        "cluster": cluster.name if cluster else None,
        "weights": start.spawn.weights.source,
        "command": start.spawn.mask.command(start.spawn.command.argv),
        **explain.facts(settings),
    }
    engine = Engine(
        start.process,
        Collaborators(
            spawn=start.spawn,
            cleaned=cleaned,
            noted=start.spawn.note,
            health=health,
            metrics=metrics,
            traffic=lambda: gateway.traffic(),  # noqa: PLW0108  # there is no gateway yet
            drain=drain,
            changed=changed,
            failed=PostMortem(settings.cache, mask=start.spawn.mask, vllm=settings.vllm.version, facts=facts).write,
        ),
        Limits(
            startup=knobs.startup_timeout,
            # A headless rank answers nobody, and takes 13 s for an end of its own.
            terminate=0.0 if cluster and cluster.headless else min(knobs.drain_timeout, TERMINATE_PATIENCE),
            stall=knobs.stall_timeout,
            restarts=knobs.max_restarts,
            window=knobs.restart_window,
            stay_when_failed=knobs.on_failure == "serve",
            cluster=cluster,
        ),
    )
    if foot is not None:
        foot.show(picture)
    admission = Admission(knobs.max_concurrency or None, knobs.max_waiting)
    gateway = Gateway(
        upstream,
        engine,
        Policy(
            *(keys.values for keys in settings.keys),
            routes=Routes(knobs.allow_routes or (), str(settings.option("root_path") or "")),
            rate=knobs.rate_limit,
            max_body=knobs.max_body,
            timeout=knobs.request_timeout or math.inf,
        ),
        hold_timeout=knobs.hold_timeout,
        client_timeout=knobs.client_timeout or math.inf,
        keep_alive=KEEP_ALIVE,
        admission=admission,
        facts=facts,
        elsewhere=elsewhere(settings),
    )
    if knobs.response_cache:
        from supervisor.gateway.cache import Cache  # noqa: PLC0415  # for those who want it

        gateway.cache = Cache(gateway, knobs.response_cache)
    access = AccessLog(loop, start.spawn.form, lines.later, knobs.log_level, gateway.run)
    if knobs.access_log:
        gateway.listeners += (access.ended,)
    for number in SIGNALS:
        loop.add_signal_handler(number, engine.stop, number)
    for heard in start.pending:
        engine.stop(heard)
    for warning in (*settings.warnings, *start.spawn.weights.passed_over):
        log.warning("%s", warning)
    where = f" on http://{address(listeners.front)}" if listeners.front else ""
    log.info("starting %s%s", settings.model.value, where or ", for RunPod's queue")
    log.info("weights: %s", start.spawn.weights.source)
    if any(keys.file for keys in settings.keys) and not sys.stdin.isatty():
        loop.add_signal_handler(signal.SIGHUP, _read_keys_again, settings, gateway, start.spawn.mask)
    server = GatewayServer(gateway, CLOSE_PATIENCE, certificate=knobs.tls_cert, key=knobs.tls_key)
    sockets = [*listeners.gateway, _listen_privately(workspace.gateway)]
    traces: Tracing | None = None

    async def trace() -> None:
        nonlocal traces
        about = {
            "vllm_supervisor.model": str(settings.model.value),
            "vllm_supervisor.vllm_version": settings.vllm.version,
        }
        traces = await asyncio.to_thread(tracing.start, settings.environ, about, start.spawn.mask)
        if traces is not None:
            gateway.listeners += (traces.ended,)

    async with asyncio.TaskGroup() as group:
        if tracing.endpoint(settings.environ):
            group.create_task(trace())
        if settings.mode == "queue":
            from supervisor.queue.child import Queue  # noqa: PLC0415

            jobs = gateway.counts.jobs = Jobs()
            queue = Queue.start(settings, listeners.simulator, str(workspace.gateway), served_name(settings), jobs)
            group.create_task(queue.worker.run())
        group.create_task(server.run_on(sockets))
        if caches is not None:
            group.create_task(tended(caches.restore))
        code = await engine.run()
        gateway.feeds.end()
        if queue is not None:
            await queue.worker.finish(LAST_REPORTS, LAST_REPORTS)
            queue.stop()
        server.should_exit = True
    access.flush()
    if traces is not None:
        traces.close()
    upstream.close()
    return code


def _read_keys_again(settings: Settings, gateway: Gateway, mask: Mask) -> None:
    """SIGHUP, where keys are in files and no terminal could have been closed."""
    import logging  # noqa: PLC0415

    log = logging.getLogger("supervisor")
    try:
        api_keys, admin_keys = (keys.read_again().values for keys in settings.keys)
    except BadValue as error:
        log.error("the keys stay as they were: expected %s", error)  # noqa: TRY400  # no bug of ours
        return
    mask.add((*api_keys, *admin_keys))
    gateway.set_keys(api_keys, admin_keys)
    log.info("keys read again: %d for clients, %d for administrators", len(api_keys), len(admin_keys))


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def elsewhere(settings: Settings) -> str | None:
    """Where requests belong, if not here."""
    cluster = settings.cluster
    if cluster is None or not cluster.headless:
        return None
    return f"This is {cluster.name}: rank 0, at {cluster.leader}, serves the model."


def invitation(settings: Settings, listeners: Listeners, simulator: str) -> str:
    """What to do now that it serves: the URL, and a line to paste."""
    chat = {"messages": [{"role": "user", "content": "What are you?"}]}
    if simulator:
        request = (
            f"{simulator}/runsync -H 'Content-Type: application/json' -d {shlex.quote(json.dumps({'input': chat}))}"
        )
        return f"ready: a simulated RunPod endpoint, {simulator}\n  curl {request}"
    if settings.cluster is not None and settings.cluster.headless:
        return f"ready: {settings.cluster.name}; rank 0, at {settings.cluster.leader}, serves"
    if not listeners.gateway:
        return f"ready: up to {settings.knobs.max_concurrency} of RunPod's jobs at once"
    host, port = listeners.gateway[0].getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
        host = "127.0.0.1"
    scheme = "https" if settings.knobs.tls_cert else "http"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    body = json.dumps({"model": served_name(settings), **chat})
    key = ' -H "Authorization: Bearer $KEY"' if settings.knobs.api_keys else ""
    request = f"{url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    return f"ready: {url}\n  curl {request}"
