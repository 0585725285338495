#!/usr/bin/env python3
"""An upstream that believes nothing: it reads HTTP/1.1 strictly, remembers all that arrived, and answers as it is told.

    recording_upstream.py serve MODEL --uds PATH      as the supervisor starts it, in vLLM's place

`Reader` is the strict parser. The tests read with it what they sent as well, so that both ends are measured alike. What
RFC 9112 lets a server repair (bare line feeds, folded lines, lists of lengths) is not repaired: who stands in front of
this has either passed on a request that can be read in one way only, or failed.

Everything but `/health`, `/metrics` and `/_...` is remembered: whole requests, the beginnings of requests whose
connection ended, and what was no HTTP. `Records` is the tests' side of it. The answer is a small 200 whose body repeats
the header `X-Marker`; a test asks for another one with the header `X-Play`, which `play()` writes:

    raw.send(b"GET /x HTTP/1.1\r\nHost: h\r\n" + play(b"HTTP/1.1 204 No Content\r\n\r\n") + b"\r\n")
    (record,) = records.take()
    assert (record["kind"], record["target"]) == ("request", "/x")
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import re
import socket
import sys
import termios
import zlib
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

VERSION = "0.32.0"  # of vLLM, as the supervisor asks for it
Fields = list[tuple[bytes, bytes]]
Part = bytes | tuple[bytes, float] | tuple[bytes, float, int]  # see `play`

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~\x80-\xff]+) HTTP/(1\.[01])")
VALUE = re.compile(rb"[\t -~\x80-\xff]*")
# A request line as llhttp reads it. What it repairs moves no end: blanks too many, and other protocols' names.
REPAIRED_LINE = re.compile(
    rb"(?:(?!CONNECT)([!#$%&'*+.^_`|~0-9A-Za-z-]+) +((?:/|\*|[A-Za-z]+://)[!-~]*)|(CONNECT) +([!-~]+)) +"
    rb"(?:HTTP|RTSP|ICE)/(1\.[01])"
)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})([ \t]*;[\t -~\x80-\xff]*)?")


class Malformed(Exception):
    """These bytes are no HTTP/1.1, or are HTTP/1.1 that two readers may understand in two ways."""


@dataclass(eq=False)
class Request:
    """A request as it stands on the wire, but without the blanks around the headers' values and the body's framing."""

    method: bytes
    target: bytes
    version: bytes
    headers: Fields
    trailers: Fields = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False
    answered: bool = False  # its answer was sent, or is about to be
    continued: bool = False  # its 100 was sent

    def values(self, name: bytes) -> list[bytes]:
        """Returns the values of all headers of this name, which is in lower case."""
        return [value for key, value in self.headers if key.lower() == name]

    def value(self, name: bytes) -> bytes:
        """Returns the first value of a header, or an empty one."""
        return next(iter(self.values(name)), b"")


class Reader:
    """Reads HTTP/1.1 requests strictly, in whatever pieces they come: `requests = reader.feed(data)`."""

    def __init__(self, *, repairs: bool = False) -> None:
        """With `repairs`, what llhttp takes for a request counts as one, if it can be read in one way only."""
        self.request_line, self.line_ends = (REPAIRED_LINE, b"\r\n") if repairs else (REQUEST_LINE, b"")
        self.buffer = bytearray()
        self.request: Request | None = None  # its head is complete, and its body is not
        self.remaining = 0  # bytes of the body, or of the chunk
        self.expects: Literal["head", "body", "size", "chunk", "trailers"] = "head"

    def feed(self, data: bytes) -> list[Request]:
        """Returns the requests that became whole. Raises Malformed; what this call had read before is then lost."""
        self.buffer += data
        found: list[Request] = []
        while self._step():
            if self.request is not None and self.request.complete:
                found.append(self.request)
                self.request = None
                self.expects = "head"
        return found

    @property
    def at_rest(self) -> bool:
        """True where no request has begun."""
        return not self.buffer and self.request is None

    def _step(self) -> bool:
        """Goes one step ahead; returns False where more has to come."""
        if self.expects == "head":
            return self._head()
        request = self.request
        assert request is not None
        if self.expects == "body":
            request.complete = self._take(request)
            return request.complete
        if self.expects == "chunk":
            if not self._take(request) or len(self.buffer) < 2:
                return False
            if self.buffer[:2] != b"\r\n":
                raise Malformed("a chunk is longer than its size")
            del self.buffer[:2]
            self.expects = "size"
            return True
        return self._size() if self.expects == "size" else self._trailers(request)

    def _head(self) -> bool:
        while self.buffer[:1] and self.buffer[0] in self.line_ends:
            del self.buffer[:1]
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = bytes(self.buffer[:end]).split(b"\r\n")
        match = self.request_line.fullmatch(first)
        if match is None:
            raise Malformed(f"no request line: {first[:80]!r}")
        method, target, version = (found for found in match.groups() if found is not None)
        request = Request(method, target, version, fields(lines))
        del self.buffer[: end + 4]
        lengths, codings = request.values(b"content-length"), request.values(b"transfer-encoding")
        if len(lengths) + len(codings) > 1:
            raise Malformed("more than one header says where the body ends")
        if codings and (codings[0].lower() != b"chunked" or request.version == b"1.0"):
            raise Malformed(f"Transfer-Encoding: {codings[0]!r} in HTTP/{request.version.decode()}")
        if lengths and (not re.fullmatch(rb"[0-9]{1,100}", lengths[0]) or int(lengths[0]) >= 1 << 63):
            raise Malformed(f"Content-Length: {lengths[0][:40]!r}")
        if len(request.values(b"host")) > 1:
            raise Malformed("more than one Host")
        self.request = request
        self.remaining = int(lengths[0]) if lengths else 0
        if codings:
            self.expects = "size"
        elif self.remaining:
            self.expects = "body"
        else:
            request.complete = True
        return True

    def _take(self, request: Request) -> bool:
        """Moves what has come of the body, or of its chunk, into the request; returns True when that is all of it."""
        piece = self.buffer[: self.remaining]
        request.body += piece
        del self.buffer[: len(piece)]
        self.remaining -= len(piece)
        return not self.remaining

    def _size(self) -> bool:
        end = self.buffer.find(b"\n")
        if end < 0:
            return False
        line = bytes(self.buffer[: end - 1])
        match = CHUNK_LINE.fullmatch(line)
        if match is None or self.buffer[end - 1 : end] != b"\r":
            raise Malformed(f"no chunk size: {line[:80]!r}")
        del self.buffer[: end + 1]
        self.remaining = int(match[1], 16)
        self.expects = "chunk" if self.remaining else "trailers"
        return True

    def _trailers(self, request: Request) -> bool:
        lines = b"\r\n" + self.buffer
        end = lines.find(b"\r\n\r\n")
        if end < 0:
            return False
        request.trailers = fields(lines[2:end].split(b"\r\n")) if end else []
        del self.buffer[: end + 2]
        request.complete = True
        return True


def fields(lines: list[bytes]) -> Fields:
    """Reads header lines strictly: a token, a colon, and a value without control characters. Raises Malformed."""
    found = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not TOKEN.fullmatch(name):
            raise Malformed(f"no header: {line[:80]!r}")
        if not VALUE.fullmatch(value):
            raise Malformed(f"a control character in {name[:40]!r}")
        found.append((bytes(name), bytes(value).strip(b" \t")))
    return found


def read(data: bytes) -> tuple[list[Request], str]:
    """Returns the whole requests in `data`, and what lies behind: "" (nothing), "incomplete", or why it is no HTTP.

    It reads with `repairs`, as the gateway's parser does.
    """
    reader = Reader(repairs=True)
    found: list[Request] = []
    at = 0
    try:
        while at < len(data):  # in steps, so that the requests before a malformed one are not lost
            if reader.expects in ("body", "chunk"):
                step = at + max(1, reader.remaining)
            elif reader.expects == "size":
                step = data.find(b"\n", at) + 1
            else:
                step = data.find(b"\r\n\r\n", max(0, at - 2)) + 4
            step = step if step > at else len(data)
            found += reader.feed(data[at:step])
            at = step
    except Malformed as error:
        return found, str(error) or "malformed"
    return found, "" if reader.at_rest else "incomplete"


def play(
    *parts: Part,
    at: int | Literal["head", "end"] = "end",
    close: bool | Literal["reset"] = False,
) -> bytes:
    """Returns a header line that asks for these bytes as the answer.

    Each part is a write of its own: bytes; or a tuple of bytes, the seconds to wait before, and how often the bytes are
    repeated within the write (once, where it is left out). The answer begins when the request is whole (`at="end"`),
    when its head is (`"head"`), or when so many bytes of its body have come. With `close` the connection is closed
    behind it, or reset.
    """
    rows = [(part,) if isinstance(part, bytes) else part for part in parts]
    script = {"at": at, "close": close, "parts": [[base64.b64encode(row[0]).decode(), *row[1:]] for row in rows]}
    return b"X-Play: " + base64.urlsafe_b64encode(zlib.compress(json.dumps(script).encode(), 9)) + b"\r\n"


class Records:
    """Asks the upstream what it remembers, past the gateway, on vLLM's own unix socket at `path`.

    The connection is open until `close`, which a test calls in the end.
    """

    def __init__(self, path: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        self.connection.settimeout(10)

    def take(self) -> list[dict[str, Any]]:
        """Returns what came since the last call, in order.

        The `kind` of each is `request`, `begun` (it never became whole), or `malformed`. `Upstream.remember` has the
        keys of a request.
        """
        self.connection.sendall(b"GET /_records HTTP/1.1\r\nHost: upstream\r\n\r\n")
        received = b""
        while (end := received.find(b"\r\n\r\n") + 4) < 4 or len(received) < end + length_of(received[:end]):
            data = self.connection.recv(1 << 20)
            assert data, "the upstream is gone"
            received += data
        found = json.loads(received[end:])
        assert isinstance(found, list)
        return found

    def close(self) -> None:
        self.connection.close()


def length_of(head: bytes) -> int:
    """Returns the Content-Length that a head of our own says."""
    return int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])


# The program


class Upstream:
    """What all connections of the program share: the records, until they are taken."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def remember(self, kind: str, request: Request | None = None, **more: object) -> None:
        if request is not None:
            if request.target in (b"/health", b"/metrics") or request.target.startswith(b"/_"):
                return
            more |= {
                "method": request.method.decode("latin-1"),
                "target": request.target.decode("latin-1"),
                "version": request.version.decode(),
                "headers": text_fields(request.headers),
                "trailers": text_fields(request.trailers),
                "length": len(request.body),
                "sha256": sha256(request.body).hexdigest(),
            }
        self.records.append({"kind": kind, **more})

    def take(self) -> bytes:
        found, self.records = self.records, []
        return json.dumps(found).encode()


