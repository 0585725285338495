"""The page at `/` and the feed at `/status/events`, without a browser (tests/browser has one)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from supervisor.gateway.page import HTML, LIMIT, Feeds, wanted
from tests.engine.test_relay import CHAT, chat
from tests.harness import RawClient, Supervisor, wait_until

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FEED = "/status/events"


@contextlib.contextmanager
def feed(served: Supervisor, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Its events, as they come."""
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=20, verify=False) as client,
        client.stream("GET", FEED, headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = answer.iter_lines()
        yield (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))


def until(events: Iterator[dict[str, Any]], condition: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """The events up to the one that is waited for; the feed itself has a time limit."""
    found = []
    for event in events:
        found.append(event)
        if condition(event):
            return found
    raise AssertionError(f"the feed ended: {found[-1]}")


# The page


def test_a_browser_gets_the_page_and_others_json(running: Supervisor) -> None:
    page = running.client.get("/", headers=BROWSER)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == HTML.read_bytes()
    assert running.client.head("/", headers=BROWSER).headers["content-length"] == str(len(page.content))
    for accepted in ("*/*", "application/json"):
        assert running.client.get("/", headers={"Accept": accepted}).json()["state"] == "ready"
    assert running.client.get("/status", headers=BROWSER).json()["state"] == "ready"


@pytest.mark.parametrize(
    ("accept", "html"),
    [(b"text/html", True), (b"a/b, TEXT/HTML;q=0.5", True), (b"*/*", False), (b"text/html2", False), (None, False)],
)
def test_who_wants_the_page(accept: bytes | None, html: bool) -> None:
    assert wanted([(b"host", b"h"), *([(b"accept", accept)] if accept else [])]) is html


def test_the_page_runs_what_is_written_in_it_and_asks_this_server_alone(running: Supervisor) -> None:
    page = running.client.get("/", headers=BROWSER)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["vary"] == "Accept"


def test_the_page_names_nothing_outside_of_it_and_no_address_from_the_root() -> None:
    text = HTML.read_text()
    assert set(re.findall(r"https?://[^\"'` >]+", text)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"""(?:href|src|action)=["'](?!#|data:)""", text) == []
    assert re.findall(r" style=| on[a-z]+=", text) == []  # the policy would block them
    assert re.findall(r"(?:ask|post)\('/", text) == []
    assert len(text.splitlines()) < 500


def test_without_the_key_there_is_the_page_and_nothing_in_it() -> None:
    environ = {"SUPERVISOR_API_KEYS": "the-right-key", "HF_TOKEN": "hf_abcdefghijklmnop"}
    with Supervisor("some/secret-model", environ=environ) as served:
        served.ready()
        page = served.client.get("/", headers=BROWSER)
        assert page.content == HTML.read_bytes()
        for path, headers in (("/", {}), ("/status", BROWSER), (FEED, {}), (FEED, {"X-API-Key": "the-wrong-key"})):
            answer = served.client.get(path, headers=headers)
            assert answer.status_code == 401
            assert "secret-model" not in answer.text
        right = {"Authorization": "Bearer the-right-key"}
        assert served.client.get("/", headers=right).json()["model"] == "some/secret-model"
        with feed(served, **right) as events:
            assert next(events)["state"] == "ready"
        told = served.client.get("/status", headers=right).text
        assert "the-right-key" not in told
        assert "abcdefghijklmnop" not in told
        served.engine_pid = json.loads(told)["pid"]


# The feed


def test_a_feed_begins_with_what_is_and_goes_on_with_what_changes(running: Supervisor) -> None:
    with feed(running) as events:
        first = next(events)
        assert first["state"] == "ready"
        assert "importing vLLM" in {row["name"] for row in first["phases"]}
        assert any("Application startup complete" in line for line in first["log"])
        assert [row["state"] for row in first["happened"]] == ["starting", "ready"]
        assert len(first["bounds"]) + 1 == len(first["buckets"])
        before = sum(first["statuses"].values())
        running.client.post(CHAT, json=chat(max_tokens=3, stream=True))
        later = until(events, lambda event: sum(event["statuses"].values()) == before + 1)
        assert sum(later[-1]["buckets"]) == sum(first["buckets"]) + 1
        assert later[-1]["reads"] > first["reads"]
        assert "happened" not in later[-1]
        assert "bounds" not in later[-1]
        assert not any("Application startup complete" in line for event in later for line in event.get("log", ()))


def test_a_feed_tells_the_start_phase_by_phase() -> None:
    with Supervisor("m", plan=[{"load_seconds": 3}]) as served:
        served.says("importing vLLM")
        with feed(served) as events:
            told = until(events, lambda event: event["state"] == "ready")
    loading = [event for event in told if event["state"] == "starting"]
    assert len(loading) >= 2
    assert [sum(row["seconds"] for row in event["phases"]) for event in loading] == sorted(
        sum(row["seconds"] for row in event["phases"]) for event in loading
    )
    assert "loading weights" in {row["name"] for row in told[-1]["phases"]}


def test_a_feed_tells_a_crash_and_the_recovery(tmp_path: Path) -> None:
    environ = {"FAKE_VLLM_COUNT": str(tmp_path / "n")}
    with Supervisor("m", plan=[{}, {"load_seconds": 1}], environ=environ) as served:
        served.ready()
        with feed(served) as events:
            assert "last_failure" not in next(events)
            os.kill(served.engine(), signal.SIGKILL)
            told = until(events, lambda event: event["state"] == "restarting")
            told += until(events, lambda event: event["state"] == "ready")
            served.engine_pid = told[-1]["pid"]
    failures = [event["last_failure"] for event in told if "last_failure" in event]
    assert len(failures) == 1
    assert "SIGKILL" in failures[0]["cause"] or failures[0]["signal"] == 9
    assert told[-1]["restarts"] == 1
    happened = [event["happened"] for event in told if "happened" in event][-1]
    assert [row["state"] for row in happened] == ["starting", "ready", "restarting", "starting", "ready"]
    assert any("Application startup complete" in line for event in told for line in event.get("log", ()))


def test_feeds_are_bounded_and_a_place_is_free_again(running: Supervisor) -> None:
    def told() -> int:
        with running.client.stream("GET", FEED) as answer:
            return answer.status_code

    with contextlib.ExitStack() as stack:
        for _ in range(LIMIT):
            raw = stack.enter_context(running.connect())
            assert b"text/event-stream" in raw.send(b"GET /status/events HTTP/1.1\r\nHost: h\r\n\r\n").until(b"data: ")
        answer = running.client.get(FEED)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert running.client.get("/status").json()["in_flight"] == 0  # they are no requests to the model
    wait_until(lambda: told() == 200, "a free place")


def test_another_method_than_get_has_one_event_and_no_place(running: Supervisor) -> None:
    assert running.client.head(FEED).headers["content-type"] == "text/event-stream; charset=utf-8"
    assert running.client.post(FEED).text.count("data: ") == 1
    assert running.client.put(FEED).status_code == 405


# Its end


def test_a_feed_tells_the_end_and_holds_nothing_up() -> None:
    with Supervisor("m") as served, contextlib.ExitStack() as stack:
        served.ready().engine()
        feeds = [stack.enter_context(feed(served)) for _ in range(3)]
        for events in feeds:
            next(events)
        began = time.monotonic()
        served.signal(signal.SIGTERM)
        for events in feeds:
            told = list(events)  # httpx complains where the last chunk is missing
            happened = [event["happened"] for event in told if "happened" in event][-1]
            assert [row["state"] for row in happened] == ["starting", "ready", "draining", "stopping", "stopped"]
        assert served.exit_code() == 0
        assert time.monotonic() - began < 3
        assert "Traceback" not in served.output
        assert "timeout graceful shutdown" not in served.output


def talkative(folder: Path) -> Path:
    """A vLLM that never is ready, and logs more than a socket takes from a reader that does not read."""
    program = folder / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        "if '--version' in sys.argv: print('0.32.0'); sys.exit()\n"
        "for number in range(1, 1_000_000):\n"
        "    print(number, 'x' * 900, flush=True)\n"
        "    if number % 300 == 0: time.sleep(0.05)\n"
    )
    program.chmod(0o755)
    return program


