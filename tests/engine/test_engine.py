"""The engine's life under the supervisor: start, hold, drain, stop, and failures, on the fake vLLM."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest

from tests.harness import FAKE, ROOT, SUPERVISOR, Supervisor, events, http, session_pids, wait_until

CHAT = "/v1/chat/completions"


def chat(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


def fault(**keys: object) -> dict[str, str]:
    return {"X-Fake": json.dumps(keys)}


def leaves_nothing(supervisor: Supervisor, workspace: Path) -> None:
    assert supervisor.engine_pid is not None
    assert session_pids(supervisor.engine_pid) == []
    assert not workspace.exists()


def state(supervisor: Supervisor) -> str:
    return str(supervisor.client.get("/status").json()["state"])


# Start


def test_with_a_warm_up_it_is_ready_when_the_model_has_answered() -> None:
    """Without our access log vLLM's own is back, and tells it: through its pipe, and so maybe after we say `ready`."""
    environ, plan = {"SUPERVISOR_WARM_UP": "true", "SUPERVISOR_ACCESS_LOG": "false"}, [{"prefill_seconds": 0.2}]
    with Supervisor("m", environ=environ, plan=plan) as supervisor:
        supervisor.ready()
        last = supervisor.client.get("/status").json()["phases"][-1]
        assert last["name"] == "warming up"
        assert last["seconds"] >= 0.2
        supervisor.says(r'INFO: .*"POST /v1/completions HTTP/1.1" 200')
        supervisor.client.post(CHAT, json=chat())
        supervisor.says(r'INFO: .*"POST /v1/chat/completions HTTP/1.1" 200')
        assert supervisor.output.count('"POST /v1/completions ') == 1
        assert "supervisor: POST" not in supervisor.output


@pytest.mark.slow
def test_an_engine_that_the_warm_up_kills_was_never_ready(tmp_path: Path) -> None:
    """Nobody's request is the one that it dies of."""
    plan = [{"die_after_requests": 0}, {}]
    environ = {"SUPERVISOR_WARM_UP": "true", "FAKE_VLLM_COUNT": str(tmp_path / "n")}
    with Supervisor("m", environ=environ, plan=plan) as supervisor:
        supervisor.ready()
        assert supervisor.client.get("/status").json()["restarts"] == 1
        assert supervisor.output.count("starting -> ready") == 1
        assert supervisor.output.index("restarting -> starting") < supervisor.output.index("starting -> ready")


def test_while_it_loads_ping_is_204_and_health_names_the_phase(starting: Supervisor) -> None:
    assert starting.client.get("/ping").status_code == 204
    assert starting.client.get("/ping").content == b""
    health = starting.client.get("/health")
    assert health.status_code == 503
    assert "loading weights" in health.json()["status"]
    status = starting.client.get("/status").json()
    assert status["state"] == "starting"
    assert "importing vLLM" in [phase["name"] for phase in status["phases"]]
    assert status["model"] == "m"


def test_requests_that_come_too_early_are_held_and_answered_in_order() -> None:
    with Supervisor("m", plan=[{"load_seconds": 4}]) as supervisor, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(supervisor.client.post, CHAT, json=chat()) for _ in range(8)]
        wait_until(lambda: supervisor.client.get("/status").json()["waiting"] == 8, "eight held requests")
        assert "ready: http" not in supervisor.output
        assert [answer.result().status_code for answer in answers] == [200] * 8


def test_hold_timeout_is_a_503_that_says_what_is_going_on(starting: Supervisor) -> None:
    answer = starting.client.post(CHAT, json=chat())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert "starting" in error["message"]
    assert "SUPERVISOR_HOLD_TIMEOUT" in error["message"]
    assert error["code"] == "engine_unavailable"
    refused = starting.client.post("/v1/messages", json={}).json()
    assert refused["type"] == "error"
    assert refused["error"]["type"] == "overloaded_error"
    assert refused["request_id"] == refused["request_id"].strip() != ""


def test_child_sees_vllms_variables_and_no_secrets_of_ours() -> None:
    environ = {
        "VLLM_SOMETHING": "1",
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "RUNPOD_AI_API_KEY": "rpa_abcdefghijklmnop",
        "RUNPOD_WEBHOOK_PING": "http://127.0.0.1:9/ping",
        "SUPERVISOR_API_KEYS": "our-secret-key",
    }
    with Supervisor("m", environ=environ) as supervisor:
        supervisor.says("supervisor: ready")
        headers = {"X-API-Key": "our-secret-key"}
        with httpx.Client(verify=False, base_url=f"http://127.0.0.1:{supervisor.port}", headers=headers) as client:
            names = set(client.get("/fake/state").json()["env_names"])
            supervisor.engine_pid = client.get("/status").json()["pid"]
        assert {"VLLM_SOMETHING", "HF_TOKEN"} <= names
        assert not {name for name in names if name.startswith(("SUPERVISOR_", "RUNPOD_"))}
        for secret in ("hf_abcdefghijklmnop", "rpa_abcdefghijklmnop", "our-secret-key"):
            assert secret not in supervisor.output


