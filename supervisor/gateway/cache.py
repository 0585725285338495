"""Answers that would come out the same: kept in memory, and shared by those who ask at the same time. Opt-in.

A request is deterministic where its body says so (temperature 0, or a seed), or where its route has no sampling. Its
answer is produced by an exchange of its own, the source, whose client is a `Recording`: holds, a replay when the engine
dies, the end of a broken stream are those of any request. Each client that asked reads the recording from its
beginning, the first one like those that come later. When all of them are gone, so is the source. What is recorded
whole, with status 200, is kept.

Only here a body is parsed, and only where this is switched on.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from supervisor.gateway.counts import Counts
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.policy import ADMIN_ROUTES

if TYPE_CHECKING:
    from supervisor.gateway.app import Gateway

# Whether the body has to ask for it. Of the other routes none is here: /v1/responses keeps a state, audio is a form.
ROUTES = {
    "/v1/chat/completions": True, "/v1/completions": True, "/v1/messages": True,
    "/v1/embeddings": False, "/v2/embed": False, "/pooling": False, "/classify": False, "/score": False,
    "/v1/score": False, "/rerank": False, "/v1/rerank": False, "/v2/rerank": False,
}  # fmt: skip
# An answer that would take more than this share of the memory is not kept.
LARGEST_SHARE = 1 / 4
OVERHEAD = 1000  # bytes that an answer takes beside its own, about
RESULTS = ("hit", "shared", "miss", "bypass")
HEADER = b"X-Supervisor-Cache: "
# Lines of an answer's head that are each client's own.
OWN_LINES = re.compile(rb"(?i)\r\n(?:x-request-id|connection): [^\r]*")
CONTROL = re.compile(rb"(?i)\r\ncache-control:([^\r]*)")
# An engine that dies makes an error event of it, and vLLM's API server ends the stream as if it were well.
FAILED = re.compile(rb"""(?m)^(?:data: ?\{"error"|event: ?error)|"finish_reason": ?"(?:abort|error)\"""")
ORIGIN = re.compile(rb"(?i)\r\norigin:[^\r]*")  # vLLM's answer repeats it


class Answer:
    """One that is there, or comes. `head` has no empty line, and nothing that is a client's own; `body` is as it goes
    over the wire, chunks and all; `events`: of a stream."""

    status = 200
    head = b""
    body: list[bytes]
    events = False
    ended = True
    source: Exchange | None = None  # what produces it
    ends_by_close = False

    def pace(self) -> None:
        """A reader stands still, or goes on."""

    def left(self, reader: Reader) -> None:
        """A reader has all of it, or its client is gone."""


class Kept(Answer):
    """A whole answer."""

    def __init__(self, head: bytes, body: bytes, *, events: bool) -> None:
        self.head = head
        self.body = [body]
        self.events = events
        self.at = time.monotonic()
        self.size = len(head) + len(body) + OVERHEAD


class Cache:
    """`takes(exchange)` for each request that may go on; those that it takes it answers, or sends on itself."""

    routes = frozenset(ROUTES)

    def __init__(self, gateway: Gateway, memory: int) -> None:
        """`memory` in bytes."""
        self.gateway = gateway
        self.memory = memory
        self.largest = memory * LARGEST_SHARE
        self.kept: OrderedDict[bytes, Kept] = OrderedDict()  # the one that was asked for last is the last
        self.size = 0
        self.recordings: dict[bytes, Recording] = {}
        self.results: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        self.epoch = 0  # of the model: an administrator may change it
        gateway.listeners += (self._ended,)

    def takes(self, exchange: Exchange) -> bool:
        """False: it has nothing to do with this one."""
        if (
            exchange.method != b"POST"
            or exchange.route not in ROUTES
            or exchange.chunked
            or exchange.expects_continue
            or not exchange.http11
            or b"no-store" in _control(exchange)
        ):
            return False
        if not exchange.request_complete:
            exchange.undecided = True  # until its body is there
        else:
            self.decide(exchange)
        return True

    def decide(self, exchange: Exchange) -> None:
        """Its body is there: answers it, or sends it on."""
        body = exchange.body
        if not _deterministic(body, asked=ROUTES[exchange.route]):
            self.results["bypass"] += 1
            self.gateway.admit(exchange)
            return
        key = _key(exchange, body)
        control = _control(exchange)
        fresh = b"no-cache" in control or b"max-age=0" in control
        if not fresh and (kept := self.kept.get(key)) is not None:
            self.kept.move_to_end(key)
            self.results["hit"] += 1
            Reader(kept, exchange, b"hit\r\nAge: %d" % (time.monotonic() - kept.at), "cache hit").read()
        elif not fresh and (recording := self.recordings.get(key)) is not None:
            self.results["shared"] += 1
            recording.join(exchange, b"shared", "shared")
        else:
            self.results["miss"] += 1
            recording = self.recordings[key] = Recording(self, key, exchange)
            recording.join(exchange, b"miss", "")
            self.gateway.admit(recording.source)

    def over(self, recording: Recording, kept: Kept | None) -> None:
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

    def _ended(self, exchange: Exchange) -> None:
        admin = exchange.route in ADMIN_ROUTES and exchange.method != b"GET"
        if admin and exchange.verdict is not None and exchange.verdict.refusal is None:
            self.epoch += 1  # other weights, another adapter: who knows
            self.recordings.clear()
            self.kept.clear()
            self.size = 0


