"""Any order of anything: clients, an engine, the clock and a signal, and what holds whatever they do."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.gateway.messages import Answer
from tests.gateway.transport import HIGH_WATER, READ_SIZE
from tests.gateway.world import DONE, STREAM_HEAD, ScriptedClient, ScriptedRequest, World, chunk

CLIENTS = 4
PATIENCE = 10.0
NOTICED = 4.5  # seconds in which a client's end is known, unless more than one read lies before it
KEPT = 1024 * 1024  # bytes of a request that are kept, so that it can be sent again
NUMBER = re.compile(rb"n=(\d+)")
# What a client that says no more is asked by, in the midst of a stream, whether it is there.
COMMENT = re.compile(rb"(?:^|(?<=\n\n)):\n\n")
STATUSES = frozenset({101, 200, 204, 400, 404, 408, 413, 429, 500, 502, 503, 504})
# Refused before there was a request to tell of.
NO_REQUEST = frozenset({400, 408})
WEBSOCKET = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
KINDS = ["plain"] * 9 + ["chunked", "large", "too large", "expects", "head", "ours", "closed", "websocket", "http/1.0"]
KINDS += ["garbage"]
LAST = frozenset({"websocket", "http/1.0", "garbage"})

which = st.integers(0, 20)  # of those that there are, counted round
share = st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1, 0.001])  # of what is to be sent


Thing = TypeVar("Thing")


class Caller:
    """A client and what it has yet to send."""

    def __init__(self, client: ScriptedClient) -> None:
        self.client = client
        self.unsent = b""
        self.here = True  # and may send
        self.spoiled = False  # what it sends further is no request
        self.left_at = math.inf
        self.sent = 0  # bytes

    @property
    def open(self) -> bool:
        return self.here and not self.client.closed

    def push(self, part: float) -> None:
        size = max(1, int(len(self.unsent) * part))
        now, self.unsent = self.unsent[:size], self.unsent[size:]
        self.sent += len(now)
        self.client.sends(now)


class Reply:
    """What vLLM answers to one request: `events` of a stream, or one body."""

    def __init__(self, request: ScriptedRequest) -> None:
        self.request = request
        found = NUMBER.search(request.target)
        assert found is not None, request.target
        self.number = found[1]
        self.kind = ""  # once there is an answer: length, stream, close, tunnel, garbage
        self.status = 200
        self.events: list[bytes] = []
        self.unsent = b""
        self.finished = False

    @property
    def body(self) -> bytes:
        return b"".join(self.events)

    @property
    def open(self) -> bool:
        return not (self.over or self.request.gone or self.request.connection.transport.far_ended)

    @property
    def over(self) -> bool:
        return self.finished and not self.unsent

    def is_all(self, body: bytes) -> bool:
        """Whether an answer of this body is complete, by all that its reader can know."""
        if self.kind != "close":  # a stream's last chunk is not missed
            return self.finished and body == self.body
        closed = self.request.connection.transport
        return closed.far_ended and closed.far_error is None and body == self.body[: len(self.body) - len(self.unsent)]

    def push(self, data: bytes, part: float) -> None:
        self.unsent += data
        size = max(1, int(len(self.unsent) * part))
        now, self.unsent = self.unsent[:size], self.unsent[size:]
        if now:
            self.request.sends(now)


def is_unanswered(reply: Reply) -> bool:
    return not reply.kind


def is_streaming(reply: Reply) -> bool:
    return reply.kind == "stream" and not reply.finished


def has_more(reply: Reply) -> bool:
    return bool(reply.unsent)


def pick(found: list[Thing], number: int) -> Thing:
    return found[number % len(found)]


class Traffic(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[Caller] = []
        self.replies: list[Reply] = []
        self.numbers = 0
        self.sound = True  # else what fails at the end says nothing new

    @initialize(state=st.sampled_from(["ready", "ready", "ready", "starting"]), limit=st.sampled_from([None, None, 2]))
    def begins(self, state: str, limit: int | None) -> None:
        self.world = World(
            engine=state, client_timeout=10, keep_alive=20, hold_timeout=40, request_timeout=60, max_body=200_000,
            limit=limit, waiting=2,
        )  # fmt: skip
        self.world.__enter__()

    # Clients

    @property
    def open_callers(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.open]

    def one_that_asks(self, number: int) -> Caller:
        found = [caller for caller in self.open_callers if not caller.spoiled]
        if number % CLIENTS < len(found):
            return found[number % CLIENTS]
        self.callers.append(Caller(self.world.client()))
        return self.callers[-1]

    def request(self, kind: str) -> bytes:
        self.numbers += 1
        target = f"/v1/completions?n={self.numbers}"
        head = f"POST {target} HTTP/1.1\r\nHost: x\r\n"
        if kind == "chunked":
            return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk(b"abc") * 3 + b"0\r\n\r\n"
        if kind == "expects":
            return f"{head}Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc".encode()
        if kind == "http/1.0":
            return f"POST {target} HTTP/1.0\r\nContent-Length: 2\r\n\r\n{{}}".encode()
        if kind == "head":
            return f"HEAD /v1/models?n={self.numbers} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        if kind in ("ours", "closed"):
            path = "/ping" if kind == "ours" else "/no/route"
            return f"GET {path}?n={self.numbers} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        if kind == "websocket":
            return f"GET /v1/realtime?n={self.numbers} HTTP/1.1\r\nHost: x\r\n{WEBSOCKET}\r\n".encode()
        if kind == "garbage":
            return b"\x16\x03\x01 \r\n\r\n"
        body = b"x" * {"plain": 20, "large": 90_000, "too large": 200_001}[kind]
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    @rule(number=which, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=10), part=share)
    def a_client_asks(self, number: int, kinds: list[str], part: float) -> None:
        caller = self.one_that_asks(number)
        for kind in kinds:
            caller.unsent += self.request(kind)
            if kind in LAST:
                caller.spoiled = True
                break
        caller.push(part)

    @rule(number=which, part=share)
    def a_client_goes_on(self, number: int, part: float) -> None:
        found = [caller for caller in self.open_callers if caller.unsent or caller.spoiled]
        if found:
            caller = pick(found, number)
            caller.unsent = caller.unsent or b"what is behind its last request"
            caller.push(part)

    @rule(number=which, size=st.sampled_from([0, 0, 1, 5_000, 100_000, None, None, None]))
    def a_client_reads(self, number: int, size: int | None) -> None:
        """So much, and nothing more for now; None: all, and what comes from now on."""
        if self.open_callers:
            pick(self.open_callers, number).client.reads(size)

    @rule(number=which, how=st.sampled_from(["leaves", "half_closes", "breaks"]))
    def a_client_goes(self, number: int, how: str) -> None:
        if not self.open_callers:
            return
        caller = pick(self.open_callers, number)
        caller.here = False
        if how != "half_closes":
            caller.left_at = self.world.now
        getattr(caller.client, how)()

    # The engine

    def open_replies(self, fit: Callable[[Reply], object] = bool) -> list[Reply]:
        while self.world.engine.waits:
            self.replies.append(Reply(self.world.engine.request()))
        return [reply for reply in self.replies if reply.open and fit(reply)]

    def there_is_something_to_answer(self, number: int) -> None:
        if self.world.stopping is None and not (self.world.engine.alive and self.world.view.ready):
            self.world.engine_is("ready")
        if not self.open_replies(is_unanswered):
            caller = self.one_that_asks(number)
            caller.unsent += self.request("plain")
            caller.push(1.0)

    @rule(
        number=which,
        kind=st.sampled_from(["stream", "stream", "stream", "length", "length", "close", "garbage"]),
        size=st.sampled_from([0, 20, 20, 100_000, 300_000]),
        status=st.sampled_from([200, 200, 200, 500, 503]),
        part=share,
    )
    def vllm_begins_an_answer(self, number: int, kind: str, size: int, status: int, part: float) -> None:
        self.there_is_something_to_answer(number)
        found = self.open_replies(is_unanswered)
        if not found:
            return
        reply = pick(found, number)
        reply.kind = kind
        if reply.request.header("upgrade") is not None:
            reply.kind = "tunnel"
            reply.request.switches()
            reply.push(b"\x81\x02hi", 1.0)
        elif kind == "stream":
            reply.push(STREAM_HEAD, part)
            reply.finished = reply.request.method == b"HEAD"
        elif kind == "garbage":
            reply.push(b"SSH-2.0 \r\n\r\n", part)
            reply.finished = True
        else:
            reply.finished = kind == "length"
            reply.events.append(b"n=%b " % reply.number + b"x" * size)
            length = b"content-length: %d\r\n" % len(reply.body) if kind == "length" else b""
            body = b"" if reply.request.method == b"HEAD" else reply.body
            reply.push(b"HTTP/1.1 %d Reason\r\n%b\r\n%b" % (status, length, body), part)

    @rule(
        number=which, sizes=st.lists(st.sampled_from([0, 20, 20, 70_000, 150_000]), min_size=1, max_size=3), part=share
    )
    def events_come(self, number: int, sizes: list[int], part: float) -> None:
        if found := self.open_replies(is_streaming):
            reply = pick(found, number)
            for size in sizes:
                reply.events.append(b"data: n=%b %d %b\n\n" % (reply.number, len(reply.events), b"x" * size))
                reply.push(chunk(reply.events[-1]), part)

    @rule(number=which, part=share)
    def a_stream_ends(self, number: int, part: float) -> None:
        if found := self.open_replies(is_streaming):
            reply = pick(found, number)
            reply.finished = True
            reply.events.append(DONE)
            reply.push(chunk(DONE) + b"0\r\n\r\n", part)

    @rule(number=which, part=share)
    def vllm_goes_on(self, number: int, part: float) -> None:
        if found := self.open_replies(has_more):
            pick(found, number).push(b"", part)

    @rule(number=which, how=st.sampled_from(["closes", "breaks", "stops_reading", "reads"]))
    def one_connection_of_vllms(self, number: int, how: str) -> None:
        if found := self.open_replies():
            getattr(pick(found, number).request, how)()

    @rule(reset=st.booleans(), known_as=st.sampled_from(["ready", "ready", "restarting", "starting"]))
    def vllm_dies(self, reset: bool, known_as: str) -> None:
        """`known_as`: what the supervisor takes the engine's state for."""
        self.open_replies()
        self.world.engine.dies(reset=reset)
        if self.world.stopping is None and known_as != "ready":
            self.world.engine_is(known_as)

    @rule(health=st.sampled_from([200, 200, 503, None]))
    def vllm_is_ready(self, health: int | None) -> None:
        self.world.engine.health = health
        if self.world.stopping is None:
            self.world.engine_is("ready")

    # The clock, and the signal

    @rule(seconds=st.sampled_from([0.3, 1.0, 3.0, 5.0, 12.0, 45.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.passes(seconds)

    @precondition(lambda self: len(self.replies) > 5)
    @rule()
    def a_signal_comes(self) -> None:
        self.world.terminates(PATIENCE)

    # What holds

    @invariant()
    def everything_is_in_order(self) -> None:
        if not hasattr(self, "world"):
            return
        self.sound = False
        self.open_replies()
        self.world.check()
        for caller in self.callers:
            assert caller.client.unread <= HIGH_WATER + 2 * READ_SIZE
            self._check_answers(caller)
            if self.world.now - caller.left_at > NOTICED and caller.sent <= READ_SIZE:
                assert caller.client.closed, "a client left, and was not noticed"
        for connection in self.world.engine.connections:
            assert connection.unread <= KEPT + 2 * READ_SIZE
        carried = Counter(id(reply.request.connection) for reply in self.replies if reply.open)
        assert all(times == 1 for times in carried.values()), "a request went into a connection that was not free"
        self.sound = True

    def _check_answers(self, caller: Caller) -> None:
        client, answers = caller.client, caller.client.answers()
        for number, answer in enumerate(answers):
            last = number == len(answers) - 1
            assert answer.whole or last
            assert not answer.cut or client.closed
            assert answer.status in STATUSES
            if number < len(client.targets) and (found := NUMBER.search(client.targets[number])):
                replies = [reply for reply in self.replies if reply.number == found[1]]
                self._check_answer(answer, replies, read=caller.left_at == math.inf)

    def _check_answer(self, answer: Answer, replies: list[Reply], *, read: bool) -> None:
        """It is one of vLLM's, as far as it came, or one of ours; `read`: somebody is there to read its end."""
        body = COMMENT.sub(b"", answer.body)
        if answer.open or not body or b'"error"' in body or b'"status"' in body:
            ours, found, _ = body.partition(b'data: {"error"')
            if found and answer.whole and body.startswith(b"data: n="):
                assert body.endswith(DONE)
                assert any(reply.body.startswith(ours) for reply in replies), "not what vLLM sent before it died"
                assert ours.endswith(b"\n\n"), "an error within an event"
            return
        assert replies, f"an answer to a request that vLLM did not get: {answer}"
        assert any(reply.body.startswith(body) for reply in replies), f"not vLLM's: {answer}"
        assert not (answer.whole and read) or any(reply.is_all(body) for reply in replies), (
            f"not all of vLLM's: {answer}"
        )

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        try:
            if not self.sound:
                return
            for caller in self.callers:
                if caller.open:
                    caller.client.reads()
            world.terminates(PATIENCE)
            world.passes(PATIENCE + 15)
            self.everything_is_in_order()
            assert world.over
            for caller in self.callers:
                assert caller.client.closed or not caller.here, "a connection is left open"
                if caller.client.closed:
                    assert not any(answer.open for answer in caller.client.answers()), caller.client.answers()
            assert (world.active, world.waiting, world.in_flight, world.connections) == (0, 0, 0, 0)
            told = Counter(ended.id for ended in world.ended)
            seen = {reply.request.id for reply in self.replies}
            for caller in self.callers:
                seen |= {answer.header(b"x-request-id") or b"" for answer in caller.client.answers()
                         if answer.status not in NO_REQUEST}  # fmt: skip
            untold = {request_id for request_id in seen - {b""} if told[request_id] != 1}
            assert not untold, f"{len(untold)} requests were not told to their watchers once"
        finally:
            world.close()


Traffic.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],  # a failure has 30 steps at most, and to make it shorter takes minutes
    suppress_health_check=list(HealthCheck),
)
test_any_order_of_events_leaves_each_client_with_whole_ended_or_cut_answers = Traffic.TestCase
