"""The relay, against a fake vLLM that says exactly what the test wants on the wire."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from supervisor.gateway.ask import ask
from supervisor.gateway.upstream import Upstream
from tests.harness import Supervisor, wait_until

CHAT = "/v1/chat/completions"
BIG = 5 * 1024 * 1024


def chat(**more: object) -> dict[str, object]:
    return {"model": "some/model", "messages": [{"role": "user", "content": "hi"}], **more}


def raw_script(*parts: bytes | tuple[bytes, float], close: bool = False) -> bytes:
    """The body of a request to /fake/raw: these bytes come back, each part a write of its own."""
    rows = [part if isinstance(part, tuple) else (part, 0.0) for part in parts]
    script = {
        "parts": [{"b64": base64.b64encode(data).decode(), "delay": delay} for data, delay in rows],
        "close": close,
    }
    return json.dumps(script).encode()


def post(path: str, body: bytes, version: str = "1.1", *headers: str, method: str = "POST") -> bytes:
    fields = "".join(f"{header}\r\n" for header in headers)
    return f"{method} {path} HTTP/{version}\r\nHost: h\r\nContent-Length: {len(body)}\r\n{fields}\r\n".encode() + body


def get(path: str, version: str = "1.1", *headers: str, method: str = "GET") -> bytes:
    fields = "".join(f"{header}\r\n" for header in headers)
    return f"{method} {path} HTTP/{version}\r\nHost: h\r\n{fields}\r\n".encode()


def echo(running: Supervisor, request: bytes) -> dict[str, Any]:
    with running.connect() as raw:
        answer = raw.send(request).answer()
    assert answer.status == 200, answer.head
    found = answer.json()
    assert isinstance(found, dict)
    return found


# The request, as vLLM sees it


def test_method_target_headers_and_body_arrive_as_sent(running: Supervisor) -> None:
    body = bytes(range(256)) * 3
    target = "/fake/echo/a%2Fb/%C3%A9;x=1?q=%20+&q=2&empty="
    seen = echo(running, post(target, body, "1.1", "X-One: 1", "x-TWO:  two words ", "X-One: 2", "Cookie: a=b; c"))
    assert (seen["method"], seen["target"]) == ("POST", target)
    assert seen["body_sha256"] == hashlib.sha256(body).hexdigest()
    headers = [tuple(header) for header in seen["headers"]]
    assert ("X-One", "1") in headers
    assert ("X-One", "2") in headers
    assert ("x-TWO", "two words") in headers
    assert ("Cookie", "a=b; c") in headers


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "REPORT"])
def test_any_method_passes(running: Supervisor, method: str) -> None:
    assert echo(running, post("/fake/echo/m", b"x", method=method))["method"] == method


def test_hop_by_hop_headers_stop_here(running: Supervisor) -> None:
    hop = ("Connection: keep-alive, X-Mine", "X-Mine: 1", "Keep-Alive: 5", "TE: trailers", "Proxy-Connection: x")
    names = {name.lower() for name, _ in echo(running, get("/fake/echo/h", "1.1", *hop))["headers"]}
    assert not names & {"connection", "x-mine", "keep-alive", "te", "proxy-connection"}


def test_request_id_is_made_or_kept_and_comes_back(running: Supervisor) -> None:
    with running.connect() as raw:
        made = raw.send(get("/fake/echo/id")).answer()
        ids = [value for name, value in made.json()["headers"] if name.lower() == "x-request-id"]
        assert ids == [made.headers["x-request-id"]]
        assert len(ids[0]) == 32
        kept = raw.send(get("/fake/echo/id", "1.1", "X-Request-Id: mine-1")).answer()
        assert kept.headers["x-request-id"] == "mine-1"
        assert ["X-Request-Id", "mine-1"] in kept.json()["headers"]


def test_chunked_request_with_trailers(running: Supervisor) -> None:
    head = "POST /fake/echo/c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
    with running.connect() as raw:
        raw.send(head.encode()).send(b"5;ext=1\r\nhello\r\n").send(b"1\r\n!\r\n0\r\nX-Sum: 1\r\n\r\n")
        seen = raw.answer().json()
    assert isinstance(seen, dict)
    assert seen["body_sha256"] == hashlib.sha256(b"hello!").hexdigest()
    assert seen["trailers"] == [["X-Sum", "1"]]


def test_large_body_streams_both_ways(running: Supervisor) -> None:
    body = b"\xff\x00" * (BIG // 2)
    answer = running.client.post("/fake/sink", content=body)
    assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()
    chunks = (body[at : at + 100_000] for at in range(0, BIG, 100_000))
    assert running.client.post("/fake/sink", content=chunks).json()["body_len"] == BIG


def test_expect_continue_waits_for_vllm(running: Supervisor) -> None:
    with running.connect() as raw:
        raw.send(b"POST /fake/echo/e HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        assert raw.send(b"ok").answer().json()["body_len"] == 2


def test_absolute_target_is_read_as_a_path(running: Supervisor) -> None:
    assert echo(running, get("http://elsewhere/fake/echo/x?y=1"))["target"] == "/fake/echo/x?y=1"


# The answer, as the client sees it


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_binary_bodies_come_back_exactly(running: Supervisor, framing: str) -> None:
    target = f"/fake/bytes?n={BIG}&chunk=70000&framing={framing}"
    through = running.client.get(target).content
    transport = httpx.HTTPTransport(uds=running.socket, verify=False)
    with httpx.Client(transport=transport, base_url="http://vllm") as direct:
        assert direct.get(target).content == through
    assert len(through) == BIG


def test_response_bytes_are_not_touched(running: Supervisor) -> None:
    """Chunk sizes, extensions and trailers are the upstream's own; only the head is rebuilt."""
    body = b"3;x=y\r\nabc\r\n1\r\n\xff\r\n0\r\nX-Trailer: t\r\n\r\n"
    head = b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\nX-Odd: \xe9\r\nX-Odd: 2\r\n"
    head += b"Connection: X-Odd2\r\nX-Odd2: 3\r\n\r\n"
    with running.connect() as raw:
        raw.send(post("/fake/raw", raw_script(head, body[:5], body[5:11], body[11:])))
        seen = raw.until(b"\r\n\r\n")
        assert seen.startswith(b"HTTP/1.1 200 Fine\r\n")
        assert b"X-Odd: \xe9\r\nX-Odd: 2\r\n" in seen
        assert b"X-Odd2" not in seen
        assert raw.until(b"X-Trailer: t\r\n\r\n") == body


