"""The gateway: what is shared by all client connections, and our own routes as an ASGI app.

It sees the engine only through `EngineView`: whether it is ready, and what to tell those who ask. Requests that arrive
while the engine loads wait here (`hold`), in order, up to the hold timeout.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from supervisor.gateway.errors import Refusal
from supervisor.gateway.policy import Policy
from supervisor.gateway.upstream import Upstream, UpstreamError

if TYPE_CHECKING:
    from supervisor.gateway.relay import Exchange

OWN_PATHS = frozenset({b"/ping", b"/health", b"/status"})
# What a client is told to wait, in seconds, before it asks again.
RETRY_AFTER = 5

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
    def explanation(self) -> str:
        """Why it is not ready, in a sentence for a client: the phase while it loads, the cause when it failed."""

    def status(self) -> Mapping[str, object]: ...


class Gateway:
    """Shared state of the client connections; as an ASGI app, our own routes."""

    own_paths = OWN_PATHS

    def __init__(
        self,
        upstream: Upstream,
        engine: EngineView,
        policy: Policy,
        hold_timeout: float,
        facts: Mapping[str, object],
    ) -> None:
        """`facts` never change and are shown at `/status`: model, mode, version, command (masked)."""
        self.upstream = upstream
        self.engine = engine
        self.policy = policy
        self.hold_timeout = hold_timeout
        self.facts = facts
        self.log = logging.getLogger("supervisor.gateway")
        self.exchanges: set[Exchange] = set()
        self.held: dict[Exchange, asyncio.TimerHandle] = {}
        self.open = False  # requests go to vLLM as they come
        self.closing = False  # every answer closes its connection
        self._emptied: asyncio.Event | None = None  # there while somebody waits in `drained`

    # What the relay asks

    def check(self, exchange: Exchange) -> Refusal | None:
        """The seam of keys, routes, limits and admission: may this request go on?"""
        refusal = self.policy.check(exchange.path, exchange.headers)
        if refusal is None and self.engine.over:
            refusal = self.unavailable()
        return refusal

    def hold(self, exchange: Exchange) -> None:
        """Keeps the request until the engine is ready, or answers 503."""
        timer = self.upstream.loop.call_later(self.hold_timeout, self._held_too_long, exchange)
        self.held[exchange] = timer

    def leave(self, exchange: Exchange) -> None:
        """The request is answered, or its client is gone."""
        timer = self.held.pop(exchange, None)
        if timer is not None:
            timer.cancel()
        self.exchanges.discard(exchange)
        if self._emptied is not None and not self.exchanges:
            self._emptied.set()

    def unavailable(self) -> Refusal:
        return Refusal(503, self.engine.explanation, code="engine_unavailable", retry_after=RETRY_AFTER)

    def unanswered(self, error: UpstreamError) -> Refusal:
        """vLLM had the request and gave no answer."""
        if not self.engine.ready:
            return self.unavailable()
        return Refusal(502, f"{error}.", code="engine_no_answer")

    def _held_too_long(self, exchange: Exchange) -> None:
        refusal = self.unavailable()
        waited = f" The request waited {self.hold_timeout:g} s (SUPERVISOR_HOLD_TIMEOUT)."
        exchange.refuse(Refusal(503, refusal.message + waited, refusal.code, math.ceil(self.hold_timeout)))

    # What the lifecycle tells

    def engine_changed(self) -> None:
        """Called after each transition of the engine."""
        self.open = self.engine.ready
        if self.open:
            for exchange in list(self.held):
                self.held.pop(exchange).cancel()
                self.upstream.send(exchange)
        elif self.engine.over:
            self.closing = True
            for exchange in list(self.held):
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

    @property
    def in_flight(self) -> int:
        return len(self.exchanges) - len(self.held)

    @property
    def waiting(self) -> int:
        return len(self.held)

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
        elif (refusal := self.policy.check(b"/status", scope["headers"])) is not None:
            await _answer(send, refusal.status, {"error": refusal.message})
        else:
            status = {**self.engine.status(), **self.facts, "in_flight": self.in_flight, "waiting": self.waiting}
            await _answer(send, 200, status)

    async def _ping(self, send: Send) -> None:
        """RunPod's load balancer: 204 keeps the worker in its list while it loads, 200 sends it work."""
        if self.engine.ready:
            await _answer(send, 200, {"status": "ready"})
        elif self.engine.over:
            await _answer(send, 503, {"status": self.engine.explanation})
        else:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})


async def _answer(
    send: Send, status: int, content: dict[str, object], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(content).encode() + b"\n"
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
