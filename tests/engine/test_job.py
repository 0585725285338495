"""`supervisor job`: one job through the simulated RunPod of a supervisor in queue mode, over the fake vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor import status
from supervisor.local_runpod import job
from tests.engine.conftest import Call
from tests.harness import SUPERVISOR, Supervisor, clean_environment, http, wait_until

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("q")


@pytest.fixture(scope="module")
def queue(folder: Path) -> Iterator[str]:
    """The address of its simulator."""
    with Supervisor("m", "--mode", "queue", environ={"TMPDIR": str(folder)}) as supervisor:
        url = supervisor.says(r"ready: a simulated RunPod endpoint, (\S+)\n", 20)[1]
        (found,) = status.ask_local({"TMPDIR": str(folder)})
        supervisor.engine_pid = found["pid"]
        yield url


def command(*arguments: str) -> list[str]:
    return [str(SUPERVISOR), "job", *arguments]


Send = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def send(call: Call) -> Send:
    def send(folder: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """To the supervisors whose TMPDIR is `folder`."""
        return call("job", *arguments, cwd=folder, given=given, TMPDIR=str(folder))

    return send


@pytest.mark.parametrize("how", ["json", "whole job", "file", "stdin"])
def test_a_job(send: Send, queue: str, folder: Path, tmp_path: Path, how: str) -> None:
    text = json.dumps({"input": CHAT} if how == "whole job" else CHAT)
    (tmp_path / "job.json").write_text(text)
    argument = {"file": str(tmp_path / "job.json"), "stdin": "-"}.get(how, text)
    done = send(folder, argument, given=text)
    assert (done.returncode, done.stderr) == (0, "")
    (answer,) = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"]


def test_by_url(send: Send, queue: str, folder: Path, tmp_path: Path) -> None:
    for url in (queue, queue.partition("/v2/")[0], queue.partition("://")[2].partition("/v2/")[0]):
        assert send(tmp_path, json.dumps(CHAT), "--url", url).returncode == 0


@pytest.mark.parametrize(
    "content",
    [
        CHAT,
        {"prompt": "hi"},
        {"openai_route": "/v1/chat/completions", "openai_input": CHAT},
        {"route": "/v1/messages", "body": {**CHAT, "max_tokens": 16}},
        {"route": "/v1/responses", "body": {"input": "hi"}},
    ],
    ids=["chat", "prompt", "openai", "anthropic", "responses"],
)
def test_a_stream_is_the_text(send: Send, queue: str, folder: Path, content: dict[str, Any]) -> None:
    done = send(folder, json.dumps(content), "--stream")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert "data:" not in done.stdout
    assert len(done.stdout.split()) >= 8


@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_a_job_that_fails(send: Send, queue: str, folder: Path, more: tuple[str, ...]) -> None:
    done = send(folder, json.dumps({**CHAT, "model": "nobody"}), *more)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("supervisor: the job failed: The model `nobody` does not exist")
    assert "status 404" in line


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "no reader"])
def test_who_does_not_wait_for_the_end_cancels_it(queue: str, folder: Path, end: str) -> None:
    """One that would take a minute."""
    slow = {"route": "/v1/chat/completions", "headers": {"X-Fake": json.dumps({"token_interval": 1})}}
    content = {**slow, "body": {**CHAT, "max_tokens": 60, "stream": True}}
    with subprocess.Popen(
        command(json.dumps(content), "--stream"), env=clean_environment(TMPDIR=str(folder)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as sent:  # fmt: skip
        assert sent.stdout is not None
        assert sent.stderr is not None
        assert sent.stdout.read(1)  # it streams
        if end == "no reader":  # as of `| head -c 1`
            sent.stdout.close()
        else:
            sent.send_signal(signal.Signals[end])
        said = sent.stderr.read()
        assert sent.wait(15) == (1 if end == "no reader" else 130)
    assert said == b"supervisor: the job was cancelled\n"
    health = f"{queue}/health"
    wait_until(lambda: http.get(health).json()["jobs"]["inProgress"] == 0, "the end of the job")


def test_an_interrupt_is_noticed_at_the_next_look() -> None:
    with pytest.raises(KeyboardInterrupt):
        job._follow(job.Endpoint("http://127.0.0.1:9"), "id", [signal.SIGINT], stream=True)


def test_what_a_failed_job_says_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be the words of whoever sent the job, and a terminal obeys some of them."""
    answers = {"status": "FAILED", "error": json.dumps({"message": "no\n\x1b[2Jforged\u2028caf\xe9"}), "id": "7"}
    monkeypatch.setattr(job.Endpoint, "ask", lambda *_: answers)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert job.run("{}", "http://127.0.0.1:9", {}, stream=False) == 1
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert capsys.readouterr().err == r"supervisor: the job failed: no\n\x1b[2Jforged\u2028caf" + "\xe9\n"


