"""Brings a request to an engine that may die, until its answer begins.

Until then the request is kept (bodies up to 1 MiB), so that it can be sent again: `TABLE` says when, and is the same
table as in docs/faults.md. Once an answer has begun it can't be taken back: the delivery steps out of its way, and only
passes on what is left of the request's body.
"""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING, cast

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from supervisor.gateway.door import BaseDelivery, Door
from supervisor.gateway.errors import Refusal, UpstreamError, refuse
from supervisor.gateway.http1 import Framing, KnownAnswer, Request, ResponseHead
from supervisor.gateway.upstream import Disconnected, NotConnected, Receiver, Sink, Unanswered, UpstreamConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Request bodies of up to so many bytes are kept until the answer begins, so that the request can be sent again.
KEEP_LIMIT = 1024 * 1024
# vLLM's API server answers everything in flight with one of these in the moment its EngineCore dies.
DOUBTED_STATUSES = frozenset({500, 503})
# The latter has no Retry-After: the request is most likely what stops engines.
BROKEN_OFF, LOST_TWICE = refuse("engine_stopped"), refuse("engine_stopped_twice")
log = logging.getLogger("supervisor.gateway")


class State(Enum):
    WAITING = "at the gate, or for a connection"
    SENT = "vLLM has it"
    DOUBTED = "vLLM answered 500 or 503, as it does when its engine has died: does it live?"
    UNSENT = "vLLM took no connection: does it live?"
    LOST = "vLLM closed the connection without an answer: does it live?"
    OVER = "answered, refused, or given up by its client"

    __hash__ = object.__hash__  # Enum's own is written in Python, and the table is looked at for each request


WAITING, SENT, OVER = State.WAITING, State.SENT, State.OVER  # a module's names are found faster than an enum's


class Event(Enum):
    GO = "the engine may have it"
    ANSWER = "an answer begins"
    ERROR = "an answer of 500 or 503 begins"
    STALE = "an idle connection turned out closed, under the same engine, for the first time"
    UNCONNECTED = "no connection, and nothing was sent"
    BROKEN = "the connection broke, and the request is kept, and was not sent again before"
    GONE = "the connection broke, and it can't be sent again; or what came is no HTTP"
    ALIVE = "the engine that had it lives"
    DEAD = "the engine that had it is gone"
    REFUSE = "the gate, a time limit or a size ends it"

    __hash__ = object.__hash__


