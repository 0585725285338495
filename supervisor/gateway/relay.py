"""The connection to the client: a request arrives, passes policy and hold, and is spliced to vLLM.

`RelayProtocol` is uvicorn's httptools protocol with the parser's callbacks replaced. Requests for our own paths are
handed back to uvicorn, which runs the ASGI app; every other request becomes an `Exchange`, which stands where uvicorn
expects its request cycle, so that keep-alive, pipelining and graceful shutdown stay uvicorn's.

Heads are rebuilt on both ways (hop-by-hop headers gone, the request id added); bodies pass as they come. A request
body is framed anew, by what the parser saw, so that vLLM never sees two requests where we saw one. Backpressure works
both ways: whoever can't take more pauses the reading of the other side.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from supervisor.gateway.errors import Refusal
from supervisor.gateway.upstream import (
    HOP_BY_HOP,
    Framing,
    ResponseHead,
    Unanswered,
    UpstreamConnection,
    UpstreamError,
)

if TYPE_CHECKING:
    import asyncio

    from supervisor.gateway.app import Gateway

# Request bodies up to this size are kept until the answer begins, so that the request can be sent again.
KEEP_LIMIT = 1024 * 1024
# Header lines that the relay looks at; all others are copied without a look.
WATCHED = HOP_BY_HOP | {b"content-length", b"expect", b"host", b"x-request-id"}
REQUEST_ID_LIMIT = 256


class _Unheard:
    """Stands for the event that uvicorn sets on its cycles: nobody waits for an exchange."""

    def set(self) -> None:
        pass


class Exchange:
    """One relayed request, from its head to the last byte of its answer.

    Is a `Sink` for the upstream connection, and has the attributes that uvicorn's protocol reads of its cycle:
    `keep_alive`, `response_complete`, `disconnected`, `message_event`.
    """

    __slots__ = (
        "chunked",
        "connection",
        "dechunker",
        "disconnected",
        "ends_by_close",
        "expects_continue",
        "headers",
        "http11",
        "is_head",
        "keep_alive",
        "kept",
        "kept_size",
        "method",
        "path",
        "protocol",
        "request_complete",
        "request_head",
        "request_id",
        "resent",
        "response_complete",
        "response_started",
        "target",
    )
    message_event = _Unheard()

    def __init__(
        self, protocol: RelayProtocol, method: bytes, target: bytes, path: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.protocol = protocol
        self.method = method
        self.target = target
        self.path = path
        self.headers = headers
        self.is_head = method == b"HEAD"
        self.http11 = True
        self.keep_alive = True
        self.chunked = False
        self.expects_continue = False
        self.request_id = b""
        self.request_head = b""
        self.request_complete = False
        self.kept: list[bytes] | None = []
        self.kept_size = 0
        self.resent = False
        self.connection: UpstreamConnection | None = None
        self.dechunker: _Dechunker | None = None
        self.ends_by_close = False
        self.response_started = False
        self.response_complete = False
        self.disconnected = False

    # From the client

    def build_request_head(self) -> Refusal | None:
        """Writes the head that vLLM will see. A refusal where HTTP leaves no honest way to pass the request on."""
        lines = [self.method, b" ", self.target, b" HTTP/1.1\r\n"]
        has_host = False
        named: frozenset[bytes] = frozenset()
        for name, value in self.headers:
            lower = name.lower()
            if lower not in WATCHED:
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"host":
                has_host = True
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"content-length":
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"x-request-id":
                if not self.request_id and 0 < len(value) <= REQUEST_ID_LIMIT:
                    self.request_id = value
            elif lower == b"transfer-encoding":
                if value.lower() != b"chunked":
                    return Refusal(501, "Transfer-Encoding other than 'chunked' is not supported.")
                self.chunked = True
                lines.append(b"Transfer-Encoding: chunked\r\n")
            elif lower == b"expect":
                if self.http11:  # RFC 9110, 10.1.1: an HTTP/1.0 client can't wait for a 100
                    self.expects_continue = True
                    lines += (name, b": ", value, b"\r\n")
            elif lower == b"connection" and value.lower() not in (b"close", b"keep-alive"):
                named |= {token.strip() for token in value.lower().split(b",")}
        if not self.request_id:
            self.request_id = os.urandom(16).hex().encode()
        if not has_host:
            lines.append(b"Host: vllm\r\n")
        lines += (b"X-Request-Id: ", self.request_id, b"\r\n\r\n")
        if named - WATCHED:
            lines = _without(lines, named - WATCHED)
        self.request_head = b"".join(lines)
        return None

    def start(self) -> None:
        """Its turn has come: the answers before it on this connection are complete."""
        self.protocol.answering = self
        gateway = self.protocol.gateway
        gateway.exchanges.add(self)
        refusal = self.build_request_head() or gateway.check(self)
        if refusal is not None:
            self.refuse(refusal)
        elif gateway.open:
            gateway.upstream.send(self)
        else:
            gateway.hold(self)

    def request_data(self, data: bytes) -> None:
        if self.response_complete:
            return  # answered early: the rest is read and thrown away, so that the connection stays usable
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._pass_on(data)

    def request_end(self, trailers: list[tuple[bytes, bytes]]) -> None:
        self.request_complete = True
        if self.response_complete:
            return
        if self.chunked:
            fields = b"".join(b"%b: %b\r\n" % field for field in trailers if field[0].lower() not in WATCHED)
            self._pass_on(b"0\r\n%b\r\n" % fields)
        if self.connection is not None:
            self.connection.end_request()

    def _pass_on(self, data: bytes) -> None:
        if self.kept is not None:
            self.kept.append(data)
            self.kept_size += len(data)
        if self.connection is not None:
            self.connection.write(data)
            if self.kept_size > KEEP_LIMIT:
                self.kept = None
        elif self.kept_size > HIGH_WATER_LIMIT:
            self.protocol.flow.pause_reading()

    def client_gone(self) -> None:
        """Nobody will read the answer: vLLM is told at once, by closing its connection."""
        self.disconnected = True
        self.protocol.gateway.leave(self)
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    # From vLLM: a Sink

    def connected(self, connection: UpstreamConnection) -> None:
        if self.disconnected or self.response_complete:
            connection.abort()
            return
        self.connection = connection
        assert self.kept is not None  # dropped only after a connection was there, and then nothing is sent again
        connection.write(b"".join((self.request_head, *self.kept)))
        if self.request_complete:
            connection.end_request()
        else:
            self.protocol.flow.resume_reading()

    def response_head(self, head: ResponseHead) -> None:
        if head.status < 200:
            if self.http11:
                self.protocol.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.fields))
            return
        self.response_started = True
        self.kept = None
        lines = [b"HTTP/1.1 %d " % head.status, head.reason, b"\r\n", head.fields]
        if head.framing is Framing.CHUNKED and not self.is_head:
            if self.http11:
                lines.append(b"Transfer-Encoding: chunked\r\n")
            else:
                self.dechunker = _Dechunker()
                self.ends_by_close = True
        elif head.framing is Framing.CLOSE and not self.is_head:
            self.ends_by_close = True
        if not head.has_request_id:
            lines += (b"X-Request-Id: ", self.request_id, b"\r\n")
        if self.ends_by_close or (self.expects_continue and not self.request_complete) or self.protocol.gateway.closing:
            self.keep_alive = False
        lines.append(b"\r\n" if self.keep_alive else b"Connection: close\r\n\r\n")
        self.protocol.transport.write(b"".join(lines))

    def response_data(self, data: bytes) -> None:
        self.protocol.transport.write(data if self.dechunker is None else self.dechunker.feed(data))

    def response_end(self) -> None:
        self.connection = None
        self._complete()

    def response_lost(self, error: UpstreamError) -> None:
        connection, self.connection = self.connection, None
        if self.disconnected or self.response_complete:
            return
        gateway = self.protocol.gateway
        if self.response_started:
            gateway.log.warning("%s (request %s, answer cut)", error, self.request_id.decode("latin-1"))
            self.client_gone()
            if self.ends_by_close:
                _reset(self.protocol.transport)
            else:
                self.protocol.transport.close()
        elif (
            isinstance(error, Unanswered)
            and connection is not None
            and connection.reused
            and not self.resent
            and self.kept is not None
        ):  # vLLM closed the idle connection while this request was on its way into it
            self.resent = True
            gateway.upstream.send(self, fresh=True)
        else:
            gateway.log.warning("%s (request %s)", error, self.request_id.decode("latin-1"))
            self.refuse(gateway.unanswered(error))

    def pause_request(self) -> None:
        if not self.request_complete:
            self.protocol.flow.pause_reading()

    def resume_request(self) -> None:
        self.protocol.flow.resume_reading()

    # Our own answer

    def refuse(self, refusal: Refusal) -> None:
        head, body = refusal.head_and_body(self.path, self.request_id)
        if (self.expects_continue and not self.request_complete) or self.protocol.gateway.closing:
            self.keep_alive = False
        end = b"\r\n" if self.keep_alive else b"Connection: close\r\n\r\n"
        self.protocol.transport.write(head + end + (b"" if self.is_head else body))
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        self._complete()

    def end_now(self, refusal: Refusal) -> None:
        """The drain timeout has passed: an answer that has not begun is a refusal, one that has is cut."""
        if not self.response_started:
            self.refuse(refusal)
        else:
            if self.connection is not None:
                self.connection.abort()
            self.response_lost(UpstreamError(refusal.message))

    def _complete(self) -> None:
        self.response_complete = True
        protocol = self.protocol
        protocol.gateway.leave(self)
        protocol.answering = None
        if not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()


class RelayProtocol(HttpToolsProtocol):
    """One client connection. Passed to uvicorn as `Config(http=...)`; `Config(app=...)` must be the `Gateway`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gateway = cast("Gateway", self.app)
        self.incoming: Exchange | None = None  # whose body is arriving
        self.answering: Exchange | None = None  # whose answer is leaving

    # asyncio's callbacks

    def connection_lost(self, exc: Exception | None) -> None:
        for exchange in (self.answering, *(cycle for cycle, _ in self.pipeline)):
            if isinstance(exchange, Exchange):
                exchange.client_gone()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.answering is not None and self.answering.connection is not None:
            self.answering.connection.pause_response()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.answering is not None and self.answering.connection is not None:
            self.answering.connection.resume_response()

    # httptools' callbacks, in the order in which it calls them

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.incoming = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        target, headers = self.url, self.headers
        path = target.partition(b"?")[0]
        if not target.startswith(b"/"):
            target, path = _origin_form(target)
        if path in self.gateway.own_paths:
            self._leave_to_uvicorn(target, headers)
            return
        exchange = Exchange(self, self.parser.get_method(), target, path, headers)
        exchange.http11 = self.parser.get_http_version() == "1.1"
        # After an upgrade the parser reads no further request, whatever vLLM makes of it.
        exchange.keep_alive = exchange.http11 and self.parser.should_keep_alive() and not self.parser.should_upgrade()
        self.incoming = exchange
        self.headers = []  # what comes now are trailers
        before, self.cycle = self.cycle, cast(Any, exchange)
        if before is None or before.response_complete:
            exchange.start()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cast(Any, exchange), self.app))

    def _leave_to_uvicorn(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        super().on_message_begin()
        self.url = target
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.incoming is None:
            super().on_body(body)
        else:
            self.incoming.request_data(body)

    def on_message_complete(self) -> None:
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
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer is under way: a second one in its midst would corrupt it
            return
        head, body = Refusal(400, msg, code="bad_request").head_and_body(b"", os.urandom(16).hex().encode())
        self.transport.write(head + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


class _Dechunker:
    """Takes the chunk framing off, for HTTP/1.0 clients."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.parser = httptools.HttpResponseParser(self)
        self.parser.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def feed(self, data: bytes) -> bytes:
        self.parser.feed_data(data)
        body = b"".join(self.parts)
        self.parts.clear()
        return body


def _reset(transport: asyncio.Transport) -> None:
    """Closes so that the client notices: a body whose end only the close tells must not look complete."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


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


def _without(lines: list[bytes], names: frozenset[bytes]) -> list[bytes]:
    """The head's lines without the headers that `Connection` names."""
    kept = []
    for line in b"".join(lines).split(b"\r\n"):
        if line.partition(b":")[0].lower() not in names:
            kept.append(line)
    return [b"\r\n".join(kept)]