def test_events_leave_as_they_come(running: Supervisor) -> None:
    """The first event is at the client while the second is not yet made."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    script = raw_script(head, b"b\r\ndata: one\n\n\r\n", (b"b\r\ndata: two\n\n\r\n0\r\n\r\n", 0.5))
    with running.connect() as raw:
        raw.send(post("/fake/raw", script)).until(b"data: one")
        assert b"two" not in raw.received
        raw.until(b"0\r\n\r\n")


def test_a_head_in_pieces_is_one_head(running: Supervisor) -> None:
    with running.connect() as raw:
        raw.send(
            post(
                "/fake/raw",
                raw_script(b"HTTP/1.1 2", (b"00 OK\r\nContent-Le", 0.02), (b"ngth: 2\r\n\r", 0.02), b"\nok"),
            )
        )
        assert raw.answer().body == b"ok"


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_a_body(running: Supervisor, status: int) -> None:
    with running.connect() as raw:
        for _ in range(2):  # the connection stays usable
            assert raw.send(get(f"/fake/status/{status}")).until(b"\r\n\r\n").startswith(b"HTTP/1.1 %d" % status)
        assert raw.send(get("/fake/echo/x")).answer().status == 200


def test_head_has_a_length_and_no_body(running: Supervisor) -> None:
    script = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    with running.connect() as raw:
        for _ in range(2):
            raw.send(post("/fake/raw", raw_script(script), method="HEAD"))
            assert b"Content-Length: 1000\r\n" in raw.until(b"\r\n\r\n")
        assert raw.send(get("/fake/echo/x")).answer().status == 200


def test_a_body_behind_a_heads_answer_goes_nowhere(running: Supervisor) -> None:
    with running.connect() as raw:
        script = raw_script(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        raw.send(post("/fake/raw", script, method="HEAD"))
        try:
            seen = raw.rest()
        except ConnectionResetError:
            seen = b""
    assert b"evil" not in seen


def test_interim_answers_pass_to_http11_only(running: Supervisor) -> None:
    script = raw_script(
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    )
    with running.connect() as raw:
        assert b"Link: </a>\r\n" in raw.send(post("/fake/raw", script)).until(b"\r\n\r\n")
        assert raw.answer().body == b"ok"
    with running.connect() as raw:
        assert raw.send(post("/fake/raw", script, "1.0")).answer().status == 200


def test_http10_client_gets_no_chunks(running: Supervisor) -> None:
    script = raw_script(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n"
    )
    with running.connect() as raw:
        head, _, body = raw.send(post("/fake/raw", script, "1.0")).rest().partition(b"\r\n\r\n")
    assert body == b"abcde"
    assert b"chunked" not in head
    assert b"Connection: close" in head


def test_body_until_close_closes_here_too(running: Supervisor) -> None:
    with running.connect() as raw:
        raw.send(post("/fake/raw", raw_script(b"HTTP/1.1 200 OK\r\n\r\n", b"abc", close=True)))
        head, _, body = raw.rest().partition(b"\r\n\r\n")
    assert body == b"abc"
    assert b"Connection: close" in head


# Connections


def test_pipelined_requests_are_answered_in_order(running: Supervisor) -> None:
    with running.connect() as raw:
        raw.send(get("/fake/echo/1") + post("/fake/echo/2", b"two") + get("/ping") + get("/fake/echo/3"))
        targets = [raw.answer(), raw.answer(), raw.answer(), raw.answer()]
        assert [answer.status for answer in targets] == [200] * 4
        assert [b"echo/1" in targets[0].body, b"echo/2" in targets[1].body, b"echo/3" in targets[3].body] == [True] * 3


def test_connections_are_reused_on_both_sides(running: Supervisor) -> None:
    with running.connect() as raw:
        connections = {raw.send(get("/fake/echo/x")).answer().headers["x-fake-connection"] for _ in range(5)}
    assert len(connections) == 1


def test_client_asks_to_close(running: Supervisor) -> None:
    with running.connect() as raw:
        assert b"Connection: close" in raw.send(get("/fake/echo/x", "1.1", "Connection: close")).rest()


def test_a_connection_that_was_just_closed_costs_no_request(running: Supervisor) -> None:
    """vLLM closes a connection in the moment it is used again: the request is sent once more, on a new one."""
    with running.connect() as raw:
        for _ in range(20):
            # Pipelined, so the second goes out as the first's answer is read, before the close behind it is.
            raw.send(get("/v1/models", "1.1", 'X-Fake: {"close_silently": true}') * 2)
            assert [raw.answer().status, raw.answer().status] == [200, 200]


@pytest.mark.parametrize("how", [socket.SHUT_RDWR, "reset"])
def test_client_gone_aborts_in_vllm(running: Supervisor, how: int | str) -> None:
    body = json.dumps(chat(stream=True, max_tokens=10_000)).encode()
    before = running.client.get("/fake/state").json()["aborted"]
    with running.connect() as raw:
        raw.send(post(CHAT, body, "1.1", "Content-Type: application/json", 'X-Fake: {"token_interval": 0.01}')).until(
            b"data: "
        )
        if how == "reset":
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: running.client.get("/fake/state").json()["aborted"] == before + 1, "the abort", 1)


def test_client_gone_before_the_answer_aborts(running: Supervisor) -> None:
    with running.connect() as raw:
        raw.send(get("/fake/hang"))
        wait_until(lambda: running.client.get("/status").json()["in_flight"] == 1, "the request in flight")
    wait_until(lambda: running.client.get("/status").json()["in_flight"] == 0, "the request gone", 1)


def test_slow_client_pauses_vllm(running: Supervisor) -> None:
    """30 MB for a client that does not read: the supervisor takes in what fits its buffers, and loses none of it."""
    process = psutil.Process(running.process.pid)
    before = process.memory_info().rss
    with running.connect() as raw:
        raw.send(get("/fake/bytes?n=30000000&chunk=65536&framing=length")).until(b"\r\n\r\n")
        wait_until(lambda: stands_still(process), "the stream to stand still", 60)
        assert process.memory_info().rss - before < 20_000_000
        received = len(raw.received)
        while received < 30_000_000:
            data = raw.socket.recv(1 << 20)
            assert data, received
            received += len(data)
        assert process.memory_info().rss - before < 20_000_000


def test_slow_vllm_pauses_the_client(running: Supervisor) -> None:
    process = psutil.Process(running.process.pid)
    before = process.memory_info().rss
    with running.connect() as raw:
        raw.socket.settimeout(1.0)
        raw.send(b"POST /fake/sink?rate=0 HTTP/1.1\r\nHost: h\r\nContent-Length: 50000000\r\n\r\n")
        with pytest.raises(TimeoutError):
            raw.send(b"x" * 50_000_000)
        assert process.memory_info().rss - before < 20_000_000
        # Its end would lie behind what nobody reads, and the request stay.
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: running.client.get("/status").json()["in_flight"] == 0, "the end of the request")


def stands_still(process: psutil.Process) -> bool:
    """No byte moved through the process for half a second."""
    moved = process.io_counters().read_chars
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if process.io_counters().read_chars != moved:
            return False
    return True


# Faults of vLLM


def test_dies_mid_body_is_seen_as_cut(running: Supervisor) -> None:
    for body in (b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"):
        script = raw_script(b"HTTP/1.1 200 OK\r\n" + body, close=True)
        with pytest.raises(httpx.RemoteProtocolError):
            running.client.post("/fake/raw", content=script)


EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(data: bytes) -> bytes:
    return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([event(b"one")], b"data: one\n\n" + b"ERROR"),
        ([event(b"one") + event(b"two")[:7]], b"data: one\n\n" + b"ERROR"),
        ([event(b"one") + event(b"two")[:-1]], b"data: one\n\n" + b"ERROR"),
        ([event(b"one") + b"1"], b"data: one\n\n" + b"ERROR"),
        ([event(b"one"), b"5\r\ndata:\r\n"], b"data: one\n\n" + b"ERROR"),
        ([event(b"one") + event(b"[DONE]")], b"data: one\n\ndata: [DONE]\n\n"),
        ([event(b"one") + event(b"[DONE]") + b"0\r\n"], b"data: one\n\ndata: [DONE]\n\n"),
        ([], b"ERROR"),
    ],
    ids=["whole", "half-chunk", "almost", "half-size", "half-event", "ended", "almost-ended", "head-alone"],
)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_stream_that_breaks_off_is_ended_well(
    running: Supervisor, parts: list[bytes], expected: bytes, version: str
) -> None:
    """Only whole events reach the client, and an error is the last of them, unless the stream was at its end."""
    script = raw_script(EVENT_STREAM, *((part, 0.02) for part in parts), close=True)
    with running.connect() as raw:
        raw.send(post("/fake/raw", script, version)).until(b"\r\n\r\n")
        if version == "1.0":
            received = raw.rest()
        else:
            received = b""
            while size := int(raw.until(b"\r\n"), 16):
                chunk = raw.until(b"\r\n")
                while len(chunk) < size + 2:
                    chunk += raw.until(b"\r\n")
                received += chunk[:-2]
            assert raw.until(b"\r\n") == b"\r\n"
    before, error, _ = received.partition(b'data: {"error"')
    assert before + (b"ERROR" if error else b"") == expected
    assert received.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("framing", ["length", "chunked", "empty", "stream"])
def test_an_answer_of_500_of_a_living_engine_passes(running: Supervisor, framing: str) -> None:
    """It is held back for a moment, in case the engine is dying, and then passes as it came."""
    answers = {
        "length": (b"Content-Length: 4\r\n\r\nfail", b"fail"),
        "chunked": (b"Transfer-Encoding: chunked\r\n\r\n4\r\nfail\r\n0\r\n\r\n", b"fail"),
        "empty": (b"Content-Length: 0\r\n\r\n", b""),
        "stream": (
            b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + event(b"x") + b"0\r\n\r\n",
            b"data: x\n\n",
        ),
    }
    raw, body = answers[framing]
    answer = running.client.post("/fake/raw", content=raw_script(b"HTTP/1.1 500 Oops\r\nX-A: b\r\n" + raw))
    assert (answer.status_code, answer.reason_phrase, answer.headers["x-a"]) == (500, "Oops", "b")
    assert answer.content == body
    assert running.client.get("/v1/models").status_code == 200


def test_a_head_without_its_body_is_no_answer_yet(running: Supervisor) -> None:
    """vLLM dies between the head and the body of a whole answer: nothing has reached the client."""
    script = raw_script(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", close=True)
    answer = running.client.post("/fake/raw", content=script)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_no_answer"


def test_a_cut_body_never_looks_complete(running: Supervisor) -> None:
    """An HTTP/1.0 client knows the end of a body by the close alone: a cut one must end in a reset."""
    script = raw_script(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", (b"3\r\nabc\r\n", 0.05), close=True)
    with running.connect() as raw, pytest.raises(ConnectionResetError):
        raw.send(post("/fake/raw", script, "1.0")).rest()


@pytest.mark.parametrize(
    "garbage",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    ],
    ids=["no-http", "two-lengths", "gzip-chunked", "unasked-upgrade", "endless-head"],
)
def test_garbage_becomes_502(running: Supervisor, garbage: bytes) -> None:
    answer = running.client.post("/fake/raw", content=raw_script(garbage, close=True))
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_no_answer"
    assert answer.json()["error"]["type"] == "upstream_error"


def test_more_than_one_answer_never_reaches_the_next_request(running: Supervisor) -> None:
    two = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    with running.connect() as raw:
        assert raw.send(post("/fake/raw", raw_script(two))).answer().status == 502
        assert b"evil" not in raw.send(get("/fake/echo/x")).answer().body
    with running.connect() as raw:
        raw.send(
            post(
                "/fake/raw",
                raw_script(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", (b"HTTP/1.1 200 OK\r\n\r\n", 0.01)),
            )
        )
        assert raw.answer().body == b"ok"
        assert b"evil" not in raw.send(get("/fake/echo/x")).answer().body


def test_early_answer_then_more_body(running: Supervisor) -> None:
    """vLLM answers before it has read the body: the answer passes, the rest of the body goes nowhere."""
    answer = running.client.post("/v1/nowhere", content=b"x" * BIG)
    assert answer.status_code == 404


# Faults of clients


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no-http", "length-and-chunked", "two-lengths", "bad-chunk"],
)
def test_bad_requests_are_refused(running: Supervisor, request_: bytes) -> None:
    with running.connect() as raw:
        seen = raw.send(request_).rest()
    assert not seen or seen.startswith(b"HTTP/1.1 400 ")
    assert running.client.get("/ping").status_code == 200


def test_garbage_behind_a_request_does_not_corrupt_its_answer(running: Supervisor) -> None:
    body = json.dumps(chat(stream=True, max_tokens=50)).encode()
    with running.connect() as raw:
        raw.send(post(CHAT, body, "1.1", "Content-Type: application/json", 'X-Fake: {"token_interval": 0.01}')).until(
            b"data: "
        )
        raw.send(b"nonsense\r\n\r\n")
        try:
            seen = raw.rest()
        except ConnectionResetError:
            seen = b""
    assert b"HTTP/1.1 400" not in seen


def test_transfer_coding_that_is_not_chunked(running: Supervisor) -> None:
    with running.connect() as raw:
        raw.send(b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
        assert raw.answer().status == 501


def test_upgrade_is_relayed_without_it(running: Supervisor) -> None:
    with running.connect() as raw:
        answer = raw.send(get("/fake/echo/u", "1.1", "Connection: Upgrade", "Upgrade: h2c")).answer()
        assert not {name.lower() for name, _ in answer.json()["headers"]} & {"upgrade", "connection"}
        own = [raw.send(get("/health", "1.1", "Connection: Upgrade", "Upgrade: h2c")).answer() for _ in range(2)]
    assert [answer.status for answer in own] == [200, 200]


def test_many_offers_of_another_protocol_in_one_write(running: Supervisor) -> None:
    """As `curl --http2` and Java's client make them, bodies and all."""
    head = b"POST /fake/echo/u HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n"
    with running.connect() as raw:
        raw.send((head + b"ab") * 500)
        assert {raw.answer().json()["body_len"] for _ in range(500)} == {2}


