"""A supervisor as a user runs it: a process of its own, watched through its output, its port and its session.

    with Supervisor("some/model", plan=[{"load_seconds": 1}]) as supervisor:
        supervisor.says("loading weights")
        supervisor.ready()
        assert supervisor.client.get("/v1/models").status_code == 200
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code() == 0

vLLM is scripts/fake_vllm unless the test names another. Leaving the block kills the supervisor and all that is left of
vLLM's session, and fails the test if the output holds a fault of the supervisor's own, such as a traceback.

Nothing here sleeps for a condition: every wait polls one with a deadline, and says what it waited for. All times are in
seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "scripts" / "fake_vllm"  # stands for the `vllm` command; `plan` tells it what each start does
FAKE_RUNPOD = ROOT / "scripts" / "fake_runpod"
DEMO = ROOT / "supervisor" / "demo" / "model"  # the folder of the bundled model
SUPERVISOR = Path(sys.prefix) / "bin" / "supervisor"  # the installed command


# A client for single requests, to any address. It reads no certificates, which no test needs: that would cost each new
# client 50 ms. It stays open as long as the process.
http = httpx.Client(verify=False, timeout=60)

Result = TypeVar("Result")


def wait_until(condition: Callable[[], Result | Literal[False] | None], what: str, seconds: float = 30.0) -> Result:
    """Polls `condition` until it returns something true, and returns that; fails with `what` after `seconds`."""
    deadline, pause = time.monotonic() + seconds, 0.005
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for: {what}"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)
    return result


def clean_environment(**more: str) -> dict[str, str]:
    """Returns what a user's shell has, and `more`, without the settings that happen to be set on this machine."""
    keep = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    found = {name: os.environ[name] for name in keep if name in os.environ}
    # So the fake's `python3` is our own, and not a version manager's shim, which takes 0.15 s of each start.
    found["PATH"] = f"{sys.prefix}/bin:{found['PATH']}"
    return found | more


