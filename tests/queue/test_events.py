"""A stream that arrives in any pieces leaves in whole events, with not a byte more or less."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator

import pytest

from supervisor.local_runpod.queue import RUNPOD_CHUNK_LIMIT
from supervisor.queue import worker
from supervisor.queue.worker import CHUNK_LIMIT, EVENT_LIMIT, cut_chunk

ENDS = ("\n\n", "\r\n\r\n")
# Of 1, 2, 3 and 4 bytes.
LETTERS = 'a"\\ :é߿€日�🙂\U0010ffff'


class Events:
    """A stream, as the worker cuts it."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.begun = False

    def feed(self, data: bytes) -> None:
        self.buffer += data

    def cut(self, *, ended: bool = False) -> str:
        text = cut_chunk(self.buffer, has_begun=self.begun, has_ended=ended)
        self.begun |= bool(text)
        return text


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a short stream meets many times."""
    monkeypatch.setattr(worker, "CHUNK_LIMIT", 40)
    monkeypatch.setattr(worker, "EVENT_LIMIT", 100)


def event(random_: random.Random, end: str, length: int) -> str:
    """About `length` characters: some lines, of which none is empty."""
    line_end = end[: len(end) // 2]
    lines = [random_.choice(("data: ", "event: ", ": ", "x"))]
    for _ in range(length):
        if random_.random() < 0.05:
            lines.append("data:")
        lines[-1] += random_.choice(LETTERS)
    return line_end.join(lines) + end


def pieces(random_: random.Random, data: bytes, longest: int) -> Iterator[bytes]:
    while data:
        at = random_.randint(1, longest)
        yield data[:at]
        data = data[at:]


def cut_all(queue: Events, *, ended: bool = False) -> Iterator[str]:
    while chunk := queue.cut(ended=ended):
        yield chunk


def chunks_of(parts: Iterable[bytes], random_: random.Random | None = None) -> list[str]:
    """As the worker does it: what is there is cut now and then (with a `random_`), the rest at the end."""
    queue = Events()
    found: list[str] = []
    for part in parts:
        queue.feed(part)
        if random_ is None or random_.random() < 0.5:
            found += cut_all(queue)
    found += cut_all(queue, ended=True)
    assert not queue.buffer
    return found


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("end", ENDS, ids=["lf", "crlf"])
def test_chunks_are_whole_events_however_the_stream_is_split(end: str) -> None:
    random_ = random.Random(1)
    for _ in range(600):
        given = [event(random_, end, random_.randint(0, 20)) for _ in range(random_.randint(1, 12))]
        unfinished = random_.choice(["", "data: the end is missing é"])
        stream = ("".join(given) + unfinished).encode()
        chunks = chunks_of(pieces(random_, stream, random_.choice((1, 7, 60, 500))), random_)
        assert "".join(chunks).encode() == stream
        assert chunks[0] == given[0]
        assert all(chunk.endswith(end) for chunk in chunks[:-1])
        for chunk in chunks:
            assert len(chunk.encode()) <= 40 or chunk.count(end) <= 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("end", ENDS, ids=["lf", "crlf"])
def test_no_character_is_torn_where_an_event_is_too_long(end: str) -> None:
    random_ = random.Random(2)
    cuts_inside = 0
    for _ in range(600):
        given = [event(random_, end, random_.choice((3, 30, 200))) for _ in range(random_.randint(1, 4))]
        stream = "".join(given).encode()
        chunks = chunks_of(pieces(random_, stream, random_.choice((1, 7, 60, 2000))), random_)
        assert "".join(chunks).encode() == stream  # a character that is torn would come as another
        assert max(len(chunk.encode()) for chunk in chunks) <= 100
        cuts_inside += sum(not chunk.endswith(end) for chunk in chunks[:-1])
        assert len(given[0].encode()) > 100 or chunks[0] == given[0]
    assert cuts_inside > 600


def test_events_with_both_kinds_of_ends() -> None:
    stream = b"data: 1\r\n\r\ndata: 2\n\ndata: 3\r\n\r\ndata: 4\n\n"
    assert chunks_of([stream]) == ["data: 1\r\n\r\n", "data: 2\n\ndata: 3\r\n\r\ndata: 4\n\n"]


def test_nothing_comes_before_an_event_is_whole() -> None:
    queue = Events()
    for part in (b"data: 1", b"\n", b"data: 2\r", b"\n\r"):
        queue.feed(part)
        assert queue.cut() == ""
    queue.feed(b"\n")
    assert queue.cut() == "data: 1\ndata: 2\r\n\r\n"
    assert queue.cut() == ""
    assert queue.cut(ended=True) == ""


def test_the_first_event_is_not_kept_waiting_and_the_others_go_together() -> None:
    queue = Events()
    queue.feed(b"data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4")
    assert queue.cut() == "data: 1\n\n"
    assert queue.cut() == "data: 2\n\ndata: 3\n\n"
    assert queue.cut() == ""
    queue.feed(b"\n\n")
    assert queue.cut() == "data: 4\n\n"


def test_the_end_gives_what_is_left() -> None:
    assert chunks_of([b"data: 1\n\ndata: 2"]) == ["data: 1\n\n", "data: 2"]
    assert chunks_of([b"data: 1"]) == ["data: 1"]
    assert chunks_of([]) == []


def test_many_events_go_in_chunks_of_the_limit() -> None:
    one = "data: " + "x" * 100 + "é\n\n"
    count = 3 * CHUNK_LIMIT // len(one.encode())
    chunks = chunks_of([one.encode() * count])
    assert "".join(chunks) == one * count
    sizes = [len(chunk.encode()) for chunk in chunks[1:-1]]
    assert sizes
    assert all(CHUNK_LIMIT - len(one.encode()) <= size <= CHUNK_LIMIT for size in sizes)


@pytest.mark.parametrize("length", [CHUNK_LIMIT + 1, EVENT_LIMIT - 20])
def test_an_event_longer_than_a_chunk_stays_whole(length: int) -> None:
    long = "data: " + "x" * length + "\n\n"
    stream = "data: 1\n\n" + long + "data: 3\n\n"
    chunks = chunks_of(pieces(random.Random(3), stream.encode(), 65536))
    assert "".join(chunks) == stream
    assert long in chunks


@pytest.mark.parametrize("first", ["", "data: 1\n\n"], ids=["first", "later"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "in-pieces"])
@pytest.mark.parametrize("text", ["é", "日", "🙂", "ab🙂é日"])
def test_a_longer_one_is_cut_between_two_characters(text: str, at_once: bool, first: str) -> None:
    stream = f"{first}data: {text * (2 * EVENT_LIMIT // len(text.encode()))}\n\ndata: 3\n\n"
    data = stream.encode()
    chunks = chunks_of([data] if at_once else pieces(random.Random(4), data, 65536))
    assert "".join(chunks) == stream
    assert max(len(chunk.encode()) for chunk in chunks) <= EVENT_LIMIT


@pytest.mark.parametrize("text", ['"', "\\", '{"a":"b"},', "x"])
@pytest.mark.parametrize("length", [CHUNK_LIMIT, EVENT_LIMIT - 20, 2 * EVENT_LIMIT])
def test_no_chunk_is_more_than_runpod_takes(text: str, length: int) -> None:
    stream = f"data: {text * (length // len(text))}\n\n"
    for chunk in chunks_of(pieces(random.Random(5), stream.encode(), 65536)):
        assert len(json.dumps({"output": chunk}, ensure_ascii=False).encode()) <= RUNPOD_CHUNK_LIMIT


def test_what_is_no_utf8_is_replaced_and_the_rest_arrives() -> None:
    random_ = random.Random(6)
    for _ in range(300):
        given = [
            random_.choice((b"\xff", b"\x80", b"\xc3", b"\xf0\x9f", b"\xed\xa0\xbd", b"ok", "é".encode()))
            for _ in range(8)
        ]
        stream = b"".join(b"data: " + one + b"\n\n" for one in given)
        chunks = chunks_of(pieces(random_, stream, 9), random_)
        assert "".join(chunks) == stream.decode("utf-8", "replace")


@pytest.mark.parametrize("byte", [b"\x80", b"\xff", b"\xf0"], ids=repr)
def test_noise_without_end_arrives_too(byte: bytes) -> None:
    chunks = chunks_of([b"data: 1\n\n", byte * (2 * EVENT_LIMIT)])
    assert chunks[0] == "data: 1\n\n"
    assert re.fullmatch("�+", "".join(chunks[1:]))
    assert sum(map(len, chunks[1:])) == 2 * EVENT_LIMIT


def test_a_character_that_the_end_cuts_off_is_replaced() -> None:
    assert chunks_of(["data: 🙂".encode()[:-1]]) == ["data: �"]
