"""The client's end of a conversation, byte for byte: what came is parsed strictly, and nothing is repaired.

    seen = converse(port, [b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"], [b"GET"])
    assert seen.finals[0].status == 200
    assert seen.end == "open"

`converse` opens one connection to a port of 127.0.0.1, and closes it. All that was read is bytes.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.engine.recording_upstream import Fields, Malformed, Request, fields

STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([0-9]{3})(?: ([\t -~\x80-\xff]*))?")
PROBE = b"GET /probe HTTP/1.1\r\nHost: probe\r\n\r\n"
PATIENCE = 5.0  # seconds for a whole conversation
QUIET_CALLS = 5  # how often `quiet` is called in a row, before nothing more is expected


@dataclass
class Answer:
    """One answer, interim ones included, with its body decoded."""

    status: int
    reason: bytes | None  # None: not even the blank before it
    headers: Fields
    framing: str = "none"  # how the body's end is known: none (there is no body), length, chunked, close
    body: bytes = b""
    trailers: Fields = field(default_factory=list)

    def value(self, name: bytes) -> bytes:
        """Returns the values of all headers of this name, joined by commas; `name` is in lower case."""
        return b", ".join(value for key, value in self.headers if key.lower() == name)

    @property
    def announces_close(self) -> bool:
        return self.value(b"connection").lower() == b"close" or self.framing == "close"


@dataclass
class Transcript:
    """How a conversation went: what came, and how it ended.

    `end` is open (another request was answered), closed, reset, silent (nothing more comes), or garbled (no HTTP).
    """

    answers: list[Answer]  # those that are whole, without the probe's
    end: str
    received: bytes  # all that came, as it came
    problem: str = ""  # why what came is not a row of whole answers

    @property
    def finals(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status >= 200]

    @property
    def interims(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status < 200]


def answers_in(data: bytes, methods: Sequence[bytes], closed: bool) -> tuple[list[Answer], bytes]:
    """Returns the whole answers in `data`, to requests of these methods, and what lies behind them. Raises Malformed.

    With `closed`, `data` is all that the connection brought, so that an answer may end with it.
    """
    found: list[Answer] = []
    finals = 0
    while (end := data.find(b"\r\n\r\n")) >= 0:
        first, *lines = data[:end].split(b"\r\n")
        match = STATUS_LINE.fullmatch(first)
        if match is None:
            raise Malformed(f"no status line: {first[:80]!r}")
        answer = Answer(int(match[2]), match[3], fields(lines))
        rest = data[end + 4 :]
        method = methods[finals] if finals < len(methods) else b"GET"
        if answer.status >= 200 and answer.status not in (204, 304) and method != b"HEAD":
            whole = read_body(answer, rest, closed)
            if whole is None:
                break
            rest = whole
        found.append(answer)
        finals += answer.status >= 200
        data = rest
    return found, data


def read_body(answer: Answer, data: bytes, closed: bool) -> bytes | None:
    """Fills in the body, and returns what lies behind it; None where it is not complete. Raises Malformed."""
    codings = [value for name, value in answer.headers if name.lower() == b"transfer-encoding"]
    lengths = [value for name, value in answer.headers if name.lower() == b"content-length"]
    if len(codings) + len(lengths) > 1 or codings not in ([], [b"chunked"]):
        raise Malformed(f"an answer with the lengths {codings + lengths}")
    if lengths:
        answer.framing = "length"
        size = int(lengths[0])
        answer.body = data[:size]
        return data[size:] if len(data) >= size else None
    if not codings:
        answer.framing = "close"
        answer.body = data
        return b"" if closed else None
    answer.framing = "chunked"
    pieces = []
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end:
            return None
        match = re.fullmatch(rb"([0-9A-Fa-f]+)[ \t]*(;[\t -~\x80-\xff]*)?", line)
        if match is None:
            raise Malformed(f"no chunk size: {line[:80]!r}")
        size = int(match[1], 16)
        if not size:
            break
        if len(data) < size + 2:
            return None
        if data[size : size + 2] != b"\r\n":
            raise Malformed("a chunk is longer than its size")
        pieces.append(data[:size])
        data = data[size + 2 :]
    answer.body = b"".join(pieces)
    if data[:2] == b"\r\n":
        return data[2:]
    trailers, end, data = data.partition(b"\r\n\r\n")
    if not end:
        return None
    answer.trailers = fields(trailers.split(b"\r\n"))
    return data


def converse(
    port: int,
    pieces: Sequence[bytes | int | None],
    methods: Sequence[bytes],
    *,
    half_close: bool = False,
    probes: bool = True,
    quiet: Callable[[], object] | None = None,
) -> Transcript:
    """Sends the pieces, each in a write of its own, and reads until each of `methods` has its answer.

    A number among the pieces waits until so many answers have come, interim ones included; a negative one until so many
    bytes have. With `half_close`, the sending side is shut down behind the last piece. In the end one more request
    shows whether the connection is still there (not with `probes` off, where the last request is not complete).

    Where it may be that nothing comes, `quiet` takes the place of the deadline, which fails the test: it is called when
    nothing comes, and does something that takes the other side a while. After a few calls in a row the conversation is
    over. None among the pieces waits for such a silence, too.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        return _Conversation(connection, list(pieces), list(methods), half_close, probes, quiet).run()


