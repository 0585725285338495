"""Whatever an answer is, and at whatever moment its engine is lost, its client gets what it can read to the end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httptools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor.gateway.endings import LARGEST_COMMENT, PARTIAL_LIMIT, Body, Events, LateAnswer, Tunnel, is_comment
from supervisor.gateway.errors import Refusal
from supervisor.gateway.frames import GOING_AWAY, INTERNAL_ERROR
from supervisor.gateway.http1 import Dechunker

STOPPED = Refusal(503, "The engine stopped.", "engine_stopped")
SHUTS_DOWN = Refusal(503, "The server shut down.", "shutting_down")
# By route: how a stream of its own ends, and how one ends that was broken off.
DONE = b"data: [DONE]"
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}'
ROUTES = {
    "/v1/completions": DONE,
    "/v1/messages": MESSAGE_STOP,
    "/v1/responses": b'data: {"type":"response.completed"}',
}
often = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


class Chunks(NamedTuple):
    """What a plain reader of chunks makes of some bytes, which may end anywhere."""

    content: bytes
    within: bool  # a chunk, from the end of its size's line to the end of the line behind its data
    between: bool  # chunks: the next byte is the first of a size
    ended: bool  # by the last chunk and the empty line
    rest: bytes  # what lies behind that


def read_chunks(data: bytes) -> Chunks:
    at, content = 0, b""
    while at < len(data):
        line = data.find(b"\r\n", at)
        if line < 0:
            assert b"\n" not in data[at:], "a line feed alone"
            return Chunks(content, False, False, False, b"")
        size = int(data[at:line].split(b";")[0], 16)
        if size == 0:
            end = data[line + 2 : line + 4]
            assert b"\r\n".startswith(end), "trailers, which nobody sent"
            return Chunks(content, end != b"\r\n", False, end == b"\r\n", data[line + 4 :])
        content += data[line + 2 : line + 2 + size]
        end = data[line + 2 + size : line + 4 + size]
        assert b"\r\n".startswith(end), "a chunk is longer than it said"
        if end != b"\r\n":
            return Chunks(content, True, False, False, b"")
        at = line + 4 + size
    return Chunks(content, False, True, False, b"")


def read_events(content: bytes) -> list[list[bytes]]:
    """The lines of each event, as a plain reader of event streams has them: it passes over comments."""
    found: list[list[bytes]] = [[]]
    for line in content.replace(b"\r\n", b"\n").split(b"\n"):
        if not line:
            found.append([])
        elif not line.startswith(b":"):
            found[-1].append(line)
    return [event for event in found if event]


@dataclass
class Stream:
    route: str
    events: list[bytes]  # whole ones
    pieces: list[bytes]  # of the raw bytes, as they are read

    def __repr__(self) -> str:
        """Some are large."""
        return f"<{self.route}, events {list(map(_short, self.events))}, pieces {list(map(_short, self.pieces))}>"

    @property
    def content(self) -> bytes:
        return b"".join(self.events)

    def reads(self) -> list[tuple[bytes, bool]]:
        """Each with whether the bytes so far end within a chunk."""
        raw = b""
        found = []
        for piece in self.pieces:
            raw += piece
            found.append((piece, read_chunks(raw).within))
        return found

    def beginnings(self) -> set[bytes]:
        """Whole events, from the first on."""
        found, content = {b""}, b""
        for event in self.events:
            content += event
            found.add(content)
        return found

    def must_be_well(self, content: bytes) -> None:
        """Whole events, then the error and the end that its route's clients know, unless it had ended by itself."""
        tail = STOPPED.events(self.route.encode())
        if content.endswith(tail):
            assert content.removesuffix(tail) in self.beginnings()
        else:
            assert content in self.beginnings()
            assert content.endswith((DONE + b"\n\n", MESSAGE_STOP + b"\n\n")), "an answer that nobody ended"


def _short(data: bytes) -> str:
    return f"{data[:30]!r}...{data[-30:]!r} ({len(data)} bytes)" if len(data) > 100 else repr(data)