def test_health_port_serves_beside_the_first() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Supervisor("m", environ={"PORT_HEALTH": str(port)}) as supervisor:
        supervisor.ready()
        assert http.get(f"http://127.0.0.1:{port}/ping").status_code == 200


# Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stop_mid_stream_completes_it_and_leaves_nothing(number: int) -> None:
    with Supervisor("m") as supervisor:
        supervisor.ready().engine()
        workspace = Path(supervisor.socket).parent
        body = chat(stream=True, max_tokens=150)
        with supervisor.client.stream("POST", CHAT, json=body, headers=fault(token_interval=0.02)) as answer:
            lines = answer.iter_lines()
            next(lines)
            supervisor.signal(number)
            supervisor.says("ready -> draining")
            late = http.post(f"http://127.0.0.1:{supervisor.port}{CHAT}", json=chat())
            assert late.status_code == 503
            assert "retry-after" in late.headers
            assert http.get(f"http://127.0.0.1:{supervisor.port}/ping").status_code == 503
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
        assert supervisor.exit_code() == 0
        leaves_nothing(supervisor, workspace)


@pytest.mark.slow
def test_many_streams_and_waiting_requests_at_stop() -> None:
    """All that were being answered complete; the exit code is 0."""
    with Supervisor("m") as supervisor, concurrent.futures.ThreadPoolExecutor(32) as pool:
        supervisor.ready().engine()

        def stream() -> list[dict[str, object]]:
            body = json.dumps(chat(stream=True, max_tokens=150)).encode()
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nX-Fake: {fault(token_interval=0.05)['X-Fake']}\r\nContent-Length: "
            )
            with supervisor.connect() as raw:
                raw.send(f"{head}{len(body)}\r\n\r\n".encode() + body)
                return list(events(raw.until(b"[DONE]")))

        streams = [pool.submit(stream) for _ in range(32)]
        wait_until(lambda: supervisor.client.get("/status").json()["in_flight"] == 32, "32 streams")
        supervisor.signal(signal.SIGTERM)
        for result in streams:
            assert result.result()[-1]["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
        assert supervisor.exit_code() == 0


def test_stop_while_it_loads_answers_the_waiting() -> None:
    """vLLM is deaf to SIGTERM while it loads (3 of 3 tries), and has nothing to lose: it is killed at once."""
    plan = [{"load_seconds": 60, "ignore_sigterm": True}]
    with Supervisor("m", plan=plan) as supervisor, concurrent.futures.ThreadPoolExecutor(1) as pool:
        supervisor.engine()
        held = pool.submit(supervisor.client.post, CHAT, json=chat())
        wait_until(lambda: supervisor.client.get("/status").json()["waiting"] == 1, "the held request")
        supervisor.signal(signal.SIGTERM)
        assert held.result().status_code == 503
        assert supervisor.exit_code() == 0
        assert "ignored SIGTERM" not in supervisor.output
        assert session_pids(supervisor.engine_pid or 0) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_right_after_the_spawn_leaves_nothing(number: int) -> None:
    """While the supervisor still imports, nobody walks the table yet: the signal waits."""
    with Supervisor("m") as supervisor:
        ours = psutil.Process(supervisor.process.pid)

        def spawned() -> int | None:
            """The pid of a child that leads a session (a short-lived one may ask vLLM for its version before)."""
            return next((child.pid for child in ours.children() if os.getsid(child.pid) == child.pid), None)

        supervisor.engine_pid = wait_until(spawned, "the spawn")
        supervisor.signal(number)
        assert supervisor.exit_code() == 0
        assert session_pids(supervisor.engine_pid) == []


def test_drain_timeout_cuts_and_says_so_in_the_exit_code() -> None:
    with Supervisor("m", environ={"SUPERVISOR_DRAIN_TIMEOUT": "0.3"}) as supervisor:
        supervisor.ready().engine()
        body = chat(stream=True, max_tokens=10_000)
        with supervisor.client.stream("POST", CHAT, json=body, headers=fault(token_interval=0.05)) as answer:
            received = b""
            for data in answer.iter_raw():
                if not received:
                    supervisor.signal(signal.SIGTERM)
                received += data
        assert list(events(received))[-1]["error"]["code"] == "shutting_down"  # type: ignore[index]
        assert received.endswith(b"data: [DONE]\n\n")
        assert supervisor.exit_code() == 128 + signal.SIGTERM
        assert "SUPERVISOR_DRAIN_TIMEOUT" in supervisor.output


def test_second_signal_does_not_wait() -> None:
    with Supervisor("m") as supervisor:
        supervisor.ready().engine()
        workspace = Path(supervisor.socket).parent
        with supervisor.connect() as raw:
            raw.send(b"GET /fake/hang HTTP/1.1\r\nHost: h\r\n\r\n")
            wait_until(lambda: supervisor.client.get("/status").json()["in_flight"] == 1, "the request in flight")
            supervisor.signal(signal.SIGTERM)
            supervisor.says("ready -> draining")
            supervisor.signal(signal.SIGTERM)
            assert supervisor.exit_code() == 128 + signal.SIGTERM
        leaves_nothing(supervisor, workspace)


@pytest.mark.slow
def test_vllm_that_ignores_sigterm_is_killed_with_all_that_it_started() -> None:
    plan = [{"ignore_sigterm": True, "leave_orphan": True}]
    with Supervisor("m", plan=plan, environ={"SUPERVISOR_DRAIN_TIMEOUT": "1"}) as supervisor:
        supervisor.ready().engine()
        workspace = Path(supervisor.socket).parent
        assert len(session_pids(supervisor.engine())) >= 4
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code(20) == 0
        assert "ignored SIGTERM" in supervisor.output
        leaves_nothing(supervisor, workspace)


# Failures


@pytest.mark.slow
def test_startup_timeout_is_exit_3_and_names_the_variable() -> None:
    with Supervisor("m", plan=[{"load_seconds": 60}], environ={"SUPERVISOR_STARTUP_TIMEOUT": "3"}) as supervisor:
        supervisor.engine()
        assert supervisor.exit_code() == 3
        assert "SUPERVISOR_STARTUP_TIMEOUT" in supervisor.output
        assert session_pids(supervisor.engine()) == []


@pytest.mark.slow
def test_a_stopped_reader_of_our_output_stops_nothing() -> None:
    """A full pipe on stdout and stderr: its lines are lost, requests are not."""
    read, write = os.pipe()
    environ = {
        "SUPERVISOR_VLLM": str(FAKE),
        "PORT": "0",
        "FAKE_VLLM_PLAN": '[{"log_flood": 2000}]',
        "PATH": os.environ["PATH"],
    }
    process = subprocess.Popen(
        [str(SUPERVISOR), "up", "m"], env=environ, stdout=write, stderr=write, stdin=subprocess.DEVNULL
    )
    os.close(write)
    try:
        head = b""
        while b"ready: http" not in head:
            head += os.read(read, 4096)
        port = int(head.split(b"ready: http://127.0.0.1:")[1].split()[0])
        engine = http.get(f"http://127.0.0.1:{port}/status").json()["pid"]

        def lines() -> int:
            answer = http.get(f"http://127.0.0.1:{port}/status?after=0", timeout=2)
            assert answer.status_code == 200
            return int(answer.json()["line"])

        wait_until(lambda: lines() > 4000, "more lines than the pipe's 64 KB take, four times")
        process.send_signal(signal.SIGTERM)
        os.set_blocking(read, True)
        while os.read(read, 65536):
            pass
        assert process.wait(15) == 0
        assert session_pids(engine) == []
    finally:
        process.kill()
        process.wait()
        os.close(read)


def test_closed_output_stops_nothing() -> None:
    with Supervisor("m", plan=[{"log_flood": 200, "log_binary": True}]) as supervisor:
        supervisor.ready().engine()
        wait_until(lambda: b"\xff" in supervisor.raw_output or b"\xfe" in supervisor.raw_output, "bytes as they came")
        assert supervisor.process.stdout is not None
        supervisor.stop_reading()
        for _ in range(20):
            assert supervisor.client.post(CHAT, json=chat()).status_code == 200
        supervisor.signal(signal.SIGTERM)
        assert supervisor.process.wait(15) == 0
        assert session_pids(supervisor.engine()) == []


def test_readme_tool_line_works() -> None:
    """`SUPERVISOR_VLLM=scripts/fake_vllm supervisor up x`, from the repository's root."""
    with Supervisor("x", vllm="scripts/fake_vllm", cwd=ROOT) as supervisor:
        supervisor.ready().engine()
