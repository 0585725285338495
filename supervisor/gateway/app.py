"""Our own routes, as an ASGI app: `/ping`, `/health`, `/status`, `/metrics`, the page at `/`, and CORS preflights for
every path, which a browser asks without a key and before it asks anything else."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from supervisor.gateway import page, told
from supervisor.gateway.ask import ask
from supervisor.gateway.gate import Engine, Gate
from supervisor.gateway.policy import is_preflight

if TYPE_CHECKING:
    from supervisor.gateway.cache import Cache
    from supervisor.gateway.counts import Counts
    from supervisor.gateway.http1 import Headers
    from supervisor.gateway.policy import Policy
    from supervisor.gateway.upstream import Upstream

OWN_PATHS = frozenset({b"/ping", b"/health", b"/status", b"/metrics", b"/"})
READY = {b"/ping": "ready", b"/health": "ok"}
METHODS = ("GET", "HEAD", "POST")
NOTHING = 204
# Seconds for vLLM to tell its metrics, before only ours are told.
METRICS_PATIENCE = 5.0

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Answer = tuple[int, "Headers", bytes]  # status, header fields, body


class EngineView(Engine, Protocol):
    """What the gateway may know of the engine."""

    @property
    def timeline(self) -> Sequence[Mapping[str, object]]:
        """Its latest states, the present one included: `at`, `state`, `reason`."""

    def status(self) -> Mapping[str, object]: ...

    def log_after(self, number: int) -> tuple[int, list[str]]:
        """How many lines vLLM has logged, and those of them behind the first `number` that are kept."""


@dataclass(slots=True)
class OwnRoutes:
    """`facts` never change and are shown at `/status`: model, mode, version, command (masked)."""

    engine: EngineView
    policy: Policy
    gate: Gate
    counts: Counts
    upstream: Upstream
    in_flight: Callable[[], int]
    facts: Mapping[str, object]
    cache: Cache | None = None

    def is_own(self, path: bytes) -> bool:
        return path in OWN_PATHS or (bool(self.policy.routes.root) and self._path(path) in OWN_PATHS)

    def _path(self, path: bytes) -> bytes:
        """Below vLLM's --root-path ours are, too."""
        return (self.policy.routes.below_root(path) or "/").encode("latin-1", "replace")

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        headers: Headers = scope["headers"]
        if is_preflight(scope["method"].encode(), headers):
            status, fields, body = self._preflight(headers)
        else:
            status, fields, body = await self._answer(scope)
            fields = [*fields, *self.policy.origins.fields(dict(headers).get(b"origin"))]
        if status != NOTHING:
            fields.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    def _preflight(self, headers: Headers) -> Answer:
        allowed = self.policy.origins.preflight(headers)
        if allowed is None:
            return _json(400, {"error": "This page's origin is none of ALLOWED_ORIGINS."})
        return NOTHING, allowed, b""

    async def _answer(self, scope: Scope) -> Answer:
        path, engine = self._path(scope["raw_path"]), self.engine
        if scope["method"] not in METHODS:
            return _json(405, {"error": "GET, HEAD or POST"}, (b"allow", b"GET, HEAD, POST"))
        if path in READY:
            if engine.ready:
                return _json(200, {"status": READY[path]})
            # RunPod's load balancer: 204 keeps the worker in its list while it loads, 200 sends it work.
            loads = path == b"/ping" and not engine.over
            return (NOTHING, [], b"") if loads else _json(503, {"status": engine.explanation})
        if path == b"/" and page.wanted(scope["headers"]):
            return page.answer()
        return self._refused(scope) or (await self._metrics() if path == b"/metrics" else self._told(scope))

    def _refused(self, scope: Scope) -> Answer | None:
        """The rest is told only to those who have a key, where there are keys."""
        if _private(scope):
            return None
        address = scope["client"][0].encode() if scope["client"] else b""
        refusal = self.policy.refused(self.policy.identify(scope["headers"]), address, self.gate.loop.time())
        if refusal is None:
            return None
        again = [(b"retry-after", b"%d" % refusal.retry_after)] if refusal.retry_after else []
        return _json(refusal.status, {"error": refusal.message}, *again)

    def _status(self) -> dict[str, object]:
        return {**self.engine.status(), "in_flight": self.in_flight(), "waiting": self.gate.waiting}

    def _told(self, scope: Scope) -> Answer:
        content = told.told(
            self._status(), self.facts, self.engine, self.counts, self.upstream.reads,
            full=told.sees_all(self.policy, scope["headers"], private=_private(scope)),
            after=told.lines_seen(scope["query_string"]),
        )  # fmt: skip
        return _json(200, content, (b"cache-control", b"no-store"))

    async def _metrics(self) -> Answer:
        """Ours, and vLLM's own as they are."""
        from supervisor.gateway.metrics import CONTENT_TYPE, Exposition  # noqa: PLC0415  # 20 ms, for those who ask

        text = Exposition(self.counts, self.facts, self._status(), self.cache).text()
        if self.engine.ready:
            status, vllms = await ask(self.upstream, "/metrics", patience=METRICS_PATIENCE) or (0, b"")
            text += vllms if status == 200 else b""
        return 200, [(b"content-type", CONTENT_TYPE)], text


def _json(status: int, content: Mapping[str, object], *more: tuple[bytes, bytes]) -> Answer:
    return status, [(b"content-type", b"application/json"), *more], json.dumps(content).encode() + b"\n"


def _private(scope: Scope) -> bool:
    """From a socket that nobody else can open: a path has no port."""
    return scope["server"] is not None and scope["server"][1] is None
