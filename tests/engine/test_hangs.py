"""What hangs holds nobody up: a GPU's driver, a disk of weights, of caches, of post-mortems.

The driver is a stand-in for its library; the disk is the C library's calls, held up by a preloaded one (stand_ins/).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from tests.engine.stand_ins import STAND_INS, Watched, missing
from tests.harness import Supervisor, have_ended, http, session_pids, wait_until

COMPLETIONS = "/v1/completions"
# A machine with NVIDIA's driver, as far as anybody looks.
WITH_A_DRIVER = """
import supervisor.around.gpus as gpu
gpu.DRIVER_DEVICES = ("/dev/null",)
from supervisor.cli import main
raise SystemExit(main())
"""
DRIVER_HANGS = r"GPU's driver did not answer"
WEIGHTS_HANG = r"weights.*did not answer|waiting for.*weights"
# Seconds: the longest answer of /ping; the supervisor's end after vLLM's; until an engine serves again.
QUICK, LEAVES, SERVES_AGAIN = 2.0, 5.0, 15.0  # where something that hangs is waited for, it is for ever
ASKED = 50


def serves_again(supervisor: Supervisor) -> None:
    supervisor.says(r"(?s)-> restarting.*starting -> ready", SERVES_AGAIN)
    assert supervisor.client.post(COMPLETIONS, json={"prompt": "x"}, timeout=10).status_code == 200


def vllm(supervisor: Supervisor) -> int:
    """The pid of its API server, as soon as there is one; also the session's id."""
    pid: int = wait_until(lambda: supervisor.client.get("/status").json()["pid"], "vLLM's pid")
    supervisor.engine_pid = pid
    return pid


def kill_vllm(supervisor: Supervisor) -> int:
    """Returns the pid that it had."""
    pid = vllm(supervisor)
    os.kill(pid, signal.SIGKILL)
    return pid


def stop(supervisor: Watched) -> None:
    """SIGTERM: it is gone soon after vLLM is."""
    session = vllm(supervisor)
    supervisor.signal(signal.SIGTERM)
    wait_until(lambda: session_pids(session) == [], "vLLM's end")
    supervisor.leaves(0, LEAVES, "after vLLM's")


@dataclass
class Pings:
    """Status (0: none came) and seconds of each."""

    found: list[tuple[int, float]] = field(default_factory=list)

    def statuses(self) -> set[int]:
        return {status for status, _ in self.found}


