"""Malformed and hostile bytes, made by rules (tests/engine/made.py), on both sides of the gateway.

The upstream raises at whatever is not one well-formed request, and answers what it is told, well-formed or not. Neither
side is judged by the gateway's own parser: `Reader` and `answers_in` say what the bytes mean, and where they mean
nothing, the gateway may only refuse, or close.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tests.engine import made
from tests.engine.made import NUMBERS, Played, good, numbered, writes
from tests.engine.recording_upstream import Records, Request, play, read, text_fields
from tests.engine.test_differential import UPSTREAM, is_own, request
from tests.engine.wire import Answer, answers_in, origin_form, without_hop_by_hop
from tests.harness import RawClient, Supervisor, wait_until

pytestmark = pytest.mark.slow  # hundreds of requests each; the corpus beside it is what was found by them

PATIENCE = 10.0
NOTHING_OF_THEM = {"host", "content-length", "transfer-encoding", "x-request-id"}  # framing, and what is added


def examples(count: int) -> settings:
    """The same in each run, kept nowhere, and not made smaller, which takes long where something hangs."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Bench:
    supervisor: Supervisor
    records: Records
    probe: RawClient
    read: int = 0  # of its log
    late: list[object] = field(
        default_factory=list, repr=False
    )  # requests of clients that have gone, which may be read later

    def ask(self, raw: RawClient | None = None) -> None:
        """One request all the way there and back: whatever was sent before has been looked at."""
        number = b"probe-%d" % next(NUMBERS)
        answer = (raw or self.probe).send(request(b"GET", b"/_probe", b"X-Marker: " + number)).answer()
        assert (answer.status, answer.body) == (200, b"seen %b: 0 bytes" % number)

    def at_rest(self) -> list[dict[str, Any]]:
        """What has arrived upstream, when nothing is left of the clients that went; and the gateway is well."""

        def nothing_in_flight() -> bool:
            status: dict[str, Any] = self.probe.send(request(b"GET", b"/status")).answer().json()
            assert isinstance(status, dict)
            is_idle: bool = status["in_flight"] == status["waiting"] == 0
            return is_idle

        wait_until(nothing_in_flight, "nothing in flight", PATIENCE)
        # Three rounds of the upstream's loop: one to take a connection, one to read it, one to see it close.
        arrived = [record for _ in range(3) for record in self.records.take()]
        with self.supervisor.connect() as raw:
            self.ask(raw)
        assert self.supervisor.process.poll() is None
        said = self.supervisor.raw_output[self.read :]
        self.read += len(said)
        assert not re.search(rb"Traceback|Exception in|Fatal error", said), said.decode(errors="replace")[-3000:]
        return arrived


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    environ = {"SUPERVISOR_ALLOW_ROUTES": "/", "SUPERVISOR_MAX_BODY": "40000"}
    with contextlib.ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor("some/model", vllm=UPSTREAM, environ=environ)).ready()
        records = stack.enter_context(contextlib.closing(Records(supervisor.socket)))
        yield Bench(supervisor, records, stack.enter_context(supervisor.connect()))


class Talk:
    """A client's side of its connection, until somebody ends it."""

    def __init__(self, client: RawClient) -> None:
        self.socket = client.socket
        self.received = b""
        self.over = False  # by the gateway
        self.closed = False  # and in an orderly way

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def take(self, seconds: float = 0.0) -> bool:
        """Reads what has come; False where nothing has, in this time."""
        if self.over or not select.select([self.socket], [], [], seconds)[0]:
            return False
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self.socket.recv(1 << 20)
            self.closed = not data
        self.received += data
        self.over = not data
        return True

    def leave(self, how: str) -> None:
        with contextlib.suppress(OSError):  # it may be over already
            if how == "reset":
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "half":
                self.socket.shutdown(socket.SHUT_WR)

    def finals(self, *methods: bytes) -> list[Answer]:
        """All that came is a row of answers to requests with these methods, of which the last may not be whole."""
        found, _ = answers_in(self.received, methods, self.closed)
        return [answer for answer in found if answer.status >= 200]

    def wait_for(self, count: int, *methods: bytes) -> None:
        """So many answers, or the end."""
        deadline = time.monotonic() + PATIENCE
        while not self.over and len(self.finals(*methods)) < count:
            assert time.monotonic() < deadline, f"waited for {count} answers, or a close; received {self.received!r}"
            self.take(1.0)


