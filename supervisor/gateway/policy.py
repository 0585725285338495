"""Who may ask for what, how much, and how often.

What can be said of a request by its head alone is a `Verdict`, which is kept with a head that comes again; what depends
on the moment (the rate) is asked each time.
"""

from __future__ import annotations

import ipaddress
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest
from urllib.parse import unquote

from supervisor.gateway.counts import OTHER
from supervisor.gateway.errors import Refusal
from supervisor.gateway.http1 import KEY_PROTOCOL, Headers, Request

UNAUTHORIZED = Refusal(
    401, "A valid key is needed: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.", "invalid_api_key"
)
# Wrong keys that one address may try in a minute before it is told no more than that.
FAILURES = 60
TOO_MANY_FAILURES = Refusal(
    429, f"More than {FAILURES} wrong keys in a minute from this address.", "too_many_wrong_keys", retry_after=60
)
# Keys of one request that are looked at.
KEYS_LIMIT = 8
SHOWN_PATH = 100
# Names by which this machine's loopback is reached, and that nobody can have in the DNS; the last two from containers.
LOOPBACK_NAMES = frozenset({"localhost", "*.localhost", "host.docker.internal", "host.containers.internal"})
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# vLLM's routes for those who use the model (tests/vllm/test_routes.py compares both lists with vLLM's own). A prefix
# opens what lies below it as well, unless a longer one closes that again.
OPEN_ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/cohere/v2/chat", "/v1/systemone",
    "/v1/decisions", "/generative_scoring", "/inference/v1/generate", "/tokenize", "/detokenize", "/invocations",
    "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank",
    "/v2/rerank", "/v1/audio", "/v1/realtime", "/v1/models", "/version", "/load", "/openapi.json", "/docs",
    "/redoc", "/static", "/health", "/ping", "/metrics",
)  # fmt: skip
# Those of them that vLLM's API server can't answer without its engine.
ENGINE_ROUTES = frozenset(OPEN_ROUTES[: OPEN_ROUTES.index("/v1/realtime")]) - {"/tokenize", "/detokenize"}
# Routes that change the server, stop other people's requests, or show its configuration.
ADMIN_ROUTES = (
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/start_profile", "/stop_profile",
    "/tokenizer_info", "/kv_event_sources", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance",
    "/inference/v1/abort_requests", "/abort_requests", "/collective_rpc", "/server_info", "/reset_prefix_cache",
    "/reset_mm_cache", "/reset_encoder_cache", "/sleep", "/release_kv_cache_memory", "/wake_up", "/is_sleeping",
    "/pause", "/resume", "/is_paused", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
    "/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update",
    "/update_weight_version", "/weight_info", "/weight_checker", "/get_world_size",
)  # fmt: skip
ADMIN_ONLY = Refusal(
    403, "This route needs an admin key: it can change the server, or shows its configuration.", "admin_key_needed"
)
# Clients whose rate is remembered; those that have not used theirs up are forgotten first.
CLIENTS_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a request's head tells. `client`: the key that was given, for limits by client; `route`: the prefix of the
    lists above that its path has, for metrics; `admin`: its key is an administrator's; `failed`: its keys are not
    valid."""

    refusal: Refusal | None
    client: bytes = b""
    route: str = OTHER
    admin: bool = False
    failed: bool = False


class Routes:
    """Which paths are open: the longest prefix decides."""

    def __init__(self, allowed: Iterable[str] = (), root: str = "") -> None:
        """`allowed`: more prefixes to open; `root`: vLLM's --root-path, which it takes off."""
        table = dict.fromkeys(ADMIN_ROUTES, ADMIN_ONLY) | dict.fromkeys((*OPEN_ROUTES, *allowed))
        self.table = {prefix.rstrip("/"): refusal for prefix, refusal in table.items()}
        self.root = root.rstrip("/")
        # By its last part and by the last two, for a hint. Clients forget the /v1, or have it twice.
        self.hints = {"/".join(route.split("/")[-count:]): route for count in (1, 2) for route in OPEN_ROUTES}

    def below_root(self, path: bytes) -> str:
        """As vLLM looks at it: without escapes, and without the root path."""
        text = unquote(path.decode("latin-1"))
        if self.root and (text == self.root or text.startswith(self.root + "/")):
            text = text[len(self.root) :]
        return text

    def find(self, path: bytes) -> tuple[str, Refusal | None]:
        """The prefix that decides, and what it decides."""
        text = self.below_root(path)
        at = len(text)
        while at > 0:
            if (prefix := text[:at]) in self.table:
                return prefix, self.table[prefix]
            at = text.rfind("/", 0, at)
        return OTHER, self.table[""] if "" in self.table else self._unknown(text)

    def _unknown(self, path: str) -> Refusal:
        parts = path.rstrip("/").split("/")
        near = self.hints.get("/".join(parts[-2:])) or self.hints.get(parts[-1])
        hint = f"Did you mean {near}?" if near else "SUPERVISOR_ALLOW_ROUTES opens others."
        return Refusal(404, f"There is no route {path[:SHOWN_PATH]} here. {hint}", "route_not_found")

    def refusal(self, path: bytes) -> Refusal | None:
        return self.find(path)[1]


