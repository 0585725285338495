"""HTTP/1.1 read by a plain strict reader, which shares no line with the gateway's.

    reader = RequestReader()
    reader.feed(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert reader.messages[0].target == b"/"

Whatever is not as RFC 9112 has it raises `Malformed`: what the gateway writes must please the strictest reader there
is. All that was read is bytes, and so are the names of headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~\x80-\xff]+) HTTP/1\.([01])")
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) ([\t -~\x80-\xff]*)")
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*((?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?)[ \t]*")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t -~\x80-\xff]*)?")
LONGEST_LINE = 100_000  # bytes that may come without the end of a line, or of a head


class Malformed(AssertionError):
    """Raised for bytes that are not HTTP/1.1."""


class Message:
    """A request or an answer, as far as it has come."""

    def __init__(self, lines: list[bytes]) -> None:
        """Takes the lines of the head, of which a subclass reads the first."""
        self.fields: list[tuple[bytes, bytes]] = []  # names in lower case
        for line in lines[1:]:
            found = FIELD.fullmatch(line)
            if found is None:
                raise Malformed(f"no header line: {line!r}")
            self.fields.append((found[1].lower(), found[2]))
        self.content = bytearray()  # the body without its framing
        self.whole = False  # all of its body has come
        self.chunked = False
        self.remaining: int | None = 0  # bytes of the body, or of its chunk; None: all until the connection closes
        self._expects = "size"  # what comes next of a chunk: size, data, end; or the trailers

    @property
    def body(self) -> bytes:
        return bytes(self.content)

    def header(self, name: bytes) -> bytes | None:
        """Returns a header's value, or None; raises Malformed where it stands there more than once."""
        values = self.headers(name)
        if len(values) > 1:
            raise Malformed(f"{name!r} stands there more than once")
        return values[0] if values else None

    def headers(self, name: bytes) -> list[bytes]:
        """Returns the values of all headers of this name, in any case."""
        return [value for field, value in self.fields if field == name.lower()]

    def read_framing(self, default_size: int | None) -> None:
        """Reads how the body's end is known. `default_size` is its size where the head does not say it."""
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
        """Moves what belongs to the body off the beginning of `data`."""
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
    """An answer, which is `whole` (all of it came), `cut` (the rest will never come) or `open` (it may come yet)."""

    def __init__(self, lines: list[bytes], method: bytes) -> None:
        """`method` is that of the request, because an answer to a HEAD has no body."""
        found = STATUS_LINE.fullmatch(lines[0])
        if found is None:
            raise Malformed(f"no status line: {lines[0][:80]!r}")
        super().__init__(lines)
        self.status, self.reason = int(found[1]), found[2]
        self.interim: list[Answer] = []  # the answers of status 1xx that came before it
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
        """True where its last chunk says that all of it came, and not the end of the connection."""
        return self.whole and self.chunked

    @property
    def open(self) -> bool:
        return not self.whole and not self.cut

    @property
    def closes(self) -> bool:
        """True where nothing may come behind it on this connection."""
        return b"close" in self.headers(b"connection") or self.remaining is None

    @property
    def events(self) -> list[bytes]:
        """The events of a stream, without the blank lines. The last element is a half event, or empty."""
        return self.body.split(b"\n\n")


class RequestReader:
    """Reads what a client sends on one connection: `feed` it, and look at `messages`."""

    def __init__(self) -> None:
        self.data = bytearray()  # bytes that belong to no message yet, or to a part of one that is not whole
        self.messages: list[Request] = []  # the last one may not be whole

    def feed(self, data: bytes) -> None:
        """Takes the next bytes; raises Malformed."""
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
    """Reads the answers on one connection: `feed` it, say its `end`, and look at `messages`."""

    def __init__(self, method: Callable[[int], bytes]) -> None:
        """`method(n)` returns the method of the request that the nth answer is for, counted from 0."""
        self.method = method
        self.data = bytearray()
        self.messages: list[Answer] = []  # the final ones, and a 101; the last one may not be whole
        self.interim: list[Answer] = []  # those of status 1xx that came before the next final one
        self.tunnel: bytearray | None = None  # what came behind a 101; None: there was none

    def feed(self, data: bytes) -> None:
        """Takes the next bytes; raises Malformed, also for bytes behind an answer that closes the connection."""
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
        """Takes the end of the connection: the last answer is now `whole`, if it lasts until then, or `cut`."""
        latest = self.messages[-1] if self.messages else None
        if latest is not None and not latest.whole:
            latest.whole = latest.remaining is None and not latest.chunked and not reset
            latest.cut = not latest.whole


def take_line(data: bytearray) -> bytes | None:
    """Moves the first line off `data`, and returns it without its end; None where it is not whole."""
    end = data.find(b"\r\n")
    if end < 0:
        if len(data) > LONGEST_LINE:
            raise Malformed(f"a line without end: {bytes(data[:80])!r}")
        return None
    line = bytes(data[:end])
    del data[: end + 2]
    return line


def take_head(data: bytearray) -> list[bytes] | None:
    """Moves a head off `data`, and returns its lines; None where it is not whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > LONGEST_LINE:
            raise Malformed(f"a head without end: {bytes(data[:80])!r}")
        return None
    lines = bytes(data[:end]).split(b"\r\n")
    del data[: end + 4]
    return lines