def pieces_of(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = [0, *sorted({cut % len(data) for cut in cuts} - {0}), len(data)] if data else [0]
    return [data[start:end] for start, end in itertools.pairwise(places)]


SMALL = st.text("abc :", min_size=1, max_size=40).map(str.encode)
LARGE = st.integers(PARTIAL_LIMIT - 100, 2 * PARTIAL_LIMIT).map(lambda size: b"x" * size)


@st.composite
def streams(draw: st.DrawFn, *, anywhere: bool = False) -> Stream:
    """`anywhere`: chunks may end within an event's end as well, which no server does on purpose."""
    route = draw(st.sampled_from(sorted(ROUTES)))
    eol = draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    texts = draw(st.lists(st.tuples(st.sampled_from([b"data: ", b"id: 1\ndata: ", b": "]), SMALL | LARGE), max_size=5))
    written = [field + text for field, text in texts]
    if draw(st.booleans()):
        written.append(ROUTES[route])
    events = [eol.join(event.split(b"\n")) + 2 * eol for event in written]
    if draw(st.booleans()):  # empty lines, which nobody asked for
        events = [part for event in events for part in (event, eol)]
    content = b"".join(events)
    cuts = set(draw(st.lists(st.integers(0, 10**7), max_size=6)))
    cuts = {cut % len(content) for cut in cuts} if content else set()
    ends, at = [], 0
    for event in events:
        at += len(event)
        ends.append(at)
        if draw(st.booleans()):
            cuts.add(at)
        if not anywhere:
            cuts -= set(range(at - min(len(event), 2 * len(eol)) + 1, at))
    places = sorted({0, len(content)} | cuts)
    chunks = [content[start:end] for start, end in itertools.pairwise(places)]
    if anywhere:  # a lone line end is a chunk of its own in `test_a_lone_line_end...`
        chunks = _joined(chunks, eol)
    extension = draw(st.sampled_from([b"", b"", b"", b";a=b"]))
    raw = b"".join(chunk(data, extension) for data in chunks) + b"0\r\n\r\n"
    # Some cuts where chunks and events end, where it matters, and some anywhere.
    cuts = set(draw(st.lists(st.integers(0, 10**7), max_size=8)))
    at = 0
    for data in chunks:
        at += len(chunk(data, extension))
        if draw(st.booleans()):
            cuts |= {at, at + draw(st.integers(-6, 6))}
    return Stream(route, events, pieces_of(raw, sorted(cut for cut in cuts if cut >= 0)))


def _joined(chunks: list[bytes], eol: bytes) -> list[bytes]:
    found: list[bytes] = []
    for data in chunks:
        if data == eol and found:
            found[-1] += data
        else:
            found.append(data)
    return found


def test_the_reader_of_this_page_and_the_parser_say_the_same_of_every_byte() -> None:
    """`in_chunk` is the parser's word in the gateway, and this page's here."""

    class Parser:
        within = False

        def on_chunk_header(self) -> None:
            self.within = True

        def on_chunk_complete(self) -> None:
            self.within = False

    raw = chunk(b"data: 1\n\n") + chunk(b":\n\n", b";a=b") + chunk(b"x" * 20) + b"0\r\n\r\n"
    seen = Parser()
    parser = httptools.HttpResponseParser(seen)
    parser.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for at in range(len(raw)):
        parser.feed_data(raw[at : at + 1])
        assert seen.within == read_chunks(raw[: at + 1]).within, raw[: at + 1]


# Event streams


@given(stream=streams() | streams(anywhere=True))
@often
def test_a_stream_that_is_not_broken_off_passes_untouched(stream: Stream) -> None:
    body, seen, got = Events(), b"", b""
    for data, in_chunk in stream.reads():
        seen += data
        got += body.feed(data, in_chunk=in_chunk)
        assert seen.startswith(got)
        assert len(seen) - len(got) < PARTIAL_LIMIT, "what is large is not kept"
    assert got + body.flush() == b"".join(stream.pieces)


@given(stream=streams() | streams(anywhere=True))
@often
def test_a_stream_can_be_ended_well_whenever_its_client_is_not_within_an_event(stream: Stream) -> None:
    body, got = Events(), b""
    for data, in_chunk in [(b"", False), *stream.reads()]:
        got += body.feed(data, in_chunk=in_chunk)
        ending = body.ending(STOPPED, stream.route.encode())
        if ending is None:
            assert len(got) >= PARTIAL_LIMIT, "nothing here was too large to be kept"
            continue
        chunks = read_chunks(got + ending)
        assert chunks.ended
        assert chunks.rest == b""
        stream.must_be_well(chunks.content)


@given(stream=streams())
@often
def test_only_a_client_within_an_event_is_cut(stream: Stream) -> None:
    body, got = Events(), b""
    for data, in_chunk in stream.reads():
        got += body.feed(data, in_chunk=in_chunk)
        if body.ending(STOPPED, stream.route.encode()) is None:
            chunks = read_chunks(got)
            assert not chunks.between or chunks.content not in stream.beginnings()


@given(stream=streams())
@often
def test_the_stream_of_an_http_1_0_client_ends_likewise(stream: Stream) -> None:
    reads = stream.reads()
    for moment in range(len(reads) + 1):  # each from the beginning: to end it changes what it knows
        body = Events(Dechunker())
        got = b"".join(body.feed(data, in_chunk=in_chunk) for data, in_chunk in reads[:moment])
        assert stream.content.startswith(got)
        ending = body.ending(STOPPED, stream.route.encode())
        if ending is None:
            assert len(b"".join(stream.pieces[:moment])) >= PARTIAL_LIMIT, "nothing here was too large to be kept"
        else:
            stream.must_be_well(got + ending)


@given(stream=streams())
@often
def test_an_http_1_0_client_gets_the_content_alone(stream: Stream) -> None:
    body = Events(Dechunker())
    got = b"".join(body.feed(data, in_chunk=in_chunk) for data, in_chunk in stream.reads())
    assert got + body.flush() == stream.content


@given(stream=streams(), http11=st.booleans(), moments=st.sets(st.integers(0, 12)))
@often
def test_a_comment_may_stand_wherever_one_is_offered(stream: Stream, http11: bool, moments: set[int]) -> None:
    body, got = Events(None if http11 else Dechunker()), b""
    for number, (data, in_chunk) in enumerate(stream.reads()):
        got += body.feed(data, in_chunk=in_chunk)
        if number in moments:
            got += body.filler()
    got += body.flush()
    content = got
    if http11:
        chunks = read_chunks(got)
        assert chunks.ended
        content = chunks.content
    assert read_events(content) == read_events(stream.content)


@given(
    texts=st.lists(SMALL | LARGE, max_size=5),
    together=st.sets(st.integers(0, 5)),
    cuts=st.lists(st.integers(0, 10**7), max_size=8),
)
@often
def test_of_vllms_own_streams_no_event_that_came_whole_is_dropped(
    texts: list[bytes], together: set[int], cuts: list[int]
) -> None:
    """A chunk for each event, or for some: none ends within one."""
    events = [b"data: %b\n\n" % text for text in texts]
    chunks: list[bytes] = []
    for number, event in enumerate(events):
        if number in together and chunks:
            chunks[-1] += event
        else:
            chunks.append(event)
    raw = b"".join(map(chunk, chunks)) + b"0\r\n\r\n"
    stream = Stream("/v1/completions", events, pieces_of(raw, cuts))
    body, got, seen = Events(), b"", b""
    for data, in_chunk in stream.reads():
        seen += data
        got += body.feed(data, in_chunk=in_chunk)
        ending = body.ending(STOPPED, b"/v1/completions")
        arrived = [end for end in _chunk_ends(chunks) if end <= len(seen)]
        whole = read_chunks(seen[: arrived[-1]]).content if arrived else b""
        if ending is not None:
            assert read_chunks(got + ending).content.startswith(whole)


def _chunk_ends(chunks: list[bytes]) -> list[int]:
    found, at = [], 0
    for data in chunks:
        at += len(chunk(data))
        found.append(at)
    return found


def test_what_looks_like_the_end_of_a_chunk_within_one_is_none() -> None:
    """Empty lines of an event stream whose lines end as a chunk's do."""
    small = Events()
    assert small.feed(b"40\r\ndata: x\r\n\r\n\r\n", in_chunk=True) == b""
    ending = small.ending(STOPPED, b"/v1/completions")
    assert ending is not None
    assert read_chunks(ending).content == STOPPED.events(b"/v1/completions")
    large = Events()
    large.feed(b"20000\r\ndata: " + b"x" * PARTIAL_LIMIT, in_chunk=True)
    large.feed(b"\r\n\r\n\r\n", in_chunk=True)
    assert large.ending(STOPPED, b"/v1/completions") is None


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("behind", [b"", b"0", b"0\r", b"0\r\n", b"0\r\n\r"])
def test_a_stream_that_has_ended_by_itself_has_no_error(route: str, behind: bytes) -> None:
    body = Events()
    got = body.feed(
        chunk(b"data: 1\n\n") + chunk(ROUTES[route] + b"\n\n") + behind, in_chunk=behind[:2] == b"0\r\n"[:2]
    )
    ending = body.ending(STOPPED, route.encode())
    assert ending is not None
    chunks = read_chunks(got + ending)
    assert chunks.ended
    # Of a Responses stream the end is not known by its bytes.
    assert chunks.content.endswith(ROUTES[route] + b"\n\n") == (route != "/v1/responses")


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_a_lone_line_end_in_a_chunk_of_its_own_ends_no_event(eol: bytes) -> None:
    body = Events()
    got = body.feed(chunk(b"data: a"), in_chunk=False) + body.feed(chunk(eol), in_chunk=False)
    ending = body.ending(STOPPED, b"/v1/completions")
    assert ending is not None
    Stream("/v1/completions", [b"data: a" + eol + b"data: b" + 2 * eol], []).must_be_well(
        read_chunks(got + ending).content
    )


# Answers that are no streams


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 10**7), max_size=5))
@often
def test_what_is_no_stream_passes_and_can_only_be_cut(data: bytes, cuts: list[int]) -> None:
    plain, old = Body(), Body(Dechunker())
    raw = (chunk(data) if data else b"") + b"0\r\n\r\n"
    pieces = pieces_of(raw, cuts)
    assert b"".join(plain.feed(piece, in_chunk=False) for piece in pieces) == raw
    assert b"".join(old.feed(piece, in_chunk=False) for piece in pieces) == data
    for body in (plain, old):
        assert (body.flush(), body.filler(), body.ending(STOPPED, b"/")) == (b"", b"", None)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    content=JSON,
    indent=st.sampled_from([None, 2]),
    chunked=st.booleans(),
    cuts=st.lists(st.integers(0, 10**7), max_size=5),
    route=st.sampled_from(sorted(ROUTES)),
)
@often
def test_a_late_answer_becomes_one_event(
    content: Any, indent: int | None, chunked: bool, cuts: list[int], route: str
) -> None:
    raw = json.dumps({"error": content}, indent=indent).encode()
    body = LateAnswer(route.encode(), chunked=chunked)
    for piece in pieces_of(chunk(raw) + b"0\r\n\r\n" if chunked else raw, cuts):
        assert body.feed(piece, in_chunk=False) == b""
    chunks = read_chunks(body.flush())
    assert chunks.ended
    events = chunks.content.split(b"\n\n")
    assert events.pop() == b""
    if route == "/v1/completions":
        assert events.pop() == DONE
    (event,) = events
    name, _, data = event.rpartition(b"data: ")
    assert name == (b"" if route == "/v1/completions" else b"event: error\n")
    assert json.loads(data) == {"error": content}


