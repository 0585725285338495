"""A client's connection: it answers the requests that reader.py makes of its bytes, and ends what is too slow.

Requests wait here for their turn, so that answers leave in the order in which the requests came.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from supervisor.gateway.door import KEEP, AfterAnswer, Door
from supervisor.gateway.errors import Refusal
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.gate import RETRY_AFTER
from supervisor.gateway.http1 import ANSWER_START, Request
from supervisor.gateway.reader import OWN_BODY_LIMIT, PIPELINED, UNPARSED_LIMIT, RequestReader

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

LINGER = 2.0  # a client that was refused has so many seconds in which it may still send its body, and read why
# A client that has closed its side is looked at after so many seconds: one that is gone has refused our bytes by then.
GONE_KNOWN_AFTER = 0.1
# A half-closed client whose answer is no stream is taken for gone when nothing of it was sent for so many seconds.
GONE_AFTER = 2.0
LEAST_RATE = 100  # a body must bring so many bytes a second, once the client's time for its next bytes has passed
# So many files are kept for our own routes and for vLLM; the log warns of that once in so many seconds.
RESERVED_FILES, WARN_EVERY = 64, 600.0
CROWDED = Refusal(503, "The server has too many connections.", "too_many_connections", RETRY_AFTER)
log = logging.getLogger("supervisor.gateway")
HEAD_TOO_SLOW = Refusal(408, "The request's head did not come in time.", code="request_timeout")


class Clients:
    """Holds all connections, which the gateway looks at each second, and what they have in common."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        is_own: Callable[[bytes], bool],
        most_files: int,
        *,
        timeout: float,
        idle_timeout: float,
    ) -> None:
        """`is_own` tells whether a path is our own. At most `most_files` files may be open. `timeout`: seconds for a
        client's next bytes, or for it to take ours; `idle_timeout`: seconds between its requests."""
        self.loop = loop
        self.is_own = is_own
        self.most_files = most_files
        self.warned_at = -math.inf  # the loop's time of the last warning about files
        self.timeout = timeout
        self.idle_timeout = idle_timeout
        self.connections: set[ClientConnection] = set()
        self.clock = loop.time()  # the loop's time at the last look

    def connection_opened(self, connection: ClientConnection, descriptor: int) -> None:
        """`descriptor` is the lowest that was free. Before the last are taken, idle clients are closed, and new ones
        get our own routes alone: a load balancer that is not answered would end a healthy server."""
        self.connections.add(connection)
        if descriptor < self.most_files - RESERVED_FILES:
            return
        idle = sorted((one for one in self.connections if one.is_idle), key=lambda one: one.active_at)
        for one in idle[:RESERVED_FILES]:
            one.transport.close()
        connection.door = replace(connection.door, crowd_refusal=CROWDED)
        if self.loop.time() - self.warned_at > WARN_EVERY:
            self.warned_at = self.loop.time()
            text = "%d files may be open, and nearly all are: new requests are refused. Raise the limit (ulimit -n)."
            log.warning(text, self.most_files)

    def forget_heads(self) -> None:
        """Makes each connection forget its latest head, whose verdict may differ now that the policy has changed."""
        for connection in self.connections:
            connection.heads.forget()
            for one in connection.waiting:  # their turn is yet to come
                if isinstance(one, Exchange):
                    one.request.verdict = connection.door.policy.judge(one.request)