@contextlib.contextmanager
def pinging(supervisor: Supervisor) -> Iterator[Pings]:
    """Asks /ping all the while, and at least ASKED times. Each answer must be quick."""
    pings, over = Pings(), threading.Event()
    port = supervisor.port

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=2 * QUICK, verify=False) as client:
            while not over.is_set() or len(pings.found) < ASKED:
                began, status = time.monotonic(), 0
                with contextlib.suppress(httpx.HTTPError):
                    status = client.get("/ping").status_code
                pings.found.append((status, time.monotonic() - began))
                if not status:
                    return
                over.wait(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield pings
    finally:
        over.set()
        thread.join()
        slowest = max(seconds for _, seconds in pings.found)
        assert 0 not in pings.statuses(), f"/ping number {len(pings.found)} was not answered in {slowest:.1f} s"
        assert slowest < QUICK, f"an answer of /ping took {slowest:.2f} s"


def listening(supervisor: Supervisor) -> int | None:
    """The port at which it accepts, seen from outside: it need not have said a word."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.Process(supervisor.process.pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                return int(connection.laddr.port)
    return None


def answers_ping(supervisor: Supervisor, seconds: float = 3.0) -> int:
    """The status of /ping, as soon as the port is there; it must not be long in coming."""
    port = wait_until(lambda: listening(supervisor), "the port")
    try:
        return http.get(f"http://127.0.0.1:{port}/ping", timeout=seconds).status_code
    except httpx.TimeoutException:
        raise AssertionError(f"the port accepts, and /ping is not answered in {seconds:g} s") from None


def descendants(supervisor: Supervisor) -> list[psutil.Process]:
    return psutil.Process(supervisor.process.pid).children(recursive=True)


# A GPU's driver


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """While this file is there, the driver hangs."""
    return tmp_path / "driver hangs"


def with_a_driver(hangs_when: Path, **keys: object) -> Watched:
    environ = {"PYTHONPATH": str(STAND_INS / "nvml"), "NVML_HANGS_WHEN": str(hangs_when)}
    return Watched("m", program=(sys.executable, "-P", "-c", WITH_A_DRIVER, "up"), environ=environ, **keys)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_driver_that_hangs_at_the_start_is_not_waited_for(driver: Path) -> None:
    driver.touch()
    with with_a_driver(driver) as supervisor:
        assert answers_ping(supervisor) in (200, 204)
        supervisor.ready()
        assert supervisor.client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
        supervisor.says(DRIVER_HANGS)
        stop(supervisor)


@pytest.mark.slow
def test_a_queue_worker_whose_driver_hangs_is_not_fit(driver: Path) -> None:
    driver.touch()
    environ = {"PYTHONPATH": str(STAND_INS / "nvml"), "NVML_HANGS_WHEN": str(driver), "RUNPOD_GPU_COUNT": "1"}
    with Supervisor("m", "--mode", "queue", environ=environ) as supervisor:
        supervisor.says("not fit \\(gpu\\): RunPod gave 1 GPUs, and the driver does not answer in 20 s")
        assert supervisor.exit_code() == 3


def test_sigterm_is_heard_while_the_driver_hangs(driver: Path) -> None:
    driver.touch()
    with with_a_driver(driver, plan=[{"load_seconds": 60}]) as supervisor:
        answers_ping(supervisor)
        pid = vllm(supervisor)
        supervisor.signal(signal.SIGTERM)
        supervisor.leaves(0, LEAVES, "after SIGTERM")
        assert session_pids(pid) == []


@pytest.mark.slow
def test_an_engine_is_replaced_though_the_driver_hangs_after_its_crash(driver: Path) -> None:
    """So it is with a GPU that fell off the bus."""
    with with_a_driver(driver) as supervisor:
        supervisor.ready()
        driver.touch()
        with pinging(supervisor) as pings:
            kill_vllm(supervisor)
            serves_again(supervisor)
        assert pings.statuses() == {200, 204}
        stop(supervisor)


@pytest.mark.slow
def test_sigterm_is_heard_while_a_crash_waits_for_the_driver(driver: Path) -> None:
    """The wait is 5 s long: the end must not take as long."""
    with with_a_driver(driver) as supervisor:
        supervisor.ready()
        driver.touch()
        pid = kill_vllm(supervisor)
        supervisor.says("ready -> restarting")
        supervisor.signal(signal.SIGTERM)
        supervisor.leaves(0, 3.5, "after SIGTERM")
        assert session_pids(pid) == []


# A disk


@dataclass
class Disk:
    """`folder`, and what is below it, hangs from `hangs()` to `goes_on()`."""

    library: Path
    folder: Path
    switch: Path

    @property
    def environ(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "HANG_BELOW": str(self.folder), "HANG_WHEN": str(self.switch)}

    def hangs(self) -> None:
        self.switch.touch()

    def goes_on(self) -> None:
        self.switch.unlink()


@pytest.fixture(scope="session")
def hang_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        missing("there is no C compiler, and no disk that hangs is tried: apt-get install gcc libc6-dev")
    library = tmp_path_factory.mktemp("hang") / "hang.so"
    command: list[str | Path] = [compiler, "-shared", "-fPIC", "-O1", "-o", library, STAND_INS / "hang.c", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        missing(f"no disk that hangs is tried, for its stand-in does not compile: {done.stderr[-500:]}")
    return library


@pytest.fixture
def disk(hang_library: Path, tmp_path: Path) -> Callable[[Path], Disk]:
    return lambda folder: Disk(hang_library, folder, tmp_path / "disk hangs")


CALLS = """
import os, shutil, sys, tempfile, threading
from pathlib import Path

def calls(base):
    parent = os.open(base.parent, os.O_RDONLY)
    return [
        lambda: os.stat(base), lambda: os.lstat(base), base.exists, lambda: os.open(base / "f", os.O_RDONLY),
        lambda: open(base / "f").close(), lambda: list(os.scandir(base)), lambda: list(base.iterdir()),
        lambda: list(base.glob("*")), lambda: list(os.walk(base)), lambda: os.mkdir(base / "d"),
        lambda: os.rename(base / "g", base / "h"), lambda: os.replace(base / "i", base / "j"),
        lambda: os.unlink(base / "u"), lambda: os.rmdir(base / "r"), lambda: shutil.rmtree(base / "t"),
        lambda: os.statvfs(base), lambda: os.access(base, os.R_OK), lambda: os.stat(base.name, dir_fd=parent),
        lambda: os.path.realpath(base / "f"), lambda: os.utime(base / "f"), lambda: tempfile.mkstemp(dir=base),
        lambda: os.chmod(base / "f", 0o600), lambda: (base / "f").write_text("x"), lambda: (base / "f").read_text(),
    ]

def begin(base, done):
    for folder in (base, base / "r", base / "t"):
        folder.mkdir()
    for name in "fgiu":
        (base / name).touch()
    for number, call in enumerate(calls(base)):
        yield threading.Thread(target=lambda n=number, c=call: done.append((n, c())), daemon=True)

below, beside, switch = map(Path, sys.argv[1:])
hung, free = [], []
threads = list(begin(below, hung)), list(begin(beside, free))
switch.touch()
for each in (*threads[0], *threads[1]):
    each.start()
for thread in threads[1]:
    thread.join(10)
print(len(threads[1]) - len(free), sorted(number for number, _ in hung))
switch.unlink()
for thread in threads[0]:
    thread.join(10)
print(len(threads[0]) - len(hung))
"""


def test_the_stand_in_for_a_disk_holds_up_each_call(disk: Callable[[Path], Disk], tmp_path: Path) -> None:
    """Else the tests below would pass for nothing: this is for another Python, another C library."""
    hung = disk(tmp_path / "below")
    command: list[str | Path] = [sys.executable, "-c", CALLS, hung.folder, tmp_path / "beside", hung.switch]
    environ = {**os.environ, **hung.environ}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["0 []", "0"], done.stderr


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for TMPDIR: pytest's own have names that are too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="hangs-") as folder:
        yield Path(folder)


def compiled_code(supervisor: Supervisor) -> Path:
    """The folder in which vLLM keeps what it compiles; its archive on the volume has the same name."""
    variables = Path(f"/proc/{vllm(supervisor)}/environ").read_bytes().split(b"\0")
    (root,) = [variable for variable in variables if variable.startswith(b"VLLM_CACHE_ROOT=")]
    return Path(root.partition(b"=")[2].decode()).parent


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["SUPERVISOR_CACHE_DIR", "SUPERVISOR_VOLUME"])
def test_a_volume_whose_archive_hangs_as_it_is_unpacked(
    disk: Callable[[Path], Disk], tmp_path: Path, short: Path, setting: str
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    hung = disk(volume / ("supervisor/compiled" if setting == "SUPERVISOR_VOLUME" else "compiled"))
    hung.hangs()
    environ = {**hung.environ, setting: str(volume), "TMPDIR": str(short)}
    with Watched("m", environ=environ) as supervisor:
        with pinging(supervisor):
            supervisor.ready()
        stop(supervisor)


@pytest.mark.slow
def test_an_archive_that_is_a_pipe(tmp_path: Path, short: Path) -> None:
    """To open it hangs, whatever the machine."""
    environ = {"SUPERVISOR_CACHE_DIR": str(tmp_path), "TMPDIR": str(short)}
    with Watched("m", environ=environ) as supervisor:
        name = compiled_code(supervisor).name
    (tmp_path / "compiled").mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "compiled" / f"{name}.tar")
    with Watched("m", environ=environ) as supervisor:
        with pinging(supervisor):
            supervisor.ready()
        stop(supervisor)


@pytest.mark.slow
def test_a_volume_that_hangs_as_the_archive_is_written(
    disk: Callable[[Path], Disk], tmp_path: Path, short: Path
) -> None:
    hung = disk(tmp_path / "compiled")
    environ = {**hung.environ, "SUPERVISOR_CACHE_DIR": str(tmp_path), "TMPDIR": str(short)}
    with Watched("m", environ=environ, plan=[{"load_seconds": 3}]) as supervisor:
        supervisor.says("no compiled code is kept")
        folder = compiled_code(supervisor) / "vllm"
        folder.mkdir(parents=True)
        (folder / "graph").write_text("what vLLM compiled")
        hung.hangs()
        with pinging(supervisor):
            supervisor.ready()
        stop(supervisor)


@pytest.mark.slow
def test_a_post_mortem_that_hangs_holds_nobody_up(disk: Callable[[Path], Disk], tmp_path: Path) -> None:
    hung = disk(tmp_path / "postmortem")
    with Watched("m", environ={**hung.environ, "SUPERVISOR_CACHE_DIR": str(tmp_path)}) as supervisor:
        supervisor.ready()
        hung.hangs()
        with pinging(supervisor) as pings:
            kill_vllm(supervisor)
            serves_again(supervisor)
        assert pings.statuses() == {200, 204}
        stop(supervisor)


@pytest.mark.slow
def test_a_post_mortem_that_hangs_does_not_keep_a_failed_one_from_leaving(
    disk: Callable[[Path], Disk], tmp_path: Path
) -> None:
    hung = disk(tmp_path / "postmortem")
    environ = {**hung.environ, "SUPERVISOR_CACHE_DIR": str(tmp_path), "SUPERVISOR_MAX_RESTARTS": "0"}
    with Watched("m", environ=environ) as supervisor:
        supervisor.ready()
        hung.hangs()
        kill_vllm(supervisor)
        supervisor.leaves(4, 25, "after vLLM's")


# The disk of the weights


def a_model(folder: Path) -> Path:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder


def in_the_hubs_cache(home: Path) -> dict[str, str]:
    """The same model as `org/model`, and what makes the supervisor look there."""
    repository, commit = home / "hub/models--org--model", "0123456789" * 4
    a_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_sigterm_is_heard_while_a_restart_waits_for_weights_that_hang(
    disk: Callable[[Path], Disk], tmp_path: Path
) -> None:
    hung = disk(a_model(tmp_path / "model"))
    with Watched(hung.folder, environ=hung.environ) as supervisor:
        supervisor.ready()
        hung.hangs()
        pid = kill_vllm(supervisor)
        supervisor.says("restart 1 of")
        with pinging(supervisor) as pings:
            pass
        assert pings.statuses() == {204}
        supervisor.signal(signal.SIGTERM)
        supervisor.leaves(0, 4, "after SIGTERM")
        assert session_pids(pid) == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a folder", "the hub's cache"])
def test_a_restart_says_that_the_weights_hang_and_goes_on_when_they_do(
    disk: Callable[[Path], Disk], tmp_path: Path, where: str
) -> None:
    hung = disk(tmp_path / "volume")
    environ = in_the_hubs_cache(hung.folder) if where != "a folder" else {}
    model = a_model(hung.folder / "model") if where == "a folder" else "org/model"
    with Watched(model, environ={**hung.environ, **environ}) as supervisor:
        supervisor.ready()
        hung.hangs()
        with pinging(supervisor) as pings:
            kill_vllm(supervisor)
            supervisor.says(WEIGHTS_HANG, 30)
            hung.goes_on()
            serves_again(supervisor)
        assert pings.statuses() == {200, 204}
        stop(supervisor)


@pytest.mark.parametrize("where", [pytest.param("a folder", marks=pytest.mark.slow), "the hub's cache"])
def test_weights_that_hang_at_the_first_start(disk: Callable[[Path], Disk], tmp_path: Path, where: str) -> None:
    hung = disk(tmp_path / "volume")
    environ = in_the_hubs_cache(hung.folder) if where != "a folder" else {}
    model = a_model(hung.folder / "model") if where == "a folder" else "org/model"
    hung.hangs()
    with Watched(model, environ={**hung.environ, **environ}) as supervisor:
        assert answers_ping(supervisor) == 204
        with pinging(supervisor) as pings:
            pass
        assert pings.statuses() == {204}
        children = descendants(supervisor)
        supervisor.signal(signal.SIGTERM)
        supervisor.leaves(0, 4, "after SIGTERM")
        wait_until(lambda: have_ended(*children), "the end of all that it had started", 2)


@pytest.mark.slow
def test_a_first_start_says_that_the_weights_hang_and_goes_on_when_they_do(
    disk: Callable[[Path], Disk], tmp_path: Path
) -> None:
    hung = disk(tmp_path / "volume")
    environ = in_the_hubs_cache(hung.folder)
    hung.hangs()
    with Watched("org/model", environ={**hung.environ, **environ}) as supervisor:
        supervisor.says(WEIGHTS_HANG, 30)
        hung.goes_on()
        supervisor.ready()
        assert supervisor.client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
        stop(supervisor)


# A name in vLLM's metrics that looks like their end: the heartbeat, which looks for hangs, once ended what served.

NAME = "x} y"
BRACE = {"SERVED_MODEL_NAME": json.dumps([NAME])}


@pytest.mark.slow
def test_a_model_name_with_a_brace_and_a_blank_ends_nothing() -> None:
    """Eight heartbeats in the 2 s of SUPERVISOR_STALL_TIMEOUT, all through one long request and beyond."""
    with Watched("m", environ={**BRACE, "SUPERVISOR_STALL_TIMEOUT": "2"}) as supervisor:
        supervisor.ready()
        assert f'model_name="{NAME}"' in supervisor.client.get("/metrics").text
        body = {"model": NAME, "prompt": "x", "stream": True, "max_tokens": 20}
        answer = supervisor.client.post(COMPLETIONS, json=body, headers={"X-Fake": '{"token_interval": 0.1}'})
        assert answer.content.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in answer.content
        status = supervisor.client.get("/status").json()
        assert (status["state"], status["restarts"]) == ("ready", 0)
        stop(supervisor)


@pytest.mark.slow
def test_a_hang_is_seen_in_spite_of_such_a_name() -> None:
    with Watched("m", environ={**BRACE, "SUPERVISOR_STALL_TIMEOUT": "1"}) as supervisor:
        supervisor.ready()
        body = {"prompt": "x", "stream": True, "max_tokens": 30}
        answer = supervisor.client.post(COMPLETIONS, json=body, headers={"X-Fake": '{"freeze_after_tokens": 3}'})
        assert b"engine_stopped" in answer.content
        supervisor.says("vLLM hangs: no progress in 1 s")
        serves_again(supervisor)
        stop(supervisor)
