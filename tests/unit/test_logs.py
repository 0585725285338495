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
from functools import cached_property
from pathlib import Path

import pytest

from supervisor import logs
from supervisor import output as output_module
from supervisor.gateway.access import AccessLog, Answer
from supervisor.lines import Form, VllmLines
from supervisor.output import Output
from supervisor.settings.secrets import Mask
from tests.harness import wait_until

MASK = Mask({"HF_TOKEN": "very-secret-value"})
JSON, TEXT = Form(MASK, as_json=True), Form(MASK)
QUEUE = Form(MASK, as_json=True, queue=True)


class Told:
    """A log, and what it wrote."""

    def __init__(self, form: Form) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `lines`
        self.log = logs.Log(form, Output(self.file.fileno(), form.lost))
        self.logger = logging.Logger("supervisor.engine")
        self.logger.addHandler(self.log)

    @cached_property
    def lines(self) -> list[str]:
        self.log.close()
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
def test_no_secret_is_in_any_part(form: Form) -> None:
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
    assert len(lines) == logs.ALIKE + 2
    assert "something else" in lines[-2]
    assert lines[-1].endswith("490 more of these in 10 s: vLLM closed the connection after 499 bytes")


def test_an_output_that_wakes_often_tells_them_no_sooner(text: Told) -> None:
    """While a start is shown it wakes six times a second."""
    woken = threading.Semaphore(0)
    idle = text.log.output.idle

    def counted(ended: bool) -> bytes:
        woken.release()
        return idle(ended)

    text.log.output.idle = counted
    for number in range(logs.ALIKE + 5):
        text.logger.warning("vLLM closed the connection after %d bytes", number)
    text.log.output.show(list)
    for _ in range(3):
        assert woken.acquire(timeout=10)
    text.logger.warning("vLLM closed the connection after %d bytes", 1000)
    lines = text.lines
    assert len(lines) == logs.ALIKE + 1
    assert " 6 more of these" in lines[-1]


def test_after_a_while_they_are_told_again() -> None:
    repeats = logs.Repeats()
    assert [repeats.passes("kind", f"line {at}", 0.1 * at) for at in range(12)] == [True] * 10 + [False] * 2
    assert repeats.due(9.9) == []
    assert repeats.due(10.0) == [("line 11", 2)]
    assert repeats.due(20.0) == []
    assert repeats.passes("kind", "line", 20.0)


def test_a_flood_of_different_kinds_is_bounded() -> None:
    repeats = logs.Repeats()
    assert all(repeats.passes(number, "line", 0.0) for number in range(10 * logs.KINDS))
    assert len(repeats.kinds) == logs.KINDS


def test_what_is_an_event_of_its_own_is_told_each_time(text: Told) -> None:
    for number in range(50):
        text.logger.warning("job failed", extra={"request": f"job{number}", "each": True})
        text.logger.info("loading")
    assert len(text.lines) == 100


def test_a_clients_id_can_make_no_line_and_no_colour(text: Told) -> None:
    text.logger.info("cut", extra={"request": "a\x85b\x1b[31m"})
    assert text.lines[0].endswith(r"(request a\x85b\x1b[31m)")


# Readers


def test_a_reader_that_stands_still_costs_lines_and_says_how_many() -> None:
    """Nobody waits for it: neither who logs nor vLLM's pump."""
    reading, writing = os.pipe()
    output = Output(writing, TEXT.lost)
    line = b"x" * 999 + b"\n"
    for _ in range(output_module.BACKLOG + 500):
        output.put(line)
    assert output.lost > 100
    received = bytearray()

    def read() -> None:
        while data := os.read(reading, 1 << 20):
            received.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(output._waiting.empty, "its having read")
    output.put(b"goes on\n")
    wait_until(lambda: received.endswith(b"goes on\n"), "the last line")
    output.close()
    os.close(writing)
    reader.join()
    os.close(reading)
    lost = re.findall(rb"supervisor WARNING: (\d+) lines were lost here: nobody read the log\n", received)
    assert received.count(line) + sum(map(int, lost)) == output_module.BACKLOG + 500
    assert received.endswith(b"goes on\n")


def test_an_output_that_does_not_block_loses_nothing() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    output = Output(writing, TEXT.lost)
    output.put(b"x" * 299_999 + b"\n")
    received = b""
    while not received.endswith(b"\n"):
        received += os.read(reading, 10_000)
    assert len(received) == 300_000
    output.close()
    os.close(writing)
    os.close(reading)


def test_its_memory_is_bounded_too() -> None:
    reading, writing = os.pipe()
    output = Output(writing, TEXT.lost)
    for _ in range(1000):
        output.put(b"x" * 99_999 + b"\n")
    assert output._bytes < output_module.BACKLOG_BYTES + 200_000
    os.close(reading)
    output.close()
    os.close(writing)


def test_a_reader_that_is_gone_or_a_line_that_cant_be_made_is_not_the_end(text: Told) -> None:
    text.log.later(lambda: [str(1 / 0)])
    text.logger.info("%d", "no number")
    text.logger.info("goes on")
    lines = text.lines
    assert "a line was lost (ZeroDivisionError" in lines[0]
    assert "a line was lost (TypeError" in lines[1]
    assert lines[2].endswith("goes on")


