"""This ASGI app answers our own routes: `/ping`, `/health`, `/status`, `/metrics`, the page at `/`; and CORS preflights
for every path, which a browser asks without a key and before it asks anything else.

`/status` tells everything to administrators, to everybody where no keys are set at all, and over the private unix
socket, which only the supervisor's own user can open. Whoever else may ask is told what `FOR_EVERYBODY` names.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl

from supervisor.gateway import page
from supervisor.gateway.ask import ask
from supervisor.gateway.counts import BOUNDS, Counts
from supervisor.gateway.gate import Engine, Gate
from supervisor.gateway.policy import Policy, is_preflight

if TYPE_CHECKING:
    from supervisor.gateway.cache import Cache
    from supervisor.gateway.http1 import Headers
    from supervisor.gateway.upstream import Upstream

OWN_PATHS = frozenset({b"/ping", b"/health", b"/status", b"/metrics", b"/"})
READY = {b"/ping": "ready", b"/health": "ok"}
OWN_METHODS = ("GET", "HEAD", "POST")
# These tell how the server is and what it counts. The rest is how it is set up (settings, paths, vLLM's command), for
# which vLLM's own /server_info needs an admin key, and vLLM's log, which quotes what other clients sent. The list says
# what is shown, and not what is hidden: a new fact is hidden until somebody thinks about it.
FOR_EVERYBODY = frozenset({
    "state", "since", "reason", "pid", "phases", "progress", "expected_seconds", "model", "mode", "vllm_version",
    "last_failure", "restarts", "restarts_by_cause", "transitions", "in_flight", "waiting",
    "now", "bounds", "statuses", "buckets", "reads", "happened",
})  # fmt: skip
LOG_OF_FAILURE = "log_tail"  # vLLM's last lines, within `last_failure`
TRANSITIONS = 30  # so many of the latest are shown on the page
LONGEST_LINE = 1000  # characters; vLLM's log may have a line of 64 kB
NUMBER = re.compile(r"[0-9]{1,15}")
METRICS_PATIENCE = 5.0  # vLLM has so many seconds to tell its metrics; then only ours are told

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Answer = tuple[int, "Headers", bytes]  # status, header fields, body


class EngineView(Engine, Protocol):
    """The routes read this of the engine as well, on the loop, each time that somebody asks. Nothing of it may wait."""

    @property
    def timeline(self) -> Sequence[Mapping[str, object]]:
        """Returns its latest states for the page, in order, the present one included: `at`, `state`, `reason`."""

    def status(self) -> Mapping[str, object]: ...  # returns what /status tells of the engine; /metrics reads it, too

    def log_after(self, number: int) -> tuple[int, list[str]]:
        """Returns, for the page, how many lines vLLM has logged, and those behind the first `number` that are kept."""


@dataclass(slots=True)
class OwnRoutes:
    """Answers our own routes. `facts` never change and are shown at `/status`: model, mode, version, masked command."""

    engine: EngineView
    policy: Policy
    gate: Gate
    counts: Counts
    upstream: Upstream
    count_requests: Callable[[], dict[str, int]]
    facts: Mapping[str, object]
    cache: Cache | None = None

    def is_own(self, path: bytes) -> bool:
        return path in OWN_PATHS or (bool(self.policy.routes.root) and self._path(path) in OWN_PATHS)

    def _path(self, path: bytes) -> bytes:
        """Returns the path without vLLM's --root-path: our own routes are found below it, too."""
        return (self.policy.routes.strip_root(path) or "/").encode("latin-1", "replace")

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        headers: Headers = scope["headers"]
        if is_preflight(scope["method"].encode(), headers):
            allowed = self.policy.origins.preflight(headers)
            refused = _json(400, {"error": "This page's origin is none of ALLOWED_ORIGINS."})
            status, fields, body = (204, allowed, b"") if allowed is not None else refused
        else:
            status, fields, body = await self._answer(scope)
            fields = [*fields, *self.policy.origins.fields(dict(headers).get(b"origin"))]
        if status != 204:
            fields.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope) -> Answer:
        path = self._path(scope["raw_path"])
        if scope["method"] not in OWN_METHODS:
            return _json(405, {"error": "GET, HEAD or POST"}, (b"allow", b"GET, HEAD, POST"))
        if path in READY:
            return self._readiness(path)
        if path == b"/" and page.wants_html(scope["headers"]):
            return page.answer()
        if (refused := self._check_key(scope)) is not None:
            return refused
        return await self._metrics() if path == b"/metrics" else self._status(scope)

    def _readiness(self, path: bytes) -> Answer:
        if self.engine.ready:
            return _json(200, {"status": READY[path]})
        # RunPod's load balancer asks /ping: 204 keeps the worker in its list while it loads, 200 sends it work.
        loads = path == b"/ping" and not self.engine.is_closed
        return (204, [], b"") if loads else _json(503, {"status": self.engine.explanation})

    def _check_key(self, scope: Scope) -> Answer | None:
        """Returns a refusal, or None: where there are keys, the rest is told only to those who have one."""
        if _is_local(scope):
            return None
        address = scope["client"][0].encode() if scope["client"] else b""
        refusal = self.policy.refusal_for(self.policy.identify(scope["headers"]), address, self.gate.loop.time())
        if refusal is None:
            return None
        more = [(b"retry-after", b"%d" % refusal.retry_after)] if refusal.retry_after else []
        more += [(b"www-authenticate", b"Bearer")] if refusal.status == HTTPStatus.UNAUTHORIZED else []
        return _json(refusal.status, {"error": refusal.message}, *more)

    def may_see_all(self, scope: Scope) -> bool:
        """Tells whether `/status` may tell everything. With API keys alone nobody is an administrator over HTTP."""
        policy = self.policy
        return _is_local(scope) or not (policy.api_keys or policy.admin_keys) or policy.identify(scope["headers"]).admin

    def _status(self, scope: Scope) -> Answer:
        content = self.status(after=lines_seen(scope["query_string"]))
        content = content if self.may_see_all(scope) else public_part(content)
        return _json(200, content, (b"cache-control", b"no-store"))

    def status(self, after: int | None = None) -> dict[str, Any]:
        """Returns what `/status` tells; with `after` (a line of vLLM's log, by its number) what the page needs, too."""
        content = {**self.engine.status(), **self.count_requests(), **self.facts}
        if after is not None:
            line, log = self.engine.log_after(after)
            content |= {
                "now": time.time(), "bounds": BOUNDS, "statuses": self.counts.statuses, "buckets": self.counts.buckets,
                "reads": self.upstream.reads, "happened": list(self.engine.timeline)[-TRANSITIONS:],
                "line": line, "log": [text[:LONGEST_LINE] for text in log],
            }  # fmt: skip
        return content

    async def _metrics(self) -> Answer:
        """Answers with our metrics, and behind them vLLM's own as they are."""
        from supervisor.gateway.metrics import CONTENT_TYPE, exposition  # noqa: PLC0415  # 20 ms, for those who ask

        text = exposition(self.counts, self.status(), self.cache)
        if self.engine.ready:
            status, vllms = await ask(self.upstream, "/metrics", patience=METRICS_PATIENCE) or (0, b"")
            text += vllms if status == 200 else b""
        return 200, [(b"content-type", CONTENT_TYPE)], text


def lines_seen(query: bytes) -> int | None:
    """Returns the N of the query's `after=N`, 0 where it is no number; None where nobody asks for what is new."""
    value = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True)).get("after")
    if value is None:
        return None
    return int(value) if NUMBER.fullmatch(value) else 0


def public_part(status: Mapping[str, Any]) -> dict[str, Any]:  # what everybody may see of it
    found = {name: value for name, value in status.items() if name in FOR_EVERYBODY}
    if isinstance(failure := found.get("last_failure"), Mapping):
        found["last_failure"] = {name: value for name, value in failure.items() if name != LOG_OF_FAILURE}
    return found


def _json(status: int, content: Mapping[str, object], *more: tuple[bytes, bytes]) -> Answer:
    return status, [(b"content-type", b"application/json"), *more], json.dumps(content).encode() + b"\n"


def _is_local(scope: Scope) -> bool:
    """Tells whether a request came by the socket that nobody else can open: its address is a path, without a port."""
    return scope["server"] is not None and scope["server"][1] is None
