"""What runs once vLLM is spawned: the engine's owner, the gateway, the queue worker, on one event loop.

The wiring alone; each of them has a room of its own. It is imported while vLLM imports: that costs nobody any time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import uvloop

from supervisor import listen, logs
from supervisor.around.postmortem import PostMortem
from supervisor.around.start import waterfall
from supervisor.engine import gpu
from supervisor.engine.engine import RANKS_INTERVAL, Collaborators, Engine, Limits
from supervisor.engine.process import EngineProcess
from supervisor.gateway import tracing
from supervisor.gateway.access import AccessLog
from supervisor.gateway.app import Admission, Gateway
from supervisor.gateway.counts import Jobs
from supervisor.gateway.policy import Policy, Routes
from supervisor.gateway.server import GatewayServer
from supervisor.gateway.upstream import Probe, Upstream, UpstreamError
from supervisor.launch import SIGNALS, Spawn
from supervisor.listen import Listeners
from supervisor.settings import demo, explain
from supervisor.settings.command import served_name
from supervisor.settings.sources import Settings
from supervisor.settings.values import BadValue

if TYPE_CHECKING:
    from supervisor.queue.child import Queue

# The own routes and clients' last bytes, after the last relayed request is done.
CLOSE_PATIENCE = 5
KEEP_ALIVE = 75.0
PROBE_TIMEOUT = 10.0
# vLLM leaves 0.6 s to 2 s after SIGTERM when nothing is in flight; one that has not left by then is killed. Who wants a
# short drain wants a short end, too.
TERMINATE_PATIENCE = 10.0
# Of the drain timeout, at most: to report RunPod's jobs that are not done as failed.
LAST_REPORTS = 5.0
# States that the queue worker is told of; the end is told by `finish`.
TOLD = frozenset({"starting", "ready", "restarting", "failed"})


@dataclass(frozen=True, slots=True)
class Start:
    """What is there once vLLM is spawned. `pending` holds signals that nobody has heard yet."""

    settings: Settings
    spawn: Spawn
    process: EngineProcess
    listeners: Listeners
    pending: list[int]


def serve(start: Start) -> int:
    """Until it is told to stop, or has failed; returns the exit code."""
    log = logs.start(start.spawn.form, start.settings.knobs.log_level, start.spawn.stderr)

    async def run() -> int:
        return await Serving(start, log).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


class Serving:
    """One run of the supervisor. What the engine's owner asks of others (`Collaborators`) are its methods."""

    def __init__(self, start: Start, lines: logs.Log) -> None:
        self.log = logging.getLogger("supervisor")
        self.loop = asyncio.get_running_loop()
        self.settings = settings = start.settings
        self.knobs = settings.knobs
        self.spawn = start.spawn
        self.listeners = start.listeners
        self.pending = start.pending
        self.lines = lines
        self.foot = start.spawn.stderr if start.spawn.has_foot else None
        cluster = settings.cluster
        self.headless = cluster is not None and cluster.headless
        self.gpu_before: list[int] | None = None
        self.warm: EngineProcess | None = None  # has answered its first request
        self.invited = False
        self.traces: tracing.Tracing | None = None
        self.upstream = Upstream(str(start.spawn.workspace.socket), self.loop)
        self.facts = self._facts()
        self.engine = Engine(start.process, self._collaborators(), self._limits())
        self.gateway = self._gateway()
        self.access = AccessLog(self.loop, start.spawn.form, lines.later, self.knobs.log_level, self.gateway.run)
        if self.knobs.access_log:
            self.gateway.listeners += (self.access.ended,)
        self.queue: Queue | None = None
        self.group = asyncio.TaskGroup()

    def _facts(self) -> dict[str, object]:
        """What never changes, for /status."""
        settings, simulator = self.settings, self.listeners.simulator
        return {
            "model": settings.model.value,
            "mode": settings.mode,
            "vllm_version": settings.vllm.version,
            "simulator": f"http://{listen.address(simulator)}/v2/local" if simulator else None,
            "cluster": settings.cluster.name if settings.cluster else None,
            "weights": self.spawn.weights.source,
            "command": self.spawn.mask.command(self.spawn.command.argv),
            **explain.facts(settings),
        }

    def _collaborators(self) -> Collaborators:
        settings, mask = self.settings, self.spawn.mask
        postmortem = PostMortem(settings.cache, mask=mask, vllm=settings.vllm.version, facts=self.facts)
        return Collaborators(
            spawn=self.spawn,
            cleaned=self.cleaned,
            noted=self.spawn.note,
            health=self.health,
            metrics=self.metrics,
            traffic=lambda: self.gateway.traffic(),  # noqa: PLW0108  # there is no gateway yet
            drain=self.drain,
            changed=self.changed,
            failed=postmortem.write,
        )

    def _limits(self) -> Limits:
        knobs = self.knobs
        return Limits(
            startup=knobs.startup_timeout,
            # A headless rank answers nobody, and takes 13 s for an end of its own.
            terminate=0.0 if self.headless else min(knobs.drain_timeout, TERMINATE_PATIENCE),
            stall=knobs.stall_timeout,
            restarts=knobs.max_restarts,
            window=knobs.restart_window,
            stay_when_failed=knobs.on_failure == "serve",
            cluster=self.settings.cluster,
        )

    def _gateway(self) -> Gateway:
        settings, knobs = self.settings, self.knobs
        gateway = Gateway(
            self.upstream,
            self.engine,
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
            admission=Admission(knobs.max_concurrency or None, knobs.max_waiting),
            facts=self.facts,
            elsewhere=elsewhere(settings),
        )
        if knobs.response_cache:
            from supervisor.gateway.cache import Cache  # noqa: PLC0415  # for those who want it

            gateway.cache = Cache(gateway, knobs.response_cache)
        return gateway

    async def run(self) -> int:
        settings, listeners = self.settings, self.listeners
        self.gpu_before = await asyncio.to_thread(gpu.used)
        self._listen_for_signals()
        self._show_start()
        for warning in (*settings.warnings, *self.spawn.weights.passed_over):
            self.log.warning("%s", warning)
        where = f" on http://{listen.address(listeners.front)}" if listeners.front else ", for RunPod's queue"
        self.log.info("starting %s%s", settings.model.value, where)
        self.log.info("weights: %s", self.spawn.weights.source)
        server = GatewayServer(self.gateway, CLOSE_PATIENCE, certificate=self.knobs.tls_cert, key=self.knobs.tls_key)
        private = self.spawn.workspace.gateway
        sockets = [*listeners.gateway, listen.privately(private)]
        async with self.group as group:
            if tracing.endpoint(settings.environ):
                group.create_task(self._trace())
            if settings.mode == "queue":
                from supervisor.queue.child import Queue  # noqa: PLC0415  # in that mode only

                jobs = self.gateway.counts.jobs = Jobs()
                self.queue = Queue.start(settings, listeners.simulator, str(private), served_name(settings), jobs)
                group.create_task(self.queue.worker.run())
            group.create_task(server.run_on(sockets))
            if self.spawn.caches is not None:
                group.create_task(self._tend(self.spawn.caches.restore))
            code = await self.engine.run()
            self.gateway.feeds.end()
            if self.queue is not None:
                await self.queue.worker.finish(LAST_REPORTS, LAST_REPORTS)
                self.queue.stop()
            server.should_exit = True
        self.access.flush()
        if self.traces is not None:
            self.traces.close()
        self.upstream.close()
        return code

    def _listen_for_signals(self) -> None:
        for number in SIGNALS:
            self.loop.add_signal_handler(number, self.engine.stop, number)
        for heard in self.pending:
            self.engine.stop(heard)
        if any(keys.file for keys in self.settings.keys) and not sys.stdin.isatty():
            self.loop.add_signal_handler(signal.SIGHUP, self._read_keys_again)

    def _read_keys_again(self) -> None:
        """SIGHUP, where keys are in files and no terminal could have been closed."""
        try:
            api_keys, admin_keys = (keys.read_again().values for keys in self.settings.keys)
        except BadValue as error:
            self.log.error("the keys stay as they were: expected %s", error)  # noqa: TRY400  # no bug of ours
            return
        self.spawn.mask.add((*api_keys, *admin_keys))
        self.gateway.set_keys(api_keys, admin_keys)
        told = "keys read again: %d for clients, %d for administrators"
        self.log.info(told, len(api_keys), len(admin_keys))

    async def _trace(self) -> None:
        settings = self.settings
        about = {
            "vllm_supervisor.model": str(settings.model.value),
            "vllm_supervisor.vllm_version": settings.vllm.version,
        }
        self.traces = await asyncio.to_thread(tracing.start, settings.environ, about, self.spawn.mask)
        if self.traces is not None:
            self.gateway.listeners += (self.traces.ended,)

    async def _tend(self, what: Callable[[], str | None]) -> None:
        try:
            if told := await asyncio.to_thread(what):
                self.log.info("%s", told)
        except Exception:  # a comfort: whatever is wrong with it, it must not end what serves
            self.log.exception("compiled code could not be looked after")

    # What the engine's owner asks

    async def _ask(self, path: str, body: bytes = b"", *, patience: float = PROBE_TIMEOUT) -> tuple[int, bytes] | None:
        try:
            async with asyncio.timeout(patience):
                return await Probe.get(self.upstream, path, body)
        except (UpstreamError, TimeoutError):
            return None

    async def health(self) -> int | None:
        engine = self.engine
        if self.headless:  # no port, and no word of readiness but its log's
            return 200 if engine.ranks is not None and engine.ranks.loaded else None
        if not self.spawn.workspace.socket.exists():  # one stat, so that a loading vLLM costs no connection
            return None
        answer = await self._ask("/health")
        warms_up = self.settings.is_demo or self.knobs.warm_up
        if warms_up and answer is not None and answer[0] == 200 and self.warm is not self.spawn.latest:
            self.warm = self.spawn.latest
            engine.phases.warm_up()
            await self._ask("/v1/completions", demo.WARM_UP, patience=self.knobs.startup_timeout)
            answer = await self._ask("/health")  # it may not have lived through it
        return answer[0] if answer is not None else None

    async def metrics(self) -> bytes | None:
        answer = await self._ask("/metrics")
        return answer[1] if answer is not None and answer[0] == 200 else None

    async def cleaned(self) -> None:
        self.upstream.close()
        self.spawn.workspace.clear()
        await gpu.freed(self.gpu_before)

    async def drain(self) -> bool:
        if self.headless:
            return await self._rank_0_gone()
        patience = self.knobs.drain_timeout
        try:
            async with asyncio.timeout(patience):
                if self.queue is not None:
                    reserve = min(LAST_REPORTS, patience / 4)
                    await self.queue.worker.finish(patience - reserve, reserve)
                await self.gateway.drained()
        except TimeoutError:
            limit = f"{patience:g} s (SUPERVISOR_DRAIN_TIMEOUT)"
            self.log.warning("%d requests were still running after %s: cut", self.gateway.in_flight, limit)
            self.gateway.cut("The server shut down before this request was done.")
            return False
        return True

    async def _rank_0_gone(self) -> bool:
        """A whole that is stopped gets its signals at once: rank 0's last answers need this rank."""
        deadline = self.loop.time() + self.knobs.drain_timeout
        ranks = self.engine.ranks
        while ranks is not None and ranks.noted and self.loop.time() < deadline:
            if await asyncio.to_thread(ranks.gone) is not None:
                break
            await asyncio.sleep(RANKS_INTERVAL / 4)
        return True

    def changed(self) -> None:
        engine, queue = self.engine, self.queue
        self.gateway.engine_changed()
        if queue is not None and engine.state.value in TOLD:
            queue.worker.tell(engine.state.value)
        self._show_start()
        if not engine.ready:
            return
        if self.spawn.caches is not None:
            self.group.create_task(self._tend(self.spawn.caches.keep))
        self._tell_start()
        if not self.invited:
            self.invited = True
            simulator = queue.simulator.url if queue is not None and queue.simulator is not None else ""
            self.log.info("%s", invitation(self.settings, self.listeners, simulator))

    # How a start is told

    def _show_start(self) -> None:
        if self.foot is not None:
            self.foot.hide() if self.engine.ready or self.engine.over else self.foot.show(self._picture)

    def _tell_start(self) -> None:
        if self.foot is not None:
            self.lines.later(partial(self._picture, running=False))
        else:
            rows = self.engine.phases.as_rows()
            told = ", ".join(f"{row['name']} {row['seconds']:.1f} s" for row in rows)
            self.log.info("vLLM's start: %s", told, extra={"fields": {"phases": rows}})

    def _picture(self, *, running: bool = True) -> list[str]:
        phases = self.engine.phases
        if running and phases.finished is not None:
            return []  # between two runs
        return waterfall(phases.as_rows(), phases.progress, running=running, colour=self.spawn.form.colour)


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
        job = shlex.quote(json.dumps({"input": chat}))
        request = f"{simulator}/runsync -H 'Content-Type: application/json' -d {job}"
        return f"ready: a simulated RunPod endpoint, {simulator}\n  curl {request}"
    if settings.cluster is not None and settings.cluster.headless:
        return f"ready: {settings.cluster.name}; rank 0, at {settings.cluster.leader}, serves"
    if not listeners.gateway:
        return f"ready: up to {settings.knobs.max_concurrency} of RunPod's jobs at once"
    url = listen.url(listeners.gateway[0], "https" if settings.knobs.tls_cert else "http")
    body = shlex.quote(json.dumps({"model": served_name(settings), **chat}))
    key = ' -H "Authorization: Bearer $KEY"' if settings.knobs.api_keys else ""
    return f"ready: {url}\n  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {body}"
