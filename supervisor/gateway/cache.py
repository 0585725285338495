"""Answers that would come out the same: kept in memory, and shared by those who ask at the same time. Opt-in.

A request is deterministic where its body says so (temperature 0, or a seed), or where its route has no sampling. Its
answer is asked for by a delivery of its own, for a `Recording`: holds, a replay when the engine dies are those of any
request. Each client that asked reads the recording from its beginning, the first one like those that come later; what
they get is what a delivery would have told them. When all of them are gone, so is the delivery. What is recorded whole,
with status 200, is kept.

Only here a body is parsed, and only where this is switched on.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from supervisor.gateway.delivery import KEEP_LIMIT, Answered, Delivery
from supervisor.gateway.door import Delivering
from supervisor.gateway.http1 import Framing, KnownAnswer, Request, ResponseHead
from supervisor.gateway.policy import ADMIN_ROUTES, CACHED_ROUTES

if TYPE_CHECKING:
    from supervisor.gateway.errors import Refusal, UpstreamError
    from supervisor.gateway.exchange import Exchange
    from supervisor.gateway.record import Record

# Headers by which vLLM's answer differs.
VARYING = frozenset({b"content-type", b"endpoint-load-metrics-format", b"origin", b"x-data-parallel-rank"})
# An answer that would take more than this share of the memory is not kept.
LARGEST_SHARE = 1 / 4
OVERHEAD = 1000  # bytes that an answer takes beside its own, about
RESULTS = ("hit", "shared", "miss", "bypass")
HEADER = b"X-Supervisor-Cache: "
# An engine that dies makes an error event of it, and vLLM's API server ends the stream as if it were well.
FAILED = re.compile(rb"""(?m)^(?:data: ?\{"error"|event: ?error)|"finish_reason": ?"(?:abort|error)\"""")


class Cache:
    """`deliver` stands where a delivery is made, and makes one for each request that it has nothing to do with."""

    def __init__(self, new_id: Callable[[], bytes], memory: int) -> None:
        """`memory` in bytes."""
        self.new_id = new_id
        self.memory = memory
        self.largest = memory * LARGEST_SHARE
        self.kept: OrderedDict[bytes, Kept] = OrderedDict()  # the one that was asked for last is the last
        self.size = 0
        self.recordings: dict[bytes, Recording] = {}
        self.results: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        self.epoch = 0  # of the model: an administrator may change it

    def deliver(self, exchange: Exchange, head: bytes) -> Delivering:
        request = exchange.request
        if (
            request.method == b"POST"
            and exchange.verdict.route in CACHED_ROUTES
            and request.http11
            and not (request.chunked or request.expects_continue)
            and b"no-store" not in _control(request)
        ):
            return Undecided(self, exchange, head)
        return Delivery(exchange, head)

    def decide(self, asked: Undecided) -> None:
        """Its body is there: answers it, or sends it on."""
        exchange, body = asked.exchange, asked.body
        request = exchange.request
        if not _deterministic(body, asked=CACHED_ROUTES[exchange.verdict.route]):
            self.results["bypass"] += 1
            asked.go_on()
            return
        key = _key(exchange, body)
        control = _control(request)
        fresh = b"no-cache" in control or b"max-age=0" in control
        if not fresh and (kept := self.kept.get(key)) is not None:
            self.kept.move_to_end(key)
            self.results["hit"] += 1
            exchange.cached = "cache hit"
            Reader(kept, exchange, b"hit\r\nAge: %d" % (time.monotonic() - kept.at)).read()
        elif not fresh and (recording := self.recordings.get(key)) is not None:
            self.results["shared"] += 1
            exchange.cached = "shared"
            recording.join(exchange, b"shared")
        else:
            self.results["miss"] += 1
            # Its id is in vLLM's answer, and may come to others: so it is none that a client made.
            head = request.again(b"%d" % len(body), self.new_id(), body)
            recording = self.recordings[key] = Recording(self, key, exchange, head)
            recording.join(exchange, b"miss")
            recording.source.begin(True)

    def over(self, recording: Recording, kept: Kept | None = None) -> None:
        """A recording is whole, or was given up."""
        if self.recordings.get(recording.key) is recording:
            del self.recordings[recording.key]
        if kept is None or recording.epoch != self.epoch or kept.size > self.largest:
            return
        self._forget(recording.key)
        self.kept[recording.key] = kept
        self.size += kept.size
        while self.size > self.memory:
            self._forget(next(iter(self.kept)))

    def _forget(self, key: bytes) -> None:
        if (before := self.kept.pop(key, None)) is not None:
            self.size -= before.size

    def ended(self, record: Record) -> None:
        """A watcher: of what an administrator asks for."""
        verdict = record.verdict
        if verdict.route in ADMIN_ROUTES and record.request.method != b"GET" and verdict.refusal is None:
            self.epoch += 1  # other weights, another adapter: who knows
            self.recordings.clear()
            self.kept.clear()
            self.size = 0


