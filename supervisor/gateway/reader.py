"""The bytes of a client's connection, made into requests.

It is uvicorn's httptools protocol with the parser's callbacks replaced. A head that came before is not read again
(heads.py). Requests for our own paths are handed back to uvicorn, which runs the ASGI app; every other request becomes
an `Exchange`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from supervisor.gateway.door import Client
from supervisor.gateway.errors import Refusal
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.heads import RepeatedHeads
from supervisor.gateway.http1 import HEAD_LIMIT, HEAD_TOO_LARGE, VERSIONS, Request, asks_for_websocket, origin_form
from supervisor.gateway.policy import is_preflight

if TYPE_CHECKING:
    from supervisor.gateway.client import Clients
    from supervisor.gateway.door import Door

FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Requests that may wait behind the one that is answered, before no more is parsed; and bytes that are parsed at once,
# which may hold some tens of them. Of a chunked body it is more: where it ends is not known.
PIPELINED, SLICE, CHUNKED_SLICE = 8, 1024, 16 * 1024
# Bytes that may wait for the parser before no more is read. Reading on shows when the client goes.
UNPARSED_LIMIT = 64 * 1024
# Bytes of a body that our own routes throw away.
OWN_BODY_LIMIT = 64 * 1024


class _StopParsing(Exception):  # no error
    """Ends the parser's reading."""


