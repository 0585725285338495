"""The log of a whole supervisor: access lines, JSON, what must not be in it, and a start as a terminal shows it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from supervisor.around.start import draw_waterfall
from supervisor.launch import Launch
from supervisor.settings.settings import Arguments, gather
from tests.harness import FAKE, SUPERVISOR, Supervisor, clean_environment, wait_until

COMPLETIONS = "/v1/completions"
PROMPT = "a sentence that nobody else writes"


def fault(**keys: object) -> dict[str, str]:
    return {"X-Fake": json.dumps(keys)}


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    """Two keys, JSON lines; the tests here share it."""
    environ = {"SUPERVISOR_LOG_FORMAT": "json", "SUPERVISOR_LOG_LEVEL": "debug", "SUPERVISOR_MAX_BODY": "2000"}
    with Supervisor("m", environ=environ) as supervisor:
        yield supervisor.ready()


def lines(supervisor: Supervisor) -> list[dict[str, Any]]:
    """Each line of its output is JSON, or this fails."""
    whole = supervisor.output.rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


@pytest.fixture(scope="module")
def client(supervisor: Supervisor) -> httpx.Client:
    return supervisor.client


def line_of(supervisor: Supervisor, request_id: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [line for line in lines(supervisor) if line.get("requestId") == request_id and "status" in line]

    (line,) = wait_until(found, f"the line of {request_id}")
    return line


def test_each_answer_has_one_line(supervisor: Supervisor, client: httpx.Client) -> None:
    headers = {"X-Request-Id": "whole"}
    answer = client.post(f"{COMPLETIONS}?secret=in-the-query", json={"prompt": PROMPT}, headers=headers)
    line = line_of(supervisor, "whole")
    assert (line["logger"], line["level"]) == ("supervisor.access", "INFO")
    assert (line["method"], line["path"], line["status"]) == ("POST", COMPLETIONS, 200)
    assert (line["bytes"], line["client"], line["note"]) == (len(answer.content), "127.0.0.1", None)
    assert 0 < line["first_byte_seconds"] <= line["seconds"] < 10
    assert "in-the-query" not in supervisor.output


def test_a_heads_second_time_is_logged_as_the_first(supervisor: Supervisor, client: httpx.Client) -> None:
    """They take a shorter way through the gateway."""
    ids = {client.post(COMPLETIONS, json={"prompt": "x"}).headers["x-request-id"] for _ in range(3)}
    assert [line_of(supervisor, request_id)["status"] for request_id in ids] == [200] * 3


def test_a_streams_first_event_and_its_end(supervisor: Supervisor, client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 6}
    headers = {"X-Request-Id": "stream"} | fault(token_interval=0.1)
    answer = client.post(COMPLETIONS, json=body, headers=headers)
    assert answer.status_code == 200
    line = line_of(supervisor, "stream")
    assert line["first_byte_seconds"] < line["seconds"] - 0.3
    assert line["bytes"] > len(answer.content)  # the chunks' framing with it


@pytest.mark.parametrize(
    ("name", "path", "body", "status", "note"),
    [
        ("refused", "/v1/nothing", {}, 404, "route_not_found"),
        ("large", COMPLETIONS, {"prompt": PROMPT * 100}, 413, "request_too_large"),
        ("bad", COMPLETIONS, {"prompt": PROMPT, "max_tokens": -1}, 400, None),
    ],
)
def test_what_is_refused_says_why(
    supervisor: Supervisor, client: httpx.Client, name: str, path: str, body: dict[str, object], status: int, note: str
) -> None:
    answer = client.post(path, json=body, headers={"X-Request-Id": name})
    assert answer.status_code == status, answer.text
    line = line_of(supervisor, name)
    assert (line["status"], line["level"]) == (status, "INFO")
    assert line["note"] == note


def test_a_client_that_goes(supervisor: Supervisor, client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 1000}
    headers = {"X-Request-Id": "gone"} | fault(token_interval=0.05)
    with client.stream("POST", COMPLETIONS, json=body, headers=headers) as answer:
        next(answer.iter_raw())
    line = line_of(supervisor, "gone")
    assert (line["status"], line["note"]) == (200, "client gone")


def test_our_own_routes_have_no_line(supervisor: Supervisor, client: httpx.Client) -> None:
    for path in ("/ping", "/health", "/status", "/metrics"):
        assert client.get(path, headers={"X-Request-Id": "own"}).status_code == 200
    client.post(COMPLETIONS, json={"prompt": "x"}, headers={"X-Request-Id": "after"})
    line_of(supervisor, "after")
    assert not [line for line in lines(supervisor) if line.get("path") in ("/ping", "/health", "/status", "/metrics")]


def test_vllms_lines_are_apart_and_have_their_level(supervisor: Supervisor) -> None:
    found = lines(supervisor)
    assert {line["logger"] for line in found} >= {"vllm", "supervisor", "supervisor.engine"}
    assert "INFO" in {line["level"] for line in found if line["logger"] == "vllm"}
    (start,) = [line for line in found if line["message"].startswith("vLLM's start: ")]
    assert start["phases"][0].keys() == {"name", "seconds"}


def test_no_prompt_and_no_answer_is_in_it(supervisor: Supervisor, client: httpx.Client) -> None:
    """At the level `debug`, and after all that the tests before this one sent."""
    answer = client.post(COMPLETIONS, json={"prompt": PROMPT}, headers={"X-Request-Id": "last"}).json()
    text = answer["choices"][0]["text"]
    line_of(supervisor, "last")
    assert len(text) > 10
    assert PROMPT not in supervisor.output
    assert text not in supervisor.output


@pytest.mark.slow
def test_a_request_that_waited_and_was_sent_again_says_so(tmp_path: Path) -> None:
    plan = [{"die_after_requests": 0}, {"load_seconds": 0.3}]
    with Supervisor("m", plan=plan, environ={"FAKE_VLLM_COUNT": str(tmp_path / "n")}).ready() as supervisor:
        body = {"prompt": PROMPT}
        answer = supervisor.client.post(COMPLETIONS, json=body, headers={"X-Request-Id": "waited"})
        assert answer.status_code == 200
        supervisor.says(
            r"POST /v1/completions 200 in .*, [\d.]+ s held \(restarting\), sent again, from .* \(request waited\)"
        )
        assert PROMPT not in supervisor.output


# A terminal


class Screen:
    """What a person sees: text, and a foot that is rubbed out and drawn again."""

    def __init__(self) -> None:
        self.rows = [""]

    def feed(self, text: str) -> None:
        for part in re.split(r"(\x1b\[[?\d]*[A-Za-z]|\n)", text):
            if part == "\n":
                self.rows.append("")
            elif found := re.fullmatch(r"\x1b\[(\d+)F", part):
                self.rows = [*self.rows[: len(self.rows) - 1 - int(found[1])], ""]
            elif not part.startswith("\x1b"):
                self.rows[-1] += part.rstrip("\r")


class Terminal:
    """A supervisor in a terminal of its own."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self.screen = Screen()
        self.pictures: list[str] = []  # each state of the screen
        pid, self.terminal = pty.fork()
        if pid == 0:
            environ = {**clean_environment(SUPERVISOR_VLLM=str(FAKE), PORT="0", TERM="xterm"), **environ}
            os.execve(SUPERVISOR, [str(SUPERVISOR), "up", *arguments], environ)
        self.pid = pid
        self.raw = ""
        self.reader = threading.Thread(target=self._read, daemon=True)

    def read(self) -> Terminal:
        self.reader.start()
        return self

    def _read(self) -> None:
        rest = ""
        with contextlib.suppress(OSError):  # it has ended
            while data := os.read(self.terminal, 65536):
                text = rest + data.decode("utf-8", "replace")
                at = text.rfind("\n") + 1
                text, rest = text[:at], text[at:]
                self.raw += text
                self.screen.feed(text)
                self.pictures.append("\n".join(self.screen.rows))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, 15)
        os.waitpid(self.pid, 0)
        if self.reader.is_alive():
            self.reader.join(10)
        os.close(self.terminal)

    def shows(self, pattern: str) -> str:
        def found() -> str | None:
            return next((picture for picture in self.pictures if re.search(pattern, picture)), None)

        return str(wait_until(found, f"{pattern!r} on the screen"))


