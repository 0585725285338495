"""The policy says who may ask for what, how much, and how often.

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
# One address may try so many wrong keys in a minute before it is told only that there were too many.
MAX_FAILURES = 60
TOO_MANY_FAILURES = refuse("too_many_wrong_keys", 60, limit=MAX_FAILURES)
KEYS_LIMIT = 8  # so many keys of one request are looked at
# This machine's loopback is reached by these names, which nobody can have in the DNS; by the last two from containers.
LOOPBACK_NAMES = ("localhost", "*.localhost", "host.docker.internal", "host.containers.internal")
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_TABLE = tomllib.loads(Path(__file__).with_name("routes.toml").read_text(encoding="utf-8"))
ENGINE_ROUTES: frozenset[str] = frozenset(_TABLE["engine"])
OPEN_ROUTES: tuple[str, ...] = (*_TABLE["engine"], *_TABLE["server"])
ADMIN_ROUTES: tuple[str, ...] = (*_TABLE["admin"],)
# The cache may keep these routes' answers; True: only where the body asks for an answer that comes out the same.
CACHED_ROUTES: dict[str, bool] = _TABLE["cached"]
# The rates of so many clients are remembered; those whose bucket is full are forgotten first.
CLIENTS_LIMIT = 10_000
ROUNDING = 1e-6  # seconds: sixty times a sixtieth of a minute is not always a minute


class Verdict(NamedTuple):
    """Is what a request's head tells. `client`: the valid key that was given, for limits by client; `route`: the prefix
    of routes.toml that its path has, for metrics; `admin`: its key is an administrator's."""

    refusal: Refusal | None
    client: bytes = b""
    route: str = OTHER
    admin: bool = False


class Routes:
    """Knows which paths are open: the longest prefix decides."""

    def __init__(self, allowed: Iterable[str] = (), root: str = "") -> None:
        """`allowed` are more prefixes to open. `root` is vLLM's --root-path, which vLLM takes off a path."""
        table = dict.fromkeys(ADMIN_ROUTES, ADMIN_ONLY) | dict.fromkeys((*OPEN_ROUTES, *allowed))
        self.table = {prefix.rstrip("/"): refusal for prefix, refusal in table.items()}
        self.longest = max(map(len, self.table))
        self.root = root.rstrip("/")
        # Open routes by their last part and by their last two give a hint: clients forget the /v1, or have it twice.
        self.hints = {"/".join(route.split("/")[-count:]): route for count in (1, 2) for route in OPEN_ROUTES}

    def strip_root(self, path: bytes) -> str:
        """Returns the path as vLLM looks at it: without escapes, and without the root path."""
        text = unquote(path.decode("latin-1"))
        if self.root and (text == self.root or text.startswith(self.root + "/")):
            text = text[len(self.root) :]
        return text

    def find(self, path: bytes) -> tuple[str, Refusal | None]:
        """Returns the prefix that decides, and the refusal that it means; None: the path is open. vLLM's server takes
        a path with a line end behind it, or a fragment, for the path without."""
        text = self.strip_root(path).partition("#")[0].removesuffix("\n")
        at = len(text) if len(text) <= self.longest else text.rfind("/", 0, self.longest + 1)
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
    """Does CORS for our own answers, and for preflights, by the options that vLLM's own middleware has."""

    allowed: Collection[str] = ()
    methods: Collection[str] = ("*",)
    headers: Collection[str] = ("*",)
    credentials: bool = False

    def allows(self, origin: bytes | None) -> bool:
        return origin is not None and ("*" in self.allowed or origin.decode("latin-1") in self.allowed)

    def fields(self, origin: bytes | None) -> Headers:
        """Returns the header fields that an answer to a page of this origin carries."""
        if "*" in self.allowed and not self.credentials:
            return [(b"access-control-allow-origin", b"*")] if origin is not None else []
        found = [(b"vary", b"Origin")] if self.allowed else []
        if origin is not None and self.allows(origin):
            found.insert(0, (b"access-control-allow-origin", origin))
            found += [(b"access-control-allow-credentials", b"true")] if self.credentials else []
        return found

    def lines(self, origin: bytes | None) -> bytes:
        """Returns the same fields as the lines of a head."""
        return b"".join(b"%b: %b\r\n" % (name.title(), value) for name, value in self.fields(origin))

    def preflight(self, headers: Headers) -> Headers | None:
        """Returns the header fields for a browser that asks whether a page may ask; None where the page may not."""
        asked = {name.lower(): value for name, value in headers}
        origin, wanted = asked.get(b"origin", b""), asked.get(b"access-control-request-headers", b"")
        if not self.allows(origin):
            return None
        if "*" not in self.headers:
            wanted = ", ".join(self.headers).encode()
        methods = ", ".join(METHODS if "*" in self.methods else self.methods).encode()
        found = [*self.fields(origin), (b"access-control-allow-methods", methods)]
        found += [(b"access-control-allow-headers", wanted)] if wanted else []
        return [*found, (b"access-control-max-age", b"600")]


