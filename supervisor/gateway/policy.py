"""Who may ask for what, how much, and how often.

What can be said of a request by its head alone is a `Verdict`, which is kept with a head that comes again; what depends
on the moment (the rate) is asked each time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest
from urllib.parse import unquote

from supervisor.gateway.counts import OTHER
from supervisor.gateway.errors import Refusal

UNAUTHORIZED = Refusal(
    401, "A valid key is needed: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.", "invalid_api_key"
)
HEAD_LIMIT = 32 * 1024  # bytes of a request's head
HEADERS_LIMIT = 100
TARGET_LIMIT = 8 * 1024
HEAD_TOO_LARGE = Refusal(
    431,
    f"The request's head is larger than {HEAD_LIMIT} bytes, or has more than {HEADERS_LIMIT} headers.",
    "head_too_large",
)
TARGET_TOO_LONG = Refusal(414, f"The request's target is longer than {TARGET_LIMIT} bytes.", "uri_too_long")


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
UNKNOWN_ROUTE = Refusal(
    403, "This is no route of the model's. An admin key, or SUPERVISOR_ALLOW_ROUTES, opens it.", "route_not_open"
)
# Clients whose rate is remembered; those that have not used theirs up are forgotten first.
CLIENTS_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a request's head tells. `client`: the key that was given, for limits by client; `route`: the prefix of the
    lists above that its path has, for metrics."""

    refusal: Refusal | None
    client: bytes = b""
    route: str = OTHER


class Routes:
    """Which paths are open: the longest prefix decides."""

    def __init__(self, allowed: Iterable[str] = (), root: str = "") -> None:
        """`allowed`: more prefixes to open; `root`: vLLM's --root-path, which it takes off."""
        table = dict.fromkeys(ADMIN_ROUTES, ADMIN_ONLY) | dict.fromkeys((*OPEN_ROUTES, *allowed))
        self.table = {prefix.rstrip("/"): refusal for prefix, refusal in table.items()}
        self.root = root.rstrip("/")

    def find(self, path: bytes) -> tuple[str, Refusal | None]:
        """The prefix that decides, and what it decides."""
        # vLLM looks at the path without escapes.
        text = unquote(path.decode("latin-1"))
        if self.root and (text == self.root or text.startswith(self.root + "/")):
            text = text[len(self.root) :]
        at = len(text)
        while at > 0:
            if (prefix := text[:at]) in self.table:
                return prefix, self.table[prefix]
            at = text.rfind("/", 0, at)
        return OTHER, self.table.get("", UNKNOWN_ROUTE)

    def refusal(self, path: bytes) -> Refusal | None:
        return self.find(path)[1]


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
        rate: int | None = None,
        max_body: int = sys.maxsize,
        timeout: float = math.inf,
    ) -> None:
        """`rate` in requests per minute and client; `max_body` in bytes; `timeout` of a whole request, in seconds."""
        self.set_keys(api_keys, admin_keys)
        self.routes = routes or Routes()
        self.rate = Rate(rate) if rate else None
        self.max_body = max_body
        self.timeout = timeout

    def set_keys(self, api_keys: Iterable[str], admin_keys: Iterable[str]) -> None:
        self.keys = tuple(key.encode() for key in api_keys)
        self.admin_keys = tuple(key.encode() for key in admin_keys)

    def too_large(self) -> Refusal:
        text = f"The request's body is larger than {self.max_body} bytes (SUPERVISOR_MAX_BODY)."
        return Refusal(413, text, "request_too_large")

    def too_late(self) -> Refusal:
        text = f"The request took longer than {self.timeout:g} s (SUPERVISOR_REQUEST_TIMEOUT)."
        return Refusal(504, text, "request_timeout")

    def judge(self, path: bytes, headers: list[tuple[bytes, bytes]], *, private: bool = False) -> Verdict:
        """`private`: RunPod has asked for its own key; no job is an administrator, though."""
        route, refusal = self.routes.find(path)
        if private:
            return Verdict(refusal, route=route)
        verdict, admin = self.identify(headers)
        if verdict.refusal is not None or admin:
            refusal = verdict.refusal
        return Verdict(refusal, verdict.client, route)

    def identify(self, headers: list[tuple[bytes, bytes]]) -> tuple[Verdict, bool]:
        """Whether the key is a valid one, and whether it is an administrator's."""
        if not self.keys and not self.admin_keys:
            return Verdict(None), False
        given = key_given(headers)
        # Every key is compared, so that the time tells nothing of which one came close.
        admin = sum(compare_digest(given, key) for key in self.admin_keys) > 0
        known = sum(compare_digest(given, key) for key in self.keys) > 0
        if admin or known or not self.keys:
            return Verdict(None, given if admin or known else b""), admin
        return Verdict(UNAUTHORIZED), False


def key_given(headers: list[tuple[bytes, bytes]]) -> bytes:
    given = b""
    for name, value in headers:
        lower = name.lower()
        if lower == b"x-api-key":
            given = value
        elif lower == b"authorization" and value[:7].lower() == b"bearer ":
            given = value[7:].strip()
    return given


def head_limits(target: bytes, headers: list[tuple[bytes, bytes]]) -> Refusal | None:
    if len(target) > TARGET_LIMIT:
        return TARGET_TOO_LONG
    if len(headers) > HEADERS_LIMIT or sum(len(name) + len(value) + 4 for name, value in headers) > HEAD_LIMIT:
        return HEAD_TOO_LARGE
    return None