class Recipient(Receiver):
    """Receives the answer from the delivery, then from vLLM's connection: an `Exchange`, or the cache's `Recording`."""

    door: Door
    request: Request
    request_held: Callable[[str], object]  # called with the engine's state, when the wait for it begins

    @property
    def log_extra(self) -> Mapping[str, str]:
        """Holds the request's id, as the `extra` of a line of log about it."""
        raise NotImplementedError

    def interim_received(self, head: ResponseHead) -> None:
        """Takes the head of a 1xx before the answer, except 101; an implementer that can't pass it on ignores it."""

    def answer_begun(self, head: ResponseHead) -> None:
        """Takes the answer's head, once; `body_received` brings the body, `answer_ended` or `answer_lost` the end."""
        raise NotImplementedError

    def answer_received(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        """Takes a whole answer instead, whose head was seen before; `digits` are its length's. It is the last call."""
        raise NotImplementedError

    def websocket_opened(self, head: ResponseHead, data: bytes) -> None:
        """Called instead when a WebSocket is open; `data` may hold frames, and `body_received` brings others."""
        raise NotImplementedError

    def request_refused(self, refusal: Refusal) -> None:
        """The delivery calls this instead, and last, when there will be no answer of vLLM's."""
        raise NotImplementedError


class Delivery(BaseDelivery, Sink):
    """Delivers one request. `recipient` is told once what comes of it: an answer, a WebSocket, or a refusal."""

    # A new delivery's values stand in the class: what a small request never touches costs it nothing.
    state = State.WAITING
    connection: UpstreamConnection | None = None  # vLLM's, while it carries the request or its answer
    paused = False  # set while the client takes no more: a connection that comes later is paused, too
    admitted = False  # set by the gate, while the request counts among those that run
    generation = -1  # the gate's number of the engine that had the request last
    request_complete = False  # set when all of the request's body is there
    kept_size = 0  # bytes of the body that were kept
    lost_before = False  # set when the engine was lost with the request, until it is sent again
    resent = False  # set when it is sent again because an idle connection turned out closed
    pending: ResponseHead | None = None  # the head of an answer that is doubted, or whose body has not begun
    pending_body: tuple[tuple[bytes, bool], ...] = ()  # of a doubted answer: what `body_received` was called with
    pending_ended = False  # set when a doubted answer is complete
    error: UpstreamError | None = None  # how its connection to vLLM failed last

    def __init__(self, recipient: Recipient, head: bytes) -> None:
        """`head` is the request's as vLLM is to receive it; the body may stand behind it."""
        self.recipient = recipient
        self.gate = recipient.door.gate
        self.kept: list[bytes] | None = [head]
        request = recipient.request
        if request.is_head or request.websocket:
            self.is_head, self.wants_websocket = request.is_head, request.websocket

    @property
    def is_limited(self) -> bool:
        """Tells whether the gate's limit holds. The queue worker limits its jobs; a batch's requests wait in vLLM."""
        return not self.recipient.door.private

    # The client's side calls these: an exchange, or the cache

    def begin(self, complete: bool) -> None:
        self.request_complete = complete
        self.gate.admit(self)

    def write(self, data: bytes) -> None:
        if self.kept is not None:
            self.kept.append(data)
            self.kept_size += len(data)
        if self.connection is not None:
            self.connection.transport.write(data)
            if self.kept_size > KEEP_LIMIT:
                self.kept = None
        elif self.kept_size > HIGH_WATER_LIMIT:
            self.recipient.pause_request()

    def end(self) -> None:
        self.request_complete = True
        if self.connection is not None:
            self.connection.request_sent = True

    def release(self) -> None:
        self.connection = None

    def abort(self) -> None:
        self.state = OVER
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        self.gate.leave(self)
        self.recipient = NO_RECIPIENT  # each has the other, and they would stay until a garbage collection

    def pause(self) -> None:
        self.paused = True
        if self.connection is not None:
            self.connection.pause_response()

    def resume(self) -> None:
        self.paused = False
        if self.connection is not None:
            self.connection.resume_response()

    @property
    def is_working(self) -> bool:  # type: ignore[override]  # a property
        """Tells whether vLLM has all of the request, and nobody keeps it from answering."""
        return self.connection is not None and self.request_complete and not self.connection.response_paused

    @property
    def is_waiting(self) -> bool:  # type: ignore[override]
        return self.state in (State.WAITING, State.UNSENT, State.LOST) and self in self.gate

    @property
    def request_bytes(self) -> bytes:  # type: ignore[override]
        return b"".join(self.kept or ())

    def mark(self, what: str) -> None:
        """Marks it `held` for the engine, `waiting` for its turn, `sent` to vLLM or `lost` there; the last one ends."""
        self.marks = (*self.marks, (what, self.gate.loop.time()))
        if what == "held":  # a ready engine that let the request down is known to be gone in a moment
            state = self.gate.engine.state
            self.recipient.request_held("restarting" if state == "ready" else state)

    # The gate calls these

    def go(self) -> None:
        if self.state is WAITING:  # the table's first row, which each request takes, without looking it up
            self.state = SENT
            self._send(None)
        else:
            self._apply(Event.GO)

    def refuse(self, refusal: Refusal) -> None:
        self._apply(Event.REFUSE, refusal)

    def engine_judged(self, *, alive: bool) -> None:
        self._apply(Event.ALIVE if alive else Event.DEAD)
        if not alive and self.gate.open and self in self.gate:  # it is held for the next engine, which is there already
            self.gate.forget(self)
            self.go()

    # vLLM's connection calls these

    def connected(self, connection: UpstreamConnection) -> None:
        if self.state is not SENT:
            connection.abort()
            return
        self.connection = connection
        self.generation = self.gate.generation
        kept = self.kept
        assert kept is not None  # it is dropped only once there was a connection, and then nothing is sent again
        if self.paused:
            connection.pause_response()
        if self.request_complete:
            connection.request_sent = True
        else:
            self.recipient.resume_request()  # before the write, which may pause it
        connection.transport.write(kept[0] if len(kept) == 1 else b"".join(kept))

    def head_received(self, head: ResponseHead) -> None:
        if head.status < 200:
            self.recipient.interim_received(head)
        elif head.status in DOUBTED_STATUSES:
            self._apply(Event.ERROR, head)
        elif head.framing is Framing.LENGTH and not self.is_head:
            self.pending = head  # a whole answer's head waits for its body: vLLM may die between the two
        else:
            self._apply(Event.ANSWER, head)

    def websocket_opened(self, head: ResponseHead, data: bytes) -> None:
        self._step_aside()
        self.recipient.websocket_opened(head, data)

    def answer_received(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        self.connection = None
        self.state = OVER
        self.recipient.answer_received(known, digits, body)

    def body_received(self, data: bytes, in_chunk: bool) -> None:
        if self.state is State.DOUBTED:  # error answers are small: nothing bounds them here
            self.pending_body += ((data, in_chunk),)
        elif self.pending is not None:
            recipient = self.recipient
            self._apply(Event.ANSWER, self.pending)
            recipient.body_received(data, in_chunk)

    def answer_ended(self) -> None:
        self.connection = None
        if self.state is State.DOUBTED:
            self.pending_ended = True
        elif self.pending is not None:
            recipient = self.recipient
            self._apply(Event.ANSWER, self.pending)
            recipient.answer_ended()

    def answer_lost(self, error: UpstreamError) -> None:
        connection, self.connection = self.connection, None
        self.pending, self.pending_body = None, ()
        self.error = error
        reused = connection is not None and connection.reused
        if isinstance(error, NotConnected):
            event = Event.UNCONNECTED
        elif self.kept is None or not isinstance(error, Disconnected):
            event = Event.GONE
        elif (
            isinstance(error, Unanswered) and reused and not self.resent and self.generation == self.gate.generation
        ):  # vLLM closed it while this request was on its way into it. An engine that died may have died of it.
            event = Event.STALE
        else:
            event = Event.GONE if self.replayed else Event.BROKEN
        self._apply(event)

    def pause_request(self) -> None:
        self.recipient.pause_request()

    def resume_request(self) -> None:
        self.recipient.resume_request()

    # These are the table's actions; each is given the event's subject: a head, a refusal, or nothing

    def _apply(self, event: Event, subject: ResponseHead | Refusal | None = None) -> None:
        row = TABLE.get((self.state, event))
        if row is not None:  # what is not in the table changes nothing
            self.state = row[0]
            row[1](self, subject)

    def _send(self, _: object) -> None:
        if self.marks:
            self.mark("sent")
        if self.lost_before:
            self.lost_before = False
            self.replayed = True
            self.gate.counts.replayed += 1
        self.was_sent = True
        self.generation = self.gate.generation
        self.gate.upstream.send(self, fresh=self.replayed or self.resent or self.error is not None)

    def _send_afresh(self, _: object) -> None:
        self.resent = True
        self.gate.upstream.send(self, fresh=True)

    def _pass_on(self, head: ResponseHead | Refusal | None) -> None:
        assert isinstance(head, ResponseHead)
        self._step_aside()
        self.recipient.answer_begun(head)

    def _step_aside(self) -> None:
        """Leaves what follows of the answer to the recipient alone: from here on the request is not sent again."""
        self.state = State.OVER
        self.kept, self.pending = None, None
        if self.connection is not None:
            self.connection.receiver = self.recipient

    def _suspect(self, head: ResponseHead | Refusal | None) -> None:
        assert isinstance(head, ResponseHead)
        self.pending = head
        self.gate.ask(self)

    def _believe(self, _: object) -> None:
        recipient, head, body, ended = self.recipient, self.pending, self.pending_body, self.pending_ended
        self._pass_on(head)
        for data, in_chunk in body:
            recipient.body_received(data, in_chunk)
        if ended:
            recipient.answer_ended()

    def _replay(self, _: object) -> None:
        """Throws away the answer, which was the dying engine's, and gives the request to the next engine, once."""
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        self.pending, self.pending_body, self.pending_ended = None, (), False
        if self.replayed or self.kept is None:
            self._refuse(LOST_TWICE if self.replayed else BROKEN_OFF)
        else:
            self.lost_before = True
            self.mark("lost")
            self.gate.resume(self)

    def _hold(self, _: object) -> None:
        """Holds a request whose connection failed before an answer: what becomes of it depends on the engine's fate."""
        gate = self.gate
        if gate.engine.is_closed:
            self._refuse(gate.unavailable_refusal())
            return
        if self.state is State.LOST:
            self.lost_before = True
            self.mark("lost")
        log.warning("%s: its request is held", self.error, extra=self.recipient.log_extra)
        gate.hold(self)
        if gate.open:  # the engine's death may not be known yet
            gate.ask(self)

    def _try_again(self, _: object) -> None:
        """Sends the request again: the engine lives, and its socket was overrun."""
        self.gate.forget(self)
        self._send(None)

    def _give_up(self, _: object) -> None:
        """Refuses the request, as vLLM had it and gave no answer: by a 502 if the engine is ready, else by a 503."""
        log.warning("%s", self.error, extra=self.recipient.log_extra)
        if self.gate.engine.ready:
            again = ", for the second time" if self.replayed else ""
            self._refuse(Refusal(502, f"{self.error}{again}.", "engine_no_answer"))
        else:
            self._refuse(LOST_TWICE if self.replayed else self.gate.unavailable_refusal())

    def _refuse(self, refusal: object) -> None:
        assert isinstance(refusal, Refusal)
        recipient = self.recipient
        self.abort()
        recipient.request_refused(refusal)


NO_RECIPIENT = cast("Recipient", None)
_D = Delivery
TABLE: Mapping[tuple[State, Event], tuple[State, Callable[[Delivery, ResponseHead | Refusal | None], None]]] = {
    (State.WAITING, Event.GO): (State.SENT, _D._send),
    (State.SENT, Event.ANSWER): (State.OVER, _D._pass_on),
    (State.SENT, Event.ERROR): (State.DOUBTED, _D._suspect),
    (State.SENT, Event.STALE): (State.SENT, _D._send_afresh),
    (State.SENT, Event.UNCONNECTED): (State.UNSENT, _D._hold),
    (State.SENT, Event.BROKEN): (State.LOST, _D._hold),
    (State.SENT, Event.GONE): (State.OVER, _D._give_up),
    (State.DOUBTED, Event.ALIVE): (State.OVER, _D._believe),
    (State.DOUBTED, Event.DEAD): (State.WAITING, _D._replay),
    # The rest of an error answer is lost with its connection: the engine is asked about the request instead.
    (State.DOUBTED, Event.BROKEN): (State.LOST, _D._hold),
    (State.DOUBTED, Event.GONE): (State.OVER, _D._give_up),
    # Requests that are UNSENT or LOST are held: a new engine lets them go.
    (State.UNSENT, Event.GO): (State.SENT, _D._send),
    (State.UNSENT, Event.ALIVE): (State.SENT, _D._try_again),
    (State.LOST, Event.GO): (State.SENT, _D._send),
    (State.LOST, Event.ALIVE): (State.OVER, _D._give_up),
} | {(state, Event.REFUSE): (State.OVER, _D._refuse) for state in State if state is not State.OVER}