def deaf_readers(served: Supervisor, stack: contextlib.ExitStack) -> list[RawClient]:
    readers = [stack.enter_context(RawClient(served.port)) for _ in range(8)]
    for raw in readers:
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.send(b"GET /status/events HTTP/1.1\r\nHost: h\r\n\r\n")
        raw.until(b"\r\n\r\n")
    return readers


def tell(served: Supervisor) -> int:
    """Who comes is told at once, and so is everybody else: up to 180 kB of the log. Returns its last line's number."""
    answer = served.client.post(FEED)
    assert answer.status_code == 200
    return max(map(int, re.findall(r'"(\d+) x', answer.text)), default=0)


def connected(served: Supervisor) -> set[int]:
    """The clients' ports, as the supervisor's process has them: what the kernel still has to send is the kernel's."""
    found = psutil.Process(served.process.pid).net_connections("tcp")
    return {connection.raddr.port for connection in found if connection.raddr}


@pytest.mark.slow
def test_a_reader_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    environ = {"SUPERVISOR_CLIENT_TIMEOUT": "0.4"}
    with Supervisor("m", vllm=talkative(tmp_path), environ=environ) as served, contextlib.ExitStack() as stack:
        ports = {raw.socket.getsockname()[1] for raw in deaf_readers(served, stack)}
        assert ports <= connected(served)

        def dropped() -> bool:
            tell(served)
            return not ports & connected(served)

        wait_until(dropped, "the ends of their connections", 30)
        assert "Traceback" not in served.output


