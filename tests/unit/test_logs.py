"""What lines look like, and which of them are told."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor import logs
from supervisor import output as output_module
from supervisor.gateway.access import BATCH, NO_TIME, AccessLog, shown_path
from supervisor.lines import LineStyle, VllmLines
from supervisor.output import Output
from supervisor.secrets import Mask
from tests.harness import wait_until

MASK = Mask({"HF_TOKEN": "very-secret-value"})
JSON, TEXT = LineStyle(MASK, as_json=True), LineStyle(MASK)
QUEUE = LineStyle(MASK, as_json=True, queue_mode=True)


class Told:
    """A log, and what it wrote."""

    def __init__(self, form: LineStyle) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `lines`
        self.log = logs.Log(form, Output(self.file.fileno(), form.lost_line))
        self.logger = logging.Logger("supervisor.engine")
        self.logger.addHandler(self.log)

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    @cached_property
    def lines(self) -> list[str]:
        self.log.flush()
        self.log.output.close()
        with self.file:
            self.file.seek(0)
            return self.file.read().decode().splitlines()


@pytest.fixture
def text() -> Iterator[Told]:
    told = Told(TEXT)
    yield told
    assert told.lines is not None


def test_a_line_of_text(text: Told) -> None:
    text.logger.info("loading %s", "m")
    text.logger.warning("cut", extra={"request": "abc"})
    first, second = text.lines
    assert first[8:] == " supervisor: loading m"
    assert second[8:] == " supervisor WARNING: cut (request abc)"


def test_a_line_of_json() -> None:
    told = Told(JSON)
    told.logger.warning("two\nlines", extra={"request": "abc", "fields": {"phases": [1]}})
    (line,) = told.lines
    content = json.loads(line)
    assert content.pop("time")[-1] == "Z"
    assert content == {
        "level": "WARNING", "logger": "supervisor.engine", "message": "two\nlines", "requestId": "abc", "phases": [1],
    }  # fmt: skip


def test_runpods_shape_has_a_request_id_in_each_line() -> None:
    told = Told(QUEUE)
    told.logger.info("hello")
    assert json.loads(told.lines[0])["requestId"] is None


@pytest.mark.parametrize("form", [TEXT, JSON])
def test_no_secret_is_in_any_part(form: LineStyle) -> None:
    told = Told(form)
    told.logger.error("very-secret-value", extra={"request": "very-secret-value"})
    try:
        raise ValueError("very-secret-value")
    except ValueError:
        told.logger.exception("failed")
    lines = told.lines
    assert "ValueError" in "".join(lines)
    assert "secret-value" not in "".join(lines)


# What comes again and again


def test_failures_that_are_alike_are_told_ten_times_and_then_counted(text: Told) -> None:
    for number in range(500):
        text.logger.warning("vLLM closed the connection after %d bytes", number, extra={"request": f"r{number}"})
    text.logger.warning("something else")
    lines = text.lines
    assert len(lines) == logs.REPEAT_LIMIT + 2
    assert "something else" in lines[-2]
    assert lines[-1].endswith("490 more of these in 10 s: vLLM closed the connection after 499 bytes")


def test_how_many_were_held_back_is_told_though_nothing_else_is_logged(
    text: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "REPEAT_SECONDS", 0.5)
    for number in range(logs.REPEAT_LIMIT + 5):
        text.logger.warning("vLLM closed the connection after %d bytes", number)
    wait_until(lambda: not text.log.repeats.kinds, "what was held back")
    assert " 5 more of these in 0.5 s: vLLM closed the connection after 14 bytes" in text.lines[-1]


def test_after_a_while_they_are_told_again() -> None:
    repeats = logs.Repeats()
    assert [repeats.allow("kind", f"line {at}", 0.1 * at) for at in range(12)] == [True] * 10 + [False] * 2
    assert repeats.pop_due(9.9) == []
    assert repeats.pop_due(10.0) == [("line 11", 2)]
    assert repeats.pop_due(20.0) == []
    assert repeats.allow("kind", "line", 20.0)


def test_a_flood_of_different_kinds_is_bounded() -> None:
    repeats = logs.Repeats()
    assert all(repeats.allow(number, "line", 0.0) for number in range(10 * logs.MAX_KINDS))
    assert len(repeats.kinds) == logs.MAX_KINDS


def test_what_is_an_event_of_its_own_is_told_each_time(text: Told) -> None:
    for number in range(50):
        text.logger.warning("job failed", extra={"request": f"job{number}", "each": True})
        text.logger.info("loading")
    assert len(text.lines) == 100


def test_a_clients_id_can_make_no_line_and_no_colour(text: Told) -> None:
    text.logger.info("cut", extra={"request": "a\x85b\x1b[31m"})
    assert text.lines[0].endswith(r"(request a\x85b\x1b[31m)")


# Readers


class Pipe:
    """An output to a pipe that nobody reads until `read()`."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.output = Output(self.writing, TEXT.lost_line)
        self.received = bytearray()
        self._reader = threading.Thread(target=self._read)

    def _read(self) -> None:
        while data := os.read(self.reading, 1 << 20):
            self.received.extend(data)

    def read(self) -> None:
        self._reader.start()

    def waits(self) -> int:
        """Bytes."""
        return self.output._unwritten_bytes

    def lost(self) -> list[int]:
        found = re.findall(rb"supervisor WARNING: (\d+) lines were lost here: nobody read the log\n", self.received)
        return [int(count) for count in found]

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()
        os.close(self.writing)
        if self._reader.ident is not None:
            self._reader.join()
        os.close(self.reading)  # what still waits can go on, into nothing


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    with Pipe() as pipe:
        yield pipe


