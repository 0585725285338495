"""The wiring of what runs once vLLM is spawned: the engine's owner, the gateway, the queue worker, on one event loop.

Each of them has a room of its own. This is imported while vLLM imports its own modules, which costs nobody any time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import uvloop

from supervisor import explain, listen, logs
from supervisor.around.account import Account
from supervisor.around.caches import CacheKeeper, Caches
from supervisor.around.gpus import GpuMemory
from supervisor.around.media import MediaNotice
from supervisor.around.multinode import Multinode
from supervisor.around.oom import OomKills
from supervisor.around.phases import Waterfall
from supervisor.around.postmortem import PostMortem
from supervisor.around.prefetch import ReadAhead
from supervisor.around.stacks import Stacks
from supervisor.around.start import StartDisplay, invitation
from supervisor.bounded import Call, run_bounded
from supervisor.engine.child import Child
from supervisor.engine.engine import Engine, Limits
from supervisor.engine.lifecycle import State
from supervisor.engine.run import Change, Observer, Traffic
from supervisor.gateway import tracing
from supervisor.gateway.access import AccessLog
from supervisor.gateway.ask import ask
from supervisor.gateway.counts import Jobs
from supervisor.gateway.errors import Refusal
from supervisor.gateway.gate import Admission
from supervisor.gateway.policy import Origins, Policy, Rate, Routes
from supervisor.gateway.server import Gateway
from supervisor.gateway.upstream import Upstream
from supervisor.launch import SIGNALS, Launch
from supervisor.listen import Listeners
from supervisor.repositories import find_weights
from supervisor.settings.command import served_name
from supervisor.settings.settings import Settings
from supervisor.vllm.values import BadValue
from supervisor.weights.find import Weights

if TYPE_CHECKING:
    from supervisor.around.prefork import Prefork
    from supervisor.around.startup_plan import StartupPlan
    from supervisor.local_runpod.child import LocalRunPod
    from supervisor.queue.child import QueueWorker

# vLLM is asked this once before it counts as ready. On CPUs with AMX an eager vLLM 0.32.0 dies (SIGILL in its
# attention) when the first prompt that it ever computes has one or two tokens; after a longer one they are fine.
WARM_UP = b'{"prompt": "one two three four five six seven eight nine ten eleven twelve", "max_tokens": 1}'
CLOSE_PATIENCE = 5  # after the last relayed request, our own routes and the clients' last bytes have so many seconds
# vLLM leaves 0.6 s to 2 s after SIGTERM when nothing is in flight; one that is still there after this time is killed.
# Who wants a short drain wants a short end, too.
TERMINATE_PATIENCE = 10.0
# At most so much of the drain timeout is kept to report RunPod's jobs that are not done as failed, and after a second
# signal so much.
LAST_REPORTS_PATIENCE, FORCED_PATIENCE = 5.0, 2.0
# The queue worker is told of these states; `finish` tells it of the end.
REPORTED_STATES = frozenset({State.STARTING, State.READY, State.RESTARTING, State.FAILED})
TRACING_PATIENCE = 30.0  # a collector of traces has so many seconds to answer at the start


class Start(NamedTuple):
    """What exists while vLLM is spawned. `pending_signals` holds signals that nobody has obeyed yet."""

    settings: Settings
    launch: Launch
    first_call: Call[Child]
    caches: Caches | None
    plan: StartupPlan | None
    forker: Prefork | None
    listeners: Listeners
    pending_signals: list[int]


def serve(start: Start) -> int:
    """Serves until it is told to stop, or has failed; returns the exit code."""
    listen.raise_file_limit()
    sink = logs.start(start.launch.style, start.settings.knobs.log_level, start.launch.stderr)

    async def run() -> int:
        return await Supervisor(start, sink).run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())
    finally:
        sink.flush()


class Supervisor(Observer):
    """One run of the supervisor. For the engine it is the `Front`, which passes requests to it, and an observer."""

    def __init__(self, start: Start, sink: logs.Log) -> None:
        self.log = logging.getLogger("supervisor")
        self.loop = asyncio.get_running_loop()
        self.start = start
        self.settings = settings = start.settings
        self.knobs = settings.knobs
        self.launch = start.launch
        self.listeners = start.listeners
        self.sink = sink
        cluster = settings.cluster
        self.multinode = Multinode(cluster, self.knobs.drain_timeout) if cluster is not None else None
        self.headless_rank = self.multinode if cluster is not None and cluster.is_headless else None
        self.traces: tracing.Tracing | None = None
        self.worker: QueueWorker | None = None
        self.runpod: LocalRunPod | None = None
        self.upstream = Upstream(str(start.launch.workspace.socket), self.loop)
        self.facts = self._facts()
        first_call = [start.first_call]
        self.engine = Engine(
            lambda: first_call.pop() if first_call else Call(start.launch),
            self.headless_rank.ask if self.headless_rank else self.ask,
            self._limits(),
            lambda child: Waterfall(child.spawned_at, fetches=child.command.fetches),
        )
        self.account = Account(self.engine)
        self.gateway = gateway = self._make_gateway()
        self.access = AccessLog(self.loop, self.launch.style, sink.output.put, self.knobs.log_level, gateway.run_id)
        if self.knobs.access_log:
            self.gateway.watch(self.access.request_ended, jobs=False)

    def _facts(self) -> dict[str, object]:
        """Returns what never changes of `/status`."""
        settings, simulator = self.settings, self.listeners.simulator
        return {
            "model": settings.model.value,
            "mode": settings.mode,
            "vllm_version": settings.vllm.version,
            "simulator": f"http://{listen.address(simulator)}/v2/local" if simulator else None,
            "cluster": settings.cluster.name if settings.cluster else None,
            "weights": self.launch.weights.source,
            "command": self.launch.mask.command(self.launch.command.argv),
            **explain.facts(settings),
        }

    def _limits(self) -> Limits:
        knobs = self.knobs
        return Limits(
            startup=knobs.startup_timeout,
            # A headless rank answers nobody, and takes 13 s to end by itself.
            terminate=0.0 if self.headless_rank else min(knobs.drain_timeout, TERMINATE_PATIENCE),
            stall=knobs.stall_timeout,
            restarts=knobs.max_restarts,
            window=knobs.restart_window,
            stay_when_failed=knobs.on_failure == "serve",
            warm_up=WARM_UP if (self.settings.is_demo or knobs.warm_up) and not self.headless_rank else b"",
        )

    def _make_observers(self) -> list[Observer]:
        settings, launch, listeners = self.settings, self.launch, self.listeners

        def invite() -> str:
            return invitation(settings, listeners, self.runpod.url if self.runpod is not None else "")

        def current_weights() -> Weights:
            """Returns the weights of the start, or looks again where they had to be downloaded for it."""
            return launch.weights if launch.weights.folder is not None else find_weights(settings)

        vllm = settings.vllm.version
        observers: list[Observer] = [
            self.account,
            self,
            StartDisplay(self.sink, launch.foot, colour=launch.style.colour, invitation=invite),
            PostMortem(settings.cache, mask=launch.mask, vllm_version=vllm, facts=self.facts, account=self.account),
            *([] if self.headless_rank else [MediaNotice(settings, current_weights)]),
            ReadAhead(lambda: launch.weights, str(settings.option("load_format") or "auto")),
            Stacks(),
            OomKills(),
            GpuMemory(),
        ]
        observers += [self.start.forker] if self.start.forker is not None else []
        observers += [CacheKeeper(self.start.caches, self.start.plan)]
        return observers + ([self.multinode] if self.multinode is not None else [])

    def _make_gateway(self) -> Gateway:
        settings, knobs = self.settings, self.knobs
        policy = Policy(
            settings.keys[0].values,
            settings.keys[1].values,
            routes=Routes(knobs.allow_routes or (), str(settings.option("root_path") or "")),
            origins=self._origins(),
            # A browser's page reaches what listens on loopback; by which names others are known can't be told.
            hosts=knobs.allowed_hosts if listen.is_loopback(knobs.host) else None,
            rate=Rate(knobs.rate_limit) if knobs.rate_limit else None,
            max_body=knobs.max_body,
            timeout=knobs.request_timeout or math.inf,
            standing_refusal=headless_refusal(settings),
        )
        return Gateway(
            self.account,
            self.upstream,
            policy,
            Admission(knobs.max_concurrency or None, knobs.max_waiting, knobs.hold_timeout),
            facts=self.facts,
            client_timeout=knobs.client_timeout or math.inf,
            cache_memory=knobs.response_cache or 0,
            comment_interval=knobs.sse_keep_alive,
            certificate=knobs.tls_cert,
            key=knobs.tls_key,
            close_patience=CLOSE_PATIENCE,
        )

    def _origins(self) -> Origins:
        """Returns the origins of vLLM's options, which are lists written as JSON."""
        options = {}
        for name in ("origins", "methods", "headers"):
            value = self.settings.option(f"allowed_{name}")
            if value not in (None, ""):
                options[name] = json.loads(value) if isinstance(value, str) else value
        return Origins(
            options.get("origins", ()),
            options.get("methods", ("*",)),
            options.get("headers", ("*",)),
            credentials=bool(self.settings.option("allow_credentials")),
        )

    async def run(self) -> int:
        settings, listeners = self.settings, self.listeners
        self._listen_for_signals()
        for warning in (*settings.warnings, *self.launch.weights.rejections):
            self.log.warning("%s", warning)
        location = f" on http://{listen.address(listeners.front)}" if listeners.front else ", for RunPod's queue"
        self.log.info("starting %s%s", settings.model.value, location)
        self.log.info("weights: %s", self.launch.weights.source)
        private_path = self.launch.workspace.gateway_socket
        sockets = [*listeners.gateway, listen.bind_private(private_path)]
        async with asyncio.TaskGroup() as group:
            tracing_task = group.create_task(self._start_tracing()) if tracing.endpoint(settings.environ) else None
            if settings.mode == "queue":
                self._join_queue(group, str(private_path))
            group.create_task(self.gateway.run_on(sockets))
            code = await self.engine.run(self, self._make_observers())
            if self.worker is not None:
                patience = FORCED_PATIENCE if self.engine.was_forced else LAST_REPORTS_PATIENCE
                await self.worker.finish(patience, patience)
            if self.runpod is not None:
                self.runpod.stop()
            self.gateway.stop()
            if tracing_task is not None:
                tracing_task.cancel()
        self.access.flush()
        if self.traces is not None:
            self.traces.close()
        self.upstream.close()
        return code

    def _join_queue(self, group: asyncio.TaskGroup, address: str) -> None:
        """`address` is that of the gateway's private socket. Outside of RunPod a simulated RunPod takes its place."""
        from supervisor.queue.child import QueueWorker, worker_environment  # noqa: PLC0415  # only that mode needs it

        settings, environ = self.settings, dict(self.settings.environ)
        if self.listeners.simulator is not None:
            from supervisor.local_runpod.child import LocalRunPod  # noqa: PLC0415  # as above

            self.runpod = LocalRunPod(self.listeners.simulator, [key for keys in settings.keys for key in keys.values])
            environ |= self.runpod.variables
            group.create_task(self.runpod.run())
        jobs = self.gateway.counts.jobs = Jobs()
        batches = (self.knobs.job_batch_size, self.knobs.job_min_batch_size, self.knobs.job_batch_growth)
        environ = worker_environment(
            environ, socket=address, model=served_name(settings), jobs=self.knobs.max_concurrency or 1,
            # Users who name the model as runpod-LLM does have clients that know its answers.
            llm=settings.model.source.endswith("LLM_MODEL"), root=str(settings.option("root_path") or ""),
            batches=batches if self.knobs.job_output == "tokens" else None,
        )  # fmt: skip
        self.worker = QueueWorker(environ, jobs.report, jobs.worker_died)
        group.create_task(self.worker.run())

    def _listen_for_signals(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            self.loop.add_signal_handler(number, self.engine.stop, number)
        for early_signal in self.start.pending_signals:
            self.engine.stop(early_signal)
        if any(keys.file for keys in self.settings.keys) and not sys.stdin.isatty():
            self.loop.add_signal_handler(signal.SIGHUP, lambda: self.loop.create_task(self._reload_keys()))

    async def _reload_keys(self) -> None:
        """Obeys SIGHUP, where keys are in files and no terminal could have been closed."""
        try:
            api_keys, admin_keys = await Call(lambda: [keys.reread().values for keys in self.settings.keys])
        except BadValue as error:
            self.log.error("the keys stay as they were: expected %s", error)  # noqa: TRY400  # it is no bug of ours
            return
        self.launch.mask.add((*api_keys, *admin_keys))
        self.access.forget()
        self.gateway.set_keys(api_keys, admin_keys)
        if self.runpod is not None:
            self.runpod.say(f"keys {','.join((*api_keys, *admin_keys))}")
        message = "keys read again: %d for clients, %d for administrators"
        self.log.info(message, len(api_keys), len(admin_keys))

    async def _start_tracing(self) -> None:
        settings = self.settings
        attributes = {
            "vllm_supervisor.model": str(settings.model.value),
            "vllm_supervisor.vllm_version": settings.vllm.version,
        }
        try:
            start = partial(tracing.set_up, settings.environ, attributes, self.launch.mask)
            self.traces = await run_bounded(TRACING_PATIENCE, start)
        except Exception:  # without traces nobody is served worse
            self.log.exception("no traces are sent")
        if self.traces is not None:
            self.gateway.watch(self.traces.request_ended)
            tracing.log.info("traces go to %s", tracing.endpoint(settings.environ))  # from the next request on

    # The engine calls these.

    async def ask(self, path: str, body: bytes, patience: float) -> tuple[int, bytes] | None:
        return await ask(self.upstream, path, body, patience=patience)

    def traffic(self) -> Traffic:
        return Traffic(*self.gateway.traffic())

    async def drain(self) -> bool:
        if self.headless_rank is not None:
            return await self.headless_rank.drain()
        patience = self.knobs.drain_timeout
        try:
            async with asyncio.timeout(patience):
                if self.worker is not None:
                    reserve = min(LAST_REPORTS_PATIENCE, patience / 4)
                    await self.worker.finish(patience - reserve, reserve)
                await self.gateway.wait_until_drained()
        except TimeoutError:
            limit = f"{patience:g} s (SUPERVISOR_DRAIN_TIMEOUT)"
            count = self.gateway.count_requests()["in_flight"]
            self.log.warning("%d requests were still running after %s: cut", count, limit)
            self.gateway.cut("The server shut down before this request was done.")
            return False
        return True

    def state_changed(self, change: Change) -> None:
        self.gateway.gate.engine_changed()
        if self.worker is not None and change.state in REPORTED_STATES:
            self.worker.say(change.state.value)

    def run_removed(self) -> None:
        self.upstream.close()


def headless_refusal(settings: Settings) -> Refusal | None:
    """Returns why no request is taken here, and where requests belong; None where they belong here."""
    cluster = settings.cluster
    if cluster is None or not cluster.is_headless:
        return None
    text = f"This is {cluster.name}: rank 0, at {cluster.leader}, serves the model."
    return Refusal(503, text, "not_rank_0")