@pytest.mark.slow
def test_a_reader_that_does_not_read_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with Supervisor("m", vllm=talkative(tmp_path)) as served, contextlib.ExitStack() as stack:
        deaf_readers(served, stack)
        wait_until(lambda: tell(served) > 12_000, "more than the sockets take", 30)
        served.engine()
        began = time.monotonic()
        served.signal(signal.SIGTERM)
        assert served.exit_code() == 0
        assert time.monotonic() - began < 4
        assert "Traceback" not in served.output


# Nobody listens


def test_nothing_is_looked_at_while_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.gateway.page.BEAT", 0.01)
    looks = 0

    def status() -> dict[str, object]:
        nonlocal looks
        looks += 1
        row = dict.fromkeys(("since", "phases", "progress", "restarts", "pid", "last_failure"), 0)
        return {**row, "state": "ready", "reason": looks}

    async def one_feed() -> None:
        gateway = SimpleNamespace(
            engine=SimpleNamespace(status=status, timeline=[{}], log_after=lambda number: (number, [])),
            counts=SimpleNamespace(statuses={}, buckets=[]),
            upstream=SimpleNamespace(loop=asyncio.get_running_loop(), reads=0),
            connections=set(), in_flight=0, waiting=0,
        )  # fmt: skip
        feeds = Feeds(gateway)  # type: ignore[arg-type]
        leave, sent = asyncio.Event(), []

        async def receive() -> dict[str, str]:
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)
            if len(sent) == 5:
                leave.set()

        await feeds.serve({"method": "GET"}, receive, send)
        assert looks >= 4
        before = looks
        assert feeds._beat is not None
        await asyncio.sleep(max(0.0, feeds._beat.when() - asyncio.get_running_loop().time()) + 0.001)
        assert feeds._beat is None  # the last one found nobody, and there is no other
        assert looks == before

    asyncio.run(one_feed())
