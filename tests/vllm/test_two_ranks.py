"""The real vLLM on two machines: two network namespaces, each with a /dev/shm of its own, and a supervisor in each.

It starts when the vLLM that the other tests share has been stopped (conftest.py), for there are two of it here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.harness import DEMO, Supervisor, session_pids, wait_until
from tests.vllm.conftest import START, VLLM
from tests.vllm.test_serving import CHAT, greedy

pytestmark = pytest.mark.vllm

LEADER, OTHER = "10.77.0.1", "10.77.0.2"
PORT = "8000"  # of both: each has a network of its own
SHM = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
# A request as a client within the namespace sends it: method, path, body -> status and answer.
ASK = f"""
import json, sys, urllib.error, urllib.request
request = urllib.request.Request("http://127.0.0.1:{PORT}" + sys.argv[1], sys.argv[2].encode() or None)
request.add_header("Content-Type", "application/json")
try:
    answer = urllib.request.urlopen(request, timeout=180)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, json.loads(answer.read())]))
"""


def run(*command: str) -> str:
    """What it prints; raises where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Machine:
    """A network namespace with one interface; what runs in it sees no other machine but the one at its other end."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = self.link = f"sv{os.getpid()}-{rank}"
        self.folder = Path(tempfile.mkdtemp(prefix="sv"))  # a short path: sockets lie in it
        self.within = ("ip", "netns", "exec", self.name, "unshare", "--mount", "--ipc", "sh", "-c", SHM, "sh")

    def supervisor(self) -> Supervisor:
        environ = {
            "NUM_NODES": "2",
            "NODE_RANK": str(self.rank),
            "PRIMARY_ADDR": LEADER,
            "PRIMARY_PORT": "29501",
            "TENSOR_PARALLEL_SIZE": "2",
            "ENFORCE_EAGER": "true",
            # Even so each rank would compile some of the embedding's code at its first prompt, for a minute of CPU.
            "TORCHDYNAMO_DISABLE": "1",
            "PORT": PORT,
            "TMPDIR": str(self.folder),
            # Of this machine's processors each rank would bind all.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        supervisor = Supervisor(DEMO, vllm=VLLM, environ=environ, within=self.within)
        supervisor.engine_pid = 0  # what answers at this port outside of the namespace is none of ours
        return supervisor

    def ask(self, path: str, body: object = None) -> tuple[int, dict[str, object]]:
        text = "" if body is None else json.dumps(body)
        status, answer = json.loads(run("ip", "netns", "exec", self.name, sys.executable, "-c", ASK, path, text))
        return status, answer

    def engine(self) -> list[psutil.Process]:
        status = self.ask("/status")[1]
        return [psutil.Process(pid) for pid in session_pids(int(str(status["pid"])))]


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        text = "two machines were not tried: that needs root, and the programs ip (iproute2) and unshare (util-linux)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    first, other = both = Machine(0), Machine(1)
    try:
        try:
            for machine in both:
                run("ip", "netns", "add", machine.name)
            run("ip", "link", "add", first.link, "netns", first.name, "type", "veth",
                "peer", other.link, "netns", other.name)  # fmt: skip
            for machine, address in zip(both, (LEADER, OTHER), strict=True):
                run("ip", "-n", machine.name, "addr", "add", f"{address}/24", "dev", machine.link)
                for link in ("lo", machine.link):
                    run("ip", "-n", machine.name, "link", "set", link, "up")
                run(*machine.within, "true")
        except OSError as error:
            pytest.skip(f"two machines were not tried: this one can't make namespaces ({error})")
        yield both
    finally:
        for machine in both:
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)
            shutil.rmtree(machine.folder, ignore_errors=True)


def segments(supervisor: Supervisor) -> set[str]:
    """What lies in /dev/shm as the supervisor sees it."""
    return {path.name for path in Path(f"/proc/{supervisor.process.pid}/root/dev/shm").iterdir()}


def noted(machine: Machine) -> set[str]:
    """What the supervisor would remove of it."""
    (note,) = machine.folder.glob("supervisor-*/remains.json")
    return {Path(path).name for path in json.loads(note.read_text())["segments"]}


def answer(machine: Machine) -> str:
    status, content = machine.ask(CHAT, greedy(max_tokens=8))
    assert status == 200, content
    return str(content["choices"])


def test_two_machines_serve_one_model_and_start_again_together(machines: tuple[Machine, Machine]) -> None:
    ours = {path.name for path in Path("/dev/shm").iterdir()}
    with ExitStack() as stack:
        first, other = (stack.enter_context(machine.supervisor()) for machine in machines)
        first.says("starting -> ready", START)
        other.says(rf"ready: rank 1 of 2; rank 0, at {LEADER}, serves", START)
        said = answer(machines[0])
        assert machines[1].ask("/ping")[0] == 200
        status, refused = machines[1].ask(CHAT, greedy())
        assert status == 503
        assert refused["error"]["code"] == "not_rank_0"  # type: ignore[index]

        before = [machine.engine() for machine in machines]
        (worker,) = (process for process in before[1] if process.name().startswith("VLLM::Worker"))
        worker.kill()
        other.says(rf"ready -> restarting: VLLM::Worker\w* \(pid {worker.pid}\) died")
        first.says(f"ready -> restarting: the rank at {OTHER} is gone")
        for supervisor in (first, other):
            supervisor.says(r"(?s)restarting -> starting.*starting -> ready", START)
        assert answer(machines[0]) == said
        for supervisor, machine, old in zip((first, other), machines, before, strict=True):
            assert not [process for process in old if process.is_running()]
            assert segments(supervisor) <= noted(machine)  # nothing of those that were killed

        after = [process for machine in machines for process in machine.engine()]
        first.signal(signal.SIGTERM)
        assert first.exit_code(60) == 0
        other.signal(signal.SIGTERM)
        assert other.exit_code(60) == 0
        assert not [process for process in after if process.is_running()]
    for machine in machines:
        wait_until(lambda machine=machine: not run("ip", "netns", "pids", machine.name), "nobody in the namespace")  # type: ignore[misc]
        assert list(machine.folder.iterdir()) == []
    assert {path.name for path in Path("/dev/shm").iterdir()} <= ours
