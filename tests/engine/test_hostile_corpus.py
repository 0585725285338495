"""Requests made to be read in two ways, straight on the socket: refused, or passed on as the one request that they are.

vLLM must never see two requests where one was sent, and the next client never another's answer.
"""

from __future__ import annotations

import itertools
import os
import re
import socket

import pytest

from tests.harness import RawClient, Supervisor, wait_until

GET = b"GET /fake/echo/smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
SECOND = GET.replace(b"smuggled", b"second")
HOST = b"Host: h\r\n"
ECHO = b"POST /fake/echo/x HTTP/1.1\r\n" + HOST

pytestmark = pytest.mark.slow  # each waits for a while whether more comes


NUMBERS = itertools.count()


def answered(running: Supervisor, path: str) -> int:
    """How many requests for that path vLLM has answered: by its log, up to a request that is sent now."""
    marker = f"/fake/echo/marker-{os.getpid()}-{next(NUMBERS)}"
    running.client.get(marker)
    wait_until(lambda: marker in running.output, "the marker in vLLM's log")
    return len(re.findall(rf'"[A-Z]+ {path} HTTP', running.output))


def everything(raw: RawClient) -> bytes:
    """What comes until the other side closes, or says nothing for a while."""
    raw.socket.settimeout(0.4)
    seen = b""
    try:
        while data := raw.socket.recv(65536):
            seen += data
    except (TimeoutError, ConnectionResetError):
        pass
    return seen


# Each row: what is sent. None of them may reach vLLM at all, or make a second request.
REFUSED = {
    "length and chunked": ECHO + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET,
    "chunked and length": ECHO + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + GET,
    "two lengths": ECHO + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + GET,
    "two equal lengths": ECHO + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": ECHO + b"Content-Length: 4, 4\r\n\r\nabcd",
    "length with a plus": ECHO + b"Content-Length: +4\r\n\r\nabcd",
    "negative length": ECHO + b"Content-Length: -4\r\n\r\nabcd",
    "hexadecimal length": ECHO + b"Content-Length: 0x4\r\n\r\nabcd",
    "length of words": ECHO + b"Content-Length: 4 4\r\n\r\nabcd",
    "length too large": ECHO + b"Content-Length: 99999999999999999999999\r\n\r\nabcd",
    "empty length": ECHO + b"Content-Length: \r\n\r\nabcd",
    "chunked, then identity": ECHO + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + GET,
    "x-chunked": ECHO + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + GET,
    "chunked twice": ECHO + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + GET,
    "chunked on a line of its own": ECHO + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + GET,
    "name with a blank": ECHO + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + GET,
    "length with a blank": ECHO + b"Content-Length : 44\r\n\r\n" + GET,
    "folded header": ECHO + b"X-A: b\r\n c: d\r\n\r\n",
    "empty name": ECHO + b": x\r\n\r\n",
    "NUL in a name": ECHO + b"X\x00A: b\r\n\r\n",
    "NUL in a value": ECHO + b"X-A: b\x00c\r\n\r\n",
    "CR in a value": ECHO + b"X-A: b\rContent-Length: 44\r\n\r\n" + GET,
    "bare LF in a value": ECHO + b"X-A: b\nContent-Length: 44\n\n" + GET,
    "NUL in the target": b"GET /fake/echo/\x00x HTTP/1.1\r\n" + HOST + b"\r\n",
    "blank in the target": b"GET /fake/echo/a b HTTP/1.1\r\n" + HOST + b"\r\n",
    "bad chunk size": ECHO + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "negative chunk": ECHO + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
    "chunk with 0x": ECHO + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "chunk of 2^64 + 3": ECHO + b"Transfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n",
    "chunk without its end": ECHO + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
    "a trailer that is a length": (
        ECHO + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nContent-Length: 44\r\nX-T: 1\r\n\r\n" + GET
    ),
    "no version": b"GET /fake/echo/x\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.0": b"GET /fake/echo/x HTTP/3.0\r\n" + HOST + b"\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303") + b"\x00" * 100,
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT with a body": b"CONNECT h:1 HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(GET) + GET,
    "a WebSocket with a body": (
        ECHO.replace(b"POST", b"GET") + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\n" + GET
    ),
    "odd method": b"G\xffT /fake/echo/x HTTP/1.1\r\n" + HOST + b"\r\n",
    "endless target": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_or_is_one_request(running: Supervisor, name: str) -> None:
    path = f"/fake/echo/{os.getpid()}-{next(NUMBERS)}"
    with running.connect() as raw:
        seen = everything(raw.send(REFUSED[name].replace(b"/fake/echo/x", path.encode())))
    reached = answered(running, path) + answered(running, "/fake/echo/smuggled")
    refused = not seen or seen.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501 ", b"HTTP/1.1 505 "))
    assert refused, seen[:300]
    assert len(re.findall(rb"HTTP/1\.1 \d\d\d ", seen)) <= 1
    assert reached == 0, f"{reached} requests were answered by vLLM"
    assert b"smuggled" not in seen
    assert "Traceback" not in running.output


# What is odd, and all the same one request, in one way only.
PASSED = {
    "blank before the length": (ECHO + b"Content-Length:   4  \r\n\r\nabcd", 1),
    "length without a blank": (ECHO + b"Content-Length:4\r\n\r\nabcd", 1),
    "chunk extension": (ECHO + b"Transfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n", 1),
    "chunked in capitals": (ECHO + b"Transfer-Encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 1),
    "two requests that are two": (ECHO + b"Content-Length: 4\r\n\r\nabcd" + SECOND, 2),
    "a length on a GET": (SECOND.replace(b"\r\n\r\n", b"\r\nContent-Length: 4\r\n\r\nabcd"), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED)
def test_it_is_passed_on_as_what_it_is(running: Supervisor, name: str) -> None:
    request, count = PASSED[name]
    with running.connect() as raw:
        seen = everything(raw.send(request))
    assert seen.count(b"HTTP/1.1 200 ") == count


@pytest.mark.parametrize("length", [b"4", b"5", b"004", b"12"])
def test_a_remembered_head_does_not_change_what_a_body_is(running: Supervisor, length: bytes) -> None:
    """The second request has the first one's head, but for the length; what follows its body is the next request."""
    first = ECHO + b"Content-Length: 4\r\n\r\nabcd"
    body = b"x" * int(length)
    with running.connect() as raw:
        for _ in range(3):
            assert raw.send(first).answer().json()["body_len"] == 4
        answer = raw.send(first.replace(b"4\r\n\r\nabcd", length + b"\r\n\r\n" + body)).answer()
        assert answer.json()["body_len"] == len(body)
        raw.send(first.replace(b"4\r\n\r\nabcd", length + b"\r\n\r\n" + body) + SECOND)  # with another behind it
        assert raw.answer().json()["body_len"] == len(body)
        assert raw.answer().json()["target"] == "/fake/echo/second"
        raw.send(first[:-2])  # in pieces
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.send(b"cd")
        assert raw.answer().json()["body_len"] == 4