# From clients


def converse(bench: Bench, pieces: list[bytes], leaves: str) -> list[Answer]:
    """Sends the pieces, with some time between, and checks what comes of it on both ends; returns the answers."""
    bench.records.take()
    sent = b"".join(pieces := numbered(pieces))
    whole, problem = read(sent)
    methods = [one.method for one in whole]
    with bench.supervisor.connect() as client:
        talk = Talk(client)
        for number, piece in enumerate(pieces):
            if number:
                bench.ask()
            talk.send(piece)
        talk.leave(leaves)
        if leaves == "half":
            talk.wait_for(1 << 30, *methods)
        elif leaves == "stays":
            talk.wait_for(1 << 30 if problem not in ("", "incomplete") else len(whole), *methods)
            for _ in range(2):  # where it waits for more, nothing more comes
                bench.ask()
                talk.take()
    answers = talk.finals(*methods)
    arrived = bench.at_rest()
    check_arrived(bench, arrived, [as_sent(one) for one in whole], leaves)
    # To the client: each its own answer, and one refusal for what is no request.
    assert len(answers) <= len(whole) + bool(problem), (answers, sent)
    for at, answer in enumerate(answers):
        assert answer.status < 500 or answer.status in (501, 505), (answer, sent)
        if answer.value(b"x-answer"):
            one = whole[at]
            usual = b"seen %b: %d bytes" % (one.value(b"x-marker") or b"it", len(one.body))
            assert answer.body == (b"" if one.method == b"HEAD" else usual)
            assert any(as_arrived(record) == as_sent(one) for record in arrived if record["kind"] == "request")
    return answers


def check_arrived(bench: Bench, arrived: list[dict[str, Any]], sent: list[object], leaves: str) -> None:
    """Upstream: some of the requests that were sent whole, as they were, each once, and in order."""
    assert {record["kind"] for record in arrived} <= {"request", "begun"}, arrived  # of what was cut, nothing came
    for found in (as_arrived(record) for record in arrived if record["kind"] == "request"):
        if found in sent:
            del sent[: sent.index(found) + 1]
        else:
            assert found in bench.late, (found, sent)
            bench.late.remove(found)
    bench.late += sent if leaves != "stays" else []


def as_arrived(record: dict[str, Any]) -> object:
    headers = [[name, value] for name, value in record["headers"] if name.lower() not in NOTHING_OF_THEM]
    return record["method"], record["target"], record["sha256"], headers, record["trailers"]


def as_sent(one: Request) -> object:
    fields = {"headers": text_fields(without_hop_by_hop(one)), "trailers": text_fields(one.trailers)}
    names = {"method": one.method.decode("latin-1"), "target": origin_form(one.target).decode("latin-1")}
    return as_arrived(json.loads(json.dumps(fields)) | names | {"sha256": sha256(one.body).hexdigest()})


@examples(150)
@given(pieces=st.lists(made.bad, min_size=1, max_size=1).flatmap(writes))
def test_a_request_in_which_a_few_bytes_are_wrong(bench: Bench, pieces: list[bytes]) -> None:
    converse(bench, pieces, "stays")


@examples(150)
@given(pieces=st.lists(made.odd_requests(), min_size=1, max_size=1).flatmap(writes))
def test_a_request_of_odd_parts(bench: Bench, pieces: list[bytes]) -> None:
    converse(bench, pieces, "stays")


@examples(100)
@given(
    pieces=st.lists(made.any_request, min_size=2, max_size=5).flatmap(lambda row: writes(row, whole=False)),
    leaves=st.sampled_from(["stays", "half", "reset", "gone"]),
)
@example(pieces=[made.TWO_HOSTS_BETWEEN], leaves="stays")
@example(pieces=[made.CHUNKED_BEHIND], leaves="reset")
def test_a_row_of_requests_whose_client_may_go(bench: Bench, pieces: list[bytes], leaves: str) -> None:
    converse(bench, pieces, leaves)


