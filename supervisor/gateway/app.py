"""Our own routes, as an ASGI app: `/ping`, `/health`, `/status`, `/metrics`, the page at `/`, and CORS preflights for
every path, which a browser asks without a key and before it asks anything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
    from supervisor.gateway.metrics import Exposition
    from supervisor.gateway.policy import Policy
    from supervisor.gateway.upstream import Upstream

OWN_PATHS = frozenset({b"/ping", b"/health", b"/status", b"/metrics", b"/"})
METHODS = ("GET", "HEAD", "POST")
# Seconds for vLLM to tell its metrics, before only ours are told.
METRICS_PATIENCE = 5.0

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Any]


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
    exposition: Exposition | None = None

    def is_own(self, path: bytes) -> bool:
        return path in OWN_PATHS or (bool(self.policy.routes.root) and self._path(path) in OWN_PATHS)

    def _path(self, path: bytes) -> bytes:
        """Below vLLM's --root-path ours are, too."""
        return (self.policy.routes.below_root(path) or "/").encode("latin-1", "replace")

    async def __call__(self, scope: Scope, receive: Callable[[], Any], send: Send) -> None:
        assert scope["type"] == "http"
        headers: Headers = scope["headers"]
        path = self._path(scope["raw_path"])
        answer = _Answer(send, self._cors(headers))
        if is_preflight(scope["method"].encode(), headers):
            allowed = self.policy.origins.preflight(headers)
            if allowed is None:
                await answer.json(400, {"error": "This page's origin is none of ALLOWED_ORIGINS."})
            else:
                await _Answer(send, allowed).empty(204)
        elif scope["method"] not in METHODS:
            await answer.json(405, {"error": "GET, HEAD or POST"}, [(b"allow", b"GET, HEAD, POST")])
        elif path == b"/ping":
            await self._ping(answer)
        elif path == b"/health":
            ready = self.engine.ready
            await answer.json(200 if ready else 503, {"status": "ok" if ready else self.engine.explanation})
        elif path == b"/" and page.wanted(headers):
            await page.show(send)
        else:
            await self._told(path, scope, answer)

    def _cors(self, headers: Headers) -> Headers:
        origin = next((value for name, value in headers if name == b"origin"), None)
        lines = self.policy.origins.lines(origin).split(b"\r\n")[:-1]
        return [(name.lower(), value) for name, _, value in (line.partition(b": ") for line in lines)]

    async def _told(self, path: bytes, scope: Scope, answer: _Answer) -> None:
        """What only those are told who have a key, where there are keys."""
        private = _private(scope)
        if not private:
            verdict = self.policy.identify(scope["headers"])
            address = scope["client"][0].encode() if scope["client"] else b""
            if (refusal := self.policy.refused(verdict, address, self.gate.loop.time())) is not None:
                again = [(b"retry-after", b"%d" % refusal.retry_after)] if refusal.retry_after else []
                await answer.json(refusal.status, {"error": refusal.message}, again)
                return
        if path == b"/metrics":
            await self._metrics(answer)
            return
        status = {**self.engine.status(), "in_flight": self.in_flight(), "waiting": self.gate.waiting}
        content = told.told(
            status, self.facts, self.engine, self.counts, self.upstream.reads,
            full=told.sees_all(self.policy, scope["headers"], private=private),
            after=told.lines_seen(scope["query_string"]),
        )  # fmt: skip
        await answer.json(200, content, [(b"cache-control", b"no-store")])

    async def _metrics(self, answer: _Answer) -> None:
        from supervisor.gateway.metrics import CONTENT_TYPE, Exposition  # noqa: PLC0415  # 20 ms, for those who ask

        if self.exposition is None:
            self.exposition = Exposition(self.counts, self.facts, self._look, self.cache)
        text = self.exposition.text() + await self._vllms_metrics()
        await answer.give(200, text, [(b"content-type", CONTENT_TYPE)])

    def _look(self) -> dict[str, object]:
        waiting = self.gate.waiting
        return {**self.engine.status(), "requests_in_flight": self.in_flight(), "requests_waiting": waiting}

    async def _vllms_metrics(self) -> bytes:
        if not self.engine.ready:
            return b""
        answer = await ask(self.upstream, "/metrics", patience=METRICS_PATIENCE)
        return answer[1] if answer is not None and answer[0] == 200 else b""

    async def _ping(self, answer: _Answer) -> None:
        """RunPod's load balancer: 204 keeps the worker in its list while it loads, 200 sends it work."""
        if self.engine.ready:
            await answer.json(200, {"status": "ready"})
        elif self.engine.over:
            await answer.json(503, {"status": self.engine.explanation})
        else:
            await answer.empty(204)


@dataclass(slots=True)
class _Answer:
    send: Send
    cors: Headers

    async def json(self, status: int, content: Mapping[str, object], headers: Headers | None = None) -> None:
        fields = [(b"content-type", b"application/json"), *(headers or [])]
        await self.give(status, json.dumps(content).encode() + b"\n", fields)

    async def give(self, status: int, body: bytes, headers: Headers) -> None:
        fields = [*headers, (b"content-length", b"%d" % len(body)), *self.cors]
        await self.send({"type": "http.response.start", "status": status, "headers": fields})
        await self.send({"type": "http.response.body", "body": body})

    async def empty(self, status: int) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": self.cors})
        await self.send({"type": "http.response.body"})


def _private(scope: Scope) -> bool:
    """From a socket that nobody else can open: a path has no port."""
    return scope["server"] is not None and scope["server"][1] is None