class Origins:
    """CORS for our own answers, and for preflights, by the options that vLLM's own middleware has."""

    def __init__(
        self,
        allowed: Iterable[str] = (),
        methods: Iterable[str] = ("*",),
        headers: Iterable[str] = ("*",),
        *,
        credentials: bool = False,
    ) -> None:
        self.allowed = frozenset(origin.encode() for origin in allowed)
        self.all = b"*" in self.allowed
        self.methods = ", ".join(METHODS if "*" in methods else methods).encode()
        self.headers = None if "*" in headers else ", ".join(headers).encode()
        self.credentials = credentials

    def lines(self, origin: bytes | None) -> bytes:
        """What an answer to a page from there carries."""
        if not self.allowed:
            return b""
        if self.all and not self.credentials:
            return b"Access-Control-Allow-Origin: *\r\n" if origin is not None else b""
        if origin is None or not (self.all or origin in self.allowed):
            return b"Vary: Origin\r\n"
        credentials = b"Access-Control-Allow-Credentials: true\r\n" if self.credentials else b""
        return b"Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n%b" % (origin, credentials)

    def preflight(self, headers: Headers) -> Headers | None:
        """What a browser is told that asks whether it may. None: it may not."""
        asked = {name.lower(): value for name, value in headers}
        origin = asked.get(b"origin", b"")
        if not (self.all or origin in self.allowed):
            return None
        wanted = asked.get(b"access-control-request-headers", b"") if self.headers is None else self.headers
        lines = self.lines(origin).split(b"\r\n")[:-1]
        return [
            *((name.lower(), value) for name, _, value in (line.partition(b": ") for line in lines)),
            (b"access-control-allow-methods", self.methods),
            *([(b"access-control-allow-headers", wanted)] if wanted else []),
            (b"access-control-max-age", b"600"),
        ]


def is_preflight(method: bytes, headers: Headers) -> bool:
    """A browser asks, without a key, whether a page may ask."""
    names = {name.lower() for name, _ in headers} if method == b"OPTIONS" else ()
    return b"origin" in names and b"access-control-request-method" in names


