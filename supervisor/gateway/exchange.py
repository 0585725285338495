"""One relayed request, from its head to the last byte of its answer, between a client's connection and vLLM's.

Heads are rebuilt on both ways (hop-by-hop headers gone, the request id added); bodies pass as they come. A request
body is framed anew, by what the parser saw, so that vLLM never sees two requests where we saw one. Backpressure works
both ways: whoever can't take more pauses the reading of the other side.

Until the answer begins, the request is kept (bodies up to 1 MiB), so that it can be sent again when the engine dies.
After that an event stream is ended by an error event, and everything else is cut so that the client notices.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import TYPE_CHECKING

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from supervisor.gateway.counts import CLIENT_GONE, OTHER
from supervisor.gateway.errors import Refusal
from supervisor.gateway.frames import GOING_AWAY, INTERNAL_ERROR, Frames, close_frame
from supervisor.gateway.heads import RequestHead, WholeHead
from supervisor.gateway.policy import head_limits
from supervisor.gateway.upstream import (
    HOP_BY_HOP,
    Dechunker,
    Disconnected,
    Framing,
    NotConnected,
    ResponseHead,
    Unanswered,
    UpstreamConnection,
    UpstreamError,
)

if TYPE_CHECKING:
    import asyncio

    from supervisor.gateway.policy import Verdict
    from supervisor.gateway.relay import RelayProtocol

# Request bodies up to this size are kept until the answer begins, so that the request can be sent again.
KEEP_LIMIT = 1024 * 1024
# Header lines that the relay looks at; all others are copied without a look.
WATCHED = HOP_BY_HOP | {b"content-length", b"expect", b"host", b"x-request-id"}
REQUEST_ID_LIMIT = 256
# An event that is larger than this passes in pieces.
PARTIAL_LIMIT = 64 * 1024
# The end of a chunk that ends an event, or the stream.
EVENT_ENDS = (b"\n\n\r\n", b"\r\n\r\n")
# The last event of a stream, by the dialect of its route.
STREAM_ENDS = (b"data: [DONE]\n\n\r\n", b'"type":"message_stop"}\n\n\r\n')
UNKNOWN_VERSION = Refusal(505, "HTTP/1.1 and HTTP/1.0 are spoken here.", "http_version")
UNKNOWN_CODING = Refusal(501, "Transfer-Encoding other than 'chunked' is not supported.")
TWO_HOSTS = Refusal(400, "The request has more than one Host.", "bad_request")  # RFC 9112, 3.2
CHUNKS_BEFORE_1_1 = Refusal(400, "HTTP/1.0 has no Transfer-Encoding.", "bad_request")  # RFC 9112, 6.1
FRAMES_OR_BODY = Refusal(400, "A request for a WebSocket has no body.", "bad_request")
NO_TUNNELS = Refusal(501, "CONNECT is not supported.", "bad_request")
# What a request may have waited for, and how many seconds are worth a word.
WAITS, NOTED_WAIT = ("held", "waiting"), 0.1
NO_HEADERS: list[tuple[bytes, bytes]] = []
# What vLLM's API server answers to everything in flight in the moment its EngineCore dies.
DOUBTED = frozenset({500, 503})


class _Unheard:
    """Stands for the event that uvicorn sets on its cycles: nobody waits for an exchange."""

    def set(self) -> None:
        pass


class Exchange:
    """One relayed request, from its head to the last byte of its answer.

    Is a `Sink` for the upstream connection, and has the attributes that uvicorn's protocol reads of its cycle:
    `keep_alive`, `response_complete`, `disconnected`, `message_event`.
    """

    message_event = _Unheard()
    is_relayed = True

    # The state of a new one. Kept in the class: what a small request never touches costs it nothing.
    admitted = False
    http11 = True
    known_version = True
    keep_alive = True
    chunked = False
    expects_continue = False
    request_id = b""
    request_head = b""
    request_complete = False
    kept_size = 0
    generation = 0  # of the engine that has the request
    resent = False  # because an idle connection turned out closed
    replayed = False  # because the engine died
    connection: UpstreamConnection | None = None
    dechunker: Dechunker | None = None
    ends_by_close = False
    whole_events = False
    streaming = False  # whole events to a client that takes chunks: nothing to do but to pass them on
    partial = b""  # reads of an event stream that end within a chunk
    torn = False  # the client has half a chunk
    latest = b""  # what the client got last of an event stream
    unsent_head = b""
    doubted: _Doubted | None = None
    response_started = False
    response_complete = False
    disconnected = False
    upgrading = False  # asks for a WebSocket
    frames: Frames | None = None  # has one: bytes pass both ways, whatever they are
    early: tuple[bytes, ...] = ()  # frames that came before the WebSocket was there
    status = 0  # of the answer, once there is one
    read_at = 0.0  # when vLLM's last bytes of it came; 0: its first byte is not counted yet
    first_at = 0.0  # when its first byte went to the client; a stream's first event
    sent = 0  # bytes of the answer's body
    gone = False  # its client is, before the answer's end
    cut = ""  # the code of what refused it, or broke it off
    undecided = False  # whether its answer is in the cache: its body is not there yet
    cached = ""  # how the cache answered it, in a word
    marks: tuple[tuple[str, float], ...] = ()  # what kept it from going to vLLM at once, and when it went
    body_left = sys.maxsize  # bytes that the request's body may still have; jobs have RunPod's limit
    verdict: Verdict | None = None
    refusal: Refusal | None = None  # of its head, read before its turn came

    def __init__(
        self, protocol: RelayProtocol, method: bytes, target: bytes, path: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.protocol = protocol
        self.method = method
        self.target = target
        self.path = path
        self.headers = headers
        self.is_head = method == b"HEAD"
        self.began = protocol.loop.time()
        self.kept: list[bytes] | None = []
        if not protocol.private:
            self.body_left = protocol.gateway.policy.max_body

    @classmethod
    def repeated(cls, protocol: RelayProtocol, head: RequestHead, digits: bytes, body: bytes) -> Exchange:
        """A whole request whose head was seen before."""
        exchange = cls(protocol, head.method, head.target, head.path, NO_HEADERS)
        exchange.verdict = head.verdict
        exchange.request_id = request_id = protocol.gateway.new_id()
        # The body stands with the head: it is sent, and sent again, in one piece with it.
        exchange.request_head = b"".join((head.before, digits, head.after, request_id, b"\r\n\r\n", body))
        exchange.kept_size = size = len(body)
        protocol.counts.received += size
        if size > exchange.body_left:
            exchange.body_left = -1
        exchange.request_complete = True
        return exchange

    # From the client

    def build_request_head(self) -> Refusal | None:
        """Writes the head that vLLM will see. A refusal where HTTP leaves no honest way to pass the request on."""
        refusal = head_limits(self.target, self.headers) if self.known_version else UNKNOWN_VERSION
        if self.method == b"CONNECT":
            refusal = NO_TUNNELS
        if refusal is not None:
            return self._unfit(refusal)
        lines = [self.method, b" ", self.target, b" HTTP/1.1\r\n"]
        has_host = False
        body_left = self.body_left
        named: frozenset[bytes] = frozenset()
        for name, value in self.headers:
            lower = name.lower()
            if lower not in WATCHED:
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"host":
                if has_host:
                    return self._unfit(TWO_HOSTS)
                has_host = True
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"content-length":
                self.body_left -= int(value)
                lines += (name, b": ", value, b"\r\n")
            elif lower == b"x-request-id":
                if not self.request_id and 0 < len(value) <= REQUEST_ID_LIMIT:
                    self.request_id = value
            elif lower == b"transfer-encoding":
                if value.lower() != b"chunked":
                    return self._unfit(UNKNOWN_CODING)
                if not self.http11:
                    return self._unfit(CHUNKS_BEFORE_1_1)
                self.chunked = True
                lines.append(b"Transfer-Encoding: chunked\r\n")
            elif lower == b"expect":
                if self.http11:  # RFC 9110, 10.1.1: an HTTP/1.0 client can't wait for a 100
                    self.expects_continue = True
                    lines += (name, b": ", value, b"\r\n")
            elif lower == b"upgrade":
                if self.upgrading and value.lower() == b"websocket":
                    lines.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
            elif lower == b"connection" and value.lower() not in (b"close", b"keep-alive"):
                named |= {token.strip() for token in value.lower().split(b",")} - {b""}
        if self.upgrading and (self.chunked or self.body_left != body_left):
            return self._unfit(FRAMES_OR_BODY)
        if not self.request_id:
            self.request_id = self.protocol.gateway.new_id()
        if not has_host:
            lines.append(b"Host: vllm\r\n")
        lines += (b"X-Request-Id: ", self.request_id, b"\r\n\r\n")
        if named - WATCHED:
            lines = _without(lines, named - WATCHED)
        self.request_head = b"".join(lines)
        return None

    def _unfit(self, refusal: Refusal) -> Refusal:
        """Nobody knows where such a request ends: nothing more is read of this connection."""
        self.request_id = self.request_id or self.protocol.gateway.new_id()
        self.keep_alive = False
        self.body_left = -1
        return refusal

    def start(self) -> None:
        """Its turn has come: the answers before it on this connection are complete."""
        self.protocol.answering = self
        gateway = self.protocol.gateway
        gateway.exchanges.add(self)
        if self.request_complete and self.verdict is not None and self.body_left >= 0 and gateway.pass_on(self):
            return  # the common case: nothing is in its way
        refusal = self.refusal or (None if self.request_head else self.build_request_head()) or gateway.check(self)
        if refusal is None and self.body_left < 0:
            refusal = gateway.policy.too_large()
        if refusal is not None:
            self.refuse(refusal)
        elif gateway.cache is None or not gateway.cache.takes(self):
            gateway.admit(self)

    @property
    def head(self) -> bytes:
        """As vLLM gets it, without the body that may stand with it."""
        return self.request_head[: self.request_head.find(b"\r\n\r\n")]

    @property
    def body(self) -> bytes:
        """Of a request that is kept whole, and is not chunked."""
        assert self.kept is not None
        return b"".join(self.kept) or self.request_head[len(self.request_head) - self.kept_size :]

    def request_data(self, data: bytes) -> None:
        self.protocol.counts.received += len(data)
        if self.chunked:
            self.body_left -= len(data)
            if self.body_left < 0 and (self.response_complete or self.protocol.answering is self):
                self._too_much()  # or else when its turn has come
        if self.response_complete:
            return  # answered early: the rest is read and thrown away, so that the connection stays usable
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._pass_on(data)

    def _too_much(self) -> None:
        """A chunked body tells its size only as it comes."""
        if not self.response_complete:
            self.end_now(self.protocol.gateway.policy.too_large())
        elif not self.protocol.lingering:  # refused for another reason: nobody reads all of it to be polite
            self.protocol.linger()

    def request_end(self, trailers: list[tuple[bytes, bytes]]) -> None:
        self.request_complete = True
        if self.response_complete:
            return
        if self.chunked:
            fields = b"".join(b"%b: %b\r\n" % field for field in trailers if field[0].lower() not in WATCHED)
            self._pass_on(b"0\r\n%b\r\n" % fields)
        if self.connection is not None:
            self.connection.end_request()
        elif self.undecided:
            self.undecided = False
            assert self.protocol.gateway.cache is not None
            self.protocol.gateway.cache.decide(self)

    def _pass_on(self, data: bytes) -> None:
        if self.kept is not None:
            self.kept.append(data)
            self.kept_size += len(data)
        if self.connection is not None:
            self.connection.write(data)
            if self.kept_size > KEEP_LIMIT:
                self.kept = None
        elif self.undecided:
            if self.kept_size > KEEP_LIMIT:  # too large to be looked at
                self.undecided = False
                self.protocol.gateway.admit(self)
        elif self.kept_size > HIGH_WATER_LIMIT:
            self.protocol.flow.pause_reading()

    @property
    def route(self) -> str:
        return self.verdict.route if self.verdict is not None else OTHER

    @property
    def named(self) -> dict[str, str]:
        """For a line of log that is about it."""
        return {"request": self.request_id.decode("latin-1")}

    @property
    def note(self) -> str:
        """What was unusual about it, for the access log."""
        found = [f"{seconds:.1f} s {what}" for what, seconds in self.waits() if what in WAITS and seconds >= NOTED_WAIT]
        if self.replayed:
            found.append("sent again")
        if self.cached:
            found.append(self.cached)
        if self.gone:
            found.append("client gone")
        return ", ".join([*found, self.cut] if self.cut else found)

    def mark(self, what: str) -> None:
        """`held` for the engine, `waiting` for its turn, `sent` to vLLM, `lost` there; what was before ends."""
        self.marks = (*self.marks, (what, self.protocol.loop.time()))

    def waits(self) -> list[tuple[str, float]]:
        """(what, seconds), in order."""
        ends = [*(at for _, at in self.marks[1:]), self.protocol.loop.time()]
        return [(what, end - at) for (what, at), end in zip(self.marks, ends, strict=False)]

    def _count(self, status: int, *, at_once: bool = False) -> None:
        """At the first byte of an answer, or at its only one."""
        counts, now = self.protocol.counts, self.protocol.loop.time()
        seconds = now - self.began
        self.first_at = now
        if at_once:
            counts.at_once(self.route, status, seconds)
        else:
            self.read_at = now
            counts.began(self.route, status, seconds)

    def client_gone(self) -> None:
        """Nobody will read the answer: vLLM is told at once, by closing its connection."""
        if self.disconnected:
            return  # it was us who cut it
        if not self.response_complete:
            self.gone = True
            if self.read_at:
                self.protocol.counts.aborted += 1
            else:
                self.status = CLIENT_GONE
                self._count(CLIENT_GONE, at_once=True)
                self.first_at = 0.0
        self._drop()

    def _drop(self) -> None:
        """No more of its answer reaches the client."""
        self.disconnected = True
        self.protocol.gateway.leave(self)
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def memorable(self) -> RequestHead | None:
        """Its head, to be known when it comes again; None where it is not a common one."""
        if (
            not self.request_head
            or self.chunked
            or self.expects_continue
            or not self.keep_alive
            or not self.http11
            or self.is_head
            or self.verdict is None
            or self.verdict.refusal is not None
            or any(name.lower() == b"x-request-id" for name, _ in self.headers)
            or sum(name.lower() == b"content-length" for name, _ in self.headers) > 1
        ):
            return None
        written = self.request_head[: -len(self.request_id) - 4]
        return RequestHead(self.method, self.target, self.path, written, self.verdict)

    # From vLLM: a Sink

    def connected(self, connection: UpstreamConnection) -> None:
        if self.disconnected or self.response_complete:
            connection.abort()
            return
        self.connection = connection
        protocol = self.protocol
        self.generation = protocol.gateway.generation
        assert self.kept is not None  # dropped only after a connection was there, and then nothing is sent again
        connection.transport.write(b"".join((self.request_head, *self.kept)) if self.kept else self.request_head)
        if self.request_complete:
            connection.request_sent = True
        else:
            protocol.flow.resume_reading()

    def response_head(self, head: ResponseHead) -> None:
        if head.status < 200:
            if self.http11:
                self.protocol.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.fields))
            return
        gateway = self.protocol.gateway
        if head.status in DOUBTED:
            self.doubted = _Doubted(head)
            gateway.upstream.loop.call_later(gateway.fate_known_after, self.settle)
        else:
            self._begin(head)

    def response_whole(self, head: WholeHead, digits: bytes, body: bytes) -> None:
        """All of an answer at once, its head one that was seen before."""
        self.connection = None
        self.status = head.status
        end = b"\r\n\r\n"
        if self.protocol.gateway.closing or not self.keep_alive:
            self.keep_alive = False
            end = b"\r\nConnection: close\r\n\r\n"
        self.kept = None
        protocol = self.protocol
        counts = protocol.counts
        self.sent = size = len(body)
        counts.sent += size
        self.first_at = now = protocol.loop.time()
        counts.at_once(self.verdict.route, head.status, now - self.began)  # type: ignore[union-attr]  # it was sent
        protocol.transport.write(b"".join((head.before, digits, head.after, self.request_id, end, body)))
        self._complete()

    def settle(self) -> None:
        """An answer of 500 is only believed of an engine that survived it; otherwise the request is sent again."""
        gateway, doubted = self.protocol.gateway, self.doubted
        if doubted is None or self.disconnected or self.response_complete:
            return
        survived = gateway.generation == self.generation
        if survived and not doubted.alive and doubted.questions:
            doubted.questions -= 1
            gateway.ask_for(self)
            return
        self.doubted = None
        if survived:
            self._begin(doubted.head)
            if self.unsent_head:
                self._start_answer()
            for data in doubted.body:
                self._write(data)
            if doubted.ended:
                self.response_end()
            return
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        if self.replayed or self.kept is None:
            self.refuse(gateway.lost_twice() if self.replayed else gateway.broken_off())
        else:
            self.replayed = True
            self.mark("lost")
            gateway.counts.replayed += 1
            gateway.resume(self)

    def _begin(self, head: ResponseHead) -> None:
        self.status = head.status
        lines = [b"HTTP/1.1 %d " % head.status, head.reason, b"\r\n", head.fields]
        if head.framing is Framing.CHUNKED and not self.is_head:
            self.whole_events = head.is_sse
            if self.http11:
                lines.append(b"Transfer-Encoding: chunked\r\n")
            else:
                self.dechunker = Dechunker()
                self.ends_by_close = True
        elif head.framing is Framing.CLOSE and not self.is_head:
            self.ends_by_close = True
        if not head.has_request_id:
            lines += (b"X-Request-Id: ", self.request_id, b"\r\n")
        if self.ends_by_close or (self.expects_continue and not self.request_complete) or self.protocol.gateway.closing:
            self.keep_alive = False
        lines.append(b"\r\n" if self.keep_alive else b"Connection: close\r\n\r\n")
        self.unsent_head = b"".join(lines)
        if head.framing is not Framing.LENGTH or self.is_head:
            self._start_answer()

    def _start_answer(self) -> None:
        """From its first byte on an answer can't be taken back, and the request is not sent again."""
        self.response_started = True
        self.kept = None
        if not self.whole_events:  # vLLM sends a stream's head at once: its first token is what is waited for
            self._count(self.status)
        self.streaming = self.whole_events and self.dechunker is None
        self.protocol.transport.write(self.unsent_head)
        self.unsent_head = b""

    def believe(self) -> None:
        """The engine that gave the answer lives."""
        if self.doubted is not None:
            self.doubted.alive = True
        self.settle()

    def response_data(self, data: bytes) -> None:
        if self.streaming and not self.partial and not self.connection.in_chunk and data.endswith(EVENT_ENDS):  # type: ignore[union-attr]  # there is one while it streams
            self.torn = False
            self.latest = data
            protocol = self.protocol
            counts, now = protocol.counts, protocol.loop.time()
            size = len(data)
            counts.sent += size
            self.sent += size
            if self.read_at:
                counts.gap(now - self.read_at)
                self.read_at = now
            else:
                self._count(self.status)
            protocol.transport.write(data)
            return
        if self.doubted is not None:
            self.doubted.body.append(data)
            return
        if self.unsent_head:  # a whole answer's head waits for its body: vLLM may die between the two
            self._start_answer()
        if self.whole_events:
            if self.partial:
                data = self.partial + data
                self.partial = b""
            assert self.connection is not None
            self.torn = self.connection.in_chunk or not data.endswith(EVENT_ENDS)
            if self.torn and len(data) < PARTIAL_LIMIT:
                # Half an event is of no use to the client, and a stream that stops there could not be ended well.
                self.partial = data
                self.torn = False
                return
            self.latest = data
            if not self.read_at:
                self._count(self.status)
        elif self.frames is not None:
            self.frames.feed(data)
        self._write(data)

    def _write(self, data: bytes) -> None:
        size = len(data)
        self.protocol.counts.sent += size
        self.sent += size
        self.protocol.transport.write(data if self.dechunker is None else self.dechunker.feed(data))

    def response_end(self) -> None:
        self.connection = None
        if self.doubted is not None:
            self.doubted.ended = True
            return
        if self.unsent_head:
            self._start_answer()
        if self.partial:
            self._write(self.partial)
        if self.frames is not None and not self.frames.closed:
            self._close_frames(INTERNAL_ERROR, "The engine closed the connection.")
        self._complete()

    def response_lost(self, error: UpstreamError) -> None:
        connection, self.connection = self.connection, None
        if self.disconnected or self.response_complete:
            return
        self.doubted = None
        self.unsent_head = b""
        gateway = self.protocol.gateway
        if self.response_started:
            gateway.log.warning("%s: an answer is cut", error, extra=self.named)
            self._break_off(gateway.broken_off())
        elif (
            isinstance(error, Unanswered)
            and connection is not None
            and connection.reused
            and not self.resent
            and self.kept is not None
            and gateway.generation == self.generation  # else it died, maybe of this request
        ):  # vLLM closed the idle connection while this request was on its way into it
            self.resent = True
            gateway.upstream.send(self, fresh=True)
        elif isinstance(error, NotConnected):
            gateway.hold_lost(self, error)  # nothing was sent: this is no second try
        elif isinstance(error, Disconnected) and not self.replayed and self.kept is not None:
            self.replayed = True
            self.mark("lost")
            gateway.counts.replayed += 1
            gateway.hold_lost(self, error)
        else:
            gateway.log.warning("%s", error, extra=self.named)
            self.refuse(gateway.unanswered(error))

    def response_switched(self, head: ResponseHead, data: bytes) -> None:
        """vLLM opened the WebSocket; `data` may hold its first frames."""
        self.status = head.status
        self.response_started = True
        self.frames = Frames()
        self.frames.feed(data)
        self._count(head.status)
        self.kept = None
        self.protocol.tunnel = self
        lines = (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", head.fields)
        self.protocol.transport.write(b"".join((*lines, b"X-Request-Id: ", self.request_id, b"\r\n\r\n", data)))
        for early in self.early:
            self.tunnel_data(early)
        self.early = ()
        self.protocol.flow.resume_reading()

    def tunnel_data(self, data: bytes) -> None:
        """From the client: frames, or what it sent before it knew whether there would be any."""
        if self.frames is None:
            self.early = (*self.early, data)
            self.protocol.flow.pause_reading()  # it is to wait
        elif self.connection is not None:
            self.connection.write(data)

    def _close_frames(self, code: int, reason: str) -> None:
        """Ends a WebSocket that vLLM did not end, where that can be said: within a frame it were part of a message."""
        assert self.frames is not None
        if self.frames.between:
            self.protocol.transport.write(close_frame(code, reason))
            self.body_left = -1  # what the client still sends, its own close among it, is read and thrown away

    def pause_request(self) -> None:
        if not self.request_complete or self.frames is not None:
            self.protocol.flow.pause_reading()

    def resume_request(self) -> None:
        self.protocol.flow.resume_reading()

    # From the cache, or with others from one generation

    def shared_head(self, status: int, head: bytes, more: bytes, *, events: bool) -> None:
        """`head` without its empty line and what is this client's own; `more` lines stand beside it."""
        self.status, self.response_started, self.whole_events = status, True, events
        if self.protocol.gateway.closing or self.ends_by_close:
            self.keep_alive = False
        end = b"\r\n\r\n" if self.keep_alive else b"\r\nConnection: close\r\n\r\n"
        self.protocol.transport.write(b"".join((head, more, b"X-Request-Id: ", self.request_id, end)))

    def shared_data(self, data: bytes) -> None:
        """Of a stream, whole events."""
        if not self.read_at:
            self._count(self.status)
        elif self.whole_events:
            now = self.protocol.loop.time()
            self.protocol.counts.gap(now - self.read_at)
            self.read_at = now
        self.latest = data
        self._write(data)

    def shared_end(self, source: Exchange | None = None) -> None:
        """`source` produced the answer: what it went through, this one did."""
        self.connection = None
        if source is not None:
            self.marks, self.replayed, self.cut = source.marks, source.replayed, source.cut
        self._complete()

    def shared_cut(self, source: Exchange) -> None:
        self.marks, self.replayed, self.cut = source.marks, source.replayed, source.cut
        self._drop()
        self.protocol.transport.close()

    # Our own answer

    def refuse(self, refusal: Refusal) -> None:
        self.status, self.cut = refusal.status, refusal.code or ""
        self._count(refusal.status, at_once=True)
        head, body = refusal.head_and_body(self.path, self.request_id)
        self.sent = len(body)
        gateway = self.protocol.gateway
        if (self.expects_continue and not self.request_complete) or gateway.closing or self.body_left < 0:
            self.keep_alive = False
        end = b"\r\n" if self.keep_alive else b"Connection: close\r\n\r\n"
        self.protocol.transport.write(head + end + (b"" if self.is_head else body))
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        self._complete()

    def refuse_late(self) -> None:
        """The client does not go on with its body."""
        self.body_left = -1  # nobody waits for the rest
        self.end_now(Refusal(408, "The request's body did not come in time.", code="request_timeout"))

    def end_now(self, refusal: Refusal) -> None:
        """A time limit has passed, or a size: an answer that has not begun is a refusal, one that has is broken off."""
        if not self.response_started:
            self.refuse(refusal)
        else:
            if self.connection is not None:
                self.connection.abort()
                self.connection = None
            self._break_off(refusal)

    def _break_off(self, refusal: Refusal) -> None:
        """Ends an answer that had begun: an event stream by an error event and its proper end, all else by a cut."""
        self.cut = refusal.code or ""
        if self.whole_events and not self.torn:
            rest = _whole_events(self.partial)
            self._write(rest)
            # vLLM may have ended the stream itself, and died before the last chunk.
            events = b"" if (rest or self.latest).endswith(STREAM_ENDS) else refusal.events(self.path)
            if self.dechunker is None:
                events = (b"%x\r\n%b\r\n" % (len(events), events) if events else b"") + b"0\r\n\r\n"
            self.protocol.transport.write(events)
            self._complete()
        elif self.frames is not None:
            self._close_frames(GOING_AWAY if refusal.code == "shutting_down" else INTERNAL_ERROR, refusal.message)
            self._complete()
        else:
            self._drop()
            if self.ends_by_close:
                _reset(self.protocol.transport)
            else:
                self.protocol.transport.close()

    def _complete(self) -> None:
        self.response_complete = True
        protocol = self.protocol
        if self.response_started:
            if not self.read_at:
                self._count(self.status)
            protocol.counts.ended(self.route, self.status, protocol.loop.time() - self.began)
        protocol.gateway.leave(self)
        protocol.answering = None
        if not self.keep_alive:
            if self.body_left < 0:
                protocol.linger()
            else:
                protocol.transport.close()
        protocol.on_response_complete()


def asks_for_websocket(method: bytes, headers: list[tuple[bytes, bytes]]) -> bool:
    return method == b"GET" and any(
        name.lower() == b"upgrade" and value.lower() == b"websocket" for name, value in headers
    )


class _Doubted:
    """An answer that waits for the engine's fate. Error answers are small: nothing bounds them here."""

    __slots__ = ("alive", "body", "ended", "head", "questions")

    def __init__(self, head: ResponseHead) -> None:
        self.head = head
        self.body: list[bytes] = []
        self.ended = False
        self.alive = False  # the engine has said so since
        self.questions = 20  # that it may be asked; one that is not well and does not die is believed


def _whole_events(data: bytes) -> bytes:
    """The chunks at the beginning of `data` up to the last that ends an event; what follows is dropped."""
    at = whole = 0
    while (line := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line].partition(b";")[0], 16)
        end = line + 2 + size + 2
        if size == 0 or end > len(data):
            break
        at = end
        if data[:at].endswith(EVENT_ENDS):
            whole = at
    return data[:whole]


def _reset(transport: asyncio.Transport) -> None:
    """Closes so that the client notices: a body whose end only the close tells must not look complete."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _without(lines: list[bytes], names: frozenset[bytes]) -> list[bytes]:
    """The head's lines without the headers that `Connection` names."""
    first, *others = b"".join(lines).split(b"\r\n")
    kept = [first]
    for line in others:
        if line.partition(b":")[0].lower() not in names:
            kept.append(line)
    return [b"\r\n".join(kept)]
