"""Malformed and hostile messages of both sides, as Hypothesis strategies.

There are well-formed messages with a few bytes changed, messages of the grammar's shape with odd parts, and noise:

    @given(pieces=st.lists(good, min_size=1, max_size=5).flatmap(writes))
    def test_...(pieces: list[bytes]) -> None:
        pieces = numbered(pieces)

tests/engine/test_hostile_made.py uses them on a gateway.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.engine.recording_upstream import Malformed, play
from tests.engine.test_differential import ANSWERS, CLOSING_ANSWERS, TWO_CHUNKS, chunked, request
from tests.engine.wire import Answer, answers_in, read_body

NUMBERS = itertools.count()
MARK = b"@@@@@@"  # `numbered` puts a number in its place, which makes each request another one

# What clients send

ODD = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b"\x0b", b"\x0c", b"\x1b", b"\x7f", b"\xff",
    b"\x80", b":", b",", b";", b"0", b"1", b"9", b"-", b"+", b"_", b"x", b"0x", b"/", b"?", b"#", b'"', b"HTTP/1.1",
    b"chunked", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n",
    b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n",
]  # fmt: skip
odd_bytes = st.one_of(st.sampled_from(ODD), st.binary(min_size=1, max_size=4))
FRAMING_HEADERS = [
    b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 44", b"content-length: 5", b"Content-Length: 05",
    b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length:", b"Content-Length: 5 5",
    b"Content-Length: 18446744073709551621", b"Content-Length: 9223372036854775807", b"X-Length: 5", b"X-Strength: 5",
    b"Transfer-Encoding: chunked", b"transfer-encoding: CHUNKED", b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding:",
    b"Transfer-Encoding: xchunked", b"Transfer_Encoding: chunked", b"Connection: Transfer-Encoding",
    b"Connection: Content-Length",
]  # fmt: skip
OTHER_HEADERS = [
    b"Host: h", b"Host: other", b"X-A: 1", b"X-A:", b"X-B: \xe9\xff", b"Connection: close", b"Connection: keep-alive",
    b"Connection: X-A, , X-B", b"Connection: Upgrade", b"Upgrade: h2c", b"Upgrade: websocket", b"TE: trailers",
    b"Expect: 100-continue", b"X-Request-Id: mine", b"Keep-Alive: 5", b"Trailer: X-Sum", b"X-C: " + b"c" * 3000,
]  # fmt: skip
METHODS = [b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"QUERY", b"CONNECT", b"PRI", b"get", b"G\0T", b""]
SMUGGLED = request(b"GET", b"/smuggled")
BODIES = [b"", b"body!", SMUGGLED, b"0\r\n\r\n", b"0\r\n\r\n" + SMUGGLED, b"5\r\nbody!\r\n0\r\n\r\n" + SMUGGLED]


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Draws `data` with bytes put in, taken out, overwritten, doubled or cut off, in one to three places."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        stop = min(len(data), at + draw(st.integers(0, 3)))
        what = draw(st.sampled_from(("in", "out", "over", "double", "cut")))
        if what == "cut":
            data = data[:at] if draw(st.booleans()) else data[:at] + data[at + draw(st.integers(0, 40)) :]
        elif what == "double":
            data = data[:stop] + data[at:]
        else:
            put = b"" if what == "out" else draw(odd_bytes)
            data = data[:at] + put + data[at if what == "in" else stop :]
    return data


@st.composite
def good_requests(draw: st.DrawFn) -> bytes:
    """Draws a well-formed request, without a body, with a Content-Length, or in chunks."""
    target = draw(st.sampled_from([b"/" + MARK, b"/" + MARK, b"/" + MARK + b"?q", b"http://h/" + MARK, b"/ping"]))
    lines = draw(st.lists(st.sampled_from([b"X-A: 1", b"Connection: keep-alive", b"X-B:", b"X-C: a, b"]), max_size=2))
    lines.append(b"X-Marker: " + MARK)
    kind = draw(st.sampled_from(("none", "length", "chunks")))
    if kind == "none":
        return request(draw(st.sampled_from([b"GET", b"HEAD", b"POST"])), target, *lines)
    contents = [b"a", b"hello", SMUGGLED, b"0\r\n\r\n" + SMUGGLED, bytes(range(256)), b"x" * 19_000]
    pieces = draw(st.lists(st.sampled_from(contents), max_size=3))
    if kind == "length":
        return request(b"POST", target, *lines, body=b"".join(pieces))
    ends = draw(st.sampled_from([b"0\r\n\r\n", b"000;a=b\r\n\r\n", b"0\r\nX-Sum: 1\r\n\r\n"]))
    extension = draw(st.sampled_from([b"", b"", b";a", b';a="b"']))
    return request(b"POST", target, *lines, b"Transfer-Encoding: chunked") + chunked(
        *pieces, ends=ends, extension=extension
    )


@st.composite
def odd_requests(draw: st.DrawFn) -> bytes:
    """Draws a request of the grammar's shape, with odd parts in its places; it may be a good one."""
    target = b"/" + MARK
    if draw(st.integers(0, 7)) == 0:
        target = draw(st.sampled_from([b"*", b"http://h", b"", b"a", b"//a", b"/ping", b"/status?a", b"h:1"])) + draw(
            st.sampled_from([b"", MARK, b"%0d%0a", b"\t", b"#a", b"\xe9", b"x" * 9000])
        )
    version = draw(
        st.sampled_from([*[b"HTTP/1.1"] * 20, b"HTTP/1.0", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/1.2", b"http/1.1"])
    )
    blank = draw(st.sampled_from([b" "] * 20 + [b"  ", b"\t"]))
    head = draw(st.sampled_from([b"GET", b"POST", b"HEAD"] * 6 + METHODS)) + blank + target + b" " + version + b"\r\n"
    for line in [
        b"Host: h",
        *draw(st.lists(st.sampled_from(FRAMING_HEADERS + OTHER_HEADERS), max_size=5)),
        b"X-Marker: " + MARK,
    ]:
        head += draw(header_lines(line))
    return head + b"\r\n" + draw(st.sampled_from(BODIES))


@st.composite
def header_lines(draw: st.DrawFn, line: bytes) -> bytes:
    """Draws a header's line with its end, which in one of ten cases is not as it should be."""
    if draw(st.integers(0, 9)):
        return line + b"\r\n"
    name, _, value = line.partition(b": ")
    between = draw(st.sampled_from([b": ", b":", b" : ", b":\t", b":  ", b":\r\n ", b"", b"\0:"]))
    behind = draw(st.sampled_from([b"", b" ", b"\t", b"\x0b", b"\0", b"\r"]))
    return name + between + value + behind + draw(st.sampled_from([*[b"\r\n"] * 4, b"\n", b"\r", b"\r\n\t"]))


SLOW = request(b"GET", b"/" + MARK, play((b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow", 0.01)))
# Strategies of one request's bytes, or of bytes that are none.
good = st.one_of(good_requests(), good_requests(), good_requests(), st.just(SLOW))
bad = good_requests().flatmap(mutated)
any_request = st.one_of(good, bad, odd_requests())
noise = st.one_of(st.binary(max_size=200), st.lists(odd_bytes, max_size=30).map(b"".join))
UNANSWERED = request(b"GET", b"/" + MARK, play())  # the upstream sends nothing for it, and keeps the connection
# Requests with which something once went wrong.
TWO_HOSTS_BETWEEN = SLOW + request(b"GET", b"/" + MARK, b"Host: other") + request(b"GET", b"/" + MARK)
CHUNKED_BEHIND = SLOW + request(b"POST", b"/" + MARK, b"Transfer-Encoding: chunked") + chunked(b"0\r\n\r\n" + SMUGGLED)
_large = request(b"POST", b"/" + MARK, body=b"x" * 39_000)
CUT_BEHIND_A_LARGE_BODY = [_large[:100], _large[100:] + SMUGGLED[:9], SMUGGLED[9:]]


@st.composite
def writes(draw: st.DrawFn, requests: list[bytes], *, whole: bool = True) -> list[bytes]:
    """Draws the requests as a few writes, many of which end near a request's end; if not `whole`, the first of them."""
    data = b"".join(requests)
    near = draw(
        st.lists(st.tuples(st.sampled_from([0, *itertools.accumulate(map(len, requests))]), st.integers(-50, 50)))
    )
    anywhere = draw(st.lists(st.integers(0, len(data)), max_size=2))
    cuts = sorted(min(max(0, at), len(data)) for at in [*(end + by for end, by in near[:3]), *anywhere])
    pieces = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)]) if start < end]
    return pieces if whole else pieces[: draw(st.integers(1, max(1, len(pieces))))]


def numbered(pieces: list[bytes]) -> list[bytes]:
    """Returns the pieces with another number in place of each mark: no two requests of all examples are the same.

    The pieces end where they did, and a mark may go over two of them.
    """
    data = re.sub(MARK, lambda _: b"%06d" % next(NUMBERS), b"".join(pieces))
    ends = [0, *itertools.accumulate(map(len, pieces))]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


# What the upstream sends

STATUS_LINES = [
    *[b"HTTP/1.1 200 OK"] * 8, b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No", b"HTTP/1.1 304 No", b"HTTP/1.1 103 Early",
    b"HTTP/1.1 500 Oops", b"HTTP/1.1 503 No", b"HTTP/1.1 101 Go", b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK",
    b"HTTP/2 200 OK", b"HTTP/1.1 200 O\0K", b"HTTP/1.1 200 O\x1bK", b"HTTP/1.1  200 OK", b"HTTP/1.1 000 OK",
    b"ICE/1.1 200 OK", b"",
]  # fmt: skip
EVENTS = chunked(b"data: a\n\n", b"data: b\n\n", b"data: [DONE]\n\n")
CONTENTS = [
    b"", b"hello", b"hello\r\n", TWO_CHUNKS, EVENTS, EVENTS[:-3], EVENTS[:20], b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
    b"5\r\nhellooo\r\n0\r\n\r\n", b"-5\r\nhello", b"5;\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffffff\r\nhello",
]  # fmt: skip
KNOWN_ANSWERS = [answer for answer in [*ANSWERS.values(), *CLOSING_ANSWERS.values()] if len(answer) < 1000]
BYTES_BEHIND = [b"\r\n", b"\n", b"x", b"0\r\n\r\n", ANSWERS["200"], ANSWERS["204"], b"HTTP/1.1 103 Early\r\n\r\n"]


@dataclass
class Played:
    """What a client asks for, and what the upstream sends for it."""

    method: bytes
    version: bytes
    data: bytes  # what the upstream sends
    cut: int  # where the first of two writes ends
    closes: bool  # the upstream closes the connection behind it

    @property
    def parts(self) -> list[bytes]:
        """The one or two writes."""
        return [part for part in (self.data[: self.cut], self.data[self.cut :]) if part]

    def meaning(self) -> tuple[Answer | None, bytes]:
        """Returns the final answer in it, read strictly, and what lies behind; None where it holds no whole one."""
        data = self.data
        with contextlib.suppress(Malformed, ValueError):
            while (end := data.find(b"\r\n\r\n") + 4) >= 4:
                # What llhttp repairs moves no end: empty lines before it, and names of other protocols than HTTP.
                head = re.sub(rb"\A[\r\n]*(?:HTTP|ICE|RTSP)/", b"HTTP/", data[:end])
                head = re.sub(rb"(?i)chunked", b"chunked", head)
                (answer,), _ = answers_in(head, [b"HEAD"], False)
                data = data[end:]
                if answer.status >= 200:
                    bodiless = self.method == b"HEAD" or answer.status in (204, 304)
                    rest = data if bodiless else read_body(answer, data, self.closes)
                    return (None, b"") if rest is None else (answer, rest)
        return None, b""


@st.composite
def played(draw: st.DrawFn) -> Played:
    """Draws an answer, well-formed, mutated or of odd parts, perhaps with interim ones before it or bytes behind it."""
    if draw(st.booleans()):
        data = draw(st.sampled_from(KNOWN_ANSWERS))
        if draw(st.booleans()):
            data = draw(mutated(data))
    else:
        lines = draw(
            st.lists(
                st.sampled_from([*FRAMING_HEADERS, *OTHER_HEADERS, b"Content-Type: text/event-stream"]), max_size=4
            )
        )
        data = (
            draw(st.sampled_from(STATUS_LINES))
            + b"\r\n"
            + b"".join([draw(header_lines(line)) for line in lines])
            + b"\r\n"
        )
        data += draw(st.sampled_from(CONTENTS))
    before = draw(
        st.sampled_from(
            [b""] * 9 + [b"HTTP/1.1 103 Early\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\n" * 99]
        )
    )
    data = before + data + draw(st.sampled_from([b""] * 9 + BYTES_BEHIND))
    method, version = draw(st.sampled_from([b"GET", b"GET", b"HEAD"])), draw(st.sampled_from([b"1.1", b"1.1", b"1.0"]))
    found = Played(method, version, data, 0, draw(st.booleans()))
    answer, rest = found.meaning()
    # Behind what is not whole the connection is closed, or nobody would know what to wait for. Bytes behind an answer
    # come in one write with its end: later they could only be taken for the next answer.
    found.closes |= answer is None
    found.cut = draw(st.integers(0, len(data) if answer is not None and not rest else max(0, data.find(b"\r\n\r\n"))))
    return found


def _troubles() -> list[Played]:
    """Returns what once went wrong, each before and after a plain answer, whose head is remembered."""
    early, ok = b"HTTP/1.1 103 Early\r\nContent-Length: 0\r\n\r\n", ANSWERS["200"]
    rows = [ok + b"\r\n", ok.replace(b"OK", b"O\0K"), ok.replace(b"200", b"000"), early + ok, early + ok]
    rows.append(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + TWO_CHUNKS + b"\r\n")
    found = [Played(b"GET", b"1.1", ok, 0, False) for _ in rows]
    found += [Played(b"GET", b"1.1", data, len(early) if data == early + ok else 0, False) for data in rows]
    return [*found, Played(b"GET", b"1.1", b"HTTP/1.1 100 Continue\r\n\r\n", 0, True)]


troubles = _troubles()