class _Conversation:
    def __init__(
        self,
        connection: socket.socket,
        pieces: list[bytes | int | None],
        methods: list[bytes],
        half_close: bool,
        probes: bool,
        quiet: Callable[[], object] | None,
    ) -> None:
        self.connection = connection
        self.pieces = pieces
        self.methods = methods
        self.half_close = half_close
        self.probes = probes
        self.half_closed = False
        self.quiet = quiet
        self.received = b""
        self.answers: list[Answer] = []
        self.rest = b""
        self.problem = ""
        self.end = ""  # while neither side has ended it

    def run(self) -> Transcript:
        deadline = time.monotonic() + PATIENCE
        probing = False
        silence = 0
        while True:
            self._parse()
            if self.problem:
                return self._transcript("garbled")
            if self.end:
                break
            finals = sum(answer.status >= 200 for answer in self.answers)
            while self.pieces and self._has_come(self.pieces[0]):
                self.pieces.pop(0)
            if not self.pieces and self.half_close:
                self.half_close = self.probes = False
                self.half_closed = True
                self.connection.shutdown(socket.SHUT_WR)
            done = not self.pieces and finals >= len(self.methods)
            # A client that has said that no more comes is answered, and then the connection is closed.
            if done and not self._last_announces_close() and not self.half_closed:
                if probing:
                    return self._transcript("open", without_probe=True)
                if not self.probes:
                    return self._transcript("open")
                probing = True
                self.pieces.append(PROBE)
                self.methods.append(b"GET")
                continue
            wants_to_send = bool(self.pieces) and isinstance(self.pieces[0], bytes)
            timeout = 0.0 if self.quiet is not None else max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([self.connection], [self.connection] * wants_to_send, [], timeout)
            if readable:
                self._receive()
                silence = 0
            elif writable:
                self._send()
            elif self.quiet is not None:
                if silence == QUIET_CALLS:
                    if not self.pieces or isinstance(self.pieces[0], bytes):  # the other side does not take the piece
                        return self._transcript("silent")
                    self.pieces.pop(0)
                    silence = 0
                silence += 1
                self.quiet()
            else:
                raise AssertionError(f"nothing more came in {PATIENCE} s; received {self.received[-2000:]!r}")
        finals = sum(answer.status >= 200 for answer in self.answers)
        return self._transcript(self.end, without_probe=probing and finals == len(self.methods))

    def _has_come(self, piece: bytes | int | None) -> bool:
        """Returns whether what a number waits for has come: so many answers, or with a negative one so many bytes."""
        if not isinstance(piece, int):
            return False
        return len(self.answers) >= piece if piece >= 0 else len(self.received) >= -piece

    def _last_announces_close(self) -> bool:
        finals = [answer for answer in self.answers if answer.status >= 200]
        return bool(finals) and finals[-1].announces_close

    def _send(self) -> None:
        piece = self.pieces.pop(0)
        assert isinstance(piece, bytes)
        try:
            sent = self.connection.send(piece)
        except (ConnectionResetError, BrokenPipeError):
            self.pieces.clear()
            return
        if sent < len(piece):
            self.pieces.insert(0, piece[sent:])

    def _receive(self) -> None:
        try:
            data = self.connection.recv(1 << 20)
        except ConnectionResetError:
            self.end = "reset"
            return
        self.received += data
        if not data:
            self.end = "closed"

    def _parse(self) -> None:
        try:
            self.answers, self.rest = answers_in(self.received, self.methods, self.end == "closed")
        except Malformed as error:
            self.problem = str(error)

    def _transcript(self, end: str, without_probe: bool = False) -> Transcript:
        answers = self.answers[:-1] if without_probe else self.answers
        head, _, body = self.rest.partition(b"\r\n\r\n")
        left = f"cut: {head.partition(b' ')[2][:3].decode('latin-1')} {body[:80]!r}" if self.rest else ""
        return Transcript(answers, end, self.received, self.problem or left)


def origin_form(target: bytes) -> bytes:
    """Returns a target as an origin server reads it: without the scheme and host of an absolute one."""
    match = re.match(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*", target)
    if match is None:
        return target
    rest = target[match.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def without_hop_by_hop(request: Request) -> Fields:
    """Returns the headers that travel on (docs/development/architecture.md, "The path of a request"), framing included.

    Host, Expect, X-Request-Id and the framing's headers are kept even where `Connection` names them.
    """
    dropped = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade"}
    for value in request.values(b"connection"):
        dropped |= {token.strip(b" \t").lower() for token in value.split(b",")}
    dropped -= {b"host", b"content-length", b"transfer-encoding", b"expect", b"x-request-id"}
    if request.version == b"1.0":
        dropped.add(b"expect")
    return [(name, value) for name, value in request.headers if name.lower() not in dropped]