def is_preflight(method: bytes, headers: Headers) -> bool:
    """Tells whether a browser asks, without a key, whether a page may ask."""
    names = {name.lower() for name, _ in headers} if method == b"OPTIONS" else ()
    return b"origin" in names and b"access-control-request-method" in names


class Rate:
    """Limits the requests per minute of each client by a bucket, which holds as many and fills steadily."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.full_at: dict[bytes, float] = {}  # the loop's time when a client's bucket is full again

    def take(self, client: bytes, now: float) -> Refusal | None:  # None: the request may go on, and was counted
        full_at = max(self.full_at.get(client, now), now) + 60 / self.per_minute
        wait = full_at - (now + 60)  # an empty bucket is full in a minute
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
    """Holds what the settings allow, and judges each head once."""

    api_keys: Collection[str] = ()
    admin_keys: Collection[str] = ()
    routes: Routes = field(default_factory=Routes)
    origins: Origins = Origins()
    hosts: Collection[str] | None = None  # what `Host` may be beside localhost and addresses; None: anything
    rate: Rate | None = None  # limits each client's requests; None: no limit
    max_body: int = sys.maxsize  # bytes that a request's body may have
    timeout: float = math.inf  # seconds that a whole request may take
    standing_refusal: Refusal | None = None  # why no request is ever taken here; None: requests are taken
    failures: Rate = field(default_factory=partial(Rate, MAX_FAILURES))  # limits the wrong keys of each address

    def size_refusal(self) -> Refusal:
        return refuse("request_too_large", limit=self.max_body)

    def judge(self, request: Request) -> Verdict:
        route, refusal = self.routes.find(request.path)
        verdict = self.identify(request.headers)
        if verdict.admin:
            refusal = None
        refusal = verdict.refusal or refusal or self.standing_refusal or self._check_page(request, verdict)
        return Verdict(refusal, verdict.client, route, verdict.admin)

    def identify(self, headers: Headers) -> Verdict:
        """Tells whether one of the keys is valid, and whose; and whether a browser was tricked into asking here."""
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
        """Refuses DNS rebinding: a page's own name leads here, so that its browser takes us for the page's server."""
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

    def _check_page(self, request: Request, verdict: Verdict) -> Refusal | None:
        """Refuses a WebSocket that another's page opens on loopback: browsers ask nobody whether it may (RFC 6455)."""
        origin = request.header(b"origin") if request.websocket and not verdict.client else None
        if self.hosts is None or origin is None or self.origins.allows(origin):
            return None
        is_ours = origin.lower().partition(b"://")[2] == (request.header(b"host") or b"").lower()
        return None if is_ours else refuse("origin_not_allowed", name=origin.decode("latin-1"))

    def refusal_for(self, verdict: Verdict, address: bytes, now: float) -> Refusal | None:
        """Returns what the client is told, or None. Wrong keys are answered so many times a minute, and then with less;
        a valid one is let in whatever others at its address (a proxy's, maybe) have tried."""
        if verdict.refusal is UNAUTHORIZED and self.failures.take(address, now) is not None:
            return TOO_MANY_FAILURES
        return verdict.refusal


def find_keys(headers: Headers) -> list[bytes]:
    """Returns all keys of a request: programs that know two spellings send both, and one of them may be stale."""
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
