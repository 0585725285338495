"""The connection to the client: uvicorn's httptools protocol, with relayed requests taken out of its hands.

The parser's callbacks are replaced. Requests for our own paths are handed back to uvicorn, which runs the ASGI app;
every other request becomes an `Exchange`, which stands where uvicorn expects its request cycle, so that keep-alive,
pipelining and graceful shutdown stay uvicorn's.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from supervisor.gateway.errors import Refusal
from supervisor.gateway.exchange import Exchange

if TYPE_CHECKING:
    from supervisor.gateway.app import Gateway

# Seconds in which a client that was refused may still send its body, and read why.
LINGER = 2.0


class RelayProtocol(HttpToolsProtocol):
    """One client connection. Passed to uvicorn as `Config(http=...)`; `Config(app=...)` must be the `Gateway`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gateway = cast("Gateway", self.app)
        self.incoming: Exchange | None = None  # whose body is arriving
        self.answering: Exchange | None = None  # whose answer is leaving
        self.lingering = False  # answered and half closed; whatever still comes is thrown away
        self.private = False  # from the queue worker, over a socket that nobody else can open

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        found = transport.get_extra_info("socket")
        self.private = found is not None and found.family == socket.AF_UNIX

    def connection_lost(self, exc: Exception | None) -> None:
        for exchange in (self.answering, *(cycle for cycle, _ in self.pipeline)):
            if isinstance(exchange, Exchange):
                exchange.client_gone()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.lingering:
            super().data_received(data)

    def linger(self) -> None:
        """Closes our side alone: closing both while the client still sends would reset what it has not read yet."""
        self.lingering = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

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
