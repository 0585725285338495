"""Relays one request and its answer, as its client sees them.

Heads are rebuilt on both ways (hop-by-hop headers go, the request's id is added); bodies pass as they come. A request
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

# A chunked body may have so many bytes of framing, and FRAMING_SHARE more for each byte of its own. A chunk of one byte
# has five of them; sixteen thousand of an extension were 15 MB for a body of 1,000 bytes.
FRAMING_LIMIT, FRAMING_SHARE = 64 * 1024, 8
# The body of a request for an event stream, in JSON, has this in it.
WANTS_EVENTS = re.compile(rb'"stream"\s*:\s*true\b')
EVENTS_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n"
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# So many bytes of a body are kept before the request's turn comes; then the client is read no further.
EARLY_BODY_LIMIT = 64 * 1024
BODY_TOO_SLOW = Refusal(408, "The request's body did not come in time.", "request_timeout")
log = logging.getLogger("supervisor.gateway")


class Exchange(Record, Recipient):
    """Relays one request. For the delivery it is the `Recipient` of the answer."""

    refusal: Refusal | None = None  # why its head is refused, which is read before the request's turn comes
    head = b""  # of a request whose head came before: what vLLM is to receive, its body included
    request_complete = False  # set when all of the request's body is there
    early_body: list[bytes] | None = None  # what came of the body before the request's turn
    early_body_size = 0  # bytes of `early_body`
    discards_request = False  # set where what still comes of the request is read, and thrown away
    chunked_size = 0  # bytes of a chunked body, without its framing
    raw_size = 0  # bytes of a chunked body as it came, its framing included
    body: Body | None = None  # what passes the answer's body, once the answer has begun
    response_complete = False  # set when the exchange is over: its answer has ended, or its client is gone
    keep_alive = True  # whether another request may follow on the connection
    ends_by_close = False  # set where the answer's end is only told by the close
    early_frames: tuple[bytes, ...] = ()  # frames that came before the WebSocket was open
    wants_events: bool | None = None  # whether the body asks for a stream; None until somebody looked
    commented_at: float | None = None  # when the client, which waits, was last sent a comment; None: it was sent none
    last_read_at = 0.0  # when a stream's last bytes came, comments apart; 0: none came
    extra_lines = b""  # header lines that the cache adds to the answer's head

    def __init__(self, client: Client, door: Door, request: Request, request_id: bytes) -> None:
        self.client = client
        self.door = door
        self.request = request
        self.request_id = request_id
        self.began = door.time()
        if not request.keep_alive:
            self.keep_alive = False
        self.body_budget = door.max_body  # bytes that the request's body may still have

    # The client's connection calls these

    def start(self) -> None:
        """Begins, as its turn has come: the answers before it on this connection are complete."""
        door = self.door
        door.exchanges.add(self)
        refusal = self.refusal or door.find_refusal(self)
        if refusal is not None:
            self.request_refused(refusal)
            return
        head = self.head or b"%b%b\r\n\r\n" % (self.request.rewritten, self.request_id)
        if self.head:
            self.head = b""
        self.delivery = delivery = door.deliver(self, head)
        if self.early_body:
            delivery.write(b"".join(self.early_body))
            self.early_body = None
        if self.delivery is delivery:  # else the body is too large for the cache, which has begun another one
            delivery.begin(self.request_complete)
        elif self.request_complete:
            self.delivery.end()

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
            return  # it was answered early: the rest is read and thrown away, so that the connection stays usable
        if chunked:
            data = b"%x\r\n%b\r\n" % (size, data)
        self._pass_on(data)

    def count_framing(self, size: int) -> None:
        """Counts `size` bytes of a chunked body, its framing included, and refuses it where that is too much."""
        self.raw_size += size
        if self.raw_size - self.chunked_size > FRAMING_LIMIT + FRAMING_SHARE * self.chunked_size:
            self._refuse_size()

    def _refuse_size(self) -> None:
        """Refuses a chunked body, whose size shows only as it comes. Before its turn it is refused when that comes."""
        self.discards_request = True
        if self.response_complete:
            self.client.linger()  # it was refused for another reason: nobody reads all of it to be polite
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
            self.early_body = self.early_body or []
            self.early_body.append(data)
            self.early_body_size += len(data)
            if self.early_body_size > EARLY_BODY_LIMIT:
                self.client.pause()

    def pass_frames(self, data: bytes) -> None:
        """Passes frames on, or keeps what the client sent before it knew whether there would be a WebSocket."""
        if isinstance(self.body, Tunnel):
            assert self.delivery is not None
            self.delivery.write(data)
        else:
            self.early_frames += (data,)
            self.client.pause()  # the client is to wait

    def pause_answer(self) -> None:
        """The client takes no more of the answer for now: what vLLM sends is read no further."""
        if self.delivery is not None:
            self.delivery.pause()

    def resume_answer(self) -> None:
        if self.delivery is not None:
            self.delivery.resume()

    @property
    def awaits_body(self) -> bool:
        """Tells whether the client is to go on with its body. One that waits for a 100 is not, while it is held."""
        held = self.request.expects_continue and self.delivery is not None and self.delivery.is_waiting
        return not (self.request_complete or held)

    def filler(self) -> bytes:
        """Returns bytes that mean nothing at this moment (RFC 9110, 15.2, before an answer), and that all clients know.
        A client of HTTP/1.0 knows none: it is sent what its answer begins with."""
        if self.body is not None:
            return self.body.filler()
        return CONTINUE if self.request.http11 else ANSWER_START

    def client_gone(self) -> None:
        """Ends the exchange, as nobody will read the answer: vLLM is told at once, by closing its connection."""
        if self.response_complete:
            return
        self.client_left = True
        if not self.first_at:
            self.status = CLIENT_GONE
        self._leave()

    # The delivery and vLLM's connection call these (`Recipient`); the gateway's clock calls `send_due_comment`

    def interim_received(self, head: ResponseHead) -> None:
        if self.request.http11 and self.body is None:  # behind a comment it would be taken for a chunk
            self.client.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.fields))

    def send_due_comment(self, now: float) -> None:
        """While the request is held, or waits for its turn, this begins the event stream that its client asked for, and
        keeps a proxy from closing it. What becomes of the request is then told by an event, and no more by a status."""
        delivery, silence = self.delivery, now - (self.commented_at or self.began)
        if silence < self.door.comment_interval or not (self.request_complete and delivery and delivery.is_waiting):
            return
        if self.commented_at is None:
            if self.wants_events is None:  # the body is looked at once
                may_get_them = self.request.http11 and self.request.method == b"POST"
                self.wants_events = may_get_them and WANTS_EVENTS.search(delivery.request_bytes) is not None
            if not self.wants_events:
                return
            self.body, self.status = Events(), 200
            extra = self.door.policy.origins.lines(self.request.header(b"origin"))
            self.client.write(b"%b%bX-Request-Id: %b\r\n\r\n" % (EVENTS_HEAD, extra, self.request_id))
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
        if not isinstance(self.body, Events):  # vLLM sends a stream's head at once: the first event is what counts
            self.first_at = self.door.time()
        self.client.write(b"".join(lines))

    def _path(self) -> bytes:
        """Returns the path as vLLM sees it, below its --root-path: it tells the dialect of errors."""
        routes = self.door.policy.routes
        return routes.strip_root(self.request.path).encode("latin-1", "replace") if routes.root else self.request.path

    def _may_keep_alive(self) -> bool:
        """Decides whether the connection may carry another request behind this answer."""
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
        data = body.feed(data, in_chunk)  # type: ignore[union-attr]  # the answer has begun
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
            self.discards_request = True  # what the client still sends is discarded, its own close among it
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
        self.client.write(b"".join((*lines, b"X-Request-Id: ", self.request_id, b"\r\n\r\n")))
        self._send(data)
        self.client.become_tunnel(self)
        early, self.early_frames = b"".join(self.early_frames), ()
        self.client.resume()  # before the frames, which may pause it
        self.pass_frames(early)

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

    # These end the exchange

    def refuse_slow_body(self) -> None:
        """Refuses the request because its client does not go on with the body."""
        self.discards_request = True
        self.end_now(BODY_TOO_SLOW)

    def end_now(self, refusal: Refusal) -> None:
        """Ends the exchange for a time limit or a size: by a refusal, or by breaking off an answer that has begun."""
        if self.response_complete:
            return
        if self.body is None:
            self.request_refused(refusal)
        else:
            self._break_off(refusal)

    def _break_off(self, refusal: Refusal) -> None:
        """Ends an answer that had begun: well, where its form allows that, and else so that the client notices."""
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
        self.first_at = self.first_at or self.door.time()  # a stream may end without an event
        self._leave(self._after_answer())

    def _after_answer(self) -> AfterAnswer:
        if self.keep_alive:
            return AfterAnswer.KEEP
        still_sends = not self.request_complete and (self.request.chunked or self.request.length)
        lingers = still_sends or self.discards_request or self.request.has_unknown_end
        return AfterAnswer.LINGER if lingers else AfterAnswer.CLOSE

    def _leave(self, after: AfterAnswer | None = None) -> None:
        """Called once for each exchange that has begun. `after` is None where the client's connection is gone."""
        self.response_complete = True
        door = self.door
        door.exchanges.discard(self)
        self.over_at = self.over_at or door.time()
        if self.delivery is not None:
            self.delivery.abort()
        for watcher in door.watchers:
            try:
                watcher(self)
            except Exception:  # a watcher's fault is not the client's, whose answer is to end well
                log.exception("a watcher of requests failed", extra=self.log_extra)
        if after is not None:
            self.client.answer_done(self, after)


def _state_line(name: str) -> bytes:
    """Returns a header line for clients that want to know why they waited, or have to wait."""
    return b"X-Supervisor-State: %b\r\n" % name.encode()