def test_a_late_answer_with_windows_line_ends_becomes_one_event() -> None:
    body = LateAnswer(b"/v1/completions", chunked=False)
    body.feed(b'{\r\n"error": 1\r\n}', in_chunk=False)
    assert read_chunks(body.flush()).content == b'data: { "error": 1 }\n\n' + DONE + b"\n\n"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("came", [b"", b'{"error": '])
def test_a_late_answer_that_never_came_whole_is_our_error_alone(route: str, came: bytes) -> None:
    body = LateAnswer(route.encode(), chunked=False)
    body.feed(came, in_chunk=False)
    chunks = read_chunks(body.filler() + body.ending(STOPPED, route.encode()))
    assert chunks.ended
    assert chunks.content == b":\n\n" + STOPPED.events(route.encode())


# WebSockets


class Frame(NamedTuple):
    opcode: int
    payload: bytes
    masked: bool = False
    final: bool = True

    def written(self) -> bytes:
        size = len(self.payload)
        short = size if size < 126 else 126 if size < 2**16 else 127
        length = b"" if size < 126 else size.to_bytes(2 if size < 2**16 else 8)
        mask = b"mask" if self.masked else b""
        return bytes((self.final << 7 | self.opcode, self.masked << 7 | short)) + length + mask + self.payload


