"""Makes the bytes of a client's connection into requests.

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
# No more is parsed while so many requests wait behind the one that is answered. So many bytes are parsed at once, which
# may hold some tens of requests; it is more within a chunked body, because where that ends is not known.
PIPELINED, SLICE, CHUNKED_SLICE = 8, 1024, 16 * 1024
# So many bytes may wait for the parser before no more is read. Reading on until then shows when the client goes.
UNPARSED_LIMIT = 64 * 1024
# So many bytes of a body are thrown away for our own routes; a longer one ends the connection.
OWN_BODY_LIMIT = 64 * 1024


class _StopParsing(Exception):  # it is no error
    """A callback raises this to end the parser's reading."""


class RequestReader(HttpToolsProtocol, Client):
    """Calls `request_arrived` with each request whose head is there; its body follows."""

    def __init__(self, clients: Clients, door: Door, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clients = clients
        self.door = door
        self.answering: Exchange | RequestResponseCycle | None = None  # the request that is being answered
        self.waiting: deque[Exchange | RequestResponseCycle] = deque()  # requests that wait for their turn
        self.incoming: Exchange | RequestResponseCycle | None = None  # the latest request; its body arrives or is there
        self.heads: RepeatedHeads[Request] = RepeatedHeads(door.memo)
        self.unparsed = b""  # bytes that wait for the parser, because as many requests wait as may
        self.unparsed_is_full = False  # `unparsed` is over its limit, and no more is read
        self.at_start = True  # only whole requests have come, and the parser expects a new one
        self.in_head = False  # a request has begun, and its head is not complete
        self.head_began = 0.0  # the loop's time when the first byte of the latest head came
        self.head_read = 0  # bytes read since a head or a request was complete, or a body went on
        self.body_read = 0  # bytes of the arriving body that came since it was asked for
        self.body_left = 0  # bytes of the arriving body that are yet to come, if its head tells its length
        self.active_at = clients.clock  # the loop's time when the client last did something, or was answered
        self.tunnel: Exchange | None = None  # the exchange of a WebSocket, or of what may become one
        self.framing_lines = b""  # the lines that tell a body's length, if the request offers another protocol
        self.rereads_head = False  # another parser reads a head again, which only tells it of the body
        self.lingering = False  # we have answered and closed our side; whatever still comes is thrown away
        self.ignores_input = False  # what follows the last request is none, and is thrown away unread

    def request_arrived(self, request: Exchange | RequestResponseCycle) -> None:
        raise NotImplementedError  # called for each new head; the subclass gives each request its turn, in this order

    def refuse_without_a_request(self, refusal: Refusal) -> None:
        raise NotImplementedError  # called for bytes that can't be read as a request; the subclass answers or closes

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
        self._feed(data)  # `data` is one request, and all of it
        new = self.incoming
        # Only a new request's head is learnt: empty lines, which are no request, must not stand for the one before.
        if not self.at_start or new is before or not isinstance(new, Exchange):
            return
        if new.refusal is None and new.request.may_repeat():
            self.heads.learn(new.request)

    def _read_more(self, data: bytes) -> None:
        """Reads bytes that belong to a request that has begun, or that come behind one."""
        if self.lingering or self.ignores_input:
            return
        if self.tunnel is not None:
            self.tunnel.pass_frames(data)
        else:
            self.active_at = self.clients.clock
            self._parse(data)

    def _take_repeated(self, request: Request, digits: bytes, body: bytes) -> None:
        """Starts a whole request whose head was seen before, but for the `digits` of its length."""
        door = self.door
        request_id = door.new_id()
        self.incoming = self.answering = exchange = Exchange(self, door, request, request_id)
        # The body is joined to the head: it is sent, and sent again, in one piece with it.
        exchange.head = b"".join((request.prefix, digits, request.suffix, request_id, b"\r\n\r\n", body))
        exchange.request_complete = True
        size = len(body)
        door.counts.received += size
        exchange.body_budget -= size
        exchange.start()

    def _parse(self, data: bytes) -> None:
        """Parses `data` as far as there is room for the requests in it; the rest waits in `unparsed`."""
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
        """Returns how many bytes are parsed at once."""
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
        """Deals with a head that offers another protocol, where the parser stops. Returns what is to be parsed next."""
        exchange = self.incoming
        if not isinstance(exchange, Exchange) or not exchange.request.websocket:
            # `curl --http2` and Java's client offer h2c with every POST. Nobody accepts that: HTTP/1.1 goes on, with
            # another parser, which is told of the body what the first one was told.
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
            raise _StopParsing  # what follows a request that was refused for good is not read
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
        if upgrades and request.http11 and asks_for_websocket(method, headers):  # RFC 9110, 7.8
            request.websocket = True
            request.keep_alive = False  # what follows it are frames, whatever vLLM answers
        self.headers = []  # from now on they are trailers
        # The head is looked at before its turn: how the body is framed must be known before the body comes.
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
        self.cycle = None  # type: ignore[assignment]  # else uvicorn would pause reading; the order is kept here
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.head_read = 0
        self.body_read += len(body)
        self.body_left -= len(body)
        if isinstance(self.incoming, Exchange):
            self.incoming.data_of_request(body)
        elif self.incoming is not None and self.body_read > OWN_BODY_LIMIT:
            self.incoming.keep_alive = False  # nobody reads all of a long body to be polite
            if self.incoming.response_complete:
                self.linger()

    def on_message_complete(self) -> None:
        exchange = self.incoming if isinstance(self.incoming, Exchange) else None
        if self.parser.should_upgrade() and (exchange is None or not exchange.request.websocket):
            return  # another parser is yet to read its body
        self.at_start = True
        self.head_read = 0
        if exchange is not None:
            exchange.end_of_request(self.headers)
        elif self.incoming is not None:
            super().on_message_complete()
