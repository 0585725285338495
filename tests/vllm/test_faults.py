"""The fault table on the real vLLM: what is done to it, and what its clients see."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import DEMO, Supervisor, events, http, session_pids, wait_until
from tests.vllm.conftest import START, VLLM
from tests.vllm.test_serving import CHAT, greedy

pytestmark = pytest.mark.vllm


def part(supervisor: Supervisor, name: str) -> int:
    """The pid of one of the engine's processes; "" is the API server."""
    session = supervisor.client.get("/status").json()["pid"]
    supervisor.engine_pid = session  # not always that of the first start
    if not name:
        return int(session)

    def found() -> int | None:
        for pid in session_pids(session):
            with contextlib.suppress(psutil.Error):
                if psutil.Process(pid).name().startswith(name):
                    return pid
        return None

    return int(str(wait_until(found, name, 60)))


def restarts(supervisor: Supervisor) -> int:
    return supervisor.output.count("starting -> ready") - 1


def another_start(supervisor: Supervisor, old: int) -> None:
    """Between two runs there is no pid."""
    wait_until(lambda: supervisor.client.get("/status").json()["pid"] not in (None, old), "the next start", 60)


def ready_again(supervisor: Supervisor, before: int) -> None:
    wait_until(lambda: restarts(supervisor) > before, "another start", START)


def stream(supervisor: Supervisor) -> list[dict[str, object]]:
    """A long stream, read to its proper end; of four answers, or a fast machine is done before the kill."""
    body = greedy(stream=True, max_tokens=1900, ignore_eos=True, n=4, temperature=1)
    answer = http.post(f"http://127.0.0.1:{supervisor.port}{CHAT}", json=body, timeout=START)
    assert answer.content.endswith(b"data: [DONE]\n\n")
    return list(events(answer.content))


@pytest.mark.breaks_vllm
@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker", ""], ids=["EngineCore", "worker", "API-server"])
def test_killed_with_work_in_flight(served: Supervisor, victim: str) -> None:
    """Streams that had begun end with an error event, whole answers that had not begun are made by the next engine."""
    before = restarts(served)
    segments = json.loads((Path(served.socket).parent / "remains.json").read_text())["segments"]
    assert len(segments) >= 2
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        streams: list[concurrent.futures.Future[Any]] = [pool.submit(stream, served) for _ in range(8)]
        body = greedy(max_tokens=500, ignore_eos=True)
        url = f"http://127.0.0.1:{served.port}{CHAT}"
        whole: list[concurrent.futures.Future[Any]] = [
            pool.submit(http.post, url, json=body, timeout=START) for _ in range(8)
        ]
        # Not all 16, and nothing asked of vLLM: while it works, two cores may leave nobody else the time to look.
        wait_until(
            lambda: served.client.get("/status").json()["in_flight"] or all(sent.done() for sent in (*streams, *whole)),
            "requests in flight", 120,
        )  # fmt: skip
        os.kill(part(served, victim), signal.SIGKILL)
        served.says(r"ready -> restarting")
        for result in streams:
            last = result.result()[-1]
            assert "error" in last or last["choices"][0]["finish_reason"] == "length"
        for answer in whole:
            assert answer.result().status_code == 200, answer.result().text
            assert answer.result().json()["usage"]["completion_tokens"] == 500
    ready_again(served, before)
    assert not [path for path in segments if Path(path).exists()]  # 420 MB by size, which nothing else removes


@pytest.mark.breaks_vllm
def test_killed_while_idle_and_again_while_loading(served: Supervisor) -> None:
    before, old = restarts(served), served.client.get("/status").json()["pid"]
    os.kill(part(served, "VLLM::EngineCore"), signal.SIGKILL)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        held = pool.submit(http.post, f"http://127.0.0.1:{served.port}{CHAT}", json=greedy(), timeout=START)
        another_start(served, old)
        os.kill(part(served, "VLLM::EngineCore"), signal.SIGKILL)
        ready_again(served, before)
        assert held.result().status_code == 200


@pytest.mark.breaks_vllm
def test_frozen_with_work_in_flight(served: Supervisor) -> None:
    before = restarts(served)
    os.kill(part(served, "VLLM::EngineCore"), signal.SIGSTOP)
    answer = http.post(f"http://127.0.0.1:{served.port}{CHAT}", json=greedy(), timeout=START)
    assert "vLLM hangs: no progress in 15 s" in served.output
    assert answer.status_code == 200
    assert restarts(served) == before + 1


# With supervisors of their own


@pytest.mark.breaks_vllm
def test_the_next_engine_is_forked_and_answers_the_same(served: Supervisor) -> None:
    """docs/cold_start.md"""

    def answers() -> list[object]:
        prompts = [f"{number} {word}" for number in range(5) for word in ("Who", "The sea", "def f(x):", "\u20ac")]
        bodies = [greedy(max_tokens=16, ignore_eos=True, messages=[{"role": "user", "content": it}]) for it in prompts]
        return [served.client.post(CHAT, json=body, timeout=START).json()["choices"] for body in bodies]

    before, starts, said = answers(), restarts(served), len(served.output)
    os.kill(part(served, "VLLM::EngineCore"), signal.SIGKILL)
    ready_again(served, starts)
    assert "vLLM is forked: its modules were kept imported" in served.output[said:]
    assert answers() == before
    supervisor = psutil.Process(part(served, "")).parent()
    assert supervisor is not None
    (zygote,) = [each for each in supervisor.children() if each.name() == "VLLM::Zygote"]
    assert zygote.num_threads() == 1


def test_a_permanent_failure_exits_3_and_names_what_to_change() -> None:
    with Supervisor(DEMO, "--", "--no-such-option", vllm=VLLM) as supervisor:
        supervisor.engine()
        assert supervisor.exit_code(START) == 3
        assert "vLLM does not know the option --no-such-option" in supervisor.output
        assert "SUPERVISOR_EXTRA_ARGS" in supervisor.output
        assert session_pids(supervisor.engine()) == []


def test_sigterm_while_it_loads_ends_it_at_once() -> None:
    """With its EngineCore started, vLLM is deaf to SIGTERM until it is ready."""
    with Supervisor(DEMO, vllm=VLLM) as supervisor:
        part(supervisor, "VLLM::EngineCore")
        workspace = Path(supervisor.socket).parent
        supervisor.signal(signal.SIGTERM)
        assert supervisor.exit_code(30) == 0
        assert "ignored SIGTERM" not in supervisor.output
        assert session_pids(supervisor.engine_pid or 0) == []
        assert not workspace.exists()


def test_a_crash_loop_ends() -> None:
    with Supervisor(DEMO, vllm=VLLM, environ={"SUPERVISOR_MAX_RESTARTS": "1"}) as supervisor:
        first = supervisor.client.get("/status").json()["pid"]
        os.kill(first, signal.SIGKILL)
        another_start(supervisor, first)
        os.kill(supervisor.client.get("/status").json()["pid"], signal.SIGKILL)
        assert supervisor.exit_code(30) == 3
        assert "SUPERVISOR_MAX_RESTARTS" in supervisor.output
