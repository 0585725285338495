"""HTTP/1.1 read by a plain strict reader, which shares no line with the gateway's.

Whatever is not as RFC 9112 has it is `Malformed`: what the gateway writes must please the strictest reader there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~\x80-\xff]+) HTTP/1\.([01])")
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) ([\t -~\x80-\xff]*)")
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*((?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?)[ \t]*")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t -~\x80-\xff]*)?")
LONGEST_LINE = 100_000


class Malformed(AssertionError):
    """What was read is not HTTP/1.1."""


class Message:
    """A request or an answer, as far as it has come."""

    def __init__(self, lines: list[bytes]) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        for line in lines[1:]:
            found = FIELD.fullmatch(line)
            if found is None:
                raise Malformed(f"no header line: {line!r}")
            self.fields.append((found[1].lower(), found[2]))
        self.content = bytearray()
        self.whole = False  # all of its body is there
        self.chunked = False
        self.remaining: int | None = 0  # bytes of the body, or of its chunk; None: until the connection closes
        self._expects = "size"  # of a chunk; then its data, its end, the trailers

    @property
    def body(self) -> bytes:
        return bytes(self.content)

    def header(self, name: bytes) -> bytes | None:
        values = self.headers(name)
        if len(values) > 1:
            raise Malformed(f"{name!r} stands there more than once")
        return values[0] if values else None

    def headers(self, name: bytes) -> list[bytes]:
        return [value for field, value in self.fields if field == name.lower()]

    def read_framing(self, default_size: int | None) -> None:
        """Reads how the body's end is known; `otherwise`: its size where the head does not tell."""
        length, coding = self.header(b"content-length"), self.header(b"transfer-encoding")
        if coding is not None:
            if length is not None or coding != b"chunked":
                raise Malformed(f"framed by {coding!r} and {length!r}")
            self.chunked = True
        elif length is not None:
            if not length.isdigit():
                raise Malformed(f"no length: {length!r}")
            self.remaining = int(length)
        else:
            self.remaining = default_size
        self.whole = not self.chunked and self.remaining == 0

    def take(self, data: bytearray) -> None:
        """Takes what is the body's off the beginning of `data`."""
        if self.chunked:
            self._take_chunks(data)
            return
        size = len(data) if self.remaining is None else min(self.remaining, len(data))
        self.content += data[:size]
        del data[:size]
        if self.remaining is not None:
            self.remaining -= size
            self.whole = self.remaining == 0

    def _take_chunks(self, data: bytearray) -> None:
        while not self.whole:
            if self._expects == "data":
                assert self.remaining is not None
                size = min(self.remaining, len(data))
                self.content += data[:size]
                del data[:size]
                self.remaining -= size
                if self.remaining:
                    return
                self._expects = "end"
            line = take_line(data)
            if line is None:
                return
            if self._expects == "end":
                if line:
                    raise Malformed(f"a chunk is longer than it said: {line[:80]!r}")
                self._expects = "size"
            elif self._expects == "size":
                found = CHUNK_SIZE.fullmatch(line)
                if found is None:
                    raise Malformed(f"no chunk size: {line[:80]!r}")
                self.remaining = int(found[1], 16)
                self._expects = "data" if self.remaining else "trailers"
            elif not line:
                self.whole = True
            elif FIELD.fullmatch(line) is None:
                raise Malformed(f"no trailer: {line[:80]!r}")


class Request(Message):
    def __init__(self, lines: list[bytes]) -> None:
        found = REQUEST_LINE.fullmatch(lines[0])
        if found is None:
            raise Malformed(f"no request line: {lines[0][:80]!r}")
        super().__init__(lines)
        self.method, self.target = found[1], found[2]
        self.read_framing(0)


class Answer(Message):
    """`whole`: all of it came; `ended`: that is told by its last chunk; `cut`: the rest will never come."""

    def __init__(self, lines: list[bytes], method: bytes) -> None:
        found = STATUS_LINE.fullmatch(lines[0])
        if found is None:
            raise Malformed(f"no status line: {lines[0][:80]!r}")
        super().__init__(lines)
        self.status, self.reason = int(found[1]), found[2]
        self.interim: list[Answer] = []  # those of status 1xx that came before
        self.cut = False
        if method == b"HEAD" or self.status < 200 or self.status in (204, 304):
            self.whole = True
        else:
            self.read_framing(None)

    def __repr__(self) -> str:
        how = "whole" if self.whole else "cut" if self.cut else "open"
        return f"<{self.status}, {how}, {len(self.content)} bytes: {bytes(self.content[-60:])!r}>"

    @property
    def ended(self) -> bool:
        return self.whole and self.chunked

    @property
    def open(self) -> bool:
        return not self.whole and not self.cut

    @property
    def closes(self) -> bool:
        """Behind it nothing comes on this connection."""
        return b"close" in self.headers(b"connection") or self.remaining is None

    @property
    def events(self) -> list[bytes]:
        """Of an event stream; the last one is empty unless it is half."""
        return self.body.split(b"\n\n")


class RequestReader:
    """Reads one side of a connection: `feed` it, and look at `messages`."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.messages: list[Request] = []

    def feed(self, data: bytes) -> None:
        self.data += data
        while self.data:
            if self.messages and not self.messages[-1].whole:
                self.messages[-1].take(self.data)
                if not self.messages[-1].whole:
                    return
                continue
            lines = take_head(self.data)
            if lines is None:
                return
            self.messages.append(Request(lines))


class AnswerReader:
    """`method(n)` tells what the nth answer is one to."""

    def __init__(self, method: Callable[[int], bytes]) -> None:
        self.method = method
        self.data = bytearray()
        self.messages: list[Answer] = []
        self.interim: list[Answer] = []
        self.tunnel: bytearray | None = None  # what came behind a 101

    def feed(self, data: bytes) -> None:
        if self.tunnel is not None:
            self.tunnel += data
            return
        self.data += data
        while self.data:
            latest = self.messages[-1] if self.messages else None
            if latest is not None and not latest.whole:
                latest.take(self.data)
                if not latest.whole:
                    return
                continue
            if latest is not None and latest.closes:
                raise Malformed(f"behind an answer that closes the connection: {bytes(self.data[:80])!r}")
            lines = take_head(self.data)
            if lines is None:
                return
            answer = Answer(lines, self.method(len(self.messages)))
            if answer.status < 200 and answer.status != 101:
                self.interim.append(answer)
                continue
            answer.interim, self.interim = self.interim, []
            self.messages.append(answer)
            if answer.status == 101:
                self.tunnel, self.data = self.data, bytearray()
                return

    def end(self, *, reset: bool) -> None:
        latest = self.messages[-1] if self.messages else None
        if latest is not None and not latest.whole:
            latest.whole = latest.remaining is None and not latest.chunked and not reset
            latest.cut = not latest.whole


def take_line(data: bytearray) -> bytes | None:
    end = data.find(b"\r\n")
    if end < 0:
        if len(data) > LONGEST_LINE:
            raise Malformed(f"a line without end: {bytes(data[:80])!r}")
        return None
    line = bytes(data[:end])
    del data[: end + 2]
    return line


def take_head(data: bytearray) -> list[bytes] | None:
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > LONGEST_LINE:
            raise Malformed(f"a head without end: {bytes(data[:80])!r}")
        return None
    lines = bytes(data[:end]).split(b"\r\n")
    del data[: end + 4]
    return lines