SLOW = json.dumps([{"load_seconds": 1.0}, {}])


def test_a_start_is_shown_below_the_log_as_it_happens_and_stays_when_it_is_done() -> None:
    with Terminal("m", FAKE_VLLM_PLAN=SLOW).read() as terminal:
        loading = terminal.shows(r"\n[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] loading weights +\d+\.\d s +━+\n$")
        assert re.search(r"\n✓ importing vLLM +\d+\.\d s +━+\n", loading)
        terminal.shows(r"supervisor: ready: http")
        last = "\n".join(terminal.screen.rows)
        assert len(re.findall(r"^. importing vLLM +\d", last, re.MULTILINE)) == 1  # the pictures before are gone
        assert re.search(r"✓ importing vLLM.*\n(✓ .*\n)*✓ loading weights.*\n(✓ .*\n)*.* supervisor: ready: http", last)
        assert re.search(r"^\(APIServer pid=\d+\) INFO", last, re.MULTILINE)  # and vLLM's lines above are whole
        os.kill(int(re.search(r"APIServer pid=(\d+)", last)[1]), 9)  # type: ignore[index]
        terminal.shows(r"ready -> restarting(.*\n)*[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] importing vLLM")
        terminal.shows(r"(?s)restarting -> starting.*starting -> ready")