LINE = b"x" * 999 + b"\n"


def test_a_reader_that_stands_still_costs_lines_and_one_line_says_how_many(pipe: Pipe) -> None:
    """Nobody waits for it: neither who logs nor vLLM's pump."""
    many = output_module.BACKLOG_BYTES // len(LINE) + 500
    for _ in range(many):
        pipe.output.put(LINE)
    pipe.output.put(b"small\n")  # there would be room for it, but it would stand before the line that counts
    assert pipe.output.lost_count > 100
    pipe.read()
    wait_until(lambda: not pipe.waits() and not pipe.output.lost_count, "its having read")
    pipe.output.put(b"goes on\n")
    wait_until(lambda: pipe.received.endswith(b"goes on\n"), "the last line")
    (lost,) = pipe.lost()
    assert pipe.received.count(LINE) + lost == many + 1
    assert re.fullmatch(rb"[^\n]* lines were lost here: nobody read the log", pipe.received.splitlines()[-2])


def test_what_waits_is_bounded_in_bytes_and_what_is_lost_is_counted_in_lines_however_they_come(pipe: Pipe) -> None:
    """The access log hands over a hundred lines in one piece, and vLLM's pump a thousand."""
    count = 0
    for number in range(5000):
        lines = [b"%06d of %06d %b\n" % (line, number, b"x" * 300) for line in range(number % 50 + 1)]
        pipe.output.put(b"".join(lines), len(lines))
        count += len(lines)
        assert pipe.waits() <= output_module.BACKLOG_BYTES
    assert pipe.waits() > output_module.BACKLOG_BYTES - 50 * 400
    pipe.read()
    wait_until(pipe.lost, "the line that counts")
    (lost,) = pipe.lost()
    assert pipe.received.count(b" of ") + lost == count


def test_a_line_longer_than_all_that_may_wait_is_one_that_was_lost(pipe: Pipe) -> None:
    pipe.read()
    pipe.output.put(b"x" * output_module.BACKLOG_BYTES + b"\n")
    wait_until(pipe.lost, "the line that counts")
    assert pipe.lost() == [1]


