"""The gateway: what is shared by all client connections, and our own routes as an ASGI app.

It sees the engine only through `EngineView`: whether it is ready, and what to tell those who ask. Requests that arrive
while the engine loads wait here (`hold`), in order, up to the hold timeout.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from supervisor.gateway import page
from supervisor.gateway.counts import Counts
from supervisor.gateway.errors import Refusal
from supervisor.gateway.heads import Memo, RequestHead
from supervisor.gateway.policy import ENGINE_ROUTES, Policy
from supervisor.gateway.told import lines_seen, sees_all, told
from supervisor.gateway.upstream import NotConnected, Probe, Upstream, UpstreamError

if TYPE_CHECKING:
    from supervisor.gateway.cache import Cache
    from supervisor.gateway.exchange import Exchange
    from supervisor.gateway.metrics import Exposition
    from supervisor.gateway.relay import RelayProtocol

# The death of the engine is known within 0.1 s; a lost request waits this long, in seconds, to learn of it.
FATE_KNOWN_AFTER = 0.25
# Seconds between two looks at what has been going on for too long.
TICK = 1.0
CLIENT_TIMEOUT = 60.0
KEEP_ALIVE = 75.0
OWN_PATHS = frozenset({b"/ping", b"/health", b"/status", b"/metrics", b"/"})
# Seconds for vLLM to tell its metrics, before only ours are told.
METRICS_PATIENCE = 5.0
# What a client is told to wait, in seconds, before it asks again.
RETRY_AFTER = 5
# A piece of an event stream (the size of its chunk may stand before) that vLLM's API server makes without the engine:
# a comment, or what every stream of /v1/responses begins with.
NO_SIGN = re.compile(rb"(?:[0-9A-Fa-f]+\r\n)?(?::|event: response\.(?:created|in_progress)\b)")

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Any]


class EngineView(Protocol):
    """What the gateway may know of the engine."""

    @property
    def ready(self) -> bool: ...

    @property
    def over(self) -> bool:
        """Draining, stopped or failed: no request that arrives now can be answered."""

    @property
    def draining(self) -> bool:
        """The engine still answers what was there before the signal came."""

    @property
    def explanation(self) -> str:
        """Why it is not ready, in a sentence for a client: the phase while it loads, the cause when it failed."""

    @property
    def timeline(self) -> Sequence[Mapping[str, object]]:
        """Its latest states, the present one included: `at`, `state`, `reason`."""

    def status(self) -> Mapping[str, object]: ...

    def log_after(self, number: int) -> tuple[int, list[str]]:
        """How many lines vLLM has logged, and those of them behind the first `number` that are kept."""


@dataclass(frozen=True, slots=True)
class Admission:
    """How many requests may run at once (None: as many as come), and how many more may wait."""

    limit: int | None
    waiting: int


class Gateway:
    """Shared state of the client connections; as an ASGI app, our own routes."""

    own_paths = OWN_PATHS
    fate_known_after = FATE_KNOWN_AFTER

    def __init__(
        self,
        upstream: Upstream,
        engine: EngineView,
        policy: Policy,
        *,
        hold_timeout: float,
        admission: Admission,
        facts: Mapping[str, object],
        elsewhere: str | None = None,
        client_timeout: float = CLIENT_TIMEOUT,
        keep_alive: float = KEEP_ALIVE,
    ) -> None:
        """`facts` never change and are shown at `/status`: model, mode, version, command (masked). `elsewhere`: why
        no request is taken here.

        `client_timeout`: seconds for a client's next bytes, or for it to take ours; `keep_alive`: between requests.
        """
        self.client_timeout = client_timeout
        self.keep_alive = keep_alive
        self.upstream = upstream
        self.engine = engine
        self.policy = policy
        self.hold_timeout = hold_timeout
        self.admission = admission
        self.facts = facts
        self.elsewhere = elsewhere
        self.log = logging.getLogger("supervisor.gateway")
        self.exchanges: set[Exchange] = set()
        self.held: dict[Exchange, asyncio.TimerHandle] = {}
        self.queued: dict[Exchange, asyncio.TimerHandle] = {}  # first come, first served
        self.active = 0  # admitted and not yet answered
        self.open = False  # requests go to vLLM as they come
        self.generation = 0  # of the engine: one more each time it stops being ready
        self.closing = False  # every answer closes its connection
        self.asking: set[asyncio.Task[None]] = set()  # whether the engine lives
        self._emptied: asyncio.Event | None = None  # there while somebody waits in `drained`
        self.counts = Counts()
        self.cache: Cache | None = None
        self.listeners: tuple[Callable[[Exchange], None], ...] = ()  # called with each exchange that is over
        self.heads: Memo[RequestHead] = Memo()
        self._exposition: Exposition | None = None
        self.connections: set[RelayProtocol] = set()
        self.clock = 0.0  # the loop's time at the last tick
        self.run, self._requests = os.urandom(10).hex().encode(), 0
        self._tick()

    def new_id(self) -> bytes:
        """A request's id: of this run, and counted. To read as many random bytes for each would cost as much again."""
        self._requests += 1
        return b"%b%012x" % (self.run, self._requests)

    def set_keys(self, api_keys: Iterable[str], admin_keys: Iterable[str]) -> None:
        """From now on these are valid; requests that run are not stopped."""
        self.policy.set_keys(api_keys, admin_keys)
        self.heads.forget()
        for connection in self.connections:
            connection.latest = None

    # What the relay asks

    def check(self, exchange: Exchange) -> Refusal | None:
        """The seam of keys, routes, limits and admission: may this request go on?"""
        verdict, private = exchange.verdict, exchange.protocol.private
        if verdict is None:
            verdict = self.policy.judge(exchange.path, exchange.headers, private=private)
            exchange.verdict = verdict
        if verdict.refusal is not None:
            return verdict.refusal
        if self.elsewhere is not None:
            return Refusal(503, self.elsewhere, code="not_rank_0")
        if private:  # a job that was taken is done even while we drain
            return self.unavailable() if self.engine.over and not self.engine.draining else None
        if self.policy.rate is not None:
            client = verdict.client or exchange.protocol.address()
            if (refusal := self.policy.rate.take(client, exchange.began)) is not None:
                return refusal
        return None if self.open or not self.engine.over else self.unavailable()

    def admit(self, exchange: Exchange) -> None:
        """Sends the request on, or lets it wait its turn behind those that came before."""
        # How many jobs run at once is the queue worker's to keep; the requests of a job's batch wait in vLLM.
        if self.admission.limit is None or self.active < self.admission.limit or exchange.protocol.private:
            self._go(exchange)
        elif len(self.queued) < self.admission.waiting:
            timer = self.upstream.loop.call_later(self.hold_timeout, self._held_too_long, exchange)
            self.queued[exchange] = timer
            exchange.mark("waiting")
        else:
            text = f"{self.active} requests are running and {len(self.queued)} are waiting: the server is busy."
            exchange.refuse(Refusal(429, text, code="too_many_requests", retry_after=RETRY_AFTER))

    def pass_on(self, exchange: Exchange) -> bool:
        """`check` and `admit` for a request that was let in before, where nothing else is asked; False: ask them."""
        limit = self.admission.limit
        if not self.open or self.policy.rate is not None or (limit is not None and self.active >= limit):
            return False
        if self.cache is not None and exchange.route in self.cache.routes:
            return False
        self.active += 1
        exchange.admitted = True
        self.upstream.send(exchange)
        return True

    def resume(self, exchange: Exchange) -> None:
        """Sends a request again whose engine is gone: to the next one, when that is ready."""
        if self.engine.over:
            exchange.refuse(self.unavailable())
        elif self.open:
            exchange.mark("sent")
            self.upstream.send(exchange, fresh=True)
        else:
            self.hold(exchange)

    def _go(self, exchange: Exchange) -> None:
        self.active += 1
        exchange.admitted = True
        if self.open or self.engine.draining:
            if exchange.marks:
                exchange.mark("sent")
            self.upstream.send(exchange)
        else:
            self.hold(exchange)

    def hold(self, exchange: Exchange) -> None:
        """Keeps the request until the engine is ready, or answers 503."""
        self.counts.held += 1
        exchange.mark("held")
        timer = self.upstream.loop.call_later(self.hold_timeout, self._held_too_long, exchange)
        self.held[exchange] = timer

    def hold_lost(self, exchange: Exchange, error: UpstreamError) -> None:
        """vLLM closed the connection before it answered: what becomes of the request depends on the engine's fate."""
        if self.engine.over:
            exchange.refuse(self.unavailable())
            return
        self.log.warning("%s: its request is held", error, extra=exchange.named)
        self.hold(exchange)
        if self.open:  # its death may not be known yet
            self._track(self.upstream.loop.create_task(self._still_alive(exchange, error)))

    async def _still_alive(self, exchange: Exchange, error: UpstreamError) -> None:
        """The engine did not die, so it is the request that it gave no answer to; or its socket was overrun.

        On a busy machine its death is known later than after any fixed time, so it is asked. Without an answer the
        request stays held: what has become of the engine will be told.
        """
        await asyncio.sleep(FATE_KNOWN_AFTER)
        if exchange not in self.held or not self.open or not await self._answers_health():
            return
        timer = self.held.get(exchange)
        if not self.open or timer is None:
            return
        timer.cancel()
        del self.held[exchange]
        if isinstance(error, NotConnected):
            exchange.mark("sent")
            self.upstream.send(exchange, fresh=True)
        else:
            exchange.refuse(self.unanswered(error))

    def ask_for(self, exchange: Exchange) -> None:
        """Whether the engine lives that has just answered 500 or 503: of one that dies it is known in a moment."""

        async def ask() -> None:
            if await self._answers_health():
                exchange.believe()
            else:
                self.upstream.loop.call_later(self.fate_known_after, exchange.settle)

        self._track(self.upstream.loop.create_task(ask()))

    def _track(self, task: asyncio.Task[None]) -> None:
        self.asking.add(task)
        task.add_done_callback(self.asking.discard)

    async def _answers_health(self) -> bool:
        try:
            async with asyncio.timeout(METRICS_PATIENCE):
                status, _ = await Probe.get(self.upstream, "/health")
        except (UpstreamError, TimeoutError):
            return False
        return status == 200

    def leave(self, exchange: Exchange) -> None:
        """The request is answered, or its client is gone."""
        if self.held or self.queued:
            timer = self.held.pop(exchange, None) or self.queued.pop(exchange, None)
            if timer is not None:
                timer.cancel()
        self.exchanges.discard(exchange)
        if self.listeners and exchange.protocol.is_client:  # a recording's readers are told of themselves
            for ended in self.listeners:
                ended(exchange)
        if exchange.admitted:
            exchange.admitted = False
            self.active -= 1
            if self.queued and (self.engine.draining or not self.engine.over):
                following = next(iter(self.queued))
                self.queued.pop(following).cancel()
                self._go(following)
        if self._emptied is not None and not self.exchanges:
            self._emptied.set()

    def unavailable(self) -> Refusal:
        return Refusal(503, self.engine.explanation, code="engine_unavailable", retry_after=RETRY_AFTER)

    def unanswered(self, error: UpstreamError) -> Refusal:
        """vLLM had the request and gave no answer."""
        if not self.engine.ready:
            return self.unavailable()
        return Refusal(502, f"{error}.", code="engine_no_answer")

    def broken_off(self) -> Refusal:
        """vLLM had begun its answer and did not end it."""
        return Refusal(
            503, "The engine stopped in the middle of this answer. Please send the request again.", "engine_stopped"
        )

    def lost_twice(self) -> Refusal:
        """The engine died, the request was sent to the next one, and that died too."""
        text = "The engine stopped twice while it worked on this request."
        return Refusal(503, text, "engine_stopped", retry_after=RETRY_AFTER)

    def _held_too_long(self, exchange: Exchange) -> None:
        refusal = self.unavailable()
        waited = f" The request waited {self.hold_timeout:g} s (SUPERVISOR_HOLD_TIMEOUT)."
        exchange.refuse(Refusal(503, refusal.message + waited, refusal.code, math.ceil(self.hold_timeout)))

    # What the lifecycle tells

    def engine_changed(self) -> None:
        """Called after each transition of the engine."""
        if self.open and not self.engine.ready:
            self.generation += 1
        self.open = self.engine.ready and self.elsewhere is None
        if self.open:
            for exchange in list(self.held):
                self.held.pop(exchange).cancel()
                exchange.mark("sent")
                self.upstream.send(exchange, fresh=exchange.replayed)
        elif self.engine.over:
            self.closing = True
            for exchange in [*self.held, *self.queued]:
                if not (self.engine.draining and exchange.protocol.private):
                    exchange.refuse(self.unavailable())

    async def drained(self) -> None:
        """Returns when no request is in flight."""
        if self.exchanges:
            self._emptied = asyncio.Event()
            await self._emptied.wait()

    def cut(self, explanation: str) -> None:
        """Ends what is still in flight: the drain timeout has passed."""
        for exchange in list(self.exchanges):
            exchange.end_now(Refusal(503, explanation, code="shutting_down", retry_after=RETRY_AFTER))

    def traffic(self) -> tuple[Sequence[object], object]:
        """Requests that vLLM has whole, that need its engine, and that wait for its next byte; and signs of its work,
        which differ when there was some: answers that were given, and what came of those streams last."""
        waiting = [exchange for exchange in self.exchanges if _needs_the_engine(exchange)]
        answered = sum(
            sum(series.whole.buckets)
            for (route, status), series in self.counts.answers.items()
            if status < 300 and route in ENGINE_ROUTES
        )
        streamed = sum(exchange.sent for exchange in waiting if not NO_SIGN.match(exchange.latest))
        return waiting, (answered, streamed)

    def _tick(self) -> None:
        """Ends what is over its time. One look at everything costs less than a timer for each request."""
        loop, timeout = self.upstream.loop, self.policy.timeout
        loop.call_later(min(TICK, timeout / 4, self.client_timeout / 4), self._tick)
        self.clock = now = loop.time()
        for exchange in [exchange for exchange in self.exchanges if exchange.began < now - timeout]:
            refusal = self.policy.too_late()
            self.log.warning("%s", refusal.message, extra=exchange.named)
            exchange.end_now(refusal)
        for connection in list(self.connections):
            connection.check_time(now)

    @property
    def in_flight(self) -> int:
        return len(self.exchanges) - self.waiting

    @property
    def waiting(self) -> int:
        return len(self.held) + len(self.queued)

    # Our own routes

    async def __call__(self, scope: Scope, receive: Callable[[], Any], send: Send) -> None:
        assert scope["type"] == "http"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            await _answer(send, 405, {"error": "GET, HEAD or POST"}, [(b"allow", b"GET, HEAD, POST")])
        elif scope["path"] == "/ping":
            await self._ping(send)
        elif scope["path"] == "/health":
            ready = self.engine.ready
            await _answer(send, 200 if ready else 503, {"status": "ok" if ready else self.engine.explanation})
        elif scope["path"] == "/" and page.wanted(scope["headers"]):
            await page.show(send)
        elif not _private(scope) and (refusal := self.policy.identify(scope["headers"])[0].refusal) is not None:
            await _answer(send, refusal.status, {"error": refusal.message})
        elif scope["path"] == "/metrics":
            await self._metrics(send)
        else:
            status = {**self.engine.status(), "in_flight": self.in_flight, "waiting": self.waiting}
            full = sees_all(self.policy, scope["headers"], private=_private(scope))
            after = lines_seen(scope["query_string"])
            content = told(status, self.facts, self.engine, self.counts, self.upstream.reads, full=full, after=after)
            await _answer(send, 200, content)

    async def _metrics(self, send: Send) -> None:
        from supervisor.gateway.metrics import CONTENT_TYPE, Exposition  # noqa: PLC0415  # 20 ms, for those who ask

        if self._exposition is None:
            self._exposition = Exposition(self.counts, self.facts, self._look, self.cache)
        text = self._exposition.text() + await self._vllms_metrics()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", CONTENT_TYPE)]})
        await send({"type": "http.response.body", "body": text})

    def _look(self) -> dict[str, object]:
        return {
            **self.engine.status(),
            "requests_in_flight": self.in_flight,
            "requests_waiting": self.waiting,
        }

    async def _vllms_metrics(self) -> bytes:
        if not self.engine.ready:
            return b""
        try:
            async with asyncio.timeout(METRICS_PATIENCE):
                status, body = await Probe.get(self.upstream, "/metrics")
        except (UpstreamError, TimeoutError):
            return b""
        return body if status == 200 else b""

    async def _ping(self, send: Send) -> None:
        """RunPod's load balancer: 204 keeps the worker in its list while it loads, 200 sends it work."""
        if self.engine.ready:
            await _answer(send, 200, {"status": "ready"})
        elif self.engine.over:
            await _answer(send, 503, {"status": self.engine.explanation})
        else:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})


def _needs_the_engine(exchange: Exchange) -> bool:
    """Not so a WebSocket, in which nobody need speak; nor an answer that its client does not read."""
    connection = exchange.connection
    if connection is None or connection.response_paused or not exchange.request_complete or exchange.upgrading:
        return False
    return exchange.method == b"POST" and exchange.verdict is not None and exchange.verdict.route in ENGINE_ROUTES


def _private(scope: Scope) -> bool:
    """From a socket that nobody else can open: a path has no port."""
    return scope["server"] is not None and scope["server"][1] is None


async def _answer(
    send: Send, status: int, content: dict[str, object], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(content).encode() + b"\n"
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