@pytest.mark.slow
def test_a_terminal_that_stands_still_holds_up_nobody() -> None:
    """Ctrl-S, and a vLLM that logs: it waits for its log to be read, so that goes on, into nothing."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    plan = json.dumps({"log_flood": 20_000})
    url = f"http://127.0.0.1:{port}"
    with Terminal("m", PORT=str(port), FAKE_VLLM_PLAN=plan), httpx.Client(base_url=url) as client:

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/ping").status_code == 200
            return False

        wait_until(ready, "readiness")
        for _ in range(50):
            assert client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Launch]]:
    """Makes one that is in a terminal, and starts nothing."""
    with contextlib.ExitStack() as stack:

        def launch(**environ: str) -> Launch:
            monkeypatch.setattr(os, "isatty", lambda _: True)
            environ = clean_environment(SUPERVISOR_VLLM=str(FAKE), PORT="0", TERM="xterm") | environ
            workspace: Any = SimpleNamespace(socket=tmp_path / "vllm.sock", temp_folder=tmp_path)
            guard: Any = None
            made = Launch(gather(Arguments(model="m"), environ), workspace, guard, {}, None)
            stack.callback(made.close)
            return made

        yield launch


@pytest.mark.parametrize(
    ("environ", "has_foot"),
    [({}, True), ({"TERM": "dumb"}, False), ({"SUPERVISOR_LOG_FORMAT": "json"}, False)],
    ids=str,
)
def test_there_is_no_foot_where_it_would_be_noise(
    launch: Callable[..., Launch], environ: dict[str, str], has_foot: bool
) -> None:
    assert (launch(**environ).foot is not None) is has_foot


@pytest.mark.parametrize(("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False)], ids=str)
def test_without_colours_the_foot_has_none(
    launch: Callable[..., Launch], environ: dict[str, str], colour: bool
) -> None:
    form = launch(**environ).style
    for running in (True, False):
        (line,) = draw_waterfall([{"name": "importing vLLM", "seconds": 1.0}], running=running, colour=form.colour)
        assert bool(re.search(r"\x1b\[\d*m", line)) is colour


@pytest.mark.parametrize(("columns", "bar"), [("118", 32), ("60", 18), ("42", 0), ("40", 0)])
def test_the_picture_of_a_start_is_no_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: str, bar: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    rows = [{"name": "importing vLLM", "seconds": 10.0}, {"name": "starting the API server", "seconds": 0.01}]
    for lines in (draw_waterfall(rows, running=running, colour=False) for running in (True, False)):
        assert [len(line) <= int(columns) for line in lines] == [True, True]
        assert [line.count("\N{BOX DRAWINGS HEAVY HORIZONTAL}") for line in lines] == [bar, min(bar, 1)]