def read_frames(data: bytes) -> list[Frame]:
    """Whole ones; half a frame fails."""
    found = []
    while data:
        final, opcode, masked, size, at = data[0] >> 7, data[0] & 15, data[1] >> 7, data[1] & 127, 2
        if size >= 126:
            more = 2 if size == 126 else 8
            size, at = int.from_bytes(data[2 : 2 + more]), 2 + more
        at += 4 * masked
        assert len(data) >= at + size, "half a frame"
        found.append(Frame(opcode, data[at : at + size], bool(masked), bool(final)))
        data = data[at + size :]
    return found


FRAMES = st.builds(
    Frame,
    st.sampled_from([0, 1, 2, 9, 10]),
    st.binary(max_size=130) | st.sampled_from([125, 126, 127, 65_535, 65_536, 70_000]).map(lambda size: b"y" * size),
    st.booleans(),
    st.booleans(),
)


@given(
    frames=st.lists(FRAMES, max_size=5),
    cuts=st.lists(st.integers(0, 10**7), max_size=10),
    refusal=st.sampled_from([STOPPED, SHUTS_DOWN]),
)
@often
def test_a_websocket_is_closed_by_a_frame_between_two_others(
    frames: list[Frame], cuts: list[int], refusal: Refusal
) -> None:
    raw = b"".join(frame.written() for frame in frames)
    ends, at = {0}, 0
    for frame in frames:
        at += len(frame.written())
        ends.add(at)
    body, got = Tunnel(), b""
    for piece in [b"", *pieces_of(raw, cuts)]:
        assert body.feed(piece, in_chunk=False) == piece
        got += piece
        ending = body.ending(refusal, b"/v1/realtime")
        if len(got) not in ends:
            assert ending == b"" == body.flush()
            continue
        for end, code in (
            (ending, GOING_AWAY if refusal is SHUTS_DOWN else INTERNAL_ERROR),
            (body.flush(), INTERNAL_ERROR),
        ):
            last = read_frames(got + end)[-1]
            assert (last.opcode, last.final, last.masked) == (8, True, False)
            assert int.from_bytes(last.payload[:2]) == code
            assert len(last.payload) <= 125


