"""Starts that are forked from what an earlier one imported, on the fake: whatever goes wrong with it ends in a plain
start. On the real vLLM: tests/vllm/test_faults.py, where every restart is such a one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from supervisor.around import prefork, zygote
from supervisor.around.machine import Machine
from supervisor.around.prefork import MIN_MEMORY_BYTES, Prefork, make_prefork
from supervisor.engine.child import _spawn_by_fork
from tests.engine.test_faults import CHAT, OFTEN, chat
from tests.harness import DEMO, Supervisor, have_ended, session_pids, wait_until

IMPORTABLE = Path(__file__).with_name("stand_ins") / "importable"
SCRIPT = (
    f"#!{sys.executable}\nimport sys\nfrom vllm.script import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
)

FORKED, ANEW = "vLLM is forked", "vLLM is started anew, not forked: "
FAILED = "a start with modules kept imported failed: "

Start = Callable[..., Supervisor]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """`start(fault)`: a supervisor whose vLLM can be imported."""
    script = tmp_path / "vllm"
    script.write_text(SCRIPT)
    script.chmod(0o755)

    def made(fault: str = "", **more: str) -> Supervisor:
        environ = {
            "PYTHONPATH": str(IMPORTABLE), "FAKE_IMPORTED": fault, "FAKE_IMPORTED_FILE": str(tmp_path / "now"), **OFTEN,
            "SERVED_MODEL_NAME": "m", **more,
        }  # fmt: skip
        return Supervisor(DEMO, vllm=script, environ=environ)

    return made


def crash(supervisor: Supervisor, *expected: str) -> None:
    """Kills vLLM, and waits until it serves again. The log of the time between has all of `expected`."""
    said, ends = len(supervisor.output), supervisor.output.count("starting -> ready")
    supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
    os.kill(supervisor.engine(), signal.SIGKILL)
    assert supervisor.client.post(CHAT, json=chat()).status_code == 200  # held meanwhile
    wait_until(lambda: supervisor.output.count("starting -> ready") > ends, "another start", 20)
    supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
    for words in expected:
        assert words in supervisor.output[said:]


def zygotes(supervisor: Supervisor) -> list[psutil.Process]:
    """Its children that have the program's command line, but for the engine."""
    found = []
    for process in psutil.Process(supervisor.process.pid).children():
        with contextlib.suppress(psutil.Error):
            ours = any(word.endswith("zygote.py") for word in process.cmdline())
            if ours and process.pid != supervisor.engine_pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def the_zygote(supervisor: Supervisor) -> psutil.Process:
    supervisor.engine()
    wait_until(lambda: zygotes(supervisor), "the zygote")
    (found,) = zygotes(supervisor)
    return found


def first_to_go(pid: int) -> int:
    """Where memory runs out: the kernel's score, as it was set."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_a_crashed_engine_is_followed_by_a_fork(start: Start) -> None:
    with start() as supervisor:
        supervisor.ready()
        zygote = the_zygote(supervisor)
        assert zygote.num_threads() == 1
        assert first_to_go(zygote.pid) == 1000
        for _ in range(3):
            crash(supervisor, FORKED)
            engine = psutil.Process(supervisor.engine())
            assert os.getsid(engine.pid) == engine.pid
            assert engine.ppid() == supervisor.process.pid
            assert first_to_go(engine.pid) == first_to_go(supervisor.process.pid)
            assert the_zygote(supervisor) == zygote
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code() == 0
        assert not zygote.is_running()
        assert not session_pids(supervisor.engine())


@pytest.mark.slow
def test_its_words_and_its_end_are_as_of_any_other(start: Start) -> None:
    with start() as supervisor:
        supervisor.ready()
        crash(supervisor, FORKED, "(APIServer pid=", "starting -> ready: vLLM answers after")
        crash(supervisor, "vLLM ended (killed by SIGKILL)")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_zygote_that_was_killed_or_hangs(start: Start, number: int) -> None:
    with start() as supervisor:
        supervisor.ready()
        first = the_zygote(supervisor)
        first.send_signal(number)
        crash(supervisor, f"{ANEW}the process that keeps its modules imported does not answer")
        assert not first.is_running()
        assert the_zygote(supervisor) != first
        crash(supervisor, FORKED)


@pytest.mark.slow
def test_with_cuda_there_is_no_zygote(start: Start) -> None:
    with start("cuda") as supervisor:
        supervisor.ready()
        crash(supervisor)
        assert not zygotes(supervisor)
        assert FORKED not in supervisor.output


@pytest.mark.slow
def test_cuda_that_comes_later(start: Start, tmp_path: Path) -> None:
    with start("cuda-later") as supervisor:
        supervisor.ready()
        the_zygote(supervisor)
        (tmp_path / "now").touch()
        crash(supervisor, f"{ANEW}CUDA is initialized")
        assert not zygotes(supervisor)


@pytest.mark.parametrize("fault", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_fork_that_fails_is_followed_by_a_plain_start(start: Start, fault: str) -> None:
    """Twice, and no other is tried."""
    with start(fault, SUPERVISOR_STARTUP_TIMEOUT="2") as supervisor:
        supervisor.ready()
        crash(supervisor, FORKED, f"{FAILED}the next one is a plain")
        assert not zygotes(supervisor)
        crash(supervisor)  # leaves another zygote
        the_zygote(supervisor)
        crash(supervisor, FORKED, f"{FAILED}the next one is a plain")


@pytest.mark.slow
def test_a_first_start_that_fails_is_followed_by_a_plain_one(start: Start) -> None:
    """At once, and it does not count. An error that nobody knows would be the end, where it is vLLM's own."""
    with start("dies-anyway", SUPERVISOR_MAX_RESTARTS="0") as supervisor:
        supervisor.ready()
    with start("dies-anyway") as supervisor:
        supervisor.ready()
        assert f"{FAILED}the next one is a plain" in supervisor.output
        crash(supervisor, f"{FAILED}all further ones are a plain")
        crash(supervisor)
        assert supervisor.output.count(FAILED) == 2


