"""Who may ask for what, how much, and how often.

What can be said of a request by its head alone is a `Verdict`, which is kept with a head that comes again; what depends
on the moment (the rate) is asked each time. routes.toml has vLLM's routes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import sys
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from supervisor.gateway.counts import OTHER
from supervisor.gateway.errors import Refusal, refuse
from supervisor.gateway.http1 import KEY_PROTOCOL, Headers, Request

UNAUTHORIZED = refuse("invalid_api_key")
ADMIN_ONLY = refuse("admin_key_needed")
# Wrong keys that one address may try in a minute before it is told no more than that.
FAILURES = 60
TOO_MANY_FAILURES = refuse("too_many_wrong_keys", 60, limit=FAILURES)
# Keys of one request that are looked at.
KEYS_LIMIT = 8
# Names by which this machine's loopback is reached, and that nobody can have in the DNS; the last two from containers.
LOOPBACK_NAMES = ("localhost", "*.localhost", "host.docker.internal", "host.containers.internal")
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_TABLE = tomllib.loads(Path(__file__).with_name("routes.toml").read_text(encoding="utf-8"))
ENGINE_ROUTES: frozenset[str] = frozenset(_TABLE["engine"])
OPEN_ROUTES: tuple[str, ...] = (*_TABLE["engine"], *_TABLE["server"])
ADMIN_ROUTES: tuple[str, ...] = (*_TABLE["admin"],)
# Whether the body has to ask for an answer that may be kept.
CACHED_ROUTES: dict[str, bool] = _TABLE["cached"]
# Clients whose rate is remembered; those that have not used theirs up are forgotten first.
CLIENTS_LIMIT = 10_000
ROUNDING = 1e-6  # seconds: sixty times a sixtieth of a minute is not always a minute


class Verdict(NamedTuple):
    """What a request's head tells. `client`: the key that was given, for limits by client; `route`: the prefix of
    routes.toml that its path has, for metrics; `admin`: its key is an administrator's."""

    refusal: Refusal | None
    client: bytes = b""
    route: str = OTHER
    admin: bool = False


class Routes:
    """Which paths are open: the longest prefix decides."""

    def __init__(self, allowed: Iterable[str] = (), root: str = "") -> None:
        """`allowed`: more prefixes to open; `root`: vLLM's --root-path, which it takes off."""
        table = dict.fromkeys(ADMIN_ROUTES, ADMIN_ONLY) | dict.fromkeys((*OPEN_ROUTES, *allowed))
        self.table = {prefix.rstrip("/"): refusal for prefix, refusal in table.items()}
        self.root = root.rstrip("/")
        # By its last part and by the last two, for a hint. Clients forget the /v1, or have it twice.
        self.hints = {"/".join(route.split("/")[-count:]): route for count in (1, 2) for route in OPEN_ROUTES}

    def strip_root(self, path: bytes) -> str:
        """As vLLM looks at it: without escapes, and without the root path."""
        text = unquote(path.decode("latin-1"))
        if self.root and (text == self.root or text.startswith(self.root + "/")):
            text = text[len(self.root) :]
        return text

    def find(self, path: bytes) -> tuple[str, Refusal | None]:
        """The prefix that decides, and what it decides."""
        text = self.strip_root(path)
        at = len(text)
        while at > 0:
            if (prefix := text[:at]) in self.table:
                return prefix, self.table[prefix]
            at = text.rfind("/", 0, at)
        if "" in self.table:
            return OTHER, self.table[""]
        parts = text.rstrip("/").split("/")
        near = self.hints.get("/".join(parts[-2:])) or self.hints.get(parts[-1])
        hint = f"Did you mean {near}?" if near else "SUPERVISOR_ALLOW_ROUTES opens others."
        return OTHER, refuse("route_not_found", path=text, hint=hint)


