"""The fault table (docs/faults.md), each row a test on the fake vLLM; on the real one: tests/vllm/test_faults.py."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.engine.test_metrics import Scrape
from tests.harness import (
    RawClient,
    Supervisor,
    clean_environment,
    events,
    session_pids,
    wait_until,
)

CHAT = "/v1/chat/completions"
OFTEN = {"SUPERVISOR_MAX_RESTARTS": "1000", "SUPERVISOR_RESTART_WINDOW": "0.05"}  # every crash is the first


def chat(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


def fault(**keys: object) -> dict[str, str]:
    return {"X-Fake": json.dumps(keys)}


def post_raw(client: RawClient, path: str, body: object, **faults: object) -> RawClient:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nX-Fake: {json.dumps(faults)}\r\nContent-Length: {len(content)}\r\n\r\n"
    return client.send(head.encode() + content)


def state_of(supervisor: Supervisor) -> dict[str, int]:
    found = supervisor.client.get("/fake/state").json()
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def mortal() -> Iterator[Supervisor]:
    """For tests that break its engine and leave it with the next one."""
    with Supervisor("m", environ=OFTEN) as supervisor:
        yield supervisor.ready()
        supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]


def restarts(supervisor: Supervisor) -> int:
    return int(supervisor.client.get("/status").json()["restarts"])


def ready_times(supervisor: Supervisor) -> int:
    return supervisor.output.count("starting -> ready") - 1


def ready_again(supervisor: Supervisor, times: int = 1) -> None:
    wait_until(lambda: ready_times(supervisor) >= times, f"restart {times}", 20)


def ends(supervisor: Supervisor) -> None:
    """Stops it and checks that nothing is left."""
    supervisor.engine_pid = supervisor.client.get("/status").json()["pid"]
    supervisor.signal(signal.SIGTERM)
    assert supervisor.exit_code() == 0
    assert session_pids(supervisor.engine_pid) == []


# A process of the engine dies


@pytest.mark.parametrize(
    "victim",
    [pytest.param("pid", marks=pytest.mark.slow), "engine_pid", pytest.param("worker_pid", marks=pytest.mark.slow)],
)
def test_death_while_idle_costs_nothing_and_is_counted(victim: str) -> None:
    with Supervisor("m") as supervisor:
        supervisor.ready()
        before = state_of(supervisor)
        os.kill(before[victim], signal.SIGKILL)
        supervisor.says("ready -> restarting")
        assert supervisor.client.post(CHAT, json=chat()).status_code == 200  # held meanwhile
        status = supervisor.client.get("/status").json()
        assert status["restarts"] == 1
        assert status["last_failure"]["cause"]
        assert status["transitions"] == {"starting -> ready": 2, "ready -> restarting": 1, "restarting -> starting": 1}
        assert session_pids(before["pid"]) == []
        scrape = Scrape(supervisor)
        assert scrape("supervisor_engine_restarts_total") == 1
        assert scrape("supervisor_requests_held_total") + scrape("supervisor_requests_replayed_total") >= 1
        assert scrape("supervisor_engine_transitions_total", **{"from": "restarting", "to": "starting"}) == 1
        ends(supervisor)


@pytest.mark.parametrize("victim", ["pid", "engine_pid", "worker_pid"])
def test_unanswered_requests_are_sent_again_once_it_is_back(mortal: Supervisor, victim: str) -> None:
    before, begun = ready_times(mortal), restarts(mortal)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        slow = fault(prefill_seconds=0.7)
        waiting = [pool.submit(mortal.client.post, CHAT, json=chat(), headers=slow) for _ in range(8)]
        wait_until(lambda: state_of(mortal)["running"] == 8, "eight running requests")
        os.kill(state_of(mortal)[victim], signal.SIGKILL)
        assert [answer.result().status_code for answer in waiting] == [200] * 8
        ready_again(mortal, before + 1)
        assert restarts(mortal) == begun + 1


def test_an_answer_of_500_is_not_believed_of_a_dying_engine(mortal: Supervisor) -> None:
    """vLLM's API server answers 500 to what was in flight in the moment its EngineCore dies."""
    before = ready_times(mortal)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = fault(prefill_seconds=1.0)
        waiting = [pool.submit(mortal.client.post, CHAT, json=chat(), headers=slow) for _ in range(4)]
        wait_until(lambda: state_of(mortal)["running"] == 4, "four running requests")
        os.kill(state_of(mortal)["engine_pid"], signal.SIGKILL)
        assert [answer.result().status_code for answer in waiting] == [200] * 4, mortal.output[-2000:]
        ready_again(mortal, before + 1)


