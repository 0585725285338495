"""The connections to vLLM: HTTP/1.1 over its unix socket, pooled. Each carries one request at a time.

`Upstream.send(sink)` finds an idle connection or opens one, and the sink writes its request on it. The answer reaches
it as one `ResponseHead`, then as raw bytes, framing included, as vLLM wrote them: httptools only finds where it ends.
No coroutine runs per request and no body is parsed: this is the path of every token (docs/development/performance.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import cast

import httptools

from supervisor.gateway.errors import UpstreamError
from supervisor.gateway.heads import Memo, RepeatedHeads
from supervisor.gateway.http1 import ANSWER_HEAD_LIMIT, Framing, KnownAnswer, ResponseHead

IDLE_LIMIT = 4.0  # seconds; vLLM's uvicorn closes idle connections after 5 (VLLM_HTTP_TIMEOUT_KEEP_ALIVE): leave first
TOO_MUCH = "vLLM sent more than its answer"
log = logging.getLogger("supervisor.gateway")


class Disconnected(UpstreamError):
    """vLLM closed the connection: it may have died."""


class NotConnected(Disconnected):
    """Nothing was sent: nobody listens on vLLM's socket."""


class Unanswered(Disconnected):
    """Not a byte of an answer came: on a connection that had been idle, vLLM most likely never saw the request."""


class Receiver:
    """Receives an answer's body from its connection, whose last call is `answer_ended` or `answer_lost`."""

    def body_received(self, data: bytes, in_chunk: bool) -> None:
        """Takes raw bytes of the body, chunk framing and trailers included; `in_chunk`: they end within a chunk."""
        raise NotImplementedError

    def answer_ended(self) -> None:
        """The connection calls this when the answer is complete; it may carry another request by now."""
        raise NotImplementedError

    def answer_lost(self, error: UpstreamError) -> None:
        """Called instead when there is no connection, it broke, or what came is no HTTP: `error` says which."""
        raise NotImplementedError

    def pause_request(self) -> None:
        """vLLM takes no more of the request's body for now: whoever sends it is to stop until `resume_request`."""

    def resume_request(self) -> None:
        """vLLM takes more of the body again. It may be called without a pause before."""