class ClientConnection(RequestReader):
    """Serves one client's connection. To its exchanges it is a `Client`."""

    def __init__(self, clients: Clients, door: Door, **kwargs: Any) -> None:
        super().__init__(clients, door, **kwargs)
        self.advancing = False  # `_advance` runs, and is called again from within
        self.body_began = 0.0  # the loop's time when the body that arrives was asked for
        self.stuck_at = 0.0  # the loop's time since when the client does not take its answer; 0: it takes it
        self.unsent, self.unsent_at = 0, 0.0  # bytes of answers that the client has not taken, and when that changed
        # An answer and how much of it a half-closed client was sent, and when that changed.
        self.progress: tuple[Exchange | None, int] = None, 0
        self.progress_at = 0.0
        self.ends_by_close = False  # the end of the last answer, which is complete, is only told by the close
        self.held_back = False  # an exchange has paused the reading
        self.half_closed = False  # the client has said its last word, or is gone

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.write = transport.write
        self.address = self.client[0].encode() if self.client else b""
        connection = transport.get_extra_info("socket")
        self.clients.connection_opened(self, connection.fileno() if connection is not None else 0)

    @property
    def is_idle(self) -> bool:
        return self.at_start and self.answering is None and self.incoming is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self.clients.connections.discard(self)
        waiting, self.waiting = self.waiting, deque()
        for request in (self.answering, *waiting):
            if isinstance(request, Exchange):
                request.client_gone()
            elif request is not None:
                request.disconnected = True
                request.message_event.set()
        self.cycle = None  # type: ignore[assignment]  # uvicorn has nothing to end: it was done above
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Returns whether our side stays open: the client closed its own, and listens or is gone: both look alike."""
        nothing_waits = self.answering is None and not self.waiting
        if nothing_waits or not self.at_start or self.lingering or self.tunnel is not None or self.scheme == "https":
            return False  # TLS knows no half of a connection
        if not self.half_closed:
            self.half_closed = True
            self.probe_client()
        return not self.transport.is_closing()

    def probe_client(self) -> None:
        """Sends bytes that mean nothing, and looks later what came back: a client that is gone answers with a reset."""
        if isinstance(self.answering, Exchange):
            nothing = self.answering.filler()
            self.write(nothing)
            if nothing == ANSWER_START:
                self.write = self._write_the_rest
        self.loop.call_later(GONE_KNOWN_AFTER, self._abort_if_gone)

    def _write_the_rest(self, answer: bytes) -> None:
        """Writes an answer without its first bytes, which the probe has sent already."""
        self.write = self.transport.write
        self.write(answer.removeprefix(ANSWER_START))

    def _abort_if_gone(self) -> None:
        if not self.transport.is_closing() and is_gone(self.transport):
            self.transport.abort()

    # What its exchanges call (door.Client), and the order of answers

    def pause(self) -> None:
        self.held_back = True
        self.flow.pause_reading()

    def resume(self) -> None:
        self.held_back = False
        self.flow.resume_reading()
        self.active_at = self.body_began = self.loop.time()
        self.body_read = 0

    def become_tunnel(self, exchange: Exchange) -> None:
        self.tunnel = exchange

    def answer_done(self, exchange: Exchange, after: AfterAnswer) -> None:
        self.answering, self.held_back = None, False
        if after is KEEP:
            self.active_at = self.head_began = self.clients.clock  # also for a head that came meanwhile
            if self.flow.read_paused and not self.unparsed_is_full:
                self.flow.resume_reading()
            if self.waiting or self.unparsed or self.half_closed:
                self._advance()
            return
        self.ends_by_close = exchange.ends_by_close
        self.waiting.clear()  # nobody will answer them, and it is not their client that has left
        if after is AfterAnswer.LINGER:
            self.linger()
        elif after is AfterAnswer.CLOSE:
            self.active_at = self.clients.clock
            self.transport.close()
        else:
            reset(self.transport)

    def on_response_complete(self) -> None:
        """uvicorn's cycle calls this when it is done; it has closed the transport by then, if that is to be closed."""
        answered, self.answering = self.answering, None
        if answered is self.incoming and not self.at_start and self.body_read > OWN_BODY_LIMIT:
            self.linger()
        elif self.flow.read_paused and not self.unparsed_is_full:
            self.flow.resume_reading()
        if self.lingering or self.transport.is_closing():
            self.waiting.clear()  # as in `answer_done`
        self._advance()

    def _advance(self) -> None:
        """Starts the next request as soon as the client takes answers: else what it asks for would pile up here. It is
        a loop and does not call itself, because a thousand requests that are refused may come with one read."""
        if self.advancing:
            return
        self.advancing = True
        try:
            while not (self.lingering or self.transport.is_closing()):
                if self.answering is None and self.waiting and not self.flow.write_paused:
                    self._begin(self.waiting.popleft())
                elif self.unparsed and len(self.waiting) < PIPELINED:
                    self._parse(b"")
                else:
                    break
        finally:
            self.advancing = False
        self.active_at = self.clients.clock
        if self.unparsed_is_full and len(self.unparsed) <= UNPARSED_LIMIT // 2:
            self.unparsed_is_full = False
            if not self.held_back:
                self.flow.resume_reading()
        if self.half_closed and self.answering is None and not self.waiting and not self.lingering:
            self.transport.close()

    def _begin(self, request: Exchange | RequestResponseCycle) -> None:
        self.answering = request
        self.active_at = self.clients.clock
        self.body_began, self.body_read = self.loop.time(), 0
        if isinstance(request, Exchange):
            request.start()
        else:
            super()._start_asgi_task(request, self.app)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """uvicorn calls this to run a cycle that it has made; the cycle waits for its turn instead."""
        self.request_arrived(cycle)

    def request_arrived(self, request: Exchange | RequestResponseCycle) -> None:
        self.incoming = request
        self.waiting.append(request)
        self._advance()

    def linger(self) -> None:
        """Closes our side alone: closing both while the client still sends would reset what it has not read yet."""
        if self.lingering:
            return
        self.lingering = True
        self.unparsed = b""
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck_at = self.loop.time()
        if isinstance(self.answering, Exchange):
            self.answering.pause_answer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stuck_at = 0.0
        if isinstance(self.answering, Exchange):
            self.answering.resume_answer()
        else:
            self._advance()

    def cut(self) -> None:
        """Closes at once, so that an answer that is under way does not look complete."""
        if self.ends_by_close or (isinstance(self.answering, Exchange) and self.answering.ends_by_close):
            reset(self.transport)
        else:
            self.transport.abort()

    # Called each second

    def check_time(self, now: float) -> None:
        """Ends what has waited for the client for too long. `now` is the loop's time."""
        timeout = self.clients.timeout
        unsent = self.transport.get_write_buffer_size()
        if unsent != self.unsent:
            self.unsent, self.unsent_at = unsent, now
        if unsent and now - self.unsent_at > timeout:
            self.cut()  # a close would wait for the client for ever
        if self.transport.is_closing():
            return
        request = self.answering
        if self.half_closed or self.flow.read_paused:
            if is_gone(self.transport):
                self.transport.abort()
                return
            if not self.half_closed and _poll(self.transport) & select.POLLRDHUP:  # the client has closed its side
                self.half_closed = True
                self.probe_client()
            elif self.half_closed and isinstance(request, Exchange) and request.body is not None and not unsent:
                # Within an answer that is no stream the client can't be probed. vLLM makes such an answer at once.
                if self.progress != (request, request.sent):
                    self.progress, self.progress_at = (request, request.sent), now
                elif now - self.progress_at > GONE_AFTER and not request.filler():
                    self.cut()
                    return
        if self.stuck_at and now - self.stuck_at > timeout:
            self.cut()
        elif isinstance(request, Exchange):
            is_reading = request is self.incoming and request.awaits_body and not self.flow.read_paused
            if is_reading and self._body_is_slow(now):
                request.refuse_slow_body()
        elif request is not None:
            pass  # one of our own routes is at work, and does not wait for the client
        elif self.at_start:
            if now - self.active_at > self.clients.idle_timeout:
                self.transport.close()
        elif now - self.head_began > timeout if self.in_head else self._body_is_slow(now):
            self.refuse_without_a_request(HEAD_TOO_SLOW)

    def _body_is_slow(self, now: float) -> bool:
        """Tells whether a body comes too slowly; if it was answered already it is read to its end, but not for ever."""
        timeout = self.clients.timeout
        return now - self.active_at > timeout or now - self.body_began > timeout + self.body_read / LEAST_RATE

    # uvicorn's seams

    def shutdown(self) -> None:
        if self.answering is None:
            self.transport.close()
        else:
            self.answering.keep_alive = False

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        pass  # an unanswered `Upgrade:` is no fault: the request was relayed without it

    def send_400_response(self, msg: str) -> None:
        self.refuse_without_a_request(Refusal(400, msg, code="bad_request"))

    def refuse_without_a_request(self, refusal: Refusal) -> None:
        """Refuses bytes that are no request, or not yet one, or the rest of a request that was well until here."""
        if self.lingering:
            return
        request = self.answering
        if isinstance(request, Exchange) and request is self.incoming and not request.request_complete:
            if request.body is not None:
                self.cut()
            else:
                request.discards_request = True  # nobody knows where its body ends
                request.end_now(refusal)
            return
        if request is not None or self.waiting:
            if isinstance(self.incoming, Exchange) and self.incoming in self.waiting and not self.at_start:
                self.incoming.refusal = self.incoming.request.end_reading(self.incoming.refusal or refusal)
                self.incoming.keep_alive, self.ignores_input, self.at_start = False, True, True
            elif not (self.at_start or self.in_head):
                self.cut()  # an answer is under way: a second one in its midst would corrupt it
            elif not self.ignores_input:  # whole requests are answered, and what follows them is ignored
                self.ignores_input = self.at_start = True
                self.in_head, self.unparsed = False, b""
                (self.waiting[-1] if self.waiting else request).keep_alive = False  # type: ignore[union-attr]  # one of them is
            return
        if not self.at_start and not self.in_head:
            self.linger()  # the rest of a request that was answered early: there is no second answer to it
            return
        self._begin(self._unread_request(refusal))

    def _unread_request(self, refusal: Refusal) -> Exchange:
        """Returns an exchange for the watchers, who count and log: no more is known of its request than was read."""
        method, target = (self.parser.get_method(), self.url) if self.headers else (b"-", b"-")
        request = Request(method, target, target.partition(b"?")[0], [])
        request.verdict = self.door.policy.judge(request)
        exchange = Exchange(self, self.door, request, self.door.new_id())
        exchange.refusal = request.end_reading(refusal)
        exchange.keep_alive = False
        return exchange


def reset(transport: asyncio.Transport) -> None:
    """Closes by a reset, so that the client notices: a body whose end only the close tells must not look complete."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _poll(transport: asyncio.Transport) -> int:
    connection = transport.get_extra_info("socket")
    if connection is None or connection.fileno() < 0:
        return 0
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)
    return sum(events for _, events in poll.poll(0))


def is_gone(transport: asyncio.Transport) -> bool:
    """Tells whether the client has closed the connection both ways. While nothing is read, nothing else shows that."""
    return bool(_poll(transport) & (select.POLLHUP | select.POLLERR))