class Rate:
    """Requests per minute for each client: a bucket that holds as many, and fills steadily."""

    def __init__(self, per_minute: int) -> None:
        self.capacity = float(per_minute)
        self.per_second = per_minute / 60
        self.buckets: dict[bytes, tuple[float, float]] = {}  # tokens left, and when

    def take(self, client: bytes, now: float) -> Refusal | None:
        tokens, at = self.buckets.get(client, (self.capacity, now))
        tokens = min(self.capacity, tokens + (now - at) * self.per_second)
        if tokens < 1:
            wait = math.ceil((1 - tokens) / self.per_second)
            text = f"More than {self.capacity:.0f} requests in a minute: the next one is taken in {wait} s."
            return Refusal(429, text, "rate_limit_exceeded", retry_after=wait)
        if client not in self.buckets and len(self.buckets) >= CLIENTS_LIMIT:
            self._forget(now)
        self.buckets[client] = (tokens - 1, now)
        return None

    def _forget(self, now: float) -> None:
        full = [
            client
            for client, (tokens, at) in self.buckets.items()
            if tokens + (now - at) * self.per_second >= self.capacity
        ]
        for client in full or list(self.buckets)[: CLIENTS_LIMIT // 2]:
            del self.buckets[client]


class Policy:
    """Asked once for each head."""

    def __init__(
        self,
        api_keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        *,
        routes: Routes | None = None,
        origins: Origins | None = None,
        hosts: Iterable[str] | None = None,
        rate: int | None = None,
        max_body: int = sys.maxsize,
        timeout: float = math.inf,
        elsewhere: Refusal | None = None,
    ) -> None:
        """`hosts`: what `Host` may be beside localhost and addresses, None for any; `rate` in requests per minute and
        client; `max_body` in bytes; `timeout` of a whole request, in seconds; `elsewhere`: why no request is taken
        here."""
        self.set_keys(api_keys, admin_keys)
        self.routes = routes or Routes()
        self.origins = origins or Origins()
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.rate = Rate(rate) if rate else None
        self.failures = Rate(FAILURES)
        self.max_body = max_body
        self.timeout = timeout
        self.elsewhere = elsewhere

    def set_keys(self, api_keys: Iterable[str], admin_keys: Iterable[str]) -> None:
        self.keys = tuple(key.encode() for key in api_keys)
        self.admin_keys = tuple(key.encode() for key in admin_keys)

    def too_large(self) -> Refusal:
        text = f"The request's body is larger than {self.max_body} bytes (SUPERVISOR_MAX_BODY)."
        return Refusal(413, text, "request_too_large")

    def too_late(self) -> Refusal:
        text = f"The request took longer than {self.timeout:g} s (SUPERVISOR_REQUEST_TIMEOUT)."
        return Refusal(504, text, "request_timeout")

    def judge(self, request: Request) -> Verdict:
        route, refusal = self.routes.find(request.path)
        verdict = self.identify(request.headers)
        if verdict.admin:
            refusal = None
        refusal = verdict.refusal or refusal or self.elsewhere
        return Verdict(refusal, verdict.client, route, verdict.admin, verdict.failed)

    def identify(self, headers: Headers) -> Verdict:
        """Whether one of the keys is valid, and whose it is; and whether a browser was tricked into asking here."""
        known = b""
        for given in keys_given(headers):
            # Every key is compared, so that the time tells nothing of which one came close.
            if sum(compare_digest(given, key) for key in self.admin_keys) > 0:
                return Verdict(None, given, admin=True)
            if sum(compare_digest(given, key) for key in self.keys) > 0:
                known = given
        if known:
            return Verdict(None, known)
        return Verdict(UNAUTHORIZED, failed=True) if self.keys else Verdict(self._host_refused(headers))

    def _host_refused(self, headers: Headers) -> Refusal | None:
        """DNS rebinding: a page's own name leads here, and its browser believes that it asks its own server."""
        if self.hosts is None:
            return None
        found = next((value for name, value in headers if name.lower() == b"host"), b"localhost")
        host = found.decode("latin-1").lower()
        name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
        if _is_address(name) or _among(name, LOOPBACK_NAMES) or _among(name, self.hosts):
            return None
        text = (
            f"This server has no keys, and is not known as {name[:SHOWN_PATH]}: SUPERVISOR_ALLOWED_HOSTS names others."
        )
        return Refusal(403, text, "host_not_allowed")

    def refused(self, verdict: Verdict, address: bytes, now: float) -> Refusal | None:
        """What its client is told. Wrong keys are answered so many times a minute, and then with less; a valid one is
        let in whatever others at its address (a proxy's, maybe) have tried."""
        if verdict.failed and self.failures.take(address, now) is not None:
            return TOO_MANY_FAILURES
        return verdict.refusal


def keys_given(headers: Headers) -> list[bytes]:
    """All of them: programs that know two spellings send both, and one of them may be stale."""
    found = []
    for name, value in headers:
        lower = name.lower()
        if lower in (b"x-api-key", b"api-key"):
            found.append(value)
        elif lower == b"authorization" and value[:7].lower() == b"bearer ":
            found.append(value[7:].strip())
        elif lower == b"sec-websocket-protocol":
            tokens = [token.strip() for token in value.split(b",")]
            found += [token[len(KEY_PROTOCOL) :] for token in tokens if token.startswith(KEY_PROTOCOL)]
    return found[:KEYS_LIMIT]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _among(name: str, hosts: frozenset[str]) -> bool:
    """`*.example.com` stands for all names below."""
    return name in hosts or any(host.startswith("*.") and name.endswith(host[1:]) for host in hosts)