class Sink(Receiver):
    """Sends one request, and receives its answer, or names somebody else for the body (`connection.receiver`)."""

    is_head = False  # whether the request is a HEAD, whose answer has no body
    wants_websocket = False  # whether the request asks for a WebSocket

    def connected(self, connection: UpstreamConnection) -> None:
        """`Upstream.send` calls this, maybe at once, with a connection: to write the request on it, or abort it."""
        raise NotImplementedError

    def head_received(self, head: ResponseHead) -> None:
        """Takes the head of the answer, and of each 1xx before it but 101; the last call carries the final status."""
        raise NotImplementedError

    def websocket_opened(self, head: ResponseHead, data: bytes) -> None:
        """vLLM opened the WebSocket: `data` may hold frames, `body_received` brings others, `answer_ended` the end."""
        raise NotImplementedError

    def answer_received(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        """Takes a whole answer, whose head was seen before; only `connected` came first. `digits` are its length's."""
        raise NotImplementedError


class UpstreamConnection(asyncio.Protocol):
    """Carries requests to vLLM, one at a time. `sink` is whoever's request it carries, None while it is idle."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made, before any use
        self.sink: Sink | None = None
        self.receiver: Receiver | None = None  # who gets the answer's body: the sink, or whom it has named
        self.tunnel = False  # set when a WebSocket is open: no HTTP follows
        self.heads: RepeatedHeads[KnownAnswer] = RepeatedHeads(upstream.heads)
        self.reused = False  # set when it is taken from the idle ones
        self.idle_since = 0.0  # when its last answer was complete: the loop's time in seconds
        self.writing_paused = False  # set while vLLM takes no more of the request
        self.response_paused = False  # set while the client takes no more of the answer
        self.parser = httptools.HttpResponseParser(self)
        self._expect_head()

    def _expect_head(self) -> None:
        self.has_answered = False  # set when an answer's first byte came
        self.raw_head = b""  # what came of a head that is not complete
        self.in_head = True  # true until the answer's own head is complete
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.head: ResponseHead | None = None
        self.keep_alive = False  # whether vLLM leaves the connection open behind the answer
        self.request_sent = False  # set when the request is complete: once answered, the connection may carry another
        self.message_complete = False  # set when the parser has seen the answer's end
        self.last_bytes = b""  # what came of the body last: four bytes or more, where there are so many
        self.body_read = 0  # bytes of the body that came, its framing included
        self.in_chunk = False  # set between a chunk's size and its last byte

    # The sink calls these

    def abort(self) -> None:
        """Closes the connection at once, which tells vLLM to stop generating."""
        self.sink = self.receiver = None
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
        receiver, self.sink, self.receiver = self.receiver, None, None
        if receiver is None:
            return
        if self.tunnel or (self.head is not None and self.head.framing is Framing.CLOSE and exc is None):
            receiver.answer_ended()
        elif not self.has_answered:
            receiver.answer_lost(Unanswered("vLLM closed the connection without an answer"))
        else:
            receiver.answer_lost(Disconnected("vLLM closed the connection before its answer was complete"))

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self.receiver is not None:
            self.receiver.pause_request()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self.receiver is not None:
            self.receiver.resume_request()

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:  # nobody asked: a late answer must never reach the next request
            self.transport.abort()
            return
        self.upstream.reads += 1
        is_whole = self.in_head and self.request_sent and not self.raw_head
        if is_whole and (found := self.heads.find(data)) is not None and not sink.is_head:
            self.sink = self.receiver = None
            self.request_sent = self.has_answered = False
            self.upstream.release(self)
            sink.answer_received(*found)
            return
        self.has_answered = True
        if self.tunnel:
            self.receiver.body_received(data, False)  # type: ignore[union-attr]  # there is one while there is a sink
            return
        try:
            while self.in_head and data:
                data = self._feed_head(data, sink)
                if self.sink is not sink or self.tunnel:
                    return
                if self.in_head:
                    is_whole = False  # there was an interim answer
            if data:
                if self.message_complete:
                    raise UpstreamError(TOO_MUCH)
                self.parser.feed_data(data)
                self.body_read += len(data)
                if self.message_complete and not self._ends_well(data):
                    raise UpstreamError(TOO_MUCH)
                self.last_bytes = data if len(data) >= 4 else (self.last_bytes + data)[-4:]
                self.receiver.body_received(data, self.in_chunk)  # type: ignore[union-attr]  # as above
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, UpstreamError):
                raise  # a fault of ours: vLLM's answer is well
            self._fail(str(error.__context__))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"vLLM's answer is not valid HTTP/1.1 ({error})")
        except UpstreamError as error:
            self._fail(str(error))
        else:
            if self.message_complete and self.sink is sink:
                if is_whole and (head := self._repeatable_head(sink)) is not None:
                    self.heads.learn(KnownAnswer(head))
                self._finish(sink)

    def _ends_well(self, data: bytes) -> bool:
        """Tells whether nothing lies behind the answer, not even the line ends that the parser passes over."""
        head = self.head
        if head is None or head.framing is not Framing.CHUNKED:
            return head is None or self.body_read == head.length
        end = (self.last_bytes[-4:] + data)[-5:]
        return end.endswith(b"\r\n\r\n") and end[:1] not in (b"\r", b"\n")

    def _repeatable_head(self, sink: Sink) -> ResponseHead | None:
        """Returns the head of an answer that came as a whole, if it may be known when it comes again; else None."""
        head = self.head
        if (
            head is None
            or head.framing is not Framing.LENGTH
            or not 200 <= head.status < 500  # 500 and 503 may be a dying engine's
            or head.has_request_id
            or not self.keep_alive
            or sink.is_head
        ):
            return None
        return head

    def _feed_head(self, data: bytes, sink: Sink) -> bytes:
        """Parses up to the end of one head, and returns what lies behind it. Raises UpstreamError."""
        if self.raw_head:
            data = self.raw_head + data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > ANSWER_HEAD_LIMIT:
                raise UpstreamError(f"vLLM's response head is larger than {ANSWER_HEAD_LIMIT} bytes")
            self.raw_head = data
            return b""
        self.raw_head = b""
        with contextlib.suppress(httptools.HttpParserUpgrade):  # a 101 is told from the status below
            self.parser.feed_data(data[:end])
        if self.head is None:
            raise UpstreamError("vLLM's response head is not valid HTTP/1.1")
        head = self.head
        if head.status < 200:  # an interim answer: the parser is ready for the next head
            if head.status == 101:
                if not sink.wants_websocket:
                    raise UpstreamError("vLLM switched protocols unasked")
                self.tunnel, self.in_head = True, False
                sink.websocket_opened(head, data[end:])
                return b""
            sent = self.request_sent
            self._expect_head()
            self.request_sent = sent
            self.has_answered = True
        else:
            self.in_head = False
            if sink.is_head:
                self.message_complete = True
        sink.head_received(head)
        return data[end:]

    def _finish(self, sink: Sink) -> None:
        receiver, self.sink, self.receiver = self.receiver, None, None
        if self.keep_alive and self.request_sent:
            if sink.is_head:  # the parser still waits for the body that an answer to HEAD has not
                self.parser = httptools.HttpResponseParser(self)
            self._expect_head()
            self.resume_response()
            self.upstream.release(self)
        else:
            self.transport.abort()
        if receiver is not None:
            receiver.answer_ended()

    def _fail(self, text: str) -> None:
        receiver = self.receiver
        self.abort()
        if receiver is not None:
            receiver.answer_lost(UpstreamError(text))

    # httptools' callbacks, in the order in which it calls them

    def on_message_begin(self) -> None:
        if self.message_complete and not self.in_head:
            raise UpstreamError(TOO_MUCH)

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
    """Pools the connections. The one used last is used next, so that a burst's extra ones grow old and go."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.path = path
        self.loop = loop or asyncio.get_running_loop()
        self.idle: list[UpstreamConnection] = []
        self.heads: Memo[KnownAnswer] = Memo()
        self.reads = 0  # pieces of answers that were read, since the start
        self.opening_tasks: set[asyncio.Task[None]] = set()

    def send(self, sink: Sink, *, fresh: bool = False) -> None:
        """Calls `sink.connected` with a connection, or `sink.answer_lost`; `fresh` passes the idle ones over."""
        while self.idle and not fresh:
            connection = self.idle.pop()
            if connection.idle_since < self.loop.time() - IDLE_LIMIT or connection.transport.is_closing():
                connection.transport.abort()
                continue
            connection.reused = True
            connection.sink = connection.receiver = sink
            sink.connected(connection)
            return
        task = self.loop.create_task(self._open(sink))
        self.opening_tasks.add(task)
        task.add_done_callback(self.opening_tasks.discard)

    async def _open(self, sink: Sink) -> None:
        try:
            _, connection = await self.loop.create_unix_connection(lambda: UpstreamConnection(self), self.path)
            connection.sink = connection.receiver = sink
            sink.connected(connection)
        except OSError as error:
            sink.answer_lost(NotConnected(f"vLLM does not take connections ({error.strerror or error})"))
        except Exception:  # a fault of ours: nobody waits for this task, but somebody for an answer
            log.exception("no connection to vLLM")
            sink.answer_lost(UpstreamError("no connection to vLLM could be made"))

    def release(self, connection: UpstreamConnection) -> None:
        if connection.writing_paused:  # it was answered early: the next one's body would pile up behind this one's
            connection.transport.abort()
            return
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