def self_signed(folder: Path) -> dict[str, str]:
    """Makes a certificate for 127.0.0.1, as cert.pem and key.pem in `folder`; returns the settings that name them."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return {"SUPERVISOR_TLS_CERT": str(folder / "cert.pem"), "SUPERVISOR_TLS_KEY": str(folder / "key.pem")}


@contextlib.contextmanager
def mounted(folder: Path, *how: str) -> Iterator[Path]:
    """Runs `mount HOW... FOLDER`, such as for a small tmpfs, and unmounts at the end. Skips the test without root."""
    if os.getuid() != 0:
        pytest.skip("mounts need root")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *how, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def session_pids(session: int) -> list[int]:
    """Returns the pids of a session's living processes; zombies are none. The session's id is its leader's pid."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def have_ended(*processes: psutil.Process) -> bool:
    """Returns whether none of the processes runs any more. Zombies, whose parent has not reaped them yet, do not."""

    def has_ended(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # it was reaped between the two questions
            return True

    return all(map(has_ended, processes))


# RECORD matches a line with which a log record begins, ours or vLLM's; FAULT one that reports a fault of the program.
RECORD = re.compile(r"\(|\{|\d\d:\d\d:\d\d |(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
FAULT = re.compile(r"Traceback|Exception in|Fatal error|exception was never retrieved")


class Supervisor:
    """One run of the `supervisor` command, ended by force when the block is left.

    It starts when it is constructed, and a thread reads its output from then on, stdout and stderr together. Its port
    is a free one, unless the test names one. Nothing is waited for: `ready`, `says` and `exit_code` do that.
    """

    def __init__(
        self,
        *arguments: str | Path,
        vllm: str | Path | None = FAKE,
        plan: object = None,
        cwd: Path | None = None,
        environ: dict[str, str] | None = None,
        verb: str = "up",
        program: Sequence[str | Path] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """Starts `supervisor VERB ARGUMENTS` in a clean environment, to which `environ` is added.

        `vllm` is the command that it runs as vLLM; with None, it looks for one. `plan` is the fake's, passed as JSON.
        `program` takes the place of `supervisor VERB`. `within` is a command that runs the one that follows it, such as
        `unshare` with options. `cwd` is tests/ unless it is given.
        """
        more = {
            "SUPERVISOR_ALLOW_ROUTES": "/fake,/v1/nowhere",
            "SUPERVISOR_ALLOWED_HOSTS": "h,elsewhere",  # the Host headers of requests that tests write by hand
            **(environ or {}),
        }
        if vllm is not None:
            more["SUPERVISOR_VLLM"] = str(vllm)
        if plan is not None:
            more["FAKE_VLLM_PLAN"] = json.dumps(plan)
        if verb == "up" and "PORT" not in more and "--port" not in arguments:
            more["PORT"] = "0"
        self.process = subprocess.Popen(
            [*within, *map(str, program or (SUPERVISOR, verb)), *map(str, arguments)],
            env=clean_environment(**more),
            cwd=cwd or ROOT / "tests",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.raw_output = bytearray()
        self._reading_ends = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.engine_pid: int | None = None
        self._client: httpx.Client | None = None

    def _read(self) -> None:
        assert self.process.stdout is not None
        while not self._reading_ends.is_set() and (data := self.process.stdout.read1(65536)):  # type: ignore[attr-defined]
            self.raw_output += data
        if self._reading_ends.is_set():
            self.process.stdout.close()

    def stop_reading(self) -> None:
        """Closes the other end of its output, as soon as the next output has come: it must be logging."""
        self._reading_ends.set()
        self._reader.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(Exception):
                self.engine()
        if kind is not None:
            print(f"the supervisor said:\n{self.output[-5000:]}")  # pytest shows it with the failure
        if self._client is not None:
            self._client.close()
        self.process.kill()
        self.process.wait()
        if kind is None and not self._reading_ends.is_set():
            self._reader.join(5)
            assert not (faults := self.faults()), "\n".join(faults)
        for pid in session_pids(self.engine_pid) if self.engine_pid else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # What it says, and where it is

    def faults(self) -> list[str]:
        """Returns the places in its output that only a fault of ours explains, each with the 30 lines from there on.

        A traceback belongs to the record before it. vLLM's records begin with the process that wrote them, or with a
        level; ours begin with a time, or are JSON.
        """
        found, is_vllms = [], False
        lines = self.output.splitlines()
        for at, line in enumerate(lines):
            if RECORD.match(line):
                is_vllms = not line[0].isdigit() and line[0] != "{"
            if FAULT.search(line) and not is_vllms:
                found.append("\n".join(lines[at : at + 30]))
        return found

    @property
    def output(self) -> str:
        """All that it has said until now."""
        return self.raw_output.decode(errors="replace")

    def says(self, pattern: str, seconds: float = 30.0) -> re.Match[str]:
        """Waits until its output has the pattern, and returns the first match; fails once it has ended without it."""

        def match_or_end() -> re.Match[str] | bool | None:
            has_ended = self.process.poll() is not None and not self._reader.is_alive()
            return re.search(pattern, self.output) or has_ended

        try:
            found = wait_until(match_or_end, f"output {pattern!r}", seconds)
            assert found is not True, f"it ended without output {pattern!r}"
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.output[-3000:]}") from None
        assert isinstance(found, re.Match)
        return found

    @property
    def port(self) -> int:
        """The gateway's port; waits until the log names it."""
        return int(self.says(r'starting .* on http://[^\s"]+:(\d+)["\n]')[1])

    @property
    def client(self) -> httpx.Client:
        """A client of the gateway, which is kept for the whole run and closed at its end."""
        if self._client is None:
            self._client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, verify=False)
        return self._client

    def ready(self, seconds: float = 15.0) -> Self:
        """Waits until the log says that it serves."""
        self.says(r"[:\"] ?ready: http", seconds)
        return self

    def engine(self) -> int:
        """Returns the pid of vLLM's API server, which is its session's id.

        It is asked for once, and the first answer is kept: tests that let vLLM start again read `/status` themselves.
        """
        if self.engine_pid is None:
            self.engine_pid = int(self.client.get("/status").json()["pid"])
        return self.engine_pid

    @property
    def socket(self) -> str:
        """The path of vLLM's own unix socket, as its command names it."""
        match = re.search(r"--uds (\S+)", self.client.get("/status").json()["command"])
        assert match is not None
        return match[1]

    @property
    def inner(self) -> psutil.Process:
        """The supervisor's own process, where it is the only child of the command that it runs `within`."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    # What is done to it

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 15.0) -> int:
        """Waits until it ends by itself, and until all of its output is read; returns its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def connect(self) -> RawClient:
        """Opens a connection to the gateway's port, for the caller to close."""
        return RawClient(self.port)


class RawClient:
    """A TCP connection on which a test says exactly what goes over the wire.

        with supervisor.connect() as raw:
            raw.send(b"GET /ping HTTP/1.1\r\nHost: h\r\n\r\n")
            assert raw.answer().status == 200

    Each read fails when nothing comes for 10 s. `received` is what was read from the socket, and not yet returned.
    """

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> RawClient:
        self.socket.sendall(data)
        return self

    def until(self, end: bytes) -> bytes:
        """Reads up to and including `end`, and returns that; what lies behind it is kept for the next call."""
        while end not in self.received:
            data = self.socket.recv(65536)
            assert data, f"closed before {end!r}; received {self.received!r}"
            self.received += data
        at = self.received.index(end) + len(end)
        found, self.received = self.received[:at], self.received[at:]
        return found

    def rest(self) -> bytes:
        """Reads until the other side closes, and returns all that was not returned before."""
        while data := self.socket.recv(65536):
            self.received += data
        found, self.received = self.received, b""
        return found

    def answer(self) -> Answer:
        """Reads one whole response, whose body is as long as its Content-Length says, or empty."""
        head = self.until(b"\r\n\r\n")
        answer = Answer.parse(head)
        length = int(answer.headers.get("content-length", "0"))
        while len(self.received) < length:
            data = self.socket.recv(65536)
            assert data, "closed within the body"
            self.received += data
        answer.body, self.received = self.received[:length], self.received[length:]
        return answer


class Answer:
    """A response: its head as it came, its headers by their names in lower case, and its body."""

    def __init__(self, status: int, headers: dict[str, str], head: bytes) -> None:
        self.status = status
        self.headers = headers
        self.head = head
        self.body = b""

    @classmethod
    def parse(cls, head: bytes) -> Answer:
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        fields = (line.partition(":") for line in lines)
        return cls(int(first.split()[1]), {name.lower(): value.strip() for name, _, value in fields}, head)

    def json(self) -> Any:
        return json.loads(self.body)


def events(data: bytes) -> Iterator[dict[str, object]]:
    """Yields the JSON of each event of a whole event stream, without `[DONE]`."""
    for line in data.decode().split("\n"):
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