@given(frames=st.lists(FRAMES, max_size=3), cuts=st.lists(st.integers(0, 10**7), max_size=6))
@often
def test_nothing_is_added_behind_vllms_own_close(frames: list[Frame], cuts: list[int]) -> None:
    body = Tunnel()
    for piece in pieces_of(b"".join(frame.written() for frame in [*frames, Frame(8, b"\x03\xe8")]), cuts):
        body.feed(piece, in_chunk=False)
    assert body.flush() == b""


def test_a_websocket_that_vllm_has_closed_is_not_closed_again() -> None:
    body = Tunnel()
    body.feed(Frame(8, b"\x03\xe8").written(), in_chunk=False)
    assert body.ending(STOPPED, b"/v1/realtime") == b""


def test_the_reason_of_a_close_is_text_however_long_it_is() -> None:
    ending = Tunnel().ending(Refusal(503, 100 * "é", "engine_stopped"), b"/v1/realtime")
    read_frames(ending)[0].payload[2:].decode()


# Comments


@given(text=st.text("abc ", max_size=30).map(str.encode), framed=st.booleans())
@often
def test_a_comment_is_told_from_an_event(text: bytes, framed: bool) -> None:
    for line, expected in ((b":" + text, True), (b"data: " + text, False), (b"event: " + text, False)):
        event = line + b"\n\n"
        assert is_comment(chunk(event) if framed else event) == expected


def test_what_is_large_is_no_comment() -> None:
    size = LARGEST_COMMENT - len(b":\n\n")
    assert is_comment(b":" + b"x" * size + b"\n\n")
    assert not is_comment(b":" + b"x" * (size + 1) + b"\n\n")
    assert not is_comment(b"")
