"""The connection to vLLM: HTTP/1.1 over its unix socket, pooled.

`Upstream.send(sink)` finds an idle connection, or opens one, and hands it to the sink, which writes its request on it.
What comes back reaches the sink as one `ResponseHead` and then the raw bytes of the body, framing included, exactly as
vLLM wrote them: httptools only watches for where the message ends. One connection carries one request at a time.

No coroutine runs per request and no body is parsed: this is the path of every token (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import contextlib
from enum import Enum
from typing import Protocol, cast

import httptools

from supervisor.gateway.heads import Latest, Memo, WholeHead, split

# vLLM's uvicorn closes an idle connection after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE): leave first.
IDLE_LIMIT = 4.0
HEAD_LIMIT = 64 * 1024

# RFC 9110, 7.6.1: these speak of one connection, not of the message.
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"})


# What a reason may be made of.
TEXT = bytes([9, *range(32, 127), *range(128, 256)])


class Framing(Enum):
    """How the end of a response body is known."""

    NONE = "no body"
    LENGTH = "content-length"
    CHUNKED = "chunked"
    CLOSE = "until the connection closes"


class UpstreamError(Exception):
    """vLLM's side of the exchange failed; `text` says how, in words a client may read."""


class Disconnected(UpstreamError):
    """vLLM closed the connection: it may have died."""


class NotConnected(Disconnected):
    """Nothing was sent: nobody listens on vLLM's socket."""


class Unanswered(Disconnected):
    """Not a byte of an answer came: on a connection that had been idle, vLLM most likely never saw the request."""