def test_closing_does_not_wait_for_a_reader_for_long() -> None:
    reading, writing = os.pipe()
    output = Output(writing, TEXT.lost)
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
    content = json.loads(VllmLines(JSON, terminal=False)(line.encode(), line))
    assert (content["level"], content["logger"], content["message"]) == (level, "vllm", line)


def test_what_follows_a_traceback_has_its_level_until_another_comes() -> None:
    lines = ["(A pid=1) Traceback (most recent call last):", '  File "x.py"', "ValueError: no", "INFO 11-26 [x] on"]
    shown = VllmLines(JSON, terminal=False)
    levels = [json.loads(shown(line.encode(), line))["level"] for line in lines]
    assert levels == ["ERROR", "ERROR", "ERROR", "INFO"]


def test_of_a_progress_bar_json_has_its_last_state() -> None:
    line = "Loading: 0%\rLoading: 50%\rLoading: 100%"
    assert json.loads(VllmLines(JSON, terminal=False)(line.encode(), line))["message"] == "Loading: 100%"


def test_text_is_vllms_own_bytes_and_on_a_terminal_steps_back_but_for_what_is_wrong() -> None:
    assert VllmLines(TEXT, terminal=False)(b"\xff as it is", "") == b"\xff as it is\n"
    shown = VllmLines(TEXT, terminal=True)
    assert shown(b"INFO 1", "INFO 1") == b"\x1b[2mINFO 1\x1b[0m\n"
    assert shown(b"ERROR 1", "ERROR 1") == b"\x1b[31mERROR 1\x1b[0m\n"
    assert VllmLines(Form(MASK, colour=False), terminal=True)(b"ERROR 1", "ERROR 1") == b"ERROR 1\n"


# The access log


def answer(**more: object) -> Answer:
    usual = Answer(0.0, b"POST", b"/v1/completions", 200, 1.5, 0.25, 13400, b"abc", b"10.0.0.3", "")
    return usual._replace(**more)


def lines_of(form: Form, *answers: Answer) -> list[str]:
    found: list[str] = []
    log = AccessLog(None, form, lambda make: found.extend(make()))  # type: ignore[arg-type]
    log.batch = list(answers)
    log.flush()
    return found


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, ": POST /v1/completions 200 in 1.500 s, first byte after 0.250 s, 13.4 kB, from 10.0.0.3 (request abc)"),
        ({"first": 1.5, "sent": 999}, ": POST /v1/completions 200 in 1.500 s, 999 B, from 10.0.0.3 (request abc)"),
        ({"status": 503, "first": 0.0, "note": "12.0 s held, engine_unavailable", "client": b"", "sent": 2_500_000},
         " WARNING: POST /v1/completions 503 in 1.500 s, 2.5 MB, 12.0 s held, engine_unavailable (request abc)"),
        ({"path": b"/\xff\x1b[31m\n", "first": 0.0, "sent": 0},
         r": POST /\\xff\x1b[31m\n 200 in 1.500 s, 0 B, from 10.0.0.3 (request abc)"),
        ({"path": b"/very-secret-value", "first": 0.0},
         ": POST /**** 200 in 1.500 s, 13.4 kB, from 10.0.0.3 (request abc)"),
    ],
)  # fmt: skip
def test_a_line_for_each_answer(given: dict[str, object], line: str) -> None:
    assert lines_of(TEXT, answer(**given))[0][8:] == f" supervisor{line}"


def test_in_json_its_numbers_stand_by_themselves() -> None:
    content = json.loads(lines_of(JSON, answer())[0])
    assert content["message"] == "POST /v1/completions 200"
    assert (content["logger"], content["requestId"], content["client"]) == ("supervisor.access", "abc", "10.0.0.3")
    assert (content["seconds"], content["first_byte_seconds"], content["bytes"]) == (1.5, 0.25, 13400)


def test_a_secret_in_a_clients_id_is_masked() -> None:
    assert "very-secret-value" not in lines_of(TEXT, answer(request_id=b"very-secret-value"))[0]


def test_a_long_path_is_shortened() -> None:
    assert len(lines_of(TEXT, answer(path=b"/" + b"x" * 8000))[0]) < 400


def test_a_first_byte_at_once_is_one() -> None:
    """The loop's clock has whole milliseconds."""
    loop = types.SimpleNamespace(time=lambda: 7.0, call_later=lambda *_: None)
    log = AccessLog(loop, JSON, list)  # type: ignore[arg-type]
    request = types.SimpleNamespace(method=b"GET", path=b"/")
    record = types.SimpleNamespace(
        request=request, client=b"::1", began=7.0, first_at=7.0, ended=7.0, status=200, sent=1, request_id=b"a", note=""
    )
    log.ended(record)  # type: ignore[arg-type]
    record.first_at = 0.0
    log.ended(record)  # type: ignore[arg-type]
    assert [bool(answer.first) for answer in log.batch] == [True, False]


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
        line = VllmLines(form, terminal=False)(b"", str(example["message"])).decode()
    elif example["logger"] == "supervisor.access":
        line = lines_of(JSON, answer())[0]
    else:
        told = Told(form)
        fields = {"phases": []} if "phases" in example else {}
        told.logger.warning("x", extra={"request": example.get("requestId"), "fields": fields})
        (line,) = told.lines
    assert list(json.loads(line)) == list(example)


def test_the_page_has_a_row_for_each_key() -> None:
    section = PAGE[PAGE.index("## JSON") : PAGE.index("## The access log")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == {key for example in EXAMPLES for key in example}
    assert len(EXAMPLES) == 8