def test_lines_that_went_at_once_and_lines_that_waited_come_in_order(pipe: Pipe) -> None:
    """Some reads are small and late: the pipe is full now and then."""
    for number in range(100_000):
        pipe.output.put(b"%d\n" % number)
        if number == 75_000:
            assert pipe.waits()
            pipe.read()
    wait_until(lambda: pipe.received.endswith(b"\n99999\n"), "the last line")
    assert [int(line) for line in pipe.received.split()] == list(range(100_000))


def test_who_shares_our_stderr_may_still_wait_for_its_reader(pipe: Pipe) -> None:
    """vLLM, the shell: O_NONBLOCK would be theirs as well."""
    pipe.output.put(LINE)
    assert os.get_blocking(pipe.writing)
    assert os.read(pipe.reading, 4096) == LINE
    assert not pipe.waits()


def test_who_puts_lines_into_a_pipe_with_room_writes_them_itself(pipe: Pipe) -> None:
    """No thread takes turns with the event loop."""
    pipe.output.put(LINE)
    assert os.read(pipe.reading, 4096) == LINE  # would wait for ever, were the thread needed and stopped
    for _ in range(1000):
        pipe.output.put(LINE)
    assert 0 < pipe.waits() < 1000 * len(LINE)
    pipe.read()


def test_where_a_pipe_can_not_be_opened_again_a_thread_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, or a system without /proc."""
    monkeypatch.setattr(os, "open", lambda *_: os.stat("/nowhere"))  # raises OSError
    with Pipe() as pipe:
        pipe.output.put(LINE)
        assert os.read(pipe.reading, 4096) == LINE


def test_an_output_that_does_not_block_loses_nothing() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    output = Output(writing, TEXT.lost_line)
    output.put(b"x" * 299_999 + b"\n")
    received = b""
    while not received.endswith(b"\n"):
        received += os.read(reading, 10_000)
    assert len(received) == 300_000
    output.close()
    os.close(writing)
    os.close(reading)


def test_a_reader_that_is_gone_or_a_line_that_cant_be_made_is_not_the_end(text: Told) -> None:
    text.logger.info("%d", "no number")
    text.logger.info("goes on")
    lines = text.lines
    assert "a line was lost (TypeError" in lines[0]
    assert lines[1].endswith("goes on")


def test_closing_does_not_wait_for_a_reader_for_long() -> None:
    reading, writing = os.pipe()
    output = Output(writing, TEXT.lost_line)
    output.put(b"x" * 1_000_000)
    output.close()
    os.close(reading)  # and now it can go on, into nothing


# vLLM's


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("(EngineCore pid=7) WARNING 11-26 03:16:45 [core.py:77] slow", "WARNING"),
        ("(Worker_TP0 pid=7) (EngineCore pid=7) ERROR 11-26 03:16:45 [core.py:77] no", "ERROR"),
        ("INFO:     Started server process [7]", "INFO"), ("DEBUG 11-26 03:16:45 [x.py:1] ...", "DEBUG"),
        ("(APIServer pid=7) Traceback (most recent call last):", "ERROR"),
        ("ERRORS are described elsewhere", "INFO"), ("no level at all", "INFO"), ("", "INFO"),
    ],
)  # fmt: skip
def test_vllms_lines_keep_their_level(line: str, level: str) -> None:
    content = json.loads(VllmLines(JSON, is_terminal=False)(line.encode(), line))
    assert (content["level"], content["logger"], content["message"]) == (level, "vllm", line)


def test_vllms_own_colours_hide_no_level_and_are_not_in_json() -> None:
    """VLLM_LOGGING_COLOR=1 and FORCE_COLOR=1 have it colour its lines, though it writes into a pipe."""
    line = "\x1b[1;36m(APIServer pid=7)\x1b[0;0m \x1b[33mWARNING\x1b[0m \x1b[90m11-26 03:16:45\x1b[39m [core.py:7] slow"
    content = json.loads(VllmLines(JSON, is_terminal=False)(line.encode(), line))
    told = (content["level"], content["message"])
    assert told == ("WARNING", "(APIServer pid=7) WARNING 11-26 03:16:45 [core.py:7] slow")
    shown = VllmLines(TEXT, is_terminal=True)(line.encode(), line).decode()
    assert shown == f"\x1b[33m{line}\x1b[0m\n"
    assert VllmLines(TEXT, is_terminal=False)(line.encode(), line).decode() == f"{line}\n"


def test_what_follows_a_traceback_has_its_level_until_another_comes() -> None:
    lines = ["(A pid=1) Traceback (most recent call last):", '  File "x.py"', "ValueError: no", "INFO 11-26 [x] on"]
    shown = VllmLines(JSON, is_terminal=False)
    levels = [json.loads(shown(line.encode(), line))["level"] for line in lines]
    assert levels == ["ERROR", "ERROR", "ERROR", "INFO"]


def test_of_a_progress_bar_json_has_its_last_state() -> None:
    line = "Loading: 0%\rLoading: 50%\rLoading: 100%"
    assert json.loads(VllmLines(JSON, is_terminal=False)(line.encode(), line))["message"] == "Loading: 100%"


def test_text_is_vllms_own_bytes_and_on_a_terminal_steps_back_but_for_what_is_wrong() -> None:
    assert VllmLines(TEXT, is_terminal=False)(b"\xff as it is", "") == b"\xff as it is\n"
    shown = VllmLines(TEXT, is_terminal=True)
    assert shown(b"INFO 1", "INFO 1") == b"\x1b[2mINFO 1\x1b[0m\n"
    assert shown(b"ERROR 1", "ERROR 1") == b"\x1b[31mERROR 1\x1b[0m\n"
    assert VllmLines(LineStyle(MASK, colour=False), is_terminal=True)(b"ERROR 1", "ERROR 1") == b"ERROR 1\n"


BANNER = """\
(APIServer pid=9) INFO 11-30 03:30:37 [api_utils.py:347]
(APIServer pid=9) INFO 11-30 03:30:37 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0
(APIServer pid=9) INFO 11-30 03:30:37 [api_utils.py:286] non-default args: {'model_tag': 'demo'}
(EngineCore pid=7) INFO 11-30 03:30:40 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='demo'
(EngineCore pid=7) INFO 11-30 03:30:40 [ompmultiprocessing.py:185] OpenMP thread binding info:

	local_world_size=1, reserve_cpu_num=1