def test_a_cause_that_is_known_ends_the_first_start(start: Start) -> None:
    with start(FAKE_VLLM_PLAN='{"reject_flags": ["--uds"]}') as supervisor:
        assert supervisor.exit_code() == 3
        assert FAILED not in supervisor.output


def test_a_start_that_somebody_kills_is_not_doubted(start: Start) -> None:
    """It counts as it always did."""
    with start(FAKE_VLLM_PLAN='{"load_seconds": 30}', SUPERVISOR_MAX_RESTARTS="0") as supervisor:
        os.kill(supervisor.engine(), signal.SIGKILL)
        assert supervisor.exit_code() == 3
        assert FAILED not in supervisor.output


@pytest.mark.slow
def test_switched_off(start: Start) -> None:
    with start(SUPERVISOR_FAST_RESTART="false") as supervisor:
        supervisor.ready()
        crash(supervisor)
        assert FORKED not in supervisor.output
        assert not zygotes(supervisor)


def test_nothing_outlives_a_supervisor_that_was_killed(start: Start) -> None:
    with start() as supervisor:
        supervisor.ready()
        crash(supervisor, FORKED)
        zygote, engine = the_zygote(supervisor), supervisor.engine()
        supervisor.process.kill()
        wait_until(lambda: have_ended(zygote), "the zygote's end")
        wait_until(lambda: not session_pids(engine), "the engine's end")


# Without a process


def test_another_environment_is_no_reason_to_fork() -> None:
    """Much of it is read while modules are imported."""
    ours, theirs = socket.socketpair()
    with ours, theirs, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waits = pool.submit(
            zygote.wait_for_request, theirs, {"PATH": "/bin", "HF_HUB_OFFLINE": "1", "LC_CTYPE": "C.UTF-8"}
        )
        zygote.send(ours, {"argv": [], "environ": {"PATH": "/bin", "HF_HOME": "/x"}, "parent": 1})
        assert zygote.receive(ours) == ({"why": "the environment is another one: HF_HOME, HF_HUB_OFFLINE"}, [])
        ours.close()
        assert waits.result(10) is None


def test_a_start_is_plain_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Prefork(["/python"], "/bin/vllm", tmp_path)
    argv = ("/bin/vllm", "serve", "m")
    monkeypatch.setattr(Machine, "spare_memory", lambda _: MIN_MEMORY_BYTES)
    assert made.program(argv) == ("/python", zygote.__file__, str(tmp_path / "zygote.sock"), *argv)
    monkeypatch.setattr(Machine, "spare_memory", lambda _: MIN_MEMORY_BYTES - 1)
    assert made.program(argv) == argv
    made.close()


def test_a_fork_that_raises_leaves_no_pipe() -> None:
    def fork(command: object, output: int, errors: int) -> int | None:
        raise OSError("no more files")

    before = psutil.Process().num_fds()
    with pytest.raises(OSError, match="no more files"):
        _spawn_by_fork(SimpleNamespace(), fork)  # type: ignore[arg-type]  # only the fork looks at it
    assert psutil.Process().num_fds() == before