# Limits


@pytest.fixture(scope="module")
def limited() -> Iterator[Supervisor]:
    with Supervisor(
        "some/model", environ={"SUPERVISOR_MAX_BODY": "100k", "SUPERVISOR_REQUEST_TIMEOUT": "0.5"}
    ) as supervisor:
        yield supervisor.ready()


def test_a_body_of_the_largest_size_passes(limited: Supervisor) -> None:
    with limited.connect() as raw:
        assert raw.send(post("/fake/echo/x", b"x" * 100_000)).answer().json()["body_len"] == 100_000
        chunk = b"186a0\r\n" + b"x" * 100_000 + b"\r\n0\r\n\r\n"
        head = b"POST /fake/echo/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert raw.send(head + chunk).answer().json()["body_len"] == 100_000


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [100_001, 5_000_000])
def test_a_larger_body_is_refused_and_the_client_learns_why(limited: Supervisor, framing: str, size: int) -> None:
    """Also one that goes on sending: a reset would take the answer from it."""
    with limited.connect() as raw:
        if framing == "length":
            raw.send(b"POST /fake/sink HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size)
        else:
            raw.send(b"POST /fake/sink HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % size)
        raw.send(b"x" * size)
        answer = raw.answer()
        assert answer.status == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert "SUPERVISOR_MAX_BODY" in answer.json()["error"]["message"]
        assert answer.headers["connection"] == "close"
        assert raw.rest() == b""


@pytest.mark.slow
def test_a_request_over_its_time_is_ended(limited: Supervisor) -> None:
    with limited.connect() as raw:
        answer = raw.send(get("/fake/hang")).answer()
        assert answer.status == 504
        assert answer.json()["error"]["code"] == "request_timeout"
    streamed = limited.client.post(
        CHAT, json=chat(stream=True, max_tokens=1000), headers={"X-Fake": '{"token_interval": 0.01}'}
    )
    assert streamed.status_code == 200
    assert b'"request_timeout"' in streamed.content
    assert streamed.content.endswith(b"data: [DONE]\n\n")
    wait_until(lambda: limited.client.get("/status").json()["in_flight"] == 0, "nothing in flight")
    assert "SUPERVISOR_REQUEST_TIMEOUT" in limited.output


# A question of ours, among the requests


def test_a_connection_that_vllm_keeps_open_is_closed_and_no_request_has_it(tmp_path: Path) -> None:
    """A probe asks for its connection to be closed, and does not wait for that."""
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
        await asyncio.sleep(0)
        writer.write(b"k")
        assert await reader.read() == b""
        left.set()

    async def scenario() -> None:
        server = await asyncio.start_unix_server(serve, tmp_path / "s")
        upstream = Upstream(str(tmp_path / "s"))
        assert await ask(upstream, "/health", patience=5) == (200, b"ok")
        assert upstream.idle == []
        await asyncio.wait_for(left.wait(), 5)
        server.close()

    asyncio.run(scenario())
