"""The page at `/` and what it polls, `/status?after=N`, without a browser (tests/browser has one)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from supervisor.gateway.app import (
    FOR_EVERYBODY,
    LONGEST_LINE,
    TRANSITIONS,
    OwnRoutes,
    lines_seen,
    public_part,
)
from supervisor.gateway.counts import Counts
from supervisor.gateway.page import HTML, wants_html
from supervisor.gateway.policy import Policy
from supervisor.status import _UnixConnection
from tests.engine.test_relay import CHAT, chat
from tests.harness import Supervisor, wait_until

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
API_KEY, ADMIN_KEY = "a-plain-key", "the-admin-key"
STARTED = "Application startup complete"


def poll(served: Supervisor, after: object = 0, key: str = "") -> dict[str, Any]:
    headers = {"X-API-Key": key} if key else {}
    answer = served.client.get(f"/status?after={after}", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


def poll_privately(socket: Path, path: str = "/status?after=0") -> dict[str, Any]:
    connection = _UnixConnection(socket)
    connection.request("GET", path)
    found = dict(json.loads(connection.getresponse().read()))
    connection.close()
    return found


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
    assert wants_html([(b"host", b"h"), *([(b"accept", accept)] if accept else [])]) is html


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
    assert len(text.splitlines()) < 520


def test_without_the_key_there_is_the_page_and_nothing_in_it() -> None:
    environ = {"SUPERVISOR_API_KEYS": "the-right-key", "HF_TOKEN": "hf_abcdefghijklmnop"}
    with Supervisor("some/secret-model", environ=environ) as served:
        served.ready()
        page = served.client.get("/", headers=BROWSER)
        assert page.content == HTML.read_bytes()
        wrong = {"X-API-Key": "the-wrong-key"}
        for path, headers in (("/", {}), ("/status", BROWSER), ("/status?after=0", {}), ("/status?after=0", wrong)):
            answer = served.client.get(path, headers=headers)
            assert answer.status_code == 401
            assert "secret-model" not in answer.text
        right = {"Authorization": "Bearer the-right-key"}
        assert served.client.get("/", headers=right).json()["model"] == "some/secret-model"
        seen = served.client.get("/status?after=0", headers=right).text
        assert "the-right-key" not in seen
        assert "abcdefghijklmnop" not in seen
        served.engine_pid = json.loads(seen)["pid"]


# What it polls


def test_a_poll_has_what_status_has_and_what_the_page_needs_beside(running: Supervisor) -> None:
    status = running.client.get("/status").json()
    first = poll(running)
    assert {"now", "bounds", "statuses", "buckets", "reads", "happened", "line", "log"} == set(first) - set(status)
    assert set(status) <= set(first)
    assert first["state"] == "ready"
    assert first["now"] > first["since"]
    assert "importing vLLM" in {row["name"] for row in first["phases"]}
    assert any(STARTED in line for line in first["log"])
    assert first["line"] >= len(first["log"])
    assert [row["state"] for row in first["happened"]] == ["starting", "ready"]
    assert len(first["bounds"]) + 1 == len(first["buckets"])
    before = sum(first["statuses"].values())
    running.client.post(CHAT, json=chat(max_tokens=3, stream=True))
    later = poll(running, first["line"])
    assert sum(later["statuses"].values()) == before + 1
    assert sum(later["buckets"]) == sum(first["buckets"]) + 1
    assert later["reads"] > first["reads"]
    assert later["in_flight"] == 0  # a poll is no request to the model
    assert not any(STARTED in line for line in later["log"])


def test_a_poll_has_the_lines_behind_the_one_that_it_names(running: Supervisor) -> None:
    whole = poll(running)
    count, log = whole["line"], whole["log"]
    assert count == len(log) > 3  # so few lines are all kept
    assert poll(running, 2)["log"] == log[2:]
    assert poll(running, count - 1)["log"] == log[-1:]
    for none in (count, count + 1, count + 1000, 10**15 - 1):
        assert poll(running, none)["log"] == []
        assert poll(running, none)["line"] == count


@pytest.mark.parametrize("after", ["", "-1", "+1", "1.5", "1e1", "x", "%00", "²", "٣", "0x1", " 1", "1_0", "9" * 5000])
def test_what_is_no_number_counts_as_0(running: Supervisor, after: str) -> None:
    assert poll(running, after) | {"now": 0} == poll(running) | {"now": 0}


@pytest.mark.parametrize(
    ("query", "seen"),
    [(b"", None), (b"afterwards=1", None), (b"a=1&after=7", 7), (b"after", 0), (b"after=007", 7), (b"%61fter=1", 1),
     (b"after=1&after=2", 2), (b"\xff=\xff&after=\xb2", 0), (b"after=" + b"1" * 16, 0)],
)  # fmt: skip
def test_the_number_of_a_query(query: bytes, seen: int | None) -> None:
    assert lines_seen(query) == seen


def test_other_methods_and_the_feed_that_was(running: Supervisor) -> None:
    assert running.client.head("/status?after=0").text == ""
    assert running.client.post("/status?after=0").json()["log"]
    assert running.client.put("/status?after=0").status_code == 405
    assert running.client.get("/status/events").status_code == 404  # no route of ours, nor of the model's


@pytest.mark.slow
def test_the_start_is_told_phase_by_phase() -> None:
    with Supervisor("m", plan=[{"load_seconds": 3}]) as served:
        served.says("importing vLLM")
        seen = [poll(served)]

        def is_ready() -> bool:
            seen.append(poll(served))
            return bool(seen[-1]["state"] == "ready")

        wait_until(is_ready, "readiness")
    loading = [sum(row["seconds"] for row in one["phases"]) for one in seen if one["state"] == "starting"]
    assert len(loading) >= 2
    assert loading == sorted(loading)
    assert "loading weights" in {row["name"] for row in seen[-1]["phases"]}


@pytest.mark.slow
def test_a_crash_and_the_recovery_are_told_and_the_log_goes_on(tmp_path: Path) -> None:
    environ = {"FAKE_VLLM_COUNT": str(tmp_path / "n")}
    with Supervisor("m", plan=[{}, {"load_seconds": 1}], environ=environ) as served:
        served.ready()
        before = poll(served)
        assert before["last_failure"] is None
        os.kill(served.engine(), signal.SIGKILL)
        wait_until(lambda: poll(served)["restarts"] == 1 and poll(served)["state"] == "ready", "the recovery")
        later = poll(served, before["line"])
        served.engine_pid = later["pid"]
    assert later["last_failure"]["signal"] == 9
    assert any(STARTED in line for line in later["last_failure"]["log_tail"])
    assert [row["state"] for row in later["happened"]] == ["starting", "ready", "restarting", "starting", "ready"]
    assert later["line"] == before["line"] + len(later["log"])
    assert sum(STARTED in line for line in later["log"]) == 1


def test_a_poll_is_bounded_however_much_vllm_logs(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport signal, sys\n"
        "if '--version' in sys.argv: print('0.32.0'); sys.exit()\n"
        "for number in range(1000): print(number, 'x' * 5000, flush=True)\n"
        "signal.pause()\n"
    )
    program.chmod(0o755)
    with Supervisor("m", vllm=program) as served:
        served.engine()
        wait_until(lambda: poll(served)["line"] >= 1000, "its last line")
        found = poll(served)
        assert [line.split()[0] for line in found["log"][-200:]] == [str(number) for number in range(800, 1000)]
        assert len(found["log"]) == 200
        assert set(map(len, found["log"])) == {LONGEST_LINE}


def routes(policy: Policy, **facts: object) -> OwnRoutes:
    """Of an engine that has been in many states."""
    timeline = deque({"at": float(number), "state": "starting", "reason": ""} for number in range(100))
    status = {"state": "ready", "new": 1}
    engine: Any = SimpleNamespace(timeline=timeline, log_after=lambda _: (0, []), status=lambda: status)
    gate: Any = SimpleNamespace()
    upstream: Any = SimpleNamespace(reads=0)
    return OwnRoutes(engine, policy, gate, Counts(), upstream, lambda: {"in_flight": 0, "waiting": 0}, facts)


def test_of_many_transitions_the_last_ones_are_told() -> None:
    own = routes(Policy())
    assert own.status(after=0)["happened"] == list(own.engine.timeline)[-TRANSITIONS:]


def test_what_nobody_has_thought_about_is_for_administrators_alone() -> None:
    found = routes(Policy(), fact=2).status()
    assert found == {"state": "ready", "new": 1, "fact": 2, "in_flight": 0, "waiting": 0}
    assert public_part(found) == {"state": "ready", "in_flight": 0, "waiting": 0}


# Who sees what

NUMBERS = {"now", "bounds", "statuses", "buckets", "reads", "happened"}
# Of a configuration or of vLLM's log, as it is in the text of an answer.
WITHHELD = (
    "--uds",
    "--max-model-len",
    "MAX_MODEL_LEN",
    "QUANTISATION",
    "/tmp/supervisor-",
    STARTED,
    "planted in the log",
)


class Asked:
    """A supervisor whose engine has failed, with a warning among its settings and a line of a client's in its log."""

    def __init__(self, folder: Path, **keys: str) -> None:
        plan = [{}, {"die_at_start": {"log": ["what a client sent: planted in the log"], "code": 1}}]
        self.served = Supervisor(
            "some/model",
            plan=plan,
            environ={
                "TMPDIR": str(folder), "FAKE_VLLM_COUNT": str(folder / "n"), "SUPERVISOR_ON_FAILURE": "serve",
                "SUPERVISOR_MAX_RESTARTS": "1", "MAX_MODEL_LEN": "4096", "QUANTISATION": "half", **keys,
            },
        )  # fmt: skip
        self.folder = folder

    def __enter__(self) -> Asked:
        self.served.__enter__().ready()
        os.kill(int(poll_privately(self.socket)["pid"]), signal.SIGKILL)
        self.served.says("-> failed", 30)
        return self

    def __exit__(self, *error: Any) -> None:
        self.served.__exit__(*error)

    @property
    def socket(self) -> Path:
        (found,) = self.folder.glob("supervisor-*/gateway.sock")
        return found

    def get(self, path: str, key: str = "") -> httpx.Response:
        return self.served.client.get(path, headers={"X-API-Key": key} if key else {})

    def shows_everything(self, key: str = "") -> None:
        self.is_everything(self.get("/status", key).json(), self.get("/status?after=0", key).json())

    def shows_everything_privately(self) -> None:
        self.is_everything(poll_privately(self.socket, "/status"), poll_privately(self.socket))

    def is_everything(self, status: dict[str, Any], polled: dict[str, Any]) -> None:
        for found in (status, polled):
            assert "--max-model-len" in found["command"]
            assert "MAX_MODEL_LEN" in str(found["settings"])
            assert "QUANTISATION" in str(found["warnings"])
            assert "planted in the log" in str(found["last_failure"]["log_tail"])
        assert "log" not in status
        assert "planted in the log" in str(polled["log"])

    def shows_the_rest(self, key: str = "") -> None:
        for path, more in (("/status", set()), ("/", set()), ("/status?after=0", NUMBERS)):
            answer = self.get(path, key)
            found = answer.json()
            assert set(found) == (FOR_EVERYBODY - NUMBERS) | more
            assert found["state"] == "failed"
            assert found["model"] == "some/model"
            assert found["restarts"] == 1
            assert {"cause", "remedy", "exit_code", "signal", "at"} == set(found["last_failure"])
            assert [text for text in WITHHELD if text in answer.text] == []

    def refuses(self, key: str = "") -> None:
        assert [self.get(path, key).status_code for path in ("/status", "/status?after=0", "/")] == [401] * 3