@examples(60)
@given(pieces=st.lists(good, min_size=1, max_size=5).flatmap(writes))
@example(pieces=[made.CHUNKED_BEHIND])
@example(pieces=made.CUT_BEHIND_A_LARGE_BODY)
def test_a_row_of_good_requests_is_answered_in_whatever_pieces_it_comes(bench: Bench, pieces: list[bytes]) -> None:
    statuses = [answer.status for answer in converse(bench, pieces, "stays")]
    assert set(statuses[:-1]) <= {200}
    assert statuses[-1] in (200, 413)  # their bodies may be too large, together


@examples(50)
@given(pieces=made.noise.flatmap(lambda data: writes([data])), leaves=st.sampled_from(["stays", "half"]))
def test_noise(bench: Bench, pieces: list[bytes], leaves: str) -> None:
    converse(bench, pieces, leaves)


# From the upstream


def check_answer(one: Played, talk: Talk) -> None:
    """What the client has is the answer that was meant, or says that there was none, or is cut."""
    meant, behind = one.meaning()
    found = talk.finals(one.method, b"GET")
    if not found:
        assert talk.over
        return
    got = found[0]
    if got.status in (502, 503) and (is_own(got) or (one.method == b"HEAD" and got.value(b"x-request-id"))):
        return
    if b'data: {"error"' in got.body:  # a stream that broke off, and was ended well
        assert meant is None or behind
        events = got.body.partition(b'data: {"error"')[0]
        assert events in re.sub(rb"\r\n[0-9a-f]+\r\n", b"", one.data)
        return
    assert meant is not None, (got, one)
    trailers = meant.trailers if one.version == b"1.1" else []
    assert (got.status, got.reason, got.body, got.trailers) == (meant.status, meant.reason or b"", meant.body, trailers)
    assert travelling(got) == travelling(meant)


def travelling(answer: Answer) -> list[tuple[bytes, bytes]]:
    as_one = Request(b"GET", b"/", b"1.1", answer.headers)
    return [line for line in without_hop_by_hop(as_one) if line[0].lower().decode() not in NOTHING_OF_THEM]


@examples(12)
@given(batch=st.lists(made.played(), min_size=12, max_size=12))
@example(batch=made.troubles)
def test_an_upstream_that_answers_anything(bench: Bench, batch: list[Played]) -> None:
    """Many at once, for the gateway takes 0.25 s to see whether an upstream that has closed has died."""
    bench.records.take()
    targets = [b"/%06d" % next(NUMBERS) for _ in batch]
    with contextlib.ExitStack() as stack:
        talks = [(one, Talk(stack.enter_context(bench.supervisor.connect()))) for one in batch]
        for (one, talk), target in zip(talks, targets, strict=True):
            script = play(*one.parts, close=one.closes)
            talk.send(request(one.method, target, script, version=one.version))
        for one, talk in talks:
            talk.wait_for(1, one.method)
            check_answer(one, talk)
        bench.ask()
        for one, talk in talks:  # what follows on the same connection is its own
            number = b"next-%d" % next(NUMBERS)
            talk.send(request(b"GET", b"/_next", b"X-Marker: " + number))
            talk.wait_for(2, one.method, b"GET")
            check_answer(one, talk)
            for answer in talk.finals(one.method, b"GET")[1:]:
                assert (answer.status, answer.body) == (200, b"seen %b: 0 bytes" % number), (one, talk.received)
    arrived = [record["target"].encode() for record in bench.at_rest()]
    for one, target in zip(batch, targets, strict=True):  # once more only where no byte of an answer came
        assert arrived.count(target) == 1 or (not one.data and arrived.count(target) == 2), (one, arrived)


@pytest.mark.parametrize("leaves", ["reset", "gone"])
def test_what_waits_behind_an_unanswered_request_goes_with_its_client(bench: Bench, leaves: str) -> None:
    """The last one here: where the client's going is not noticed, nothing after it finds the gateway at rest."""
    converse(bench, [made.UNANSWERED + made.SMUGGLED * 2], leaves)
