"""`supervisor status`: asked on this machine without knowing port, key or certificate, and elsewhere by URL."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from supervisor import asking, status
from tests.engine.conftest import Call
from tests.harness import SUPERVISOR, Supervisor, clean_environment, self_signed, wait_until
from tests.queue.conftest import RunPod, in_queue_mode

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ask(call: Call) -> Ask:
    def ask(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Of the supervisors whose TMPDIR is `folder`."""
        return call("status", *arguments, cwd=folder, TMPDIR=str(folder), **environ)

    return ask


def test_of_one_that_serves_with_keys_and_on_a_port_that_nobody_told(ask: Ask, tmp_path: Path) -> None:
    with Supervisor("some/model", environ={"TMPDIR": str(tmp_path), "SUPERVISOR_API_KEYS": "secret-key"}) as served:
        served.ready()
        done = ask(tmp_path)
        assert done.returncode == 0, done
        assert done.stdout.startswith("ready since ")
        assert ": some/model (vLLM answers after " in done.stdout
        whole = ask(tmp_path, "--json")
        served.engine_pid = json.loads(whole.stdout)["pid"]
        assert "secret-key" not in whole.stdout

        url = f"http://127.0.0.1:{served.port}"
        refused = ask(tmp_path, "--url", url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "set SUPERVISOR_API_KEYS" in refused.stderr
        assert ask(tmp_path, "--url", url, SUPERVISOR_API_KEYS="secret-key").returncode == 0
        # The private socket opens our own pages and the model's routes, and no more than those.
        assert served.client.get("/status").status_code == 401


def test_on_a_terminal_it_is_a_table(running: Supervisor) -> None:
    wait_until(lambda: running.client.get("/status").json()["in_flight"] == 0, "what the test before it has left")
    done = subprocess.run(
        ["script", "-qec", f"stty cols 60; {SUPERVISOR} status", "/dev/null"],
        env=clean_environment(TMPDIR=str(Path(running.socket).parent.parent), TERM="xterm"),
        capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in done.stdout.replace("\r", "").splitlines()]
    rows = {line.split()[0]: line.split(None, 1)[1] for line in lines if line and not line.startswith(" ")}
    assert rows["state"] == "ready"
    assert rows["model"] == "some/model"
    assert rows["requests"] == "0 in flight, 0 waiting"
    assert "\x1b[" in done.stdout
    assert max(map(len, lines)) <= 60


def test_of_one_that_loads_and_then_restarts(ask: Ask, tmp_path: Path) -> None:
    plan = [{"load_seconds": 60}, {"load_seconds": 60}]
    with Supervisor("m", plan=plan, environ={"TMPDIR": str(tmp_path)}) as served:
        served.engine()
        done = ask(tmp_path)
        assert done.returncode == 1
        assert done.stdout.startswith("starting since ")
        os.kill(served.engine(), signal.SIGKILL)
        wait_until(lambda: "restarting since " in ask(tmp_path).stdout, "the restart")
        restarting = ask(tmp_path)
        assert restarting.returncode == 1
        served.engine_pid = None


def test_of_none(ask: Ask, tmp_path: Path) -> None:
    done = ask(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("supervisor: none runs here")
    assert ask(tmp_path, "--url", "").stderr == done.stderr  # a script's variable that is not set


def test_what_a_killed_one_left_is_passed_over(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "supervisor-left").mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "supervisor-left" / "gateway.sock"))
    assert ask(tmp_path).stderr.startswith("supervisor: none runs here")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "127.0.0.1:1", "http://127.0.0.1:notaport"])
def test_a_url_that_does_not_answer(ask: Ask, tmp_path: Path, url: str) -> None:
    done = ask(tmp_path, "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("supervisor: ")
    assert url in line


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (429, b'{"error": "Too many requests: at most 3 a minute."}', "Too many requests: at most 3 a minute."),
        (403, b'{"error": "The host gpu1 is not allowed."}', "The host gpu1 is not allowed."),
        (429, b'{"error": "a\\nb"}', r"a\nb"),
        (429, b'{"error": {"message": "another\'s"}}', "what answers is no supervisor (status 429)"),
        (403, b"<html>", "what answers is no supervisor (status 403)"),
        (200, b'{"error": "x"}', "what answers is no supervisor (status 200)"),
    ],
)
def test_a_supervisor_that_refuses_says_why(
    code: int, body: bytes, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = httpx.MockTransport(lambda _: httpx.Response(code, content=body))
    monkeypatch.setattr(asking, "client", lambda url, *_, **__: httpx.Client(base_url=url, transport=answers))
    assert status.show("http://gpu1:8000", {}, as_json=False) == 1
    assert capsys.readouterr().err == f"supervisor: {said}\n"


@pytest.mark.slow
def test_in_queue_mode_with_a_certificate_jobs_are_done_and_it_is_asked_as_ever(ask: Ask, tmp_path: Path) -> None:
    environ = {"TMPDIR": str(tmp_path), **self_signed(tmp_path)}
    with RunPod("--hold", "5") as runpod, in_queue_mode(runpod, environ=environ) as served:
        served.says("ready: https")
        assert runpod.done(HELLO)
        whole = ask(tmp_path, "--json")
        assert whole.returncode == 0
        served.engine_pid = json.loads(whole.stdout)["pid"]