(APIServer pid=9) INFO 11-30 03:30:54 [launcher.py:186] Available routes are:
(APIServer pid=9) INFO 11-30 03:30:54 [launcher.py:195] Route: /openapi.json, Methods: GET, HEAD
INFO:     Started server process [9]
(APIServer pid=9) WARNING 11-30 03:30:54 [launcher.py:195] Route: /twice is there
INFO:     Application startup complete.
(APIServer pid=9) ERROR 11-30 03:30:54 [x.py:1] █ no
INFO:     127.0.0.1:1 - "GET /docs HTTP/1.1" 200 OK""".splitlines()


def test_on_a_terminal_banner_and_routes_are_folded_and_nothing_else() -> None:
    shown = VllmLines(LineStyle(MASK, colour=False, fold=True), is_terminal=True)
    lines = "".join(shown(line.encode(), line).decode() for line in BANNER).splitlines()
    assert [line for line in lines if not line.startswith("...")] == [BANNER[at] for at in (2, 4, 6, 10, 12, 13)]
    assert [line.split()[1:3] for line in lines if line.startswith("...")] == [
        ["2", "lines"], ["1", "line"], ["3", "lines"], ["1", "line"],
    ]  # fmt: skip
    assert "SUPERVISOR_LOG_LEVEL=debug" in lines[0]


@pytest.mark.parametrize(
    ("form", "terminal"),
    [(LineStyle(MASK, fold=True), False), (LineStyle(MASK), True), (LineStyle(MASK, as_json=True, fold=True), True)],
)
def test_elsewhere_nothing_is_folded(form: LineStyle, terminal: bool) -> None:
    shown = VllmLines(form, is_terminal=terminal)
    assert all(shown(line.encode(), line) for line in BANNER)


# The access log

# What the loop's clock lacks.
UNIX = 1.7e9


def record(
    *,
    began: float = 7000.0,
    method: bytes = b"POST",
    path: bytes = b"/v1/completions",
    seconds: float = 1.5,
    first: float = 0.25,
    client: bytes = b"10.0.0.3",
    note: str = "",
    **more: object,
) -> Any:
    """A request that is over (gateway/record.py). Times in seconds; `first` is 0 where there was no first byte."""
    usual = {
        "status": 200,
        "sent": 13400,
        "request_id": b"abc",
        "client_left": False,
        "cache_word": "",
        "marks": (),
        "replayed": False,
        "held_state": "",
    }
    return types.SimpleNamespace(
        request=types.SimpleNamespace(method=method, path=path), address=client, code=note, began=began,
        over_at=began + seconds, first_at=first and (began if first == NO_TIME else began + first), **(usual | more),
    )  # fmt: skip


class Access:
    """An access log, and what it wrote."""

    def __init__(self, form: LineStyle) -> None:
        self.told: list[tuple[bytes, int]] = []
        self.log = AccessLog(None, form, lambda lines, count: self.told.append((lines, count)), own_prefix=b"0c5f")  # type: ignore[arg-type]
        self.log.unix_offset = lambda: UNIX  # type: ignore[method-assign]

    def lines(self, *records: Any) -> list[str]:
        self.told.clear()
        self.log.batch = list(records)
        self.log.flush()
        ((data, count),) = self.told
        lines = data.decode().split("\n")
        assert count == len(records) == len(lines) - 1
        assert lines.pop() == ""
        return lines


def lines_of(form: LineStyle, *records: Any) -> list[str]:
    return Access(form).lines(*records)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, ": POST /v1/completions 200 in 1.500 s, first byte after 0.250 s, 13.4 kB, from 10.0.0.3 (request abc)"),
        ({"first": 1.5, "sent": 999}, ": POST /v1/completions 200 in 1.500 s, 999 B, from 10.0.0.3 (request abc)"),
        ({"status": 503, "first": 0.0, "note": "12.0 s held, engine_unavailable", "client": b"", "sent": 2_500_000},
         " WARNING: POST /v1/completions 503 in 1.500 s, 2.5 MB, 12.0 s held, engine_unavailable (request abc)"),
        ({"path": b"/\xff\x1b[31m\n", "first": 0.0, "sent": 0},
         r": POST /\\xff\x1b[31m\n 200 in 1.500 s, 0 B, from 10.0.0.3 (request abc)"),
        ({"first": 0.0, "sent": 999_499}, ": POST /v1/completions 200 in 1.500 s, 999 kB, from 10.0.0.3 (request abc)"),
        ({"first": 0.0, "sent": 999_500}, ": POST /v1/completions 200 in 1.500 s, 1 MB, from 10.0.0.3 (request abc)"),
        ({"first": 0.0, "sent": 5 * 10**12},
         ": POST /v1/completions 200 in 1.500 s, 5000 GB, from 10.0.0.3 (request abc)"),
        ({"path": b"/very-secret-value", "first": 0.0},
         ": POST /**** 200 in 1.500 s, 13.4 kB, from 10.0.0.3 (request abc)"),
    ],
)  # fmt: skip
def test_a_line_for_each_answer(given: dict[str, Any], line: str) -> None:
    assert lines_of(TEXT, record(**given))[0][8:] == f" supervisor{line}"


def test_in_json_its_numbers_stand_by_themselves() -> None:
    content = json.loads(lines_of(JSON, record())[0])
    assert content["message"] == "POST /v1/completions 200"
    assert (content["logger"], content["requestId"], content["client"]) == ("supervisor.access", "abc", "10.0.0.3")
    assert (content["seconds"], content["first_byte_seconds"], content["bytes"]) == (1.5, 0.25, 13400)


@pytest.mark.parametrize("form", [TEXT, JSON])
def test_a_secret_in_a_clients_id_is_masked(form: LineStyle) -> None:
    assert "very-secret-value" not in lines_of(form, record(request_id=b"very-secret-value"))[0]


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_becomes_a_secret_later_is_one_from_then_on(form: str) -> None:
    """Keys are read again on SIGHUP; what is kept of lines before that must not tell them."""
    mask = Mask({})
    access = Access(LineStyle(mask, as_json=form == "json"))
    one = record(path=b"/a-key-of-tomorrow", request_id=b"a-key-of-tomorrow")
    assert access.lines(one)[0].count("a-key-of-tomorrow") == (2 if form == "text" else 3)
    mask.add(["a-key-of-tomorrow"])
    access.log.forget()
    assert "a-key-of-tomorrow" not in access.lines(one)[0]


def documented(form: LineStyle, one: Any) -> str:
    """The line as docs/logs.md has it, made of all its parts anew."""
    level = "INFO" if one.status < 500 else "WARNING"
    path, client, method = shown_path(form.mask, one.request.path), one.address.decode(), one.request.method.decode()
    at, seconds, first = (
        one.over_at + UNIX,
        one.over_at - one.began,
        one.first_at and (one.first_at - one.began or NO_TIME),
    )
    request_id = one.request_id.decode("latin-1")
    if not re.fullmatch("0c5f[0-9A-Za-z]*", request_id):
        request_id = form.mask(request_id)
    what, plain = f"{method} {path} {one.status}", replace(form, mask=str)
    if form.as_json:
        return plain.json(
            level, "supervisor.access", what, at, request_id,
            method=method, path=path, status=one.status,
            seconds=round(seconds, 4), first_byte_seconds=round(first, 4) or None,
            bytes=one.sent, client=client, note=one.code or None,
        )  # fmt: skip
    begun = f", first byte after {first:.3f} s" if 0 < first < seconds - 0.001 else ""
    parts = [f"{what} in {seconds:.3f} s{begun}", size(one.sent), one.code, client and f"from {client}"]
    return plain.text(level, ", ".join(part for part in parts if part), at, request_id)


def size(count: int) -> str:
    unit = next((unit for unit in range(3) if count < 999.5 * 1000**unit), 3)
    return f"{count / 1000**unit:{'.3g' if count < 999.5e9 else '.0f'}} {('B', 'kB', 'MB', 'GB')[unit]}"


# Letters that mean something to whoever makes lines by parts, and some that mean nothing.
ODD = st.sampled_from([
    "%", "%s", "%d", "%%", '"', "\\", "\n", "\0", "\x1b", "\x85", "é", "00:00:00", "1970-01-01T00:00:00.000Z",
    "very-secret-value", "sk-0123456789abcdef", "null", "{", "}",
])  # fmt: skip
WORDS = st.lists(ODD | st.text(max_size=5), max_size=6).map("".join)
# Of the loop's clock, which has whole milliseconds.
SPAN = st.integers(0, 100_000).map(lambda milliseconds: (7_000_000 + milliseconds) / 1000 - 7_000_000 / 1000)
RECORDS = st.builds(
    record,
    began=st.floats(0, 1e9),
    method=st.sampled_from([b"GET", b"POST", b"M-SEARCH"]),
    path=WORDS.map(lambda text: b"/" + text.encode()) | st.binary(max_size=300).map(lambda data: b"/" + data),
    status=st.integers(100, 599),
    seconds=SPAN,
    first=SPAN | st.sampled_from([0.0, NO_TIME]),
    sent=st.integers(0, 10**13),
    request_id=WORDS.map(lambda text: text.encode("latin-1", "replace"))
    | WORDS.map(lambda text: b"0c5f" + text.encode()) | st.binary(max_size=30).map(bytes)
    | st.integers(0, 10**9).map(lambda number: b"0c5f%012d" % number),
    client=st.sampled_from([b"", b"10.0.0.3", b"::1", b"fe80::1%eth0"]),
    note=st.sampled_from(["", "1.4 s held (restarting), sent again", "client gone"])
    | WORDS.filter(str.isprintable),  # ours, too
)  # fmt: skip


def test_lines_that_are_made_of_kept_parts_are_those_that_are_documented() -> None:
    forms = [TEXT, JSON, QUEUE, LineStyle(MASK, is_terminal=True)]
    kept = [(form, Access(form)) for form in forms]  # the same for all examples, so that they keep something

    @settings(deadline=None, max_examples=100, derandomize=True)
    @given(st.lists(RECORDS, min_size=1, max_size=4))
    def made(records: list[Any]) -> None:
        for form, access in kept:
            lines = access.lines(*records, *records)
            assert lines[: len(records)] == lines[len(records) :]
            for line, one in zip(lines, records, strict=False):
                assert line.encode() == documented(form, one).encode("utf-8", "backslashreplace")
                if form.as_json:
                    assert json.loads(line)["requestId"] == json.loads(documented(form, one))["requestId"]

    made()


def test_a_long_path_is_shortened() -> None:
    assert len(lines_of(TEXT, record(path=b"/" + b"x" * 8000))[0]) < 400


def test_a_first_byte_at_once_is_one() -> None:
    """The loop's clock has whole milliseconds."""
    once, never = lines_of(JSON, record(first=NO_TIME), record(first=0.0))
    assert json.loads(once)["first_byte_seconds"] == NO_TIME
    assert json.loads(never)["first_byte_seconds"] is None


