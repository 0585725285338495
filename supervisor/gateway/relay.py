"""The connection to the client: uvicorn's httptools protocol, with relayed requests taken out of its hands.

The parser's callbacks are replaced. Requests for our own paths are handed back to uvicorn, which runs the ASGI app;
every other request becomes an `Exchange`, which stands where uvicorn expects its request cycle, so that keep-alive,
pipelining and graceful shutdown stay uvicorn's.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from supervisor.gateway.errors import Refusal
from supervisor.gateway.exchange import Exchange, asks_for_websocket
from supervisor.gateway.heads import Latest, RequestHead, split
from supervisor.gateway.policy import HEAD_LIMIT, HEAD_TOO_LARGE

if TYPE_CHECKING:
    from supervisor.gateway.app import Gateway

VERSIONS = ("1.1", "1.0")
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Requests that may wait behind the one that is answered, before no more is read.
PIPELINED = 8
# Seconds in which a client that was refused may still send its body, and read why.
LINGER = 2.0
HEAD_TOO_SLOW = Refusal(408, "The request's head did not come in time.", code="request_timeout")


class _Over(Exception):  # no error
    """Ends the parser's reading."""


class RelayProtocol(HttpToolsProtocol):
    """One client connection. Passed to uvicorn as `Config(http=...)`; `Config(app=...)` must be the `Gateway`."""

    is_client = True  # not so where an exchange writes to a recording (cache.py)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gateway = cast("Gateway", self.app)
        self.counts = self.gateway.counts
        self.incoming: Exchange | None = None  # whose body is arriving
        self.answering: Exchange | None = None  # whose answer is leaving
        self.latest: Latest[RequestHead] | None = None
        self.between = True  # whole requests: the parser expects a new one
        self.in_head = False  # of a request that has begun
        self.head_read = 0  # bytes read since the last head, request, or byte of a body was complete
        self.active_at = self.gateway.clock  # when the client did something, or was answered, last
        self.stuck_at = 0.0  # since when the client does not take its answer; 0: it does
        self.tunnel: Exchange | None = None  # a WebSocket
        self.framing = b""  # of a request that offers another protocol: the header lines that tell its body's length
        self.reading_on = False  # its head is read for the second time
        self.lingering = False  # answered and half closed; whatever still comes is thrown away
        self.private = False  # from the queue worker, over a socket that nobody else can open

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        found = transport.get_extra_info("socket")
        self.private = found is not None and found.family == socket.AF_UNIX
        self.gateway.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gateway.connections.discard(self)
        for exchange in (self.answering, *(cycle for cycle, _ in self.pipeline)):
            if isinstance(exchange, Exchange):
                exchange.client_gone()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.lingering:
            return
        if self.tunnel is not None:
            self.tunnel.tunnel_data(data)
            return
        self.active_at = self.gateway.clock
        key = None
        if self.between and not self.private and (self.cycle is None or self.cycle.response_complete):
            if self.latest is not None and (same := self.latest.read(data)) is not None:
                end, digits = same
                if len(data) == end + int(digits):
                    self._repeat(self.latest.head, digits, data[end:])
                    return
            elif (found := split(data)) is not None:
                end, key, digits = found
                if len(data) != end + (int(digits) if digits else 0):
                    key = None
                elif (known := self.gateway.heads.get(key)) is not None:
                    self.latest = Latest(key, known) if digits else None
                    self._repeat(known, digits, data[end:])
                    return
        before = self.cycle
        self._parse(data)
        # Of a new request alone: empty lines, which are none, must not stand for the one before.
        if key is not None and self.between and self.cycle is not before and isinstance(self.cycle, Exchange):
            head = self.cycle.memorable()
            if head is not None:
                self.gateway.heads.learn(key, head)

    def _repeat(self, head: RequestHead, digits: bytes, body: bytes) -> None:
        exchange = Exchange.repeated(self, head, digits, body)
        self.cycle = cast(Any, exchange)
        exchange.start()

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data and not self.lingering:
            self.head_read += len(data)
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserCallbackError as error:
                if not isinstance(error.__context__, _Over):
                    raise
                return
            except httptools.HttpParserError:
                self.send_400_response("The request is not valid HTTP/1.1.")
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._upgrade(data[upgrade.args[0] :])
            else:
                if self.head_read > HEAD_LIMIT and not self.between:
                    self._refuse_without_a_request(HEAD_TOO_LARGE)
                return

    def _upgrade(self, rest: bytes) -> bytes:
        """The parser stops behind a head that offers another protocol. Returns what is to be parsed next."""
        exchange = self.incoming
        if exchange is None or not exchange.upgrading:
            # `curl --http2` and Java's client offer h2c with every POST. Nobody takes them up: HTTP/1.1 goes on, by a
            # parser that is told of the body what the first one was told.
            self.parser = httptools.HttpRequestParser(self)
            self.reading_on = True
            return b"POST / HTTP/1.1\r\n%b\r\n%b" % (self.framing, rest)
        if not exchange.response_complete:
            self.tunnel = exchange
            if rest:
                exchange.tunnel_data(rest)
        return b""

    def on_response_complete(self) -> None:
        """uvicorn's, without a timer for each request: `check_time` looks at all connections at once."""
        if self.transport.is_closing() or self.lingering:
            return  # what is behind this request is not answered
        self.active_at = self.gateway.clock
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def address(self) -> bytes:
        """The client's, for limits by client where there are no keys."""
        return self.client[0].encode() if self.client else b""

    def check_time(self, now: float) -> None:
        """Called each second: closes what waits for its client for too long."""
        gateway = self.gateway
        waited = now - self.active_at
        if self.stuck_at and now - self.stuck_at > gateway.client_timeout:
            self.transport.abort()
        elif self.cycle is not None and not self.cycle.response_complete:
            exchange = self.incoming
            waiting = exchange is not None and not exchange.request_complete and not exchange.response_complete
            if exchange is not None and waiting and waited > gateway.client_timeout and not self.flow.read_paused:
                exchange.refuse_late()
        elif self.between:
            if waited > gateway.keep_alive:
                self.transport.close()
        elif waited > gateway.client_timeout:
            self._refuse_without_a_request(HEAD_TOO_SLOW)

    def linger(self) -> None:
        """Closes our side alone: closing both while the client still sends would reset what it has not read yet."""
        self.lingering = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck_at = self.loop.time()
        if self.answering is not None and self.answering.connection is not None:
            self.answering.connection.pause_response()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stuck_at = 0.0
        if self.answering is not None and self.answering.connection is not None:
            self.answering.connection.resume_response()

    # httptools' callbacks, in the order in which it calls them

    def on_message_begin(self) -> None:
        if self.lingering:
            raise _Over  # what is behind a request that was refused for good is not read
        if self.reading_on:
            return
        self.between = False
        self.in_head = True
        self.url = b""
        self.headers = []
        self.incoming = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_url(self, url: bytes) -> None:
        if not self.reading_on:
            self.url += url

    def on_headers_complete(self) -> None:
        if self.reading_on:
            self.reading_on = False
            self.headers = []
            return
        target, headers = self.url, self.headers
        self.head_read = 0
        self.in_head = False
        path = target.partition(b"?")[0]
        if self.parser.should_upgrade():
            self.framing = b"".join(b"%b: %b\r\n" % field for field in headers if field[0].lower() in FRAMING)
        if not target.startswith(b"/"):
            target, path = _origin_form(target)
        if path in self.gateway.own_paths and self.parser.get_http_version() in VERSIONS:
            self._leave_to_uvicorn(target, headers)
            return
        exchange = Exchange(self, self.parser.get_method(), target, path, headers)
        version = self.parser.get_http_version()
        exchange.http11 = version == "1.1"
        exchange.known_version = version in VERSIONS
        exchange.keep_alive = exchange.http11 and self.parser.should_keep_alive()
        if self.parser.should_upgrade() and asks_for_websocket(exchange.method, headers):
            exchange.upgrading = True
            exchange.keep_alive = False  # what comes behind it are frames, whatever vLLM makes of it
        self.incoming = exchange
        self.headers = []  # what comes now are trailers
        before, self.cycle = self.cycle, cast(Any, exchange)
        if before is None or before.response_complete:
            exchange.start()
        else:
            # Its head is read now: how its body is framed must be known before the body comes.
            exchange.refusal = exchange.build_request_head()
            if len(self.pipeline) >= PIPELINED:  # reading on shows when the client goes
                self.flow.pause_reading()
            self.pipeline.appendleft((cast(Any, exchange), self.app))

    def _leave_to_uvicorn(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        super().on_message_begin()
        self.url = target
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.head_read = 0
        if self.incoming is None:
            super().on_body(body)
        else:
            self.incoming.request_data(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and (self.incoming is None or not self.incoming.upgrading):
            return  # its body is yet to be read
        self.between = True
        self.head_read = 0
        if self.incoming is None:
            super().on_message_complete()
        else:
            self.incoming.request_end(self.headers)

    # uvicorn's seams

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Called for each request whose turn has come, pipelined ones included."""
        if isinstance(cycle, Exchange):
            cycle.start()
        else:
            super()._start_asgi_task(cycle, app)

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        pass  # an unanswered `Upgrade:` is no fault: the request was relayed without it

    def send_400_response(self, msg: str) -> None:
        self._refuse_without_a_request(Refusal(400, msg, code="bad_request"))

    def _refuse_without_a_request(self, refusal: Refusal) -> None:
        """What came is no request, or not yet, or the rest of one that was well until here."""
        if self.lingering:
            return
        exchange = self.incoming
        if exchange is not None and exchange is self.answering and not exchange.request_complete:
            if exchange.response_started:
                self.transport.abort()
            else:
                exchange.body_left = -1  # where its body ends nobody knows
                exchange.refuse(refusal)
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer is under way: a second one in its midst would corrupt it
            return
        if not self.between and not self.in_head:
            self.linger()  # the rest of a request that was answered early: there is no second answer to it
            return
        head, body = refusal.head_and_body(b"", self.gateway.new_id())
        self.transport.write(head + b"Connection: close\r\n\r\n" + body)
        self.linger()


def _origin_form(target: bytes) -> tuple[bytes, bytes]:
    """The target and path of a request that names them otherwise: `http://host/path?query`, or `*`."""
    if b"://" not in target:
        return target, target
    rest = target.partition(b"://")[2]
    start = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    target = rest[start:]
    if not target.startswith(b"/"):
        target = b"/" + target
    return target, target.partition(b"?")[0]