SILENT = "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(); time.sleep(60)"


def test_one_that_hangs_before_its_first_word_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no open file with us."""
    monkeypatch.setattr(prefork, "PATIENCE", 0.05)
    here = Prefork(("python",), "vllm", tmp_path)
    ours = psutil.Process()
    with subprocess.Popen(
        [sys.executable, "-c", SILENT, str(tmp_path / "zygote.sock")], stdout=subprocess.PIPE
    ) as silent:
        assert silent.stdout is not None
        silent.stdout.readline()
        before = ours.num_fds()
        here._accept()
        assert here.zygote is None
        assert not psutil.pid_exists(silent.pid)
        assert ours.num_fds() == before
    here.close()


@pytest.mark.parametrize(
    "text",
    ["#!/bin/sh\nexec /opt/vllm/bin/vllm \"$@\"\n", "#!/usr/bin/python3\nimport vllm\nvllm.main()\n", ""],
    ids=["a shell's", "somebody's", "empty"],
)  # fmt: skip
def test_a_script_that_is_not_pips_is_run_as_it_is(tmp_path: Path, text: str) -> None:
    script = tmp_path / "vllm"
    script.write_text(text)
    assert make_prefork(["/usr/bin/python3"], [str(script)], tmp_path) is None


def test_vllms_own_objections_to_a_fork_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(
        data: int = 1, name: str = "LlamaForCausalLM", ipc: str = "direct_rpc", **parallel: object
    ) -> SimpleNamespace:
        given = {"world_size": 1, "data_parallel_size": data, "distributed_executor_backend": "uni", "nnodes": 1}
        model = SimpleNamespace(architecture=name, multimodal_config=SimpleNamespace(mm_tensor_ipc=ipc))
        return SimpleNamespace(parallel_config=SimpleNamespace(**given | parallel), model_config=model)

    def platform(name: str) -> None:
        module = SimpleNamespace(current_platform=SimpleNamespace(device_name=name))
        monkeypatch.setitem(sys.modules, "vllm.platforms", module)

    platform("cuda")
    assert zygote.may_fork(config())
    assert zygote.may_fork(SimpleNamespace(parallel_config=config().parallel_config, model_config=None))
    assert not zygote.may_fork(config(data=2))
    assert not zygote.may_fork(config(name="WhisperForConditionalGeneration"))
    assert not zygote.may_fork(config(ipc="torch_shm"))
    several: dict[str, Any] = {"world_size": 2, "distributed_executor_backend": "mp"}
    assert zygote.may_fork(config(**several))
    assert not zygote.may_fork(config(data=2, **several))
    assert not zygote.may_fork(config(name="WhisperForConditionalGeneration", **several))
    assert not zygote.may_fork(config(**several | {"nnodes": 2}))
    for backend in ("ray", "external_launcher", object):
        assert not zygote.may_fork(config(**several | {"distributed_executor_backend": backend}))
    platform("rocm")
    assert not zygote.may_fork(config(**several))
    platform("cpu")
    assert zygote.may_fork(config())
    assert zygote.may_fork(config(distributed_executor_backend="mp"))
    assert not zygote.may_fork(config(**several))


def test_the_method_is_set_after_vllms_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class Platform:
        @classmethod
        def check_and_update_config(cls, config: object) -> None:
            os.environ[zygote.METHOD_VARIABLE] = "spawn"

    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1, data_parallel_size=1),
        model_config=SimpleNamespace(architecture="LlamaForCausalLM"),
    )
    monkeypatch.setenv(zygote.METHOD_VARIABLE, "")
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=Platform()))
    zygote.allow_forks({zygote.METHOD_VARIABLE: "spawn"})  # the user's word
    Platform().check_and_update_config(config)
    assert os.environ[zygote.METHOD_VARIABLE] == "spawn"
    zygote.allow_forks({})
    Platform().check_and_update_config(config)
    assert os.environ[zygote.METHOD_VARIABLE] == "fork"
    config.parallel_config.world_size = 2
    Platform().check_and_update_config(config)
    assert os.environ[zygote.METHOD_VARIABLE] == "spawn"


def test_a_model_is_looked_at_in_a_process_of_its_own() -> None:
    """Where that fails, vLLM does it as it does."""

    def fails() -> int:
        raise ValueError("no such class")

    assert zygote.run_forked(lambda _: 0, os.getpid) not in (0, os.getpid())
    assert zygote.run_forked(lambda job: f"instead of {job.__name__}", fails) == "instead of fails"