@pytest.mark.parametrize(("presses", "told"), [(1, "was cancelled"), (2, "was not cancelled")])
def test_who_presses_twice_waits_for_nobody(presses: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def ask(_: str, path: str, __: str | None = None) -> dict[str, str]:
        asked.append(path)
        for _press in range(presses if path == "/stream/7" else 0):
            signal.raise_signal(signal.SIGINT)
        return {"id": "7", "status": "IN_PROGRESS"}

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(KeyboardInterrupt):
            job._send_job(SimpleNamespace(ask=ask), {}, stream=True)  # type: ignore[arg-type]
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert asked == ["/run", "/stream/7"] + ["/status/7", "/cancel/7"] * (presses == 1)
    assert told in capsys.readouterr().err


def test_where_no_job_can_go(send: Send, running: Supervisor, tmp_path: Path) -> None:
    done = send(tmp_path, json.dumps(CHAT))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no supervisor runs here: start one with `supervisor up MODEL --mode queue`" in done.stderr
    done = send(Path(running.socket).parent.parent, json.dumps(CHAT))
    assert done.returncode == 1
    assert "serves HTTP, and takes no jobs: start one with" in done.stderr
    done = send(tmp_path, json.dumps(CHAT), "--url", f"http://127.0.0.1:{running.port}")
    assert done.returncode == 1
    assert "--mode queue" in done.stderr
    for url in ("ftp://x", "http://", "http://127.0.0.1:1", "http://127.0.0.1:notaport"):
        done = send(tmp_path, json.dumps(CHAT), "--url", url)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [("no/such/file", "can't be read (No such file"), ("{", "is not JSON"), ("[]", "must be an object"), ("/", "read")],
)
def test_what_is_no_job(given: str, said: str) -> None:
    with pytest.raises(job.SendError, match=said.replace("(", r"\(")):
        job.read_job(given)


@pytest.mark.parametrize(
    ("content", "streams"),
    [
        ({"prompt": "x"}, {"prompt": "x", "stream": True}),
        ({"prompt": "x", "stream": False}, {"prompt": "x", "stream": False}),
        ({"openai_route": "/v1/models"}, {"openai_route": "/v1/models"}),
        ({"openai_input": {"prompt": "x"}}, {"openai_input": {"prompt": "x", "stream": True}}),
        ({"requests": []}, {"requests": []}),
        ("text", "text"),
    ],
)
def test_how_a_stream_is_asked_for(content: object, streams: object) -> None:
    assert job.add_stream(content) == streams


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("plain", "plain"),
        (json.dumps({"message": "m", "status": 404}), "m (status 404)"),
        ({"error_message": "e"}, "e"),
        ({"x": 1}, '{"x": 1}'),
        (None, "it does not say why"),
        ("[1]", "[1]"),
    ],
)
def test_errors_for_people(error: object, said: str) -> None:
    assert job.describe_error(error) == said


def test_on_a_terminal_it_is_indented(queue: str, folder: Path) -> None:
    done = subprocess.run(
        ["script", "-qec", f"{SUPERVISOR} job '{json.dumps(CHAT)}'", "/dev/null"],
        env=clean_environment(TMPDIR=str(folder)),
        capture_output=True, text=True, timeout=30, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) > 5
    assert os.environ.get("TERM") or True