class Answer:
    """One that is there, or comes: its head, and the reads of its body as they came, chunks and all."""

    head: ResponseHead | None = None
    parts: list[tuple[bytes, bool]]
    complete = True
    lost_by: UpstreamError | None = None
    source: Delivering = Delivering()  # what produces it

    def pace(self) -> None: ...  # a reader stands still, or goes on

    def left(self, reader: Reader) -> None: ...  # it has all of it, or its client is gone


class Kept(Answer):
    """A whole answer."""

    def __init__(self, head: ResponseHead, body: bytes) -> None:
        self.head = head
        self.parts = [(body, False)] if body else []
        self.at = time.monotonic()
        self.size = len(head.fields) + len(body) + OVERHEAD


class Recording(Answer, Answered):
    """An answer as it comes. For its delivery it is who gets it (`Answered`)."""

    source: Delivery

    def __init__(self, cache: Cache, key: bytes, first: Exchange, head: bytes) -> None:
        self.cache = cache
        self.key = key
        self.epoch = cache.epoch
        self.first = first
        self.readers: list[Reader] = []
        self.parts = []
        self.size = 0  # of the body, so far
        self.complete = False
        self.door = first.door
        self.request = first.request
        self.source = Delivery(self, head)

    @property
    def named(self) -> Mapping[str, str]:
        return self.first.named

    def join(self, exchange: Exchange, result: bytes) -> None:
        reader = Reader(self, exchange, result)
        self.readers.append(reader)
        reader.read()

    def left(self, reader: Reader) -> None:
        if reader not in self.readers:
            return
        self.readers.remove(reader)
        if not self.readers and not self.complete:
            self.complete = True
            self.cache.over(self)
            self.source.abort()
        else:
            self.pace()

    def _go_on(self) -> None:
        for reader in list(self.readers):
            reader.read()

    def pace(self) -> None:
        """It goes on while one of the readers can."""
        if not self.complete and self.readers:
            if all(reader.paused for reader in self.readers):
                self.source.pause()
            else:
                self.source.resume()

    # Answered

    def answer(self, head: ResponseHead) -> None:
        self.head = head.for_others()
        self._go_on()

    def whole(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        self.answer(known.with_length(digits))
        self.data(body, False)
        self.ended()

    def data(self, data: bytes, in_chunk: bool) -> None:
        if data:
            self.parts.append((data, in_chunk))
            self.size += len(data)
        self._go_on()
        if self.size > self.cache.largest:
            self._let_go()

    def _let_go(self) -> None:
        """Too large to be kept: nobody joins any more, and what all have read goes."""
        self.cache.over(self)
        read = min((reader.at for reader in self.readers), default=len(self.parts))
        del self.parts[:read]
        for reader in self.readers:
            reader.at -= read

    def ended(self) -> None:
        self.complete = True
        body = b"".join(data for data, _ in self.parts)
        head = self.head
        assert head is not None
        is_whole = head.status == 200 and head.framing is not Framing.CLOSE and self.size == len(body)
        self.cache.over(self, Kept(head, body) if is_whole and FAILED.search(body) is None else None)
        self.source.release()
        self.source.abort()
        self._go_on()

    def lost(self, error: UpstreamError) -> None:
        self._give_up()
        self.lost_by = error
        self._go_on()

    def refused(self, refusal: Refusal) -> None:
        self._give_up()
        for reader in list(self.readers):
            reader.exchange.refused(refusal)

    def _give_up(self) -> None:
        self.complete = True
        self.cache.over(self)
        self.source.release()
        self.source.abort()


class Reader(Delivering):
    """One client's way through an answer. For its exchange it is a `Delivering`."""

    def __init__(self, answer: Answer, exchange: Exchange, result: bytes) -> None:
        self.answer = answer
        self.exchange = exchange
        self.went = result == b"miss"
        self.at, self.paused = 0, False  # parts of the body that it has; whether its client takes no more for now
        exchange.delivering = self
        exchange.more_lines = b"%b%b\r\n" % (HEADER, result)

    def read(self) -> None:
        """Passes on what there is, as far as the client takes it."""
        answer, exchange = self.answer, self.exchange
        if answer.head is None or exchange.response_complete:
            return
        if exchange.body is None:
            exchange.answer(answer.head)
        while self.at < len(answer.parts) and not self.paused:
            data, in_chunk = answer.parts[self.at]
            self.at += 1
            exchange.data(data, in_chunk)
        if answer.complete and self.at == len(answer.parts) and not self.paused:
            if answer.lost_by is None:
                exchange.ended()
            else:
                exchange.lost(answer.lost_by)

    @property
    def marks(self) -> tuple[tuple[str, float], ...]:  # type: ignore[override]
        """What its source went through, it did."""
        return self.answer.source.marks

    @property
    def replayed(self) -> bool:  # type: ignore[override]
        return self.answer.source.replayed

    @property
    def waits(self) -> bool:  # type: ignore[override]
        return self.answer.source.waits

    @property
    def content(self) -> bytes:  # type: ignore[override]
        return self.answer.source.content

    @property
    def working(self) -> bool:  # type: ignore[override]
        return self.answer.source.working

    def abort(self) -> None:
        self.answer.left(self)

    def pause(self) -> None:
        self.paused = True
        self.answer.pace()

    def resume(self) -> None:
        self.paused = False
        self.answer.pace()
        self.read()


class Undecided(Delivering):
    """A request whose body is not there yet. For its exchange it is a `Delivering`, until there is another."""

    def __init__(self, cache: Cache, exchange: Exchange, head: bytes) -> None:
        self.cache = cache
        self.exchange = exchange
        self.head = head
        self.parts: list[bytes] = []
        self.size = 0
        self.begun = self.complete = False

    @property
    def body(self) -> bytes:
        """It stands with a head that came before."""
        return b"".join(self.parts) or self.head[self.head.find(b"\r\n\r\n") + 4 :]

    def begin(self, complete: bool) -> None:
        self.begun, self.complete = True, complete
        if complete:
            self.cache.decide(self)

    def write(self, data: bytes) -> None:
        self.parts.append(data)
        self.size += len(data)
        if self.begun and self.size > KEEP_LIMIT:  # too large to be looked at
            self.go_on()

    def end(self) -> None:
        self.complete = True
        if self.begun:
            self.cache.decide(self)

    def go_on(self) -> None:
        exchange = self.exchange
        delivery = Delivery(exchange, self.head)
        exchange.delivering = delivery
        for data in self.parts:
            delivery.write(data)
        delivery.begin(self.complete)

    def abort(self) -> None:
        self.begun = False


def _control(request: Request) -> bytes:
    """What the client says of caches."""
    return (
        b",".join(value for name, value in request.headers if name.lower() == b"cache-control")
        .lower()
        .replace(b" ", b"")
    )


def _key(exchange: Exchange, body: bytes) -> bytes:
    """The same client (its key), the same path and query, the same headers that matter, the same bytes.

    Not the same JSON: the order of a tool's properties is part of the prompt.
    """
    headers = sorted((name.lower(), value) for name, value in exchange.request.headers if name.lower() in VARYING)
    fields = [part for field in headers for part in field]
    parts = (b"%d" % exchange.door.private, exchange.verdict.client, exchange.request.target, *fields, body)
    return hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).digest()


def _deterministic(body: bytes, *, asked: bool) -> bool:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False  # vLLM says what is wrong with it
    if not isinstance(content, dict):
        return False
    if not asked:
        return True
    temperature, seed = content.get("temperature"), content.get("seed")
    return (temperature == 0 and not isinstance(temperature, bool)) or type(seed) is int