@dataclass(frozen=True)
class Origins:
    """CORS for our own answers, and for preflights, by the options that vLLM's own middleware has."""

    allowed: Collection[str] = ()
    methods: Collection[str] = ("*",)
    headers: Collection[str] = ("*",)
    credentials: bool = False

    def _allows(self, origin: bytes | None) -> bool:
        return origin is not None and ("*" in self.allowed or origin.decode("latin-1") in self.allowed)

    def fields(self, origin: bytes | None) -> Headers:
        """What an answer to a page from there carries."""
        if "*" in self.allowed and not self.credentials:
            return [(b"access-control-allow-origin", b"*")] if origin is not None else []
        found = [(b"vary", b"Origin")] if self.allowed else []
        if origin is not None and self._allows(origin):
            found.insert(0, (b"access-control-allow-origin", origin))
            found += [(b"access-control-allow-credentials", b"true")] if self.credentials else []
        return found

    def lines(self, origin: bytes | None) -> bytes:
        """The same, as they stand in a head."""
        return b"".join(b"%b: %b\r\n" % (name.title(), value) for name, value in self.fields(origin))

    def preflight(self, headers: Headers) -> Headers | None:
        """What a browser is told that asks whether it may. None: it may not."""
        asked = {name.lower(): value for name, value in headers}
        origin, wanted = asked.get(b"origin", b""), asked.get(b"access-control-request-headers", b"")
        if not self._allows(origin):
            return None
        if "*" not in self.headers:
            wanted = ", ".join(self.headers).encode()
        methods = ", ".join(METHODS if "*" in self.methods else self.methods).encode()
        found = [*self.fields(origin), (b"access-control-allow-methods", methods)]
        found += [(b"access-control-allow-headers", wanted)] if wanted else []
        return [*found, (b"access-control-max-age", b"600")]


def is_preflight(method: bytes, headers: Headers) -> bool:
    """A browser asks, without a key, whether a page may ask."""
    names = {name.lower() for name, _ in headers} if method == b"OPTIONS" else ()
    return b"origin" in names and b"access-control-request-method" in names


class Rate:
    """Requests per minute for each client: a bucket that holds as many, and fills steadily."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.full_at: dict[bytes, float] = {}  # when a client's bucket is full again

    def take(self, client: bytes, now: float) -> Refusal | None:
        full_at = max(self.full_at.get(client, now), now) + 60 / self.per_minute
        wait = full_at - (now + 60)  # an empty one is full in a minute
        if wait > ROUNDING:
            wait = math.ceil(wait)
            return refuse("rate_limit_exceeded", wait, limit=self.per_minute, wait=wait)
        if client not in self.full_at and len(self.full_at) >= CLIENTS_LIMIT:
            full = [each for each, at in self.full_at.items() if at <= now]
            for each in full or list(self.full_at)[: CLIENTS_LIMIT // 2]:
                del self.full_at[each]
        self.full_at[client] = full_at
        return None


@dataclass
class Policy:
    """Asked once for each head."""

    api_keys: Collection[str] = ()
    admin_keys: Collection[str] = ()
    routes: Routes = field(default_factory=Routes)
    origins: Origins = Origins()
    hosts: Collection[str] | None = None  # what `Host` may be beside localhost and addresses; None: anything
    rate: Rate | None = None  # of each client
    max_body: int = sys.maxsize  # bytes
    timeout: float = math.inf  # of a whole request, in seconds
    standing_refusal: Refusal | None = None  # why no request is taken here
    failures: Rate = field(default_factory=partial(Rate, FAILURES))

    def size_refusal(self) -> Refusal:
        return refuse("request_too_large", limit=self.max_body)

    def judge(self, request: Request) -> Verdict:
        route, refusal = self.routes.find(request.path)
        verdict = self.identify(request.headers)
        if verdict.admin:
            refusal = None
        refusal = verdict.refusal or refusal or self.standing_refusal
        return Verdict(refusal, verdict.client, route, verdict.admin)

    def identify(self, headers: Headers) -> Verdict:
        """Whether one of the keys is valid, and whose it is; and whether a browser was tricked into asking here."""
        known = b""
        for given in find_keys(headers):
            # Every key is compared, so that the time tells nothing of which one came close.
            if sum(compare_digest(given, key.encode()) for key in self.admin_keys):
                return Verdict(None, given, admin=True)
            if sum(compare_digest(given, key.encode()) for key in self.api_keys):
                known = given
        if known:
            return Verdict(None, known)
        return Verdict(UNAUTHORIZED if self.api_keys else self._check_host(headers))

    def _check_host(self, headers: Headers) -> Refusal | None:
        """DNS rebinding: a page's own name leads here, and its browser believes that it asks its own server."""
        if self.hosts is None:
            return None
        found = next((value for name, value in headers if name.lower() == b"host"), b"localhost")
        host = found.decode("latin-1").lower()
        name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
        if any(fnmatchcase(name, known.lower()) for known in (*LOOPBACK_NAMES, *self.hosts)):
            return None
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return None
        return refuse("host_not_allowed", name=name)

    def refusal_for(self, verdict: Verdict, address: bytes, now: float) -> Refusal | None:
        """What its client is told. Wrong keys are answered so many times a minute, and then with less; a valid one is
        let in whatever others at its address (a proxy's, maybe) have tried."""
        if verdict.refusal is UNAUTHORIZED and self.failures.take(address, now) is not None:
            return TOO_MANY_FAILURES
        return verdict.refusal


def find_keys(headers: Headers) -> list[bytes]:
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