def test_lines_do_not_wait_for_more_than_a_hundred() -> None:
    """Made all at once they would hold up the event loop."""
    timers: list[Any] = []

    def call_later(*timer: Any) -> Any:
        timers.append(timer)
        return types.SimpleNamespace(cancel=list)

    loop = types.SimpleNamespace(time=lambda: 7.0, call_later=call_later)
    told: list[int] = []
    log = AccessLog(loop, TEXT, lambda _, count: told.append(count))  # type: ignore[arg-type]
    for _ in range(2 * BATCH + 1):
        log.request_ended(record())
    assert told == [BATCH, BATCH]
    timers[-1][1]()
    assert told == [BATCH, BATCH, 1]


def test_a_line_that_cant_be_made_is_no_fault_of_the_requests(caplog: pytest.LogCaptureFixture) -> None:
    access = Access(TEXT)
    access.log.batch = [record(client=b"\xff")]
    access.log.flush()
    assert not access.told
    assert "1 lines of access could not be made" in caplog.text


# The page

PAGE = (Path(__file__).resolve().parents[2] / "docs/logs.md").read_text()
EXAMPLES = [
    json.loads(text)
    for block in re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)
    for text in re.split(r"^(?={)", block, flags=re.M)
    if text
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["logger"])
def test_examples_of_the_page_have_the_keys_that_are_written(example: dict[str, object]) -> None:
    form = QUEUE if example.get("requestId", "") is None else JSON
    if example["logger"] == "vllm":
        line = VllmLines(form, is_terminal=False)(b"", str(example["message"])).decode()
    elif example["logger"] == "supervisor.access":
        line = lines_of(JSON, record())[0]
    else:
        told = Told(form)
        fields: dict[str, object] = {"phases": []} if "phases" in example else {}
        told.logger.warning("x", extra={"request": example.get("requestId"), "fields": fields})
        (line,) = told.lines
    assert list(json.loads(line)) == list(example)


def test_the_page_has_a_row_for_each_key() -> None:
    section = PAGE[PAGE.index("## JSON") : PAGE.index("## The access log")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == {key for example in EXAMPLES for key in example}
    assert len(EXAMPLES) == 8
