"""Keeps answers in memory that would come out the same; those who ask at the same time share one. It is opt-in.

A request is deterministic where its body says so (temperature 0, or a seed), or where its route has no sampling. Its
answer is asked for by a delivery of its own, for a `Recording`: it is held, and sent again when the engine dies, as any
request is. Each client that asked reads the recording from its beginning, the first one like those that come later;
what they get is what a delivery would have told them. When all of them are gone, so is the delivery. What is recorded
whole, with status 200, is kept.

Only here a body is parsed, and only where this is switched on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from supervisor.gateway.delivery import KEEP_LIMIT, Delivery, Recipient
from supervisor.gateway.door import BaseDelivery
from supervisor.gateway.endings import FAILED
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.http1 import Framing, KnownAnswer, Request, ResponseHead
from supervisor.gateway.policy import ADMIN_ROUTES, CACHED_ROUTES

if TYPE_CHECKING:
    from supervisor.gateway.errors import Refusal, UpstreamError
    from supervisor.gateway.record import Record

# vLLM's answer differs by these headers of a request.
VARYING = frozenset({b"content-type", b"endpoint-load-metrics-format", b"origin", b"x-data-parallel-rank"})
# An answer that would take more than this share of the memory is not kept.
LARGEST_SHARE = 1 / 4
OVERHEAD = 1000  # an answer takes about so many bytes beside its own
RESULTS = {"hit": "cache hit", "shared": "shared", "miss": "", "bypass": ""}  # with the words of the access log
# An exchange is told of its answer by such calls: one of its methods, and what it is called with.
Call = tuple[Any, ...]


class KeptAnswer(NamedTuple):
    """Is an answer that was recorded to its end."""

    calls: tuple[Call, ...]  # they tell it to an exchange
    at: float  # the monotonic time of its end
    size: int  # bytes that it takes


class Cache:
    """Makes the deliveries, by `deliver`: a plain `Delivery` for each request that it has nothing to do with."""

    def __init__(self, new_id: Callable[[], bytes], memory: int) -> None:
        """`memory` is how many bytes all kept answers may take; `new_id` returns the id of a request."""
        self.new_id = new_id
        self.memory = memory
        self.largest = memory * LARGEST_SHARE
        self.kept: OrderedDict[bytes, KeptAnswer] = OrderedDict()  # by key: the one that was asked for last is the last
        self.size = 0  # bytes that the kept answers take
        self.recordings: dict[bytes, Recording] = {}  # by key: those that may be joined, and kept when they are whole
        self.was_changed = False  # whether an administrator has changed an engine's weights or adapters
        self.unsure_engine = -1  # the gate's number of the engine of which nobody knows whether a change is done
        self.results: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))

    def deliver(self, exchange: Exchange, head: bytes) -> BaseDelivery:
        request = exchange.request
        if (
            request.method == b"POST"
            and exchange.verdict.route in CACHED_ROUTES
            and request.http11
            and not (request.chunked or request.expects_continue)
            and b"no-store" not in _cache_control(request)
        ):
            return CacheableRequest(self, exchange, head)
        return Delivery(exchange, head)

    def decide(self, cacheable: CacheableRequest) -> None:
        """Answers a request whose body is there, or sends it on."""
        exchange, body = cacheable.exchange, cacheable.body
        request = exchange.request
        if not _is_deterministic(body, must_ask=CACHED_ROUTES[exchange.verdict.route]):
            self.results["bypass"] += 1
            cacheable.bypass(complete=True)
            return
        # What was changed by hand ends with its engine.
        key = _cache_key(exchange, body, self.was_changed and exchange.door.gate.generation)
        control = _cache_control(request)
        fresh = b"no-cache" in control or b"max-age=0" in control
        if not fresh and (kept := self.kept.get(key)) is not None:
            self.kept.move_to_end(key)
            self._note_result(exchange, "hit", b"Age: %d\r\n" % (time.monotonic() - kept.at))
            cacheable.unread_calls.extend(kept.calls)
            cacheable.catch_up()
        elif not fresh and (recording := self.recordings.get(key)) is not None:
            self._note_result(exchange, "shared")
            recording.join(cacheable)
        else:
            self._note_result(exchange, "miss")
            cacheable.was_sent = True
            # The id is in vLLM's answer, which others may get, too: so it is none that a client made.
            head = request.write_again(b"%d" % len(body), self.new_id(), body)
            recording = self.recordings[key] = Recording(self, key, exchange, head)
            recording.join(cacheable)
            recording.source.begin(True)

    def _note_result(self, exchange: Exchange, result: str, more: bytes = b"") -> None:
        self.results[result] += 1
        exchange.cache_word = RESULTS[result]
        exchange.extra_lines = b"X-Supervisor-Cache: %b\r\n%b" % (result.encode(), more)

    def close_recording(self, recording: Recording, kept: KeptAnswer | None = None) -> None:
        """Lets nobody join a recording any more, which is whole, was given up, or has become too large to be kept."""
        key = recording.key
        if self.recordings.get(key) is not recording:
            return  # somebody asked afresh since, or an administrator changed the model
        del self.recordings[key]
        if kept is None or self.unsure_engine == recording.door.gate.generation:
            return
        if (before := self.kept.pop(key, None)) is not None:
            self.size -= before.size
        self.kept[key] = kept
        self.size += kept.size
        while self.size > self.memory:
            self.size -= self.kept.popitem(last=False)[1].size

    def request_ended(self, record: Record) -> None:
        """Forgets all answers after the use of an admin route: both doors call it with each request, as a watcher."""
        delivery, method = record.delivery, record.request.method
        was_asked = delivery is not None and delivery.was_sent and method != b"GET"
        if record.verdict.route in ADMIN_ROUTES and was_asked:
            has_no_answer = record.client_left or record.is_ours
            self.was_changed, self.unsure_engine = True, record.door.gate.generation if has_no_answer else -1
            self.recordings.clear()  # vLLM may have other weights now, or another adapter
            self.kept.clear()
            self.size = 0


class CacheableRequest(BaseDelivery):
    """Keeps a request's body until all of it is there, then leads its client through a recording."""

    recording: Recording | None = None
    source = BaseDelivery()  # this delivery produces the answer; what it goes through, this one does
    marks = property(attrgetter("source.marks"))
    replayed = property(attrgetter("source.replayed"))
    is_waiting = property(attrgetter("source.is_waiting"))
    request_bytes = property(attrgetter("source.request_bytes"))
    is_working = property(attrgetter("source.is_working"))

    def __init__(self, cache: Cache, exchange: Exchange, head: bytes) -> None:
        self.cache = cache
        self.exchange = exchange
        self.head = head
        self.request_body = bytearray()  # the body, as far as it came
        self.unread_calls: deque[Call] = deque()  # of the answer's calls, those that its exchange has not had
        self.paused = False  # its client takes no more for now

    @property
    def body(self) -> bytes:
        """Returns the request's body, which stands behind its head where that came before."""
        return bytes(self.request_body) or self.head[self.head.find(b"\r\n\r\n") + 4 :]

    def begin(self, complete: bool) -> None:
        if complete:
            self.cache.decide(self)

    def write(self, data: bytes) -> None:
        self.request_body += data
        if len(self.request_body) > KEEP_LIMIT:  # too large to be looked at
            self.bypass(complete=False)

    def end(self) -> None:
        self.cache.decide(self)

    def bypass(self, *, complete: bool) -> None:
        """Delivers the request as it would be without a cache."""
        self.exchange.delivery = delivery = Delivery(self.exchange, self.head)
        if self.request_body:
            delivery.write(bytes(self.request_body))
        delivery.begin(complete)

    def abort(self) -> None:
        if self.recording is not None:
            self.recording.leave(self)

    def pause(self) -> None:
        self.paused = True
        if self.recording is not None:
            self.recording.pace()

    def resume(self) -> None:
        self.paused = False
        if self.recording is not None:
            self.recording.pace()
        self.catch_up()

    def catch_up(self) -> None:
        """Tells the client what there is of the answer, as far as it takes it."""
        while self.unread_calls and not self.paused and not self.exchange.response_complete:
            call, *about = self.unread_calls.popleft()
            call(self.exchange, *about)


