"""A client's connection: bytes to requests, in order, none too slow.

It is uvicorn's httptools protocol with the parser's callbacks replaced. Requests for our own paths are handed back to
uvicorn, which runs the ASGI app; every other request becomes an `Exchange`. Both wait here for their turn, so that
answers leave in the order in which the requests came.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from supervisor.gateway.door import KEEP, Door, Then
from supervisor.gateway.errors import Refusal
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.gate import RETRY_AFTER
from supervisor.gateway.http1 import (
    HEAD_LIMIT,
    HEAD_TOO_LARGE,
    VERSIONS,
    Latest,
    Memo,
    Request,
    asks_for_websocket,
    origin_form,
    split,
)
from supervisor.gateway.policy import is_preflight

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Requests that may wait behind the one that is answered, before no more is parsed; and bytes that are parsed at once,
# which may hold some tens of them. Of a chunked body it is more: where it ends is not known.
PIPELINED, SLICE, CHUNKED_SLICE = 8, 1024, 16 * 1024
# Bytes that may wait for the parser before no more is read. Reading on shows when the client goes.
UNPARSED_LIMIT = 64 * 1024
# Seconds in which a client that was refused may still send its body, and read why.
LINGER = 2.0
# Seconds until a client that has closed its side is looked at: one that is gone has refused our bytes by then.
GONE_KNOWN_AFTER = 0.1
# Seconds without a byte of its answer, after which one that can't be looked at is taken for gone.
GONE_AFTER = 2.0
# Bytes in a second that a body has at least, once the client's time for its next bytes has passed.
LEAST_RATE = 100
# Bytes of a body that our own routes throw away.
OWN_BODY_LIMIT = 64 * 1024
# Files that are kept for our own routes, and for vLLM's; and seconds between two words about it.
RESERVED_FILES, TOLD_EVERY = 64, 600.0
CROWDED = Refusal(503, "The server has too many connections.", "too_many_connections", RETRY_AFTER)
log = logging.getLogger("supervisor.gateway")
HEAD_TOO_SLOW = Refusal(408, "The request's head did not come in time.", code="request_timeout")


class _Over(Exception):  # no error
    """Ends the parser's reading."""