class RequestReader(HttpToolsProtocol, Client):
    """`arrived` is called with each request whose head is there; its body follows."""

    def __init__(self, clients: Clients, door: Door, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clients = clients
        self.door = door
        self.answering: Exchange | RequestResponseCycle | None = None
        self.waiting: deque[Exchange | RequestResponseCycle] = deque()  # for their turn
        self.incoming: Exchange | RequestResponseCycle | None = None  # whose body is arriving
        self.heads: RepeatedHeads[Request] = RepeatedHeads(door.memo)
        self.unparsed = b""  # what came behind more requests than may wait
        self.unparsed_is_full = False  # and no more of it is read
        self.at_start = True  # whole requests: the parser expects a new one
        self.in_head = False  # of a request that has begun
        self.head_began = 0.0  # when its first byte came
        self.head_read = 0  # bytes read since the last head, request, or byte of a body was complete
        self.body_read = 0  # bytes of the body that arrives, since it was asked for
        self.body_left = 0  # bytes of it that are to come, where its head tells that
        self.active_at = clients.clock  # when the client did something, or was answered, last
        self.tunnel: Exchange | None = None  # a WebSocket, or what may become one
        self.framing_lines = b""  # the header lines that tell a body's length, where a request offers another protocol
        self.rereads_head = False  # its head is read for the second time
        self.lingering = False  # answered and half closed; whatever still comes is thrown away
        self.ignores_input = False  # what came behind the last request is none, and nothing more is read of it

    def request_arrived(self, request: Exchange | RequestResponseCycle) -> None:
        raise NotImplementedError

    def refuse_without_a_request(self, refusal: Refusal) -> None:
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        if self.answering is not None or not self.at_start or self.lingering or self.unparsed or self.flow.write_paused:
            self._read_more(data)
            return
        found = self.heads.find(data)
        if found is not None:
            self._take_repeated(*found)
            return
        self.active_at = self.clients.clock
        if self.heads.key is None:
            self._parse(data)
            return
        before = self.incoming
        self._feed(data)  # it is one request, and all of it
        new = self.incoming
        # Of a new request alone: empty lines, which are none, must not stand for the one before.
        if not self.at_start or new is before or not isinstance(new, Exchange):
            return
        if new.refusal is None and new.request.may_repeat():
            self.heads.learn(new.request)

    def _read_more(self, data: bytes) -> None:
        """Of a request, or behind one."""
        if self.lingering or self.ignores_input:
            return
        if self.tunnel is not None:
            self.tunnel.pass_frames(data)
        else:
            self.active_at = self.clients.clock
            self._parse(data)

    def _take_repeated(self, request: Request, digits: bytes, body: bytes) -> None:
        """A whole request whose head was seen before."""
        door = self.door
        request_id = door.new_id()
        self.incoming = self.answering = exchange = Exchange(self, door, request, request_id)
        # The body stands with the head: it is sent, and sent again, in one piece with it.
        exchange.head = b"".join((request.prefix, digits, request.suffix, request_id, b"\r\n\r\n", body))
        exchange.request_complete = True
        size = len(body)
        door.counts.received += size
        exchange.body_budget -= size
        exchange.start()

    def _parse(self, data: bytes) -> None:
        """As far as there is room for what it holds; the rest waits."""
        if self.unparsed:
            data, self.unparsed = self.unparsed + data, b""
        at = 0
        while at < len(data) and not (self.lingering or self.ignores_input) and self.tunnel is None:
            if len(self.waiting) >= PIPELINED:
                self.unparsed = data[at:]
                if len(self.unparsed) > UNPARSED_LIMIT:
                    self.unparsed_is_full = True
                    self.flow.pause_reading()
                return
            part = data[at : at + self._slice_size()]
            at += len(part)
            self._feed(part)
        if self.tunnel is not None and at < len(data):
            self.tunnel.pass_frames(data[at:])

    def _slice_size(self) -> int:
        """Bytes that are parsed at once."""
        if self.at_start or self.in_head:
            return SLICE
        chunked = isinstance(self.incoming, Exchange) and self.incoming.request.chunked
        return CHUNKED_SLICE if chunked else max(self.body_left, SLICE)

    def _feed(self, data: bytes) -> None:
        while data and not (self.lingering or self.ignores_input):
            self.head_read += len(data)
            before = self.incoming
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserCallbackError as error:
                if not isinstance(error.__context__, _StopParsing):
                    raise
                return
            except httptools.HttpParserError:
                self.send_400_response("The request is not valid HTTP/1.1.")
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._upgrade(data[upgrade.args[0] :])
            else:
                if self.head_read > HEAD_LIMIT and not self.at_start:
                    self.refuse_without_a_request(HEAD_TOO_LARGE)
                elif (
                    before is not None
                    and before is self.incoming
                    and isinstance(before, Exchange)
                    and before.request.chunked
                ):
                    before.count_framing(len(data))
                return

    def _upgrade(self, rest: bytes) -> bytes:
        """The parser stops behind a head that offers another protocol. Returns what is to be parsed next."""
        exchange = self.incoming
        if not isinstance(exchange, Exchange) or not exchange.request.websocket:
            # `curl --http2` and Java's client offer h2c with every POST. Nobody takes them up: HTTP/1.1 goes on, by a
            # parser that is told of the body what the first one was told.
            self.parser = httptools.HttpRequestParser(self)
            self.rereads_head = True
            return b"POST / HTTP/1.1\r\n%b\r\n%b" % (self.framing_lines, rest)
        if not exchange.response_complete:
            self.tunnel = exchange
            if rest:
                exchange.pass_frames(rest)
        return b""

    # httptools' callbacks, in the order in which it calls them

    def on_message_begin(self) -> None:
        if self.lingering:
            raise _StopParsing  # what is behind a request that was refused for good is not read
        if self.rereads_head:
            return
        self.at_start = False
        self.in_head = True
        self.head_began = self.clients.clock
        self.url = b""
        self.headers = []
        self.incoming = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_url(self, url: bytes) -> None:
        if not self.rereads_head:
            self.url += url

    def on_headers_complete(self) -> None:
        if self.rereads_head:
            self.rereads_head = False
            self.headers = []
            return
        headers = self.headers
        self.head_read = self.body_read = 0
        self.in_head = False
        parser = self.parser
        upgrades = parser.should_upgrade()
        if upgrades:
            self.framing_lines = b"".join(b"%b: %b\r\n" % field for field in headers if field[0].lower() in FRAMING)
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
        door = self.door
        refusal = request.rewrite(version, tls=door.tls)
        request.verdict = door.policy.judge(request)
        exchange = Exchange(self, door, request, request.client_id or door.new_id())
        exchange.refusal = refusal
        self.body_left = request.length or 0
        exchange.body_budget -= self.body_left
        self.request_arrived(exchange)

    def _leave_to_uvicorn(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        super().on_message_begin()
        self.url = target
        for name, value in headers:
            super().on_header(name, value)
        self.cycle = None  # type: ignore[assignment]  # the order is kept here, and reading goes on
        super().on_headers_complete()

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
        self.at_start = True
        self.head_read = 0
        if exchange is not None:
            exchange.end_of_request(self.headers)
        elif self.incoming is not None:
            super().on_message_complete()