class Recording(Recipient):
    """Records an answer as its delivery tells it, and tells each reader the same."""

    held_for = ""  # the engine's state in which the request was held, if it was

    def __init__(self, cache: Cache, key: bytes, first: Exchange, head: bytes) -> None:
        self.cache = cache
        self.key = key
        self.first = first
        self.door, self.request = first.door, first.request
        self.head: ResponseHead | None = None
        self.calls: list[Call] = []  # all that came, while it may be kept
        self.size = OVERHEAD  # bytes that it takes, so far
        self.complete = False
        self.readers: list[CacheableRequest] = []
        self.source = Delivery(self, head)

    @property
    def log_extra(self) -> Mapping[str, str]:
        return self.first.log_extra

    def join(self, reader: CacheableRequest) -> None:
        reader.recording, reader.source = self, self.source
        if self.held_for:
            reader.exchange.request_held(self.held_for)
        reader.unread_calls.extend(self.calls)
        self.readers.append(reader)
        self.pace()
        reader.catch_up()

    def leave(self, reader: CacheableRequest) -> None:
        """Lets a reader go that has all of the answer, or whose client is gone."""
        if reader in self.readers:
            self.readers.remove(reader)
            self.pace()

    def pace(self) -> None:
        """Has the delivery go on while one of the readers can, and ends it with the last of them."""
        if self.complete:
            return
        if not self.readers:
            self._end(Exchange.answer_ended)
        elif all(reader.paused for reader in self.readers):
            self.source.pause()
        else:
            self.source.resume()

    def _tell_readers(self, *call: Any) -> None:
        self.calls.append(call)
        if self.size > self.cache.largest:
            self.cache.close_recording(self)
            self.calls.clear()  # those who have read them need them no more
        for reader in list(self.readers):
            reader.unread_calls.append(call)
            reader.catch_up()

    def _end(self, *call: Any, kept: KeptAnswer | None = None) -> None:
        self.complete = True
        self.cache.close_recording(self, kept)
        self.source.abort()
        self._tell_readers(*call)

    # What its delivery calls (delivery.Recipient)

    def request_held(self, state: str) -> None:
        self.held_for = state
        for reader in self.readers:
            reader.exchange.request_held(state)

    def answer_begun(self, head: ResponseHead) -> None:
        self.head = head.copy_for_others()
        self.size += len(head.fields)
        self._tell_readers(Exchange.answer_begun, self.head)

    def answer_received(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        self.answer_begun(known.head_with_length(digits))
        self.body_received(body, False)
        self.answer_ended()

    def body_received(self, data: bytes, in_chunk: bool) -> None:
        self.size += len(data)
        if data:
            self._tell_readers(Exchange.body_received, data, in_chunk)

    def answer_ended(self) -> None:
        head, body = self.head, b"".join(data for _, data, _ in self.calls[1:])
        assert head is not None
        kept = None
        if head.status == 200 and head.framing is not Framing.CLOSE and FAILED.search(body) is None:
            calls = (Exchange.answer_begun, head), (Exchange.body_received, body, False), (Exchange.answer_ended,)
            kept = KeptAnswer(calls, time.monotonic(), self.size)
        self.source.release()
        self._end(Exchange.answer_ended, kept=kept)

    def answer_lost(self, error: UpstreamError) -> None:
        self._end(Exchange.answer_lost, error)

    def request_refused(self, refusal: Refusal) -> None:
        self._end(Exchange.request_refused, refusal)


def _cache_control(request: Request) -> bytes:
    """Returns what the client says of caches, in lower case and without spaces."""
    values = (value for name, value in request.headers if name.lower() == b"cache-control")
    return b",".join(values).lower().replace(b" ", b"")


def _cache_key(exchange: Exchange, body: bytes, engine: int) -> bytes:
    """Returns a key that is the same for the same client (its key), path, query, headers that matter, and bytes.

    Different bytes of equal JSON have different keys: the order of a tool's properties is part of the prompt.
    """
    request = exchange.request
    varying = sorted((name.lower(), value) for name, value in request.headers if name.lower() in VARYING)
    said = repr((engine, exchange.door.private, exchange.verdict.client, request.target, varying))
    return hashlib.sha256(said.encode() + body).digest()


def _is_deterministic(body: bytes, *, must_ask: bool) -> bool:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False  # vLLM says what is wrong with it
    if not isinstance(content, dict):
        return False
    temperature, seed = content.get("temperature"), content.get("seed")
    return not must_ask or (temperature == 0 and not isinstance(temperature, bool)) or type(seed) is int