def text_fields(found: Fields) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in found]


class Connection(asyncio.Protocol):
    """A connection of one client, whose requests are answered in turn."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.reader = Reader()
        self.answer_lock = asyncio.Lock()
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.reader.at_rest:
            left = bytes(self.reader.buffer[:200]).decode("latin-1")
            self.upstream.remember("begun", self.reader.request, left=left)
        for task in self.tasks:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            for request in self.reader.feed(data):
                self.upstream.remember("request", request)
                self.answer_if_due(request)
        except Malformed as error:
            self.upstream.remember("malformed", why=str(error))
            self.reader = Reader()
            self.transport.abort()
            return
        if self.reader.request is not None:
            self.answer_if_due(self.reader.request)

    def answer_if_due(self, request: Request) -> None:
        """Answers the request, or sends its 100, if enough of it is there and that was not done before."""
        if request.answered:
            return
        played = request.value(b"x-play")
        script = json.loads(zlib.decompress(base64.urlsafe_b64decode(played))) if played else None
        at: Any = script["at"] if script else "end"
        if request.complete or at == "head" or (at != "end" and len(request.body) >= at):
            request.answered = True
            task = asyncio.get_running_loop().create_task(self.answer(request, script))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        elif (
            script is None
            and request.value(b"expect").lower() == b"100-continue"
            and not request.body
            and not request.continued
        ):
            request.continued = True
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def answer(self, request: Request, script: dict[str, Any] | None) -> None:
        async with self.answer_lock:
            if script is None:
                self.transport.write(self.default_answer(request))
                if request.version == b"1.0" or request.value(b"connection").lower() == b"close":
                    self.transport.close()
                return
            parts: list[list[Any]] = script["parts"]
            for number, (data, *timing) in enumerate(parts):
                if number:
                    await self.wait_until_read()
                delay, times = timing + [0, 1][len(timing) :]
                await asyncio.sleep(delay)
                self.transport.write(base64.b64decode(data) * times)
            if script["close"] == "reset":
                self.transport.abort()
            elif script["close"]:
                self.transport.close()

    def default_answer(self, request: Request) -> bytes:
        if request.target == b"/_records":
            body = self.upstream.take()
        else:
            body = b"seen %b: %d bytes" % (request.value(b"x-marker") or b"it", len(request.body))
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Answer: yes\r\n\r\n" % len(body)
        return head if request.method == b"HEAD" else head + body

    async def wait_until_read(self) -> None:
        """Returns when the other side has read all that was written, so that no read of it sees two parts as one.

        It asks the kernel again and again: nothing would set an event when the other side has read.
        """
        number = self.transport.get_extra_info("socket").fileno()
        while not self.transport.is_closing() and any(fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4))):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def serve(path: str) -> None:
    upstream = Upstream()
    server = await asyncio.get_running_loop().create_unix_server(lambda: Connection(upstream), path)
    await server.serve_forever()


def main(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print(VERSION)
        return
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments[arguments.index("--uds") + 1]))


if __name__ == "__main__":
    main(sys.argv[1:])
