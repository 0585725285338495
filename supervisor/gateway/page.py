"""The page at `/`, and what it lives on: the feed at `/status/events`.

The page holds no data, so everybody may have it; what it shows it asks for, with the key that its reader gives it.
A feed is a stream of server-sent events: one at once, one for each transition, one a second while something changes. It
holds what changes all the time, and of the rest (log, last failure, what happened) what this feed has not told yet.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisor.gateway.counts import BOUNDS

if TYPE_CHECKING:
    from supervisor.gateway.app import Gateway
    from supervisor.gateway.relay import RelayProtocol

HTML = Path(__file__).with_name("page.html")
LIMIT = 32  # feeds at once
BEAT = 1.0  # seconds between two looks whether something has changed
# Seconds of silence, after which a comment shows that the feed lives: proxies close what is silent.
QUIET = 15.0
TRANSITIONS = 30
# Seconds in which a reader may take the last event, when the supervisor leaves.
LAST_EVENT = 0.5
# An engine's log may have a line of 64 kB.
LONGEST_LINE = 1000
LOOKED_AT = ("state", "since", "reason", "phases", "progress", "restarts", "pid")
HEAD = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the events until it has some kilobytes
]

Message = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Message], Any]


def wanted(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Browsers name HTML; curl and clients that want JSON don't."""
    accepted = b",".join(value for name, value in headers if name == b"accept").lower()
    return any(kind.partition(b";")[0].strip() == b"text/html" for kind in accepted.split(b","))


@cache
def _page() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Its bytes and its head: only what is written in the file may run, and it may ask this server alone."""
    text = HTML.read_bytes()

    def hashes(element: bytes) -> str:
        found = re.findall(b"<%b>(.*?)</%b>" % (element, element), text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in found)

    policy = (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return text, [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-length", b"%d" % len(text)),
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
        (b"vary", b"Accept"),
    ]


async def show(send: Send) -> None:
    body, head = _page()
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


class _Feed:
    """One reader, and what it was told."""

    def __init__(self, connection: RelayProtocol | None) -> None:
        self.connection = connection
        self.news = asyncio.Event()
        self.told: Message = {}
        self.failure: object = None
        self.latest: object = None  # of the engine's transitions
        self.line = 0


class Feeds:
    """All readers. While there is none, nothing is looked at. One that does not read is the relay's to close."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.feeds: set[_Feed] = set()
        self.over = False
        self.now: Message = {}
        self.failure: object = None
        self._beat: asyncio.TimerHandle | None = None

    @property
    def full(self) -> bool:
        return len(self.feeds) >= LIMIT

    def changed(self) -> None:
        """Called after each transition of the engine."""
        self._tell()

    def end(self) -> None:
        """The supervisor leaves: each feed tells its last event, and no reader is waited for."""
        self.over = True
        self._tell()
        for feed in self.feeds:
            self.gateway.upstream.loop.call_later(LAST_EVENT, self._cut, feed)

    def _cut(self, feed: _Feed) -> None:
        if feed.connection in self.gateway.connections:
            feed.connection.transport.abort()

    async def serve(self, scope: Message, receive: Receive, send: Send) -> None:
        """One feed, until its reader or the supervisor leaves; other methods than GET have one event of it."""
        mine = (one for one in self.gateway.connections if one.scope is scope)
        feed = _Feed(next(mine, None))
        self.feeds.add(feed)
        if self._beat is None:
            self._tick()
        else:
            self._tell()
        gone = asyncio.create_task(_left(receive))
        gone.add_done_callback(lambda _: feed.news.set())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEAD})
            while not gone.done():
                feed.news.clear()
                last = self.over or scope["method"] != "GET"
                if event := self._event(feed):
                    await _write(send, event)
                if last:
                    break
                try:
                    async with asyncio.timeout(QUIET):
                        await feed.news.wait()
                except TimeoutError:
                    await _write(send, b":\n\n")
        finally:
            gone.cancel()
            self.feeds.discard(feed)
        await send({"type": "http.response.body"})

    def _tick(self) -> None:
        self._beat = self.gateway.upstream.loop.call_later(BEAT, self._tick) if self.feeds else None
        self._tell()

    def _tell(self) -> None:
        if not self.feeds:
            return
        gateway, status = self.gateway, self.gateway.engine.status()
        self.failure = status["last_failure"]
        self.now = {
            **{name: status[name] for name in LOOKED_AT},
            "in_flight": gateway.in_flight,
            "waiting": gateway.waiting,
            "statuses": gateway.counts.statuses,
            "buckets": list(gateway.counts.buckets),
            "reads": gateway.upstream.reads,
        }
        for feed in self.feeds:
            feed.news.set()

    def _event(self, feed: _Feed) -> bytes:
        """What this feed has not told yet; nothing where there is no such thing."""
        more: Message = {}
        if not feed.told:
            more["bounds"] = BOUNDS
        if feed.failure is not self.failure:
            feed.failure = more["last_failure"] = self.failure
        happened = list(self.gateway.engine.timeline)[-TRANSITIONS:]
        if feed.latest is not happened[-1]:
            feed.latest = happened[-1]
            more["happened"] = happened
        feed.line, lines = self.gateway.engine.log_after(feed.line)
        if lines:
            more["log"] = [line[:LONGEST_LINE] for line in lines]
        if not more and feed.told == self.now:
            return b""
        feed.told = self.now
        return b"data: %b\n\n" % json.dumps({**self.now, **more, "now": time.time()}).encode()


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
