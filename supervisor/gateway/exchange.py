"""One relayed request and its answer, as its client sees them.

Heads are rebuilt on both ways (hop-by-hop headers gone, the request id added); bodies pass as they come. A request
body is framed anew, by what the parser saw, so that vLLM never sees two requests where we saw one. Backpressure works
both ways: whoever can't take more pauses the reading of the other side.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from supervisor.gateway.delivery import BROKEN_OFF, Recipient
from supervisor.gateway.door import KEEP, AfterAnswer, Client, Door
from supervisor.gateway.endings import COMMENT_CHUNK, PLAIN, Body, Events, LateAnswer, Tunnel, is_comment
from supervisor.gateway.errors import Refusal, UpstreamError
from supervisor.gateway.http1 import ANSWER_START, WATCHED, Dechunker, Framing, KnownAnswer, Request, ResponseHead
from supervisor.gateway.record import CLIENT_GONE, Record

if TYPE_CHECKING:
    from supervisor.gateway.http1 import Headers

# Of a chunked body: bytes of framing that may stand beside it, and as many again for each of its own bytes. A chunk of
# one byte has five; sixteen thousand of an extension were 15 MB for a body of 1,000 bytes.
FRAMING_LIMIT, FRAMING_SHARE = 64 * 1024, 8
# A request for an event stream, in JSON.
WANTS_EVENTS = re.compile(rb'"stream"\s*:\s*true\b')
EVENTS_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n"
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Bytes of a body that are kept before its turn comes.
EARLY_BODY_LIMIT = 64 * 1024
BODY_TOO_SLOW = Refusal(408, "The request's body did not come in time.", "request_timeout")
log = logging.getLogger("supervisor.gateway")


class Exchange(Record, Recipient):
    """One relayed request. For the delivery it is who gets the answer (`Answered`)."""

    refusal: Refusal | None = None  # of its head, which is read before its turn comes
    head = b""  # of one that came before, as vLLM gets it, with its body
    request_complete = False  # its body is there
    early_body: tuple[bytes, ...] = ()  # its body, as far as it came before its turn
    early_body_size = 0
    discards_request = False  # what still comes of the request: it is read, and thrown away
    chunked_size = 0  # bytes of a chunked body
    framing_size = 0  # bytes of chunks that are not the body's
    body: Body | None = None  # of the answer, once it has begun
    response_complete = False
    keep_alive = True
    ends_by_close = False
    early_frames: tuple[bytes, ...] = ()  # frames that came before the WebSocket was there
    wants_events: bool | None = None  # whether its body asks for a stream, where that was looked at
    commented_at: float | None = None  # when its client, which waits, was last sent a comment
    last_read_at = 0.0  # when a stream's last bytes came
    extra_lines = b""  # that the cache adds to the answer's head

    def __init__(self, client: Client, door: Door, request: Request, request_id: bytes) -> None:
        self.client = client
        self.door = door
        self.request = request
        self.request_id = request_id
        self.began = door.time()
        if not request.keep_alive:
            self.keep_alive = False
        self.body_budget = door.max_body  # bytes that the request's body may still have

    # From the client

    def start(self) -> None:
        """Its turn has come: the answers before it on this connection are complete."""
        door = self.door
        door.exchanges.add(self)
        refusal = self.refusal or door.find_refusal(self)
        if refusal is not None:
            self.request_refused(refusal)
            return
        head = self.head
        if head:
            self.head = b""
        else:
            head = b"%b%b\r\n\r\n" % (self.request.rewritten, self.request_id)
        self.delivery = delivering = door.deliver(self, head)
        if self.early_body:
            for data in self.early_body:
                delivering.write(data)
            self.early_body = ()
        delivering.begin(self.request_complete)

    def data_of_request(self, data: bytes) -> None:
        size = len(data)
        self.door.counts.received += size
        chunked = self.request.chunked
        if chunked:
            self.body_budget -= size
            self.chunked_size += size
            if self.body_budget < 0:
                self._refuse_size()
        if self.response_complete:
            return  # answered early: the rest is read and thrown away, so that the connection stays usable
        if chunked:
            data = b"%x\r\n%b\r\n" % (size, data)
        self._pass_on(data)

    def count_framing(self, size: int) -> None:
        """So many bytes of a chunked body came, its framing included."""
        self.framing_size += size
        if self.framing_size - self.chunked_size > FRAMING_LIMIT + FRAMING_SHARE * self.chunked_size:
            self._refuse_size()

    def _refuse_size(self) -> None:
        """A chunked body tells its size only as it comes. One whose turn has not come is refused when it has."""
        self.discards_request = True
        if self.response_complete:
            self.client.linger()  # refused for another reason: nobody reads all of it to be polite
        elif self in self.door.exchanges:
            self.end_now(self.door.policy.size_refusal())

    def end_of_request(self, trailers: Headers) -> None:
        self.request_complete = True
        if self.response_complete:
            return
        if self.request.chunked:
            fields = b"".join(b"%b: %b\r\n" % field for field in trailers if field[0].lower() not in WATCHED)
            self._pass_on(b"0\r\n%b\r\n" % fields)
        if self.delivery is not None:
            self.delivery.end()

    def _pass_on(self, data: bytes) -> None:
        if self.delivery is not None:
            self.delivery.write(data)
        else:
            self.early_body += (data,)
            self.early_body_size += len(data)
            if self.early_body_size > EARLY_BODY_LIMIT:
                self.client.pause()

    def pass_frames(self, data: bytes) -> None:
        """Frames, or what its client sent before it knew whether there would be any."""
        if isinstance(self.body, Tunnel):
            assert self.delivery is not None
            self.delivery.write(data)
        else:
            self.early_frames += (data,)
            self.client.pause()  # it is to wait

    def pause_answer(self) -> None:
        """Its client takes no more of it for now."""
        if self.delivery is not None:
            self.delivery.pause()

    def resume_answer(self) -> None:
        if self.delivery is not None:
            self.delivery.resume()

    @property
    def awaits_body(self) -> bool:
        """Whether its client is to go on with its body. One that waits for a 100 is not, while it is held."""
        held = self.request.expects_continue and self.delivery is not None and self.delivery.is_waiting
        return not (self.request_complete or held)

    def filler(self) -> bytes:
        """Bytes that mean nothing at this moment (RFC 9110, 15.2, before an answer), and that all clients know. One of
        HTTP/1.0 knows none: it is sent what its answer begins with."""
        if self.body is not None:
            return self.body.filler()
        return CONTINUE if self.request.http11 else ANSWER_START

    def client_gone(self) -> None:
        """Nobody will read the answer: vLLM is told at once, by closing its connection."""
        if self.response_complete:
            return
        self.client_left = True
        if not self.first_at:
            self.status = CLIENT_GONE
        self._leave()

    # From below: Answered

    def interim_received(self, head: ResponseHead) -> None:
        if self.request.http11:
            self.client.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.fields))

    def send_due_comment(self, now: float) -> None:
        """While it is held, or waits for its turn: begins the event stream that its client asked for, and keeps it from
        being closed on by a proxy. What becomes of the request is then told by an event, and no more by a status."""
        delivery, silence = self.delivery, now - (self.commented_at or self.began)
        if silence < self.door.comment_interval or not (self.request_complete and delivery and delivery.is_waiting):
            return
        if self.commented_at is None:
            if self.wants_events is None:  # it is looked at once
                self.wants_events = self.request.http11 and WANTS_EVENTS.search(delivery.request_bytes) is not None
            if not self.wants_events:
                return
            self.body, self.status = Events(), 200
            self.client.write(b"%bX-Request-Id: %b\r\n\r\n" % (EVENTS_HEAD, self.request_id))
        self.commented_at = now
        self.client.write(COMMENT_CHUNK)

    def answer_begun(self, head: ResponseHead) -> None:
        if self.commented_at is not None:
            if not head.is_sse or head.framing is not Framing.CHUNKED:
                self.body = LateAnswer(self._path(), chunked=head.framing is Framing.CHUNKED)
            return
        self.status = head.status
        lines = [b"HTTP/1.1 %d " % head.status, head.reason, b"\r\n", head.fields, self.extra_lines]
        self.body = PLAIN
        if head.framing is Framing.CHUNKED and not self.request.is_head:
            if self.request.http11:
                dechunker = None
                lines.append(b"Transfer-Encoding: chunked\r\n")
            else:
                dechunker = Dechunker()
                self.ends_by_close = True
            if head.is_sse:
                self.body = Events(dechunker)
            elif dechunker is not None:
                self.body = Body(dechunker)
        elif head.framing is Framing.CLOSE and not self.request.is_head:
            self.ends_by_close = True
        if not head.has_request_id:
            lines += (b"X-Request-Id: ", self.request_id, b"\r\n")
        if self.held_state:
            lines.append(_state_line(self.held_state))
        lines.append(b"\r\n" if self._may_keep_alive() else b"Connection: close\r\n\r\n")
        if not isinstance(self.body, Events):  # vLLM sends a stream's head at once: its first event is waited for
            self.first_at = self.door.time()
        self.client.write(b"".join(lines))

    def _path(self) -> bytes:
        """As vLLM sees it, below its --root-path: it tells the dialect of errors."""
        routes = self.door.policy.routes
        return routes.strip_root(self.request.path).encode("latin-1", "replace") if routes.root else self.request.path

    def _may_keep_alive(self) -> bool:
        """Whether the connection may carry another request behind this answer."""
        expects = self.request.expects_continue and not self.request_complete
        if self.ends_by_close or expects or self.discards_request or self.door.gate.closing or self.door.crowd_refusal:
            self.keep_alive = False
        return self.keep_alive

    def answer_received(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        if self.commented_at is not None:
            self.answer_begun(known.head)
            self.body_received(body, False)
            self.answer_ended()
            return
        self.status = known.status
        self.body = PLAIN
        self.sent = size = len(body)
        self.door.counts.sent += size
        self.first_at = self.over_at = self.door.time()
        keeps_alive = self._may_keep_alive()
        end = b"\r\n\r\n" if keeps_alive else b"\r\nConnection: close\r\n\r\n"
        if self.held_state:
            end = b"\r\n" + _state_line(self.held_state) + end[2:]
        self.client.write(b"".join((known.prefix, digits, known.suffix, self.request_id, end, body)))
        self._leave(KEEP if keeps_alive else self._after_answer())

    def body_received(self, data: bytes, in_chunk: bool) -> None:
        body = self.body
        data = body.feed(data, in_chunk)  # type: ignore[union-attr]  # it has begun
        if not data:
            return
        size = len(data)
        self.sent += size
        self.door.counts.sent += size
        self.client.write(data)
        if type(body) is Events and not is_comment(data):
            now = self.door.time()
            if self.last_read_at:
                self.door.counts.observe_gap(now - self.last_read_at)
            else:
                self.first_at = now
            self.last_read_at = now

    def answer_ended(self) -> None:
        assert self.body is not None
        assert self.delivery is not None
        self.delivery.release()
        self._send(self.body.flush())
        if isinstance(self.body, Events) and self.body.failed:
            self.code = "engine_error"
        elif isinstance(self.body, Tunnel):
            self.discards_request = True  # what the client still sends, its own close among it
        self._finish()

    def answer_lost(self, error: UpstreamError) -> None:
        log.warning("%s: an answer is cut", error, extra=self.log_extra)
        self._break_off(BROKEN_OFF)

    def websocket_opened(self, head: ResponseHead, data: bytes) -> None:
        self.status = head.status
        self.body = Tunnel()
        self.body.feed(data, False)
        self.first_at = self.door.time()
        lines = (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", head.fields)
        self.client.write(b"".join((*lines, b"X-Request-Id: ", self.request_id, b"\r\n\r\n", data)))
        self.client.become_tunnel(self)
        early, self.early_frames = self.early_frames, ()
        for frames in early:
            self.pass_frames(frames)
        self.client.resume()

    def request_refused(self, refusal: Refusal) -> None:
        if self.body is not None:
            self._break_off(refusal)
            return
        self.status, self.code, self.is_ours = refusal.status, refusal.code or "", True
        self.first_at = self.over_at = self.door.time()
        extra = self.door.policy.origins.lines(self.request.header(b"origin"))
        if state := self.held_state or (self.door.gate.engine.state if refusal.code == "engine_unavailable" else ""):
            extra += _state_line(state)
        head, body = refusal.head_and_body(self._path(), self.request_id, extra)
        body = b"" if self.request.is_head else body
        self.sent = len(body)
        end = b"\r\n" if self._may_keep_alive() else b"Connection: close\r\n\r\n"
        self.client.write(head + end + body)
        self._finish()

    def pause_request(self) -> None:
        if not self.request_complete or isinstance(self.body, Tunnel):
            self.client.pause()

    def resume_request(self) -> None:
        self.client.resume()

    # Its end

    def refuse_slow_body(self) -> None:
        """The client does not go on with its body."""
        self.discards_request = True
        self.end_now(BODY_TOO_SLOW)

    def end_now(self, refusal: Refusal) -> None:
        """A time limit has passed, or a size: an answer that has not begun is a refusal, one that has is broken off."""
        if self.response_complete:
            return
        if self.body is None:
            self.request_refused(refusal)
        else:
            self._break_off(refusal)

    def _break_off(self, refusal: Refusal) -> None:
        """Ends an answer that had begun: well, where that can be said, and else so that its client notices."""
        assert self.body is not None
        self.code = refusal.code or ""
        ending = self.body.ending(refusal, self._path())
        if ending is None:
            self._leave(AfterAnswer.RESET if self.ends_by_close else AfterAnswer.CLOSE)
            return
        self._send(ending)
        if isinstance(self.body, Tunnel):
            self.discards_request = True
        self._finish()

    def _send(self, data: bytes) -> None:
        if data:
            self.sent += len(data)
            self.door.counts.sent += len(data)
            self.first_at = self.first_at or self.door.time()
            self.client.write(data)

    def _finish(self) -> None:
        self.first_at = self.first_at or self.door.time()  # a stream without an event
        self._leave(self._after_answer())

    def _after_answer(self) -> AfterAnswer:
        if self.keep_alive:
            return AfterAnswer.KEEP
        return AfterAnswer.LINGER if self.discards_request or self.request.has_unknown_end else AfterAnswer.CLOSE

    def _leave(self, after: AfterAnswer | None = None) -> None:
        """Once, for each that has begun. None: its client's connection is gone."""
        self.response_complete = True
        door = self.door
        door.exchanges.discard(self)
        self.over_at = self.over_at or door.time()
        if self.delivery is not None:
            self.delivery.abort()
        for watcher in door.watchers:
            try:
                watcher(self)
            except Exception:  # its fault is not the client's, whose answer is to end well
                log.exception("a watcher of requests failed", extra=self.log_extra)
        if after is not None:
            self.client.answer_done(self, after)


def _state_line(name: str) -> bytes:
    """For clients that want to know why they waited, or have to."""
    return b"X-Supervisor-State: %b\r\n" % name.encode()