class Recording(Answer):
    """An answer as it comes. Stands where its exchange has the connection to a client, and is its transport."""

    is_client = False
    source: Exchange

    def __init__(self, cache: Cache, key: bytes, first: Exchange) -> None:
        self.cache = cache
        self.key = key
        self.epoch = cache.epoch
        self.readers: list[Reader] = []
        self.body = []
        self.size = 0  # of the body, so far
        self.ended = False
        # What an exchange knows of its client's connection
        self.gateway = cache.gateway
        self.loop = cache.gateway.upstream.loop
        self.private = first.protocol.private
        self.counts = Counts()  # nobody's: each client is counted by itself
        self.answering: Exchange | None = None
        self.transport = self.flow = self
        self.source = source = Exchange(self, first.method, first.target, first.path, first.headers)  # type: ignore[arg-type]
        source.verdict = first.verdict
        source.request_id = first.request_id
        source.request_head = first.request_head
        source.kept = first.kept
        source.kept_size = first.kept_size
        source.request_complete = True

    def join(self, exchange: Exchange, result: bytes, note: str) -> None:
        reader = Reader(self, exchange, result, note)
        self.readers.append(reader)
        reader.read()
        self.pace()

    def left(self, reader: Reader) -> None:
        if reader in self.readers:
            self.readers.remove(reader)
        if not self.readers and not self.ended:
            self.ended = True
            self.cache.over(self, None)
            self.source.client_gone()
        self.pace()

    def pace(self) -> None:
        """The source goes on while one of the readers can."""
        connection = self.source.connection
        if connection is None or self.ended:
            return  # not begun, or over
        if all(reader.response_paused for reader in self.readers):
            connection.pause_response()
        else:
            connection.resume_response()

    # A client's protocol, transport and flow

    def write(self, data: bytes) -> None:
        if not self.head:  # the first write has all of the head
            head, _, data = data.partition(b"\r\n\r\n")
            self.status = int(head.split(None, 2)[1])
            if self.status < 200:
                return
            self.head = OWN_LINES.sub(b"", head) + b"\r\n"
            self.events, self.ends_by_close = self.source.whole_events, self.source.ends_by_close
        if data:
            self.body.append(data)
            self.size += len(data)
        for reader in list(self.readers):
            reader.read()
        if self.size > self.cache.largest:
            self._let_go()

    def _let_go(self) -> None:
        """Too large to be kept: nobody joins any more, and what all have read goes."""
        self.cache.over(self, None)
        read = min((reader.at for reader in self.readers), default=len(self.body))
        del self.body[:read]
        for reader in self.readers:
            reader.at -= read

    def on_response_complete(self) -> None:
        self.ended = True
        body = b"".join(self.body)
        whole = self.status == 200 and not self.source.cut and not self.ends_by_close
        whole = whole and self.size == len(body) and FAILED.search(body) is None
        self.cache.over(self, Kept(self.head, body, events=self.events) if whole else None)
        for reader in list(self.readers):
            reader.read()

    def close(self) -> None:
        """Behind a whole answer this is nothing: each client has a connection of its own. Else the answer is cut."""
        if self.source.response_complete:
            return
        self.ended = True
        self.cache.over(self, None)
        for reader in list(self.readers):
            reader.exchange.shared_cut(self.source)

    abort = linger = close

    def get_extra_info(self, name: str) -> None:
        return None

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def address(self) -> bytes:
        return b""


class Reader:
    """One client's way through an answer. Stands where its exchange has the connection to vLLM."""

    in_chunk = False
    reused = False

    def __init__(self, answer: Answer, exchange: Exchange, result: bytes, note: str) -> None:
        self.answer = answer
        self.exchange = exchange
        self.lines = b"%b%b\r\n" % (HEADER, result)
        self.at = 0  # parts of the body that it has
        # It may have stopped reading before this answer, and what it asks for would pile up.
        self.response_paused = exchange.protocol.flow.write_paused
        exchange.kept = None
        exchange.cached = note
        exchange.connection = self  # type: ignore[assignment]  # as much of one as its client's side needs

    def read(self) -> None:
        """Passes on what there is, as far as the client takes it."""
        answer, exchange = self.answer, self.exchange
        if self.response_paused or not answer.head:
            return
        if not exchange.response_started:
            exchange.ends_by_close = answer.ends_by_close
            exchange.shared_head(answer.status, answer.head, self.lines, events=answer.events)
        if self.at < len(answer.body):
            data = b"".join(answer.body[self.at :])
            self.at = len(answer.body)
            exchange.shared_data(data)
        if answer.ended and not self.response_paused and not exchange.response_complete:
            answer.left(self)
            exchange.shared_end(answer.source)

    def pause_response(self) -> None:
        self.response_paused = True
        self.answer.pace()

    def resume_response(self) -> None:
        self.response_paused = False
        self.answer.pace()
        self.read()

    def abort(self) -> None:
        self.answer.left(self)


def _control(exchange: Exchange) -> bytes:
    """What the client says of caches. Of a head that came before there are no headers but those written for vLLM."""
    return b",".join(CONTROL.findall(exchange.head)).lower().replace(b" ", b"")


def _key(exchange: Exchange, body: bytes) -> bytes:
    """The same client (its key), the same path and query, the same bytes.

    Not the same JSON: the order of a tool's properties is part of the prompt.
    """
    client = exchange.verdict.client if exchange.verdict is not None else b""
    origin = b"".join(ORIGIN.findall(exchange.head))
    parts = (b"%d" % exchange.protocol.private, client, exchange.target, origin, body)
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