class ResponseHead:
    """Status, reason, and the header lines that may travel on (hop-by-hop ones are gone)."""

    __slots__ = ("fields", "framing", "has_request_id", "is_sse", "length", "reason", "status")

    def __init__(self, status: int, reason: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.reason = reason
        if status < 100 or reason.translate(None, TEXT):
            raise UpstreamError("vLLM's answer has no valid status line")
        self.has_request_id = False
        self.is_sse = False
        self.length = 0
        framing = Framing.CLOSE
        named: frozenset[bytes] = frozenset()
        for name, value in headers:
            if len(name) == 10 and name.lower() == b"connection" and value.lower() not in (b"close", b"keep-alive"):
                named |= {token.strip() for token in value.lower().split(b",")}
        lines: list[bytes] = []
        for name, value in headers:
            lower = name.lower()
            if lower in HOP_BY_HOP or lower in named:
                if lower == b"transfer-encoding":
                    if value.lower() != b"chunked":
                        raise UpstreamError("vLLM's answer has a transfer coding other than chunked")
                    framing = Framing.CHUNKED
                continue
            if lower == b"content-length":
                framing = Framing.LENGTH
                self.length = int(value)
            elif lower == b"content-type":
                self.is_sse = value.startswith(b"text/event-stream")
            elif lower == b"x-request-id":
                self.has_request_id = True
            lines += (name, b": ", value, b"\r\n")
        self.fields = b"".join(lines)
        self.framing = Framing.NONE if status in (204, 304) or status < 200 else framing


class Sink(Protocol):
    """Who sends one request and receives its response. Calls come in this order, `response_lost` at any point."""

    is_head: bool
    is_relayed: bool  # a client's, not one of our own questions
    upgrading: bool  # asks for a WebSocket

    def connected(self, connection: UpstreamConnection) -> None: ...

    def response_head(self, head: ResponseHead) -> None:
        """Also for each 1xx; the last call carries the final status."""

    def response_switched(self, head: ResponseHead, data: bytes) -> None:
        """A WebSocket is open; what comes of it follows by `response_data`, and its end by `response_end`."""

    def response_whole(self, head: WholeHead, digits: bytes, body: bytes) -> None:
        """Instead of all the others: a whole answer, whose head was seen before."""

    def response_data(self, data: bytes) -> None:
        """Raw body bytes, chunk framing and trailers included."""

    def response_end(self) -> None: ...

    def response_lost(self, error: UpstreamError) -> None: ...

    def pause_request(self) -> None:
        """vLLM takes no more of the request body for now."""

    def resume_request(self) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to vLLM. `sink` is whoever's request it carries, None while it is idle."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made, before any use
        self.sink: Sink | None = None
        self.tunnel = False  # a WebSocket: no HTTP any more
        self.latest: Latest[WholeHead] | None = None
        self.reused = False
        self.idle_since = 0.0
        self.response_paused = False
        self.parser = httptools.HttpResponseParser(self)
        self._expect_head()

    def _expect_head(self) -> None:
        self.answered = False  # by a single byte
        self.raw_head = b""
        self.in_head = True
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.head: ResponseHead | None = None
        self.keep_alive = False
        self.request_sent = False
        self.message_complete = False
        self.previous = b""  # what came of the body last
        self.body_read = 0
        self.in_chunk = False  # between a chunk's size and its last byte

    # What the sink calls

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def end_request(self) -> None:
        """The whole request is written: once answered, the connection may carry another."""
        self.request_sent = True

    def abort(self) -> None:
        """Closes at once, which tells vLLM to stop generating."""
        self.sink = None
        self.transport.abort()

    def pause_response(self) -> None:
        self.response_paused = True
        self.transport.pause_reading()

    def resume_response(self) -> None:
        if self.response_paused:
            self.response_paused = False
            self.transport.resume_reading()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.forget(self)
        sink, self.sink = self.sink, None
        if sink is None:
            return
        if self.tunnel or (self.head is not None and self.head.framing is Framing.CLOSE and exc is None):
            sink.response_end()
        elif not self.answered:
            sink.response_lost(Unanswered("vLLM closed the connection without an answer"))
        else:
            sink.response_lost(Disconnected("vLLM closed the connection before its answer was complete"))

    def pause_writing(self) -> None:
        if self.sink is not None:
            self.sink.pause_request()

    def resume_writing(self) -> None:
        if self.sink is not None:
            self.sink.resume_request()

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:  # nobody asked: a late answer must never reach the next request
            self.transport.abort()
            return
        self.answered = True
        self.upstream.reads += sink.is_relayed
        if self.tunnel:
            sink.response_data(data)
            return
        key = None
        if self.in_head and self.request_sent and not self.raw_head:
            known: WholeHead | None = None
            end, digits = 0, b""
            if self.latest is not None and (same := self.latest.read(data)) is not None:
                known = self.latest.head
                end, digits = same
            elif (found := split(data)) is not None:
                end, key, digits = found
                known = self.upstream.heads.get(key) if digits else None
                if known is not None:
                    self.latest = Latest(key, known)
            if known is not None and len(data) == end + int(digits) and not sink.is_head:
                self.sink = None
                self.answered = self.request_sent = False
                self.upstream.release(self)
                sink.response_whole(known, digits, data[end:])
                return
        try:
            while self.in_head and data:
                data = self._feed_head(data, sink)
                if self.sink is not sink or self.tunnel:
                    return
                if self.in_head:
                    key = None  # that of an interim answer
            if data:
                if self.message_complete:
                    raise UpstreamError("vLLM sent more than its answer")
                self.parser.feed_data(data)
                self.body_read += len(data)
                if self.message_complete and not self._ends_well(data):
                    raise UpstreamError("vLLM sent more than its answer")
                self.previous = data if len(data) >= 4 else (self.previous + data)[-4:]
                sink.response_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(sink, f"vLLM's answer is not valid HTTP/1.1 ({error})")
        except UpstreamError as error:
            self._fail(sink, str(error))
        else:
            if self.message_complete and self.sink is sink:
                if key is not None and (head := self._memorable(sink)) is not None:
                    self.upstream.heads.learn(key, head)
                self._finish(sink)

    def _ends_well(self, data: bytes) -> bool:
        """The parser passes over line ends behind an answer; nothing may lie there."""
        head = self.head
        if head is None or head.framing is not Framing.CHUNKED:
            return head is None or self.body_read == head.length
        end = (self.previous[-4:] + data)[-5:]
        return end.endswith(b"\r\n\r\n") and end[:1] not in (b"\r", b"\n")

    def _memorable(self, sink: Sink) -> WholeHead | None:
        """The head of an answer that came as a whole, to be known when it comes again."""
        head = self.head
        if (
            head is None
            or head.framing is not Framing.LENGTH
            or not 200 <= head.status < 500  # 500 and 503 may be a dying engine's
            or head.has_request_id
            or not self.keep_alive
            or not sink.is_relayed
            or sink.is_head
        ):
            return None
        written = b"HTTP/1.1 %d %b\r\n%bX-Request-Id: " % (head.status, head.reason, head.fields)
        return WholeHead(head.status, written)

    def _feed_head(self, data: bytes, sink: Sink) -> bytes:
        """Parses up to the end of one head and returns what lies behind it."""
        if self.raw_head:
            data = self.raw_head + data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > HEAD_LIMIT:
                raise UpstreamError(f"vLLM's response head is larger than {HEAD_LIMIT} bytes")
            self.raw_head = data
            return b""
        self.raw_head = b""
        with contextlib.suppress(httptools.HttpParserUpgrade):  # 101: told from the status below
            self.parser.feed_data(data[:end])
        if self.head is None:
            raise UpstreamError("vLLM's response head is not valid HTTP/1.1")
        head = self.head
        if head.status < 200:  # an interim answer: the parser is ready for the next head
            if head.status == 101:
                if not sink.upgrading:
                    raise UpstreamError("vLLM switched protocols unasked")
                self.tunnel = True
                sink.response_switched(head, data[end:])
                return b""
            sent = self.request_sent
            self._expect_head()
            self.request_sent = sent
            self.answered = True
        else:
            self.in_head = False
            if sink.is_head:
                self.message_complete = True
        sink.response_head(head)
        return data[end:]

    def _finish(self, sink: Sink) -> None:
        self.sink = None
        if self.keep_alive and self.request_sent:
            if sink.is_head:  # the parser still waits for the body that an answer to HEAD has not
                self.parser = httptools.HttpResponseParser(self)
            self._expect_head()
            self.resume_response()
            self.upstream.release(self)
        else:
            self.transport.abort()
        sink.response_end()

    def _fail(self, sink: Sink, text: str) -> None:
        self.abort()
        sink.response_lost(UpstreamError(text))

    # httptools' callbacks, in the order in which it calls them

    def on_message_begin(self) -> None:
        if self.message_complete and not self.in_head:
            raise UpstreamError("vLLM sent more than its answer")

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is None:  # later ones are trailers, which travel raw
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.keep_alive = self.parser.should_keep_alive()
        self.head = ResponseHead(self.parser.get_status_code(), self.reason, self.headers)

    def on_chunk_header(self) -> None:
        self.in_chunk = True

    def on_chunk_complete(self) -> None:
        self.in_chunk = False

    def on_message_complete(self) -> None:
        self.message_complete = True


class Upstream:
    """The pool. The connection used last is used next, so that a burst's extra ones grow old and go."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.path = path
        self.loop = loop or asyncio.get_running_loop()
        self.idle: list[UpstreamConnection] = []
        self.heads: Memo[WholeHead] = Memo()
        self.reads = 0  # of answers, ever
        self.opening: set[asyncio.Task[None]] = set()

    def send(self, sink: Sink, *, fresh: bool = False) -> None:
        """Calls `sink.connected` with a connection, or `sink.response_lost`; `fresh` passes the idle ones over."""
        while self.idle and not fresh:
            connection = self.idle.pop()
            if connection.idle_since < self.loop.time() - IDLE_LIMIT or connection.transport.is_closing():
                connection.transport.abort()
                continue
            connection.reused = True
            connection.sink = sink
            sink.connected(connection)
            return
        task = self.loop.create_task(self._open(sink))
        self.opening.add(task)
        task.add_done_callback(self.opening.discard)

    async def _open(self, sink: Sink) -> None:
        try:
            _, connection = await self.loop.create_unix_connection(lambda: UpstreamConnection(self), self.path)
        except OSError as error:
            sink.response_lost(NotConnected(f"vLLM does not take connections ({error.strerror or error})"))
            return
        connection.sink = sink
        sink.connected(connection)

    def release(self, connection: UpstreamConnection) -> None:
        connection.idle_since = self.loop.time()
        self.idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    def close(self) -> None:
        """Drops the idle connections; those in use end with their requests."""
        for connection in self.idle:
            connection.transport.abort()
        self.idle.clear()


class Dechunker:
    """Takes the chunk framing off a body."""

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


class Probe:
    """A sink that asks vLLM one small question: `status, body = await Probe.get(upstream, "/metrics")`."""

    is_head = False
    is_relayed = False
    upgrading = False

    def __init__(self, path: str, body: bytes, answer: asyncio.Future[tuple[int, bytes]]) -> None:
        self.path = path
        self.request_body = body
        self.answer = answer
        self.connection: UpstreamConnection | None = None
        self.status = 0
        self.body: list[bytes] = []
        self.dechunker: Dechunker | None = None

    @classmethod
    async def get(cls, upstream: Upstream, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """A POST where there is a body, which is JSON. Raises UpstreamError."""
        probe = cls(path, body, upstream.loop.create_future())
        upstream.send(probe, fresh=True)
        try:
            return await probe.answer
        finally:
            if probe.connection is not None:
                probe.connection.abort()

    def connected(self, connection: UpstreamConnection) -> None:
        if self.answer.done():  # asked no more
            connection.abort()
            return
        self.connection = connection
        body = self.request_body
        method, more = (
            ("POST", f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n") if body else ("GET", "")
        )
        head = f"{method} {self.path} HTTP/1.1\r\nHost: vllm\r\nConnection: close\r\n{more}\r\n"
        connection.write(head.encode() + body)
        connection.end_request()

    def response_head(self, head: ResponseHead) -> None:
        self.status = head.status
        self.dechunker = Dechunker() if head.framing is Framing.CHUNKED else None

    def response_switched(self, head: ResponseHead, data: bytes) -> None:
        raise AssertionError  # never asked for

    def response_whole(self, head: WholeHead, digits: bytes, body: bytes) -> None:
        self.status = head.status
        self.body.append(body)
        self.response_end()

    def response_data(self, data: bytes) -> None:
        self.body.append(self.dechunker.feed(data) if self.dechunker else data)

    def response_end(self) -> None:
        self.connection = None  # where vLLM keeps it open, another's request may have it by now
        if not self.answer.done():
            self.answer.set_result((self.status, b"".join(self.body)))

    def response_lost(self, error: UpstreamError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def pause_request(self) -> None:
        pass

    def resume_request(self) -> None:
        pass