def test_without_any_key_everybody_sees_everything(running: Supervisor) -> None:
    for headers in ({}, {"X-API-Key": "whatever"}):
        status = running.client.get("/status", headers=headers).json()
        assert "serve some/model --uds " in status["command"]
        assert status["settings"]
        assert any(STARTED in line for line in running.client.get("/status?after=0", headers=headers).json()["log"])


def test_administrators_see_everything_and_others_the_rest(tmp_path: Path) -> None:
    keys = tmp_path / "admins"
    keys.write_text("old-admin-key\n")
    with Asked(tmp_path, SUPERVISOR_API_KEYS=API_KEY, SUPERVISOR_ADMIN_KEYS=f"@{keys}") as asked:
        asked.shows_everything("old-admin-key")
        asked.shows_the_rest(API_KEY)
        asked.refuses()
        asked.refuses(ADMIN_KEY)
        asked.shows_everything_privately()
        keys.write_text(f"{ADMIN_KEY}\n")
        asked.served.signal(signal.SIGHUP)
        asked.served.says("keys read again")
        asked.refuses("old-admin-key")
        asked.shows_everything(ADMIN_KEY)


@pytest.mark.parametrize(
    ("api_keys", "admin_keys", "given", "full"),
    [
        ([], [], "", True),
        ([], [], "whatever", True),
        ([API_KEY], [ADMIN_KEY], ADMIN_KEY, True),
        ([API_KEY], [ADMIN_KEY], API_KEY, False),
        # With API keys alone nobody is an administrator.
        ([API_KEY], [], API_KEY, False),
        # With an administrator's alone everybody is what a plain key would make of them.
        ([], [ADMIN_KEY], ADMIN_KEY, True),
        ([], [ADMIN_KEY], "", False),
        ([], [ADMIN_KEY], "another-key", False),
    ],
)
def test_who_sees_everything(api_keys: list[str], admin_keys: list[str], given: str, full: bool) -> None:
    policy = Policy(api_keys, admin_keys)
    headers = [(b"x-api-key", given.encode())] if given else []
    assert routes(policy).may_see_all({"server": ("127.0.0.1", 8000), "headers": headers}) is full
    assert routes(policy).may_see_all({"server": ("gateway.sock", None), "headers": headers})