LONG = {"stream": True, "max_tokens": 1000, "max_output_tokens": 1000}
STREAMS: list[tuple[str, dict[str, Any], Callable[[Any], object], bytes]] = [
    (CHAT, chat(), lambda event: event["error"]["code"], b"data: [DONE]\n\n"),
    ("/v1/completions", {"model": "m", "prompt": "x"}, lambda event: event["error"]["code"], b"data: [DONE]\n\n"),
    ("/v1/messages", chat(), lambda event: event["error"]["type"], b"}\n\n"),
    ("/v1/responses", {"model": "m", "input": "x"}, lambda event: event["code"], b"}\n\n"),
]


def test_each_stream_that_had_begun_ends_with_an_error_in_its_dialect_and_a_whole_answer_is_cut(
    mortal: Supervisor,
) -> None:
    before, victim = ready_times(mortal), state_of(mortal)["pid"]
    all_have_begun = threading.Barrier(2 * len(STREAMS) + 2)

    def received(method: str, path: str, body: dict[str, object] | None, **faults: object) -> bytes:
        found = b""
        with mortal.client.stream(method, path, json=body, headers=fault(**faults)) as answer:
            for data in answer.iter_raw():  # raises where the framing does not end properly
                begins, found = not found, found + data
                if begins:
                    all_have_begun.wait(20)
        return found

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        streams = [
            pool.submit(received, "POST", path, body | LONG, token_interval=0.02, split_utf8=split)
            for path, body, _, _ in STREAMS
            for split in (False, True)
        ]
        whole = pool.submit(received, "GET", "/fake/bytes?n=1000000&chunk=1000&interval=0.05", None)
        all_have_begun.wait(20)
        os.kill(victim, signal.SIGKILL)
        for number, stream in enumerate(streams):
            _, _, error, end = STREAMS[number // 2]
            assert stream.result().endswith(end)
            last = list(events(stream.result()))[-1]
            assert error(last) in ("engine_stopped", "api_error")
        with pytest.raises(httpx.RemoteProtocolError):
            whole.result()
    ready_again(mortal, before + 1)


def test_a_request_that_kills_the_engine_is_sent_twice_and_no_more(mortal: Supervisor) -> None:
    before, begun = ready_times(mortal), restarts(mortal)
    answer = mortal.client.post(CHAT, json=chat(), headers=fault(die_after_tokens=0, how="api"))
    assert answer.status_code in (502, 503)
    assert answer.json()["error"]["message"]
    ready_again(mortal, before + 2)
    assert restarts(mortal) == begun + 2
    assert mortal.client.post(CHAT, json=chat()).status_code == 200


# It hangs


def test_a_frozen_engine_is_noticed_and_replaced(tmp_path: Path) -> None:
    """Its stream ends with an error, and a request without an answer is sent to the next one. The stacks are logged by
    py-spy, where it is; here a stand-in on PATH prints what it was asked for."""
    program = tmp_path / "py-spy"
    program.write_text('#!/bin/sh\necho "the stacks, by: $*"\n')
    program.chmod(0o755)
    environ = {"SUPERVISOR_STALL_TIMEOUT": "1", "PATH": f"{tmp_path}:{clean_environment()['PATH']}"}
    with Supervisor("m", environ=environ) as supervisor, concurrent.futures.ThreadPoolExecutor(1) as pool:
        supervisor.ready()
        engine = state_of(supervisor)["engine_pid"]
        body = chat(stream=True, max_tokens=100)
        with supervisor.client.stream("POST", CHAT, json=body, headers=fault(freeze_after_tokens=3)) as answer:
            begun = psutil.Process(engine)
            wait_until(lambda: begun.status() == psutil.STATUS_STOPPED, "the engine to stand still")
            frozen = pool.submit(supervisor.client.post, CHAT, json=chat())
            received = answer.read()
        assert list(events(received))[-1]["error"]["code"] == "engine_stopped"  # type: ignore[index]
        assert received.endswith(b"data: [DONE]\n\n")
        assert frozen.result().status_code == 200
        supervisor.says("vLLM hangs: no progress in 1 s .SUPERVISOR_STALL_TIMEOUT. with 2 requests in flight")
        supervisor.says(
            rf"stacks of VLLM::EngineCor\w* \(pid {engine}\):\nthe stacks, by: dump --nonblocking --pid {engine}"
        )
        ends(supervisor)


@pytest.mark.slow
def test_what_is_slow_is_not_hung() -> None:
    with Supervisor("m", environ={"SUPERVISOR_STALL_TIMEOUT": "1"}) as supervisor:
        supervisor.ready()
        body = chat(stream=True, max_tokens=6)
        answer = supervisor.client.post(CHAT, json=body, headers=fault(token_interval=0.4, prefill_seconds=0.7))
        assert answer.content.endswith(b"data: [DONE]\n\n")
        assert "hangs" not in supervisor.output


# It does not start


def test_a_crash_loop_ends_with_4(tmp_path: Path) -> None:
    environ = {"SUPERVISOR_MAX_RESTARTS": "1", "FAKE_VLLM_COUNT": str(tmp_path / "n")}
    plan = [{}, {"die_at_start": {"log": ["MemoryError"], "code": 1, "after": 0.1}}]
    with Supervisor("m", plan=plan, environ=environ) as supervisor:
        supervisor.ready()
        os.kill(state_of(supervisor)["pid"], signal.SIGKILL)
        assert supervisor.exit_code(30) == 4
        assert supervisor.output.count("restart 1 of 1") == 1
        assert "restarting -> failed: The machine's memory was not enough." in supervisor.output
        assert "SUPERVISOR_MAX_RESTARTS" in supervisor.output


@pytest.mark.slow
def test_a_permanent_cause_is_told_to_all_who_wait_and_exits_3(tmp_path: Path) -> None:
    """And before its end it leaves a post-mortem."""
    log = ["ValueError: Model architectures ['Nonsense'] are not supported for now."]
    plan = [{"die_at_start": {"log": log, "code": 1, "after": 2.5}}]
    environ = {"SUPERVISOR_CACHE_DIR": str(tmp_path)}
    with (
        Supervisor("m", plan=plan, environ=environ) as supervisor,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        supervisor.engine()
        held = [pool.submit(supervisor.client.post, CHAT, json=chat()) for _ in range(4)]
        for answer in held:
            assert answer.result().status_code == 503
            assert "does not support the architecture" in answer.result().json()["error"]["message"]
        assert supervisor.exit_code() == 3
        assert supervisor.output.index("post-mortem, to be pasted") < supervisor.output.index("-> failed")
        *_, last = (line for line in supervisor.output.splitlines() if " ERROR: " in line)
        assert "restarting -> failed" in last
    (bundle,) = (tmp_path / "postmortem").glob("*")
    assert json.loads(bundle.read_text())["exit_code"] == 1


def test_on_failure_serve_stays_and_tells_why() -> None:
    plan = [{"die_at_start": {"log": ["torch.OutOfMemoryError: CUDA out of memory."], "code": 1}}]
    with Supervisor("m", plan=plan, environ={"SUPERVISOR_ON_FAILURE": "serve"}) as supervisor:
        supervisor.says("-> failed")
        ping = supervisor.client.get("/ping")
        assert ping.status_code == 503
        told = [
            ping.json()["status"],
            supervisor.client.get("/health").json()["status"],
            supervisor.client.post(CHAT, json=chat()).json()["error"]["message"],
            supervisor.client.post("/v1/messages", json={}).json()["error"]["message"],
        ]
        status = supervisor.client.get("/status").json()
        failure = status["last_failure"]
        assert failure["exit_code"] == 1
        assert failure["cause"] == "The GPU's memory was not enough."
        assert "TENSOR_PARALLEL_SIZE" in failure["remedy"]
        assert any("CUDA out of memory" in line for line in failure["log_tail"])
        for text in [*told, supervisor.output]:
            assert f"{failure['cause']} {failure['remedy']}" in text
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code() == 3


def test_a_part_that_dies_while_it_loads_is_noticed() -> None:
    plan = [{"load_seconds": 60}]
    with Supervisor("m", plan=plan) as supervisor:
        session = supervisor.engine()

        def engine_core() -> int | None:
            for pid in session_pids(session):
                with contextlib.suppress(psutil.Error):
                    if psutil.Process(pid).name().startswith("VLLM::EngineCore"):
                        return pid
            return None

        os.kill(wait_until(engine_core, "EngineCore"), signal.SIGKILL)
        supervisor.says("starting -> restarting", 10)


# It leaves things behind


@pytest.mark.slow
def test_twenty_crashes_leave_no_shared_memory_and_no_files(tmp_path: Path) -> None:
    seen: set[Path] = set()
    with Supervisor("m", plan=[{"shm": 1}], environ=OFTEN | {"TMPDIR": str(tmp_path)}) as supervisor:
        supervisor.ready()
        note = Path(supervisor.socket).parent / "remains.json"
        for restart in range(20):
            state = state_of(supervisor)
            # What it has mapped is noted within moments of its start; a crash before that is another story.
            wait_until(lambda: f"psm_fake_{state['engine_pid']}" in note.read_text(), "the note of its memory")  # noqa: B023
            ours = {Path(f"/dev/shm/psm_fake_{state[part]}_0") for part in ("pid", "engine_pid")}
            assert all(path.exists() for path in ours)
            seen |= ours
            os.kill(state[("pid", "engine_pid", "worker_pid")[restart % 3]], signal.SIGKILL)
            ready_again(supervisor, restart + 1)
            assert not [path for path in seen if path.exists()]
        assert [path.name for path in tmp_path.iterdir()] == [note.parent.name]
        ends(supervisor)
    assert len(seen) == 40
    assert not [path for path in seen if path.exists()]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_restarts_leave_no_open_files_and_no_memory(tmp_path: Path) -> None:
    """On a GPU 17 of them had left 28 files open, and 100 MB: what a run was attended by held itself, and the weights'
    readers had their buffers in heaps that never shrink."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [300_000_000], "data_offsets": [0, 300_000_000]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 300_000_000)
    (tmp_path / "config.json").write_text("{}")
    seen = []
    with Supervisor(tmp_path, environ=OFTEN) as supervisor:
        for restart in range(8):
            ready_again(supervisor, restart)
            facts = psutil.Process(supervisor.process.pid)
            maps = Path(f"/proc/{facts.pid}/maps")  # a reader's buffer is shared memory without a name

            def are_weights_read(maps: Path = maps) -> bool:
                return "/dev/zero" not in maps.read_text()

            wait_until(are_weights_read, "the weights are read")
            seen.append((facts.num_fds(), facts.memory_info().rss))
            os.kill(supervisor.client.get("/status").json()["pid"], signal.SIGKILL)
        ready_again(supervisor, 8)
        ends(supervisor)
    files, memory = zip(*seen[1:], strict=True)
    assert max(files) - min(files) <= 2, seen
    assert min(memory[-3:]) - min(memory[:3]) < 6_000_000, seen


# The supervisor itself


def test_sigkill_of_the_supervisor_takes_vllm_along() -> None:
    with Supervisor("m", plan=[{"shm": 1, "leave_orphan": True}]) as supervisor:
        supervisor.ready().engine()
        workspace = Path(supervisor.socket).parent
        note = workspace / "remains.json"
        wait_until(lambda: "psm_fake" in note.read_text(), "the note of its shared memory")
        segments = json.loads(note.read_text())["segments"]
        supervisor.signal(signal.SIGKILL)
        wait_until(lambda: session_pids(supervisor.engine()) == [], "vLLM's end")
        wait_until(lambda: not workspace.exists(), "the workspace's removal")
        assert not [path for path in segments if "psm_fake" in path and Path(path).exists()]


@pytest.mark.slow
def test_a_new_start_cleans_what_it_finds_of_its_own_and_nothing_else() -> None:
    """Supervisor and guard are both killed: the next start on this machine does their work."""
    with (
        tempfile.TemporaryDirectory() as base,  # or the start of another test's supervisor would clean up before ours
        Supervisor("m", plan=[{"shm": 1}], environ={"TMPDIR": base}) as first,
        Supervisor("m", environ={"TMPDIR": base}) as bystander,
    ):
        first.ready().engine()
        bystander.ready().engine()
        workspace = Path(first.socket).parent
        wait_until(lambda: "psm_fake" in (workspace / "remains.json").read_text(), "the note of its shared memory")
        segments = json.loads((workspace / "remains.json").read_text())["segments"]
        (guard,) = [child for child in psutil.Process(first.process.pid).children() if child.pid != first.engine()]
        guard.kill()
        first.signal(signal.SIGKILL)
        first.process.wait()
        assert len(session_pids(first.engine())) >= 3
        stranger = Path(tempfile.mkdtemp(prefix="supervisor-", dir=base))  # looks like ours, and has no note
        with Supervisor("m", environ={"TMPDIR": base}) as second:
            second.says("starting m")
            assert not workspace.exists()
            assert session_pids(first.engine()) == []
            assert not [path for path in segments if "psm_fake" in path and Path(path).exists()]
            second.ready().engine()
        assert stranger.exists()
        assert bystander.client.post(CHAT, json=chat()).status_code == 200


@pytest.mark.slow
def test_as_process_1_it_reaps_orphans(tmp_path: Path) -> None:
    assert os.geteuid() == 0, "needs root, for a pid namespace"
    fresh = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with Supervisor("m", within=fresh) as supervisor:
        supervisor.ready()
        init = supervisor.inner
        # An orphan of a process that is no part of vLLM, such as `docker exec` leaves. It lives until the gate opens.
        orphan = f"setsid sh -c 'cat {gate} & exec true' & wait"
        subprocess.run(["nsenter", "-t", str(init.pid), "-p", "sh", "-c", orphan], check=True)

        def orphans() -> list[psutil.Process]:
            return [child for child in init.children() if child.name() == "cat"]

        (found,) = wait_until(orphans, "the orphan is a child of process 1")
        gate.write_bytes(b"")
        wait_until(lambda: not found.is_running(), "it is reaped")  # a zombie counts as running
        session = supervisor.engine()
        init.send_signal(signal.SIGTERM)
        assert supervisor.exit_code() == 0
        assert session > 1
    assert not init.is_running()


def test_parents_death_changes_nothing() -> None:
    with Supervisor("m", within=("sh", "-c", '"$@" & wait', "sh")) as parent:
        parent.ready()
        ours = parent.inner
        parent.process.kill()
        parent.process.wait()
        try:
            session = parent.engine()
            assert parent.client.post(CHAT, json=chat()).status_code == 200
            ours.send_signal(signal.SIGTERM)
            wait_until(lambda: not ours.is_running(), "its end")
            assert session_pids(session) == []
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                ours.kill()


def test_a_temporary_folder_that_can_not_be_written_is_named() -> None:
    with Supervisor("m", environ={"TMPDIR": "/proc"}) as supervisor:
        assert supervisor.exit_code() == 2
        assert supervisor.output.startswith("supervisor: no folder can be made in /proc (")
        assert "set TMPDIR" in supervisor.output


# Drain


@pytest.mark.slow
def test_at_sigterm_running_streams_complete_and_waiting_requests_are_refused() -> None:
    environ = {"SUPERVISOR_MAX_CONCURRENCY": "8"}
    with Supervisor("m", environ=environ) as supervisor, contextlib.ExitStack() as stack:
        supervisor.ready().engine()
        body = chat(stream=True, max_tokens=30)
        running = [stack.enter_context(supervisor.connect()) for _ in range(8)]
        for client in running:
            post_raw(client, CHAT, body, token_interval=0.05)
        wait_until(lambda: supervisor.client.get("/status").json()["in_flight"] == 8, "eight streams")
        waiting = [stack.enter_context(supervisor.connect()) for _ in range(8)]
        for client in waiting:
            post_raw(client, CHAT, body)
        wait_until(lambda: supervisor.client.get("/status").json()["waiting"] == 8, "eight waiting")
        supervisor.signal(signal.SIGTERM)
        for client in waiting:
            answer = client.answer()
            assert answer.status == 503
            assert "retry-after" in answer.headers
        for client in running:
            last = list(events(client.until(b"[DONE]")))[-1]
            assert last["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
        assert supervisor.exit_code() == 0
        assert session_pids(supervisor.engine()) == []


def test_the_limit_is_first_come_first_served_and_then_429() -> None:
    environ = {"SUPERVISOR_MAX_CONCURRENCY": "1", "SUPERVISOR_MAX_WAITING": "3"}
    with Supervisor("m", environ=environ) as supervisor, contextlib.ExitStack() as stack:
        supervisor.ready()
        running, gives_up, second, third, refused = [stack.enter_context(supervisor.connect()) for _ in range(5)]

        def waiting(number: int) -> None:
            wait_until(lambda: supervisor.client.get("/status").json()["waiting"] == number, f"{number} waiting")

        running.send(b"GET /fake/hang HTTP/1.1\r\nHost: h\r\n\r\n")
        wait_until(lambda: supervisor.client.get("/status").json()["in_flight"] == 1, "the running request")
        for number, client in enumerate((gives_up, second, third), 1):
            client.send(b"GET /fake/echo/%d HTTP/1.1\r\nHost: h\r\n\r\n" % number)
            waiting(number)
        answer = refused.send(b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n").answer()
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) > 0
        gives_up.socket.close()
        waiting(2)
        running.socket.close()
        numbers = [client.answer().json()["request"] for client in (second, third)]
        assert numbers == sorted(numbers)  # of requests on the one connection to vLLM