class Clients:
    """What the connections have in common, and the look that is taken at all of them each second."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        is_own: Callable[[bytes], bool],
        most_files: int,
        *,
        timeout: float,
        keep_alive: float,
    ) -> None:
        """`is_own`: whether a path is our own; `timeout`: seconds for a client's next bytes, or for it to take ours;
        `keep_alive`: between requests."""
        self.loop = loop
        self.is_own = is_own
        self.most_files = most_files
        self.told_at = -math.inf  # of too many of them
        self.timeout = timeout
        self.keep_alive = keep_alive
        self.connections: set[ClientConnection] = set()
        self.clock = loop.time()  # at the last look

    def check_time(self) -> None:
        self.clock = self.loop.time()
        for connection in list(self.connections):
            connection.check_time(self.clock)

    def opened(self, connection: ClientConnection, number: int) -> None:
        """`number`: of its file, which is the lowest that was free. Before the last are taken, idle clients go, and of
        new ones only our own routes are served: a load balancer that is not answered would end a healthy server."""
        self.connections.add(connection)
        if number < self.most_files - RESERVED_FILES:
            return
        idle = sorted((one for one in self.connections if one.is_idle), key=lambda one: one.active_at)
        for one in idle[:RESERVED_FILES]:
            one.transport.close()
        connection.door = replace(connection.door, memo=Memo(), crowded=CROWDED)
        if self.loop.time() - self.told_at > TOLD_EVERY:
            self.told_at = self.loop.time()
            text = "%d files may be open, and nearly all are: new requests are refused. Raise the limit (ulimit -n)."
            log.warning(text, self.most_files)

    def forget_heads(self) -> None:
        """The policy changed."""
        for connection in self.connections:
            connection.latest = None


class ClientConnection(HttpToolsProtocol):
    """One client. For its exchanges it is a `Client`."""

    def __init__(self, clients: Clients, door: Door, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clients = clients
        self.door = door
        self.write: Callable[[bytes], object] = None  # type: ignore[assignment]  # the transport's
        self.address = b""
        self.answering: Exchange | RequestResponseCycle | None = None
        self.waiting: deque[Exchange | RequestResponseCycle] = deque()  # for their turn
        self.advancing = False
        self.incoming: Exchange | RequestResponseCycle | None = None  # whose body is arriving
        self.latest: Latest[Request] | None = None
        self.unparsed = b""  # what came behind more requests than may wait
        self.full = False  # and no more of it is read
        self.between = True  # whole requests: the parser expects a new one
        self.in_head = False  # of a request that has begun
        self.head_began = 0.0  # when its first byte came
        self.head_read = 0  # bytes read since the last head, request, or byte of a body was complete
        self.body_began = 0.0  # when the body that arrives was asked for
        self.body_read = 0  # bytes of it since then
        self.body_left = 0  # bytes of it that are to come, where its head tells that
        self.active_at = clients.clock  # when the client did something, or was answered, last
        self.stuck_at = 0.0  # since when the client does not take its answer; 0: it does
        self.unsent, self.unsent_at = 0, 0.0  # bytes of answers that the client has not taken, and since when so many
        self.tunnel: Exchange | None = None  # a WebSocket, or what may become one
        self.framing = b""  # of a request that offers another protocol: the header lines that tell its body's length
        self.reading_on = False  # its head is read for the second time
        self.lingering = False  # answered and half closed; whatever still comes is thrown away
        self.sent, self.sent_at = 0, 0.0  # bytes of the answer, of a client that is half closed, and when the last went
        self.half_closed = False  # the client has said its last word, or is gone

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.write = transport.write
        self.address = self.client[0].encode() if self.client else b""
        connection = transport.get_extra_info("socket")
        self.clients.opened(self, connection.fileno() if connection is not None else 0)

    @property
    def is_idle(self) -> bool:
        return self.between and self.answering is None and self.incoming is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self.clients.connections.discard(self)
        waiting, self.waiting = self.waiting, deque()
        for one in (self.answering, *waiting):
            if isinstance(one, Exchange):
                one.client_gone()
            elif one is not None:
                one.disconnected = True
                one.message_event.set()
        self.cycle = None  # type: ignore[assignment]  # as before its first request
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.lingering:
            return
        if self.tunnel is not None:
            self.tunnel.tunnel(data)
            return
        self.active_at = self.clients.clock
        if not self.between or self.answering is not None or self.unparsed or self.flow.write_paused:
            self._parse(data)
            return
        key = None
        if self.latest is not None and (same := self.latest.read(data)) is not None:
            end, digits = same
            if len(data) == end + int(digits):
                self._repeat(self.latest.known, digits, data[end:])
                return
        elif (found := split(data)) is not None:
            end, key, digits = found
            if len(data) != end + (int(digits) if digits else 0):
                key = None
            elif (known := self.door.memo.get(key)) is not None:
                self.latest = Latest(key, known) if digits else None
                self._repeat(known, digits, data[end:])
                return
        before = self.incoming
        if key is not None:
            self._feed(data)  # it is one request, and all of it
        else:
            self._parse(data)
        # Of a new request alone: empty lines, which are none, must not stand for the one before.
        new = self.incoming
        if key is None or not self.between or new is before or not isinstance(new, Exchange):
            return
        if new.refusal is None and new.request.repeats():
            self.door.memo.learn(key, new.request)

    def _repeat(self, request: Request, digits: bytes, body: bytes) -> None:
        """A whole request whose head was seen before."""
        door = self.door
        request_id = door.new_id()
        self.incoming = self.answering = exchange = Exchange(self, door, request, request_id)
        # The body stands with the head: it is sent, and sent again, in one piece with it.
        exchange.head = b"".join((request.before, digits, request.after, request_id, b"\r\n\r\n", body))
        exchange.complete = True
        size = len(body)
        door.counts.received += size
        exchange.left -= size
        exchange.start()

    def _parse(self, data: bytes) -> None:
        """As far as there is room for what it holds; the rest waits."""
        if self.unparsed:
            data, self.unparsed = self.unparsed + data, b""
        at = 0
        while at < len(data) and not self.lingering and self.tunnel is None:
            if len(self.waiting) >= PIPELINED:
                self.unparsed = data[at:]
                if len(self.unparsed) > UNPARSED_LIMIT:
                    self.full = True
                    self.flow.pause_reading()
                return
            part = data[at : at + self._slice()]
            at += len(part)
            self._feed(part)
        if self.tunnel is not None and at < len(data):
            self.tunnel.tunnel(data[at:])

    def _slice(self) -> int:
        """Bytes that are parsed at once."""
        if self.between or self.in_head:
            return SLICE
        chunked = isinstance(self.incoming, Exchange) and self.incoming.request.chunked
        return CHUNKED_SLICE if chunked else max(self.body_left, SLICE)

    def _feed(self, data: bytes) -> None:
        while data and not self.lingering:
            self.head_read += len(data)
            before = self.incoming
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
                elif (
                    before is not None
                    and before is self.incoming
                    and isinstance(before, Exchange)
                    and before.request.chunked
                ):
                    before.framed(len(data))
                return

    def _upgrade(self, rest: bytes) -> bytes:
        """The parser stops behind a head that offers another protocol. Returns what is to be parsed next."""
        exchange = self.incoming
        if not isinstance(exchange, Exchange) or not exchange.request.websocket:
            # `curl --http2` and Java's client offer h2c with every POST. Nobody takes them up: HTTP/1.1 goes on, by a
            # parser that is told of the body what the first one was told.
            self.parser = httptools.HttpRequestParser(self)
            self.reading_on = True
            return b"POST / HTTP/1.1\r\n%b\r\n%b" % (self.framing, rest)
        if not exchange.response_complete:
            self.tunnel = exchange
            if rest:
                exchange.tunnel(rest)
        return b""

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has said its last word, and may still listen; or it is gone, which looks the same."""
        nothing_waits = self.answering is None and not self.waiting
        if nothing_waits or not self.between or self.lingering or self.tunnel is not None or self.scheme == "https":
            return False  # TLS knows no half of a connection
        if not self.half_closed:
            self.half_closed = True
            self.look_for_client()
        return not self.transport.is_closing()

    def look_for_client(self) -> None:
        """A client that is gone answers bytes with a reset."""
        if isinstance(self.answering, Exchange):
            nothing = self.answering.nothing()
            if nothing is None:
                self.transport.abort()
                return
            self.write(nothing)
        self.loop.call_later(GONE_KNOWN_AFTER, self._abort_if_gone)

    def _abort_if_gone(self) -> None:
        if not self.transport.is_closing() and is_gone(self.transport):
            self.transport.abort()

    # A client for its exchanges, and the order of answers

    def pause(self) -> None:
        self.flow.pause_reading()

    def resume(self) -> None:
        self.flow.resume_reading()
        self.body_began, self.body_read = self.loop.time(), 0

    def becomes_tunnel(self, exchange: Exchange) -> None:
        self.tunnel = exchange

    def done(self, exchange: Exchange, then: Then) -> None:
        self.answering = None
        if then is KEEP:
            self.active_at = self.head_began = self.clients.clock  # also of what came meanwhile
            if self.flow.read_paused and not self.full:
                self.flow.resume_reading()
            if self.waiting or self.unparsed or self.half_closed:
                self._advance()
        elif then is Then.LINGER:
            self.linger()
        elif then is Then.CLOSE:
            self.active_at = self.clients.clock
            self.transport.close()
        else:
            reset(self.transport)

    def on_response_complete(self) -> None:
        """uvicorn's cycle is done; it has closed the transport where it is to be."""
        self.answering = None
        if self.incoming is not None and not self.between and self.body_read > OWN_BODY_LIMIT:
            self.linger()
        self._advance()

    def _advance(self) -> None:
        """The next one's turn, as soon as its client takes the answer: else what it asks for would pile up here. A
        loop, for a thousand refusals may stand in one read."""
        if self.advancing:
            return
        self.advancing = True
        try:
            while not (self.lingering or self.transport.is_closing()):
                if self.answering is None and self.waiting and not self.flow.write_paused:
                    self._begin(self.waiting.popleft())
                elif self.unparsed and len(self.waiting) < PIPELINED:
                    self._parse(b"")
                else:
                    break
        finally:
            self.advancing = False
        self.active_at = self.clients.clock
        if self.full and len(self.unparsed) <= UNPARSED_LIMIT // 2:
            self.full = False
            self.flow.resume_reading()
        if self.half_closed and self.answering is None and not self.waiting and not self.lingering:
            self.transport.close()

    def _begin(self, one: Exchange | RequestResponseCycle) -> None:
        self.answering = one
        self.active_at = self.clients.clock
        if isinstance(one, Exchange):
            self.body_began, self.body_read = self.loop.time(), 0
            one.start()
        else:
            super()._start_asgi_task(one, self.app)

    def _arrived(self, one: Exchange | RequestResponseCycle) -> None:
        self.incoming = one
        self.waiting.append(one)
        self._advance()

    def linger(self) -> None:
        """Closes our side alone: closing both while the client still sends would reset what it has not read yet."""
        if self.lingering:
            return
        self.lingering = True
        self.unparsed = b""
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck_at = self.loop.time()
        if isinstance(self.answering, Exchange):
            self.answering.pause_answer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stuck_at = 0.0
        if isinstance(self.answering, Exchange):
            self.answering.resume_answer()
        else:
            self._advance()

    def cut(self) -> None:
        """Closes at once, so that an answer that is under way does not look complete."""
        if isinstance(self.answering, Exchange) and self.answering.ends_by_close:
            reset(self.transport)
        else:
            self.transport.abort()

    # Called each second

    def check_time(self, now: float) -> None:
        """Closes what waits for its client for too long."""
        timeout = self.clients.timeout
        unsent = self.transport.get_write_buffer_size()
        if unsent != self.unsent:
            self.unsent, self.unsent_at = unsent, now
        if unsent and now - self.unsent_at > timeout:
            self.cut()  # a close would wait for it for ever
            return
        one = self.answering
        if self.half_closed or self.flow.read_paused:
            if is_gone(self.transport):
                self.transport.abort()
                return
            if not self.half_closed and has_hung_up(self.transport):
                self.half_closed = True
                self.look_for_client()
            elif self.half_closed and isinstance(one, Exchange) and one.body is not None and not unsent:
                # In the midst of what is no stream it can't be asked. vLLM makes such an answer at once.
                if one.sent != self.sent:
                    self.sent, self.sent_at = one.sent, now
                elif now - self.sent_at > GONE_AFTER and not one.nothing():
                    self.cut()
                    return
        if self.stuck_at and now - self.stuck_at > timeout:
            self.cut()
        elif isinstance(one, Exchange):
            if one is self.incoming and not one.complete and not self.flow.read_paused:
                slow = now - self.body_began > timeout + self.body_read / LEAST_RATE
                if slow or now - self.active_at > timeout:
                    one.refuse_late()
        elif one is not None:
            pass  # our own routes take no time of their client's
        elif self.between:
            if now - self.active_at > self.clients.keep_alive:
                self.transport.close()
        elif now - (self.head_began if self.in_head else self.active_at) > timeout:
            self._refuse_without_a_request(HEAD_TOO_SLOW)

    # httptools' callbacks, in the order in which it calls them

    def on_message_begin(self) -> None:
        if self.lingering:
            raise _Over  # what is behind a request that was refused for good is not read
        if self.reading_on:
            return
        self.between = False
        self.in_head = True
        self.head_began = self.clients.clock
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
        headers = self.headers
        self.head_read = self.body_read = 0
        self.in_head = False
        parser = self.parser
        upgrades = parser.should_upgrade()
        if upgrades:
            self.framing = b"".join(b"%b: %b\r\n" % field for field in headers if field[0].lower() in FRAMING)
        target = origin_form(self.url)
        path = target.partition(b"?")[0]
        method, version = parser.get_method(), parser.get_http_version()
        if version in VERSIONS and (self.clients.is_own(path) or is_preflight(method, headers)):
            self._leave_to_uvicorn(target, headers)
            return
        request = Request(method, target, path, headers)
        request.http11 = version == "1.1"
        request.keep_alive = request.http11 and parser.should_keep_alive()
        if upgrades and asks_for_websocket(method, headers):
            request.websocket = True
            request.keep_alive = False  # what comes behind it are frames, whatever vLLM makes of it
        self.headers = []  # what comes now are trailers
        # Its head is read now: how its body is framed must be known before the body comes.
        exchange = Exchange.read(self, self.door, request, version)
        self.body_left = request.length or 0
        self._arrived(exchange)

    def _leave_to_uvicorn(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        super().on_message_begin()
        self.url = target
        for name, value in headers:
            super().on_header(name, value)
        self.cycle = None  # type: ignore[assignment]  # the order is kept here, and reading goes on
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._arrived(cycle)

    def on_body(self, body: bytes) -> None:
        self.head_read = 0
        self.body_read += len(body)
        self.body_left -= len(body)
        if isinstance(self.incoming, Exchange):
            self.incoming.data_of_request(body)
        elif self.incoming is not None and self.body_read > OWN_BODY_LIMIT:
            self.incoming.keep_alive = False  # nobody reads all of it to be polite
            if self.incoming.response_complete:
                self.linger()

    def on_message_complete(self) -> None:
        exchange = self.incoming if isinstance(self.incoming, Exchange) else None
        if self.parser.should_upgrade() and (exchange is None or not exchange.request.websocket):
            return  # its body is yet to be read
        self.between = True
        self.head_read = 0
        if exchange is not None:
            exchange.end_of_request(self.headers)
        elif self.incoming is not None:
            super().on_message_complete()

    # uvicorn's seams

    def shutdown(self) -> None:
        if self.answering is None:
            self.transport.close()
        else:
            self.answering.keep_alive = False

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
        one = self.answering
        if isinstance(one, Exchange) and one is self.incoming and not one.complete:
            if one.body is not None:
                self.cut()
            else:
                one.left = -1  # where its body ends nobody knows
                one.end_now(refusal)
            return
        if one is not None:
            self.cut()  # an answer is under way: a second one in its midst would corrupt it
            return
        if not self.between and not self.in_head:
            self.linger()  # the rest of a request that was answered early: there is no second answer to it
            return
        head, body = refusal.head_and_body(b"", self.door.new_id())
        self.write(head + b"Connection: close\r\n\r\n" + body)
        self.linger()


def reset(transport: asyncio.Transport) -> None:
    """Closes so that the client notices: a body whose end only the close tells must not look complete."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _poll(transport: asyncio.Transport) -> int:
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() < 0:
        return 0
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)
    return sum(events for _, events in poll.poll(0))


def is_gone(transport: asyncio.Transport) -> bool:
    """Whether the client's side is closed for both ways. While nothing is read, nobody else tells."""
    return bool(_poll(transport) & (select.POLLHUP | select.POLLERR))


def has_hung_up(transport: asyncio.Transport) -> bool:
    """Whether no more than what is there already will come from the client."""
    return bool(_poll(transport) & select.POLLRDHUP)
