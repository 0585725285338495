"""A frozen EngineCore is noticed, whatever the API server goes on answering; and what is no hang is left alone. By what
a user sees: the log, the answers, /status. The real vLLM's share is tests/vllm/test_hang.py.

A hang takes the stall timeout to show, and its absence three of them. So the scenarios of a test run at once, each with
a supervisor of its own, and a test tells of all that failed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from websockets.sync.client import connect

from tests.harness import FAKE, RawClient, Supervisor, wait_until

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
STALL, MARGIN = 2.5, 3.0  # seconds: SUPERVISOR_STALL_TIMEOUT, and how much later a hang may be noticed
WEBSOCKET_VLLM = Path(__file__).parent / "websocket_vllm.py"
NO_COUNTERS = {"DISABLE_LOG_STATS": "true"}  # vLLM's /metrics has nothing of the engine then
ODD_NAME = 'x} 3 "y\\'  # a label of each counter
COMMENTS = {"SSE_KEEP_ALIVE_INTERVAL": "1"}

Scenario = Callable[[], None]


def together(scenarios: dict[str, Scenario]) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(scenarios)) as pool:
        running = {name: pool.submit(scenario) for name, scenario in scenarios.items()}
    failed = {name: error for name, future in running.items() if (error := future.exception())}
    for name, error in failed.items():
        error.add_note(f"scenario: {name}")
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(running)} failed: {', '.join(failed)}", [*failed.values()])


@contextlib.contextmanager
def supervised(*arguments: str, plan: object = None, vllm: str | Path = FAKE, **environ: str) -> Iterator[Supervisor]:
    environ = {"SUPERVISOR_STALL_TIMEOUT": str(STALL), **environ}
    with Supervisor("m", *arguments, plan=plan, vllm=vllm, environ=environ) as supervisor:
        yield supervisor.ready(30)


def asked(path: str = CHAT, **more: object) -> dict[str, object]:
    prompt = {"input": "hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": "m", **prompt, **more}


def fault(**keys: object) -> dict[str, str]:
    return {"X-Fake": json.dumps(keys)}


def sent(supervisor: Supervisor, body: bytes, path: str = CHAT) -> RawClient:
    """A connection on which a request has gone out."""
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return supervisor.connect().send(head.encode() + body)


def state_of(supervisor: Supervisor) -> dict[str, int]:
    found = supervisor.client.get("/fake/state").json()
    assert isinstance(found, dict)
    return found


# It hangs


@contextlib.contextmanager
def frozen_stream(supervisor: Supervisor) -> Iterator[Iterator[bytes]]:
    """A stream whose engine freezes when it has made two tokens. Gives what comes after these."""
    body = asked(stream=True, max_tokens=100)
    with supervisor.client.stream("POST", CHAT, json=body, headers=fault(freeze_after_tokens=2)) as answer:
        pieces, seen = answer.iter_raw(), b""
        while seen.count(b"data: ") < 3:  # the first has the role
            seen += next(pieces)
        yield pieces


def notices(supervisor: Supervisor, each_second: Callable[[], object] = lambda: None, stall: float = STALL) -> None:
    """From now on the engine is frozen: that is noticed, not before its time, and soon after it."""
    began = due = time.monotonic()
    said = len(supervisor.raw_output)
    while b"vLLM hangs" not in supervisor.raw_output[said:]:
        assert time.monotonic() < began + stall + MARGIN, f"not noticed in {stall + MARGIN:g} s"
        if time.monotonic() >= due:
            each_second()
            due += 1
        time.sleep(0.02)
    assert time.monotonic() > began + 0.9 * stall - 0.3, "noticed too early"  # on a busy machine we come late ourselves


def is_replaced(supervisor: Supervisor) -> None:
    supervisor.says(r"(?s)vLLM hangs.*starting -> ready", 20)
    assert supervisor.client.post(CHAT, json=asked()).status_code == 200
    assert supervisor.client.get("/status").json()["restarts"] == 1


def polled(**environ: str) -> None:
    with supervised(**environ) as supervisor, frozen_stream(supervisor):
        seen: list[int] = []
        notices(supervisor, lambda: seen.append(supervisor.client.get("/v1/models").status_code))
        assert seen.count(200) == len(seen) > 2
        is_replaced(supervisor)


def asked_nonsense(**environ: str) -> None:
    with supervised(**environ) as supervisor, frozen_stream(supervisor):
        seen: list[int] = []
        notices(supervisor, lambda: seen.append(supervisor.client.post(CHAT, content=b"{").status_code))
        assert seen.count(400) == len(seen) > 2
        is_replaced(supervisor)


def asked_for_streams(path: str = CHAT, **environ: str) -> None:
    """Each gets its head from the API server, and one of /v1/responses two events as well."""
    with supervised(**environ) as supervisor, frozen_stream(supervisor), contextlib.ExitStack() as streams:

        def another() -> None:
            client = streams.enter_context(sent(supervisor, json.dumps(asked(path, stream=True)).encode(), path))
            assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
            if path == RESPONSES:
                client.until(b"event: response.in_progress")

        notices(supervisor, another)
        is_replaced(supervisor)


def sends_comments(**environ: str) -> None:
    """They come from the API server, into the very stream that stands still."""
    with supervised(**COMMENTS, **environ) as supervisor, frozen_stream(supervisor) as pieces:
        notices(supervisor)
        assert b"".join(pieces).count(b": keep-alive\n\n") >= 2
        is_replaced(supervisor)


def given_up(**environ: str) -> None:
    """No client but the first waits long enough to be a sign by itself."""
    with supervised(**environ) as supervisor, frozen_stream(supervisor):

        def impatient() -> None:
            client = sent(supervisor, json.dumps(asked()).encode())
            threading.Timer(1.5, client.socket.close).start()

        notices(supervisor, impatient)
        is_replaced(supervisor)


def frozen_while_idle(**environ: str) -> None:
    """Its gauges say for ever that there is nothing to do."""
    with supervised(**environ) as supervisor, concurrent.futures.ThreadPoolExecutor(1) as pool:
        os.kill(state_of(supervisor)["engine_pid"], signal.SIGSTOP)
        time.sleep(STALL / 2)
        waiting = pool.submit(supervisor.client.post, CHAT, json=asked())
        notices(supervisor)
        assert waiting.result().status_code == 200  # sent again to the next one
        is_replaced(supervisor)


def frozen(**environ: str) -> None:
    with supervised(**environ) as supervisor, frozen_stream(supervisor) as pieces:
        notices(supervisor)
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
        is_replaced(supervisor)


def slow_to_tell() -> None:
    """A sample takes longer than the time between two."""
    with supervised(plan={"metrics_delays": [0.7]}) as supervisor, frozen_stream(supervisor):
        notices(supervisor, stall=STALL + 2 * 0.7)  # two looks are needed, and each takes that much longer
        is_replaced(supervisor)


def api_server_is_frozen() -> None:
    with supervised() as supervisor:
        body = asked(stream=True, max_tokens=100)
        with supervisor.client.stream("POST", CHAT, json=body, headers=fault(token_interval=0.2)) as answer:
            pieces, pid = answer.iter_raw(), state_of(supervisor)["pid"]
            next(pieces)
            os.kill(pid, signal.SIGSTOP)
            notices(supervisor)
        is_replaced(supervisor)


@pytest.mark.slow  # the same in one process: tests/engine_core, tests/unit/test_heartbeat.py
def test_a_hang_is_noticed_whatever_the_api_server_answers() -> None:
    together(
        {
            "/v1/models is polled": polled,
            "bad JSON is refused": asked_nonsense,
            "new streams begin": asked_for_streams,
            "comments are sent": sends_comments,
            "whole requests are given up": given_up,
            "frozen while idle": frozen_while_idle,
            "no counters": lambda: frozen(**NO_COUNTERS),
            "no counters, comments are sent": lambda: sends_comments(**NO_COUNTERS),
        }
    )


@pytest.mark.slow
def test_a_hang_is_noticed_in_odder_cases() -> None:
    together(
        {
            "new streams of responses begin": lambda: asked_for_streams(RESPONSES),
            "/metrics is slow": slow_to_tell,
            "the API server is frozen": api_server_is_frozen,
            "no counters, /v1/models is polled": lambda: polled(**NO_COUNTERS),
            "no counters, bad JSON is refused": lambda: asked_nonsense(**NO_COUNTERS),
            "no counters, new streams begin": lambda: asked_for_streams(**NO_COUNTERS),
            "no counters, new streams of responses begin": lambda: asked_for_streams(RESPONSES, **NO_COUNTERS),
            "no counters, frozen while idle": lambda: frozen_while_idle(**NO_COUNTERS),
        }
    )


# It does not hang


def is_left_alone(supervisor: Supervisor, seconds: float = 3 * STALL) -> None:
    """For so long; then it is the engine that it was."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert "hangs" not in supervisor.output
        time.sleep(0.05)
    status = supervisor.client.get("/status").json()
    assert (status["state"], status["restarts"]) == ("ready", 0)


def idle() -> None:
    with supervised() as supervisor:
        is_left_alone(supervisor)


def silent_websocket(vllm: str | Path = FAKE) -> None:
    with supervised(vllm=vllm) as supervisor, connect(f"ws://127.0.0.1:{supervisor.port}/v1/realtime?model=m"):
        is_left_alone(supervisor)


def long_prefills(**environ: str) -> None:
    """One after another, each nearly as long as is allowed."""
    with supervised(**environ) as supervisor:
        for stream in (True, False, True, False):
            body, slow = asked(stream=stream, max_tokens=2), fault(prefill_seconds=0.8 * STALL)
            assert supervisor.client.post(CHAT, json=body, headers=slow).status_code == 200
        is_left_alone(supervisor, 0)


def prefill_in_chunks() -> None:
    """A long prompt is read step by step: no counter tells of that, only the part of the KV cache that is in use."""
    with supervised() as supervisor:
        slow = fault(prefill_seconds=2 * STALL, prefill_steps=20)
        assert supervisor.client.post(CHAT, json=asked(max_tokens=2), headers=slow).status_code == 200
        is_left_alone(supervisor, 0)


def missed_scrapes() -> None:
    """Two of four come too late to be waited for, and the engine is slow as well."""
    with supervised(plan={"metrics_delays": [0, 0, 30, 30]}) as supervisor:
        lives(supervisor)
        assert state_of(supervisor)["scrapes"] > 2  # so that at least one was missed


def lives(supervisor: Supervisor) -> None:
    """A stream of an event each second."""
    body, slow = asked(stream=True, max_tokens=int(3 * STALL) + 1), fault(token_interval=1)
    assert supervisor.client.post(CHAT, json=body, headers=slow).content.endswith(b"data: [DONE]\n\n")
    is_left_alone(supervisor, 0)


def slow_but_living(**environ: str) -> None:
    with supervised(**environ) as supervisor:
        lives(supervisor)


def long_whole_answer(name: str) -> None:
    """No byte of it comes for all this time: only the counters tell that it is being made."""
    with supervised("--", "--served-model-name", name) as supervisor:
        body, slow = asked(model=name, max_tokens=int(3 * STALL) + 1), fault(token_interval=1)
        assert supervisor.client.post(CHAT, json=body, headers=slow).status_code == 200
        is_left_alone(supervisor, 0)


def client_does_not_read(every: float, **environ: str) -> None:
    """The engine has long made it all; the client takes a little of it every so many seconds."""
    with supervised(**environ) as supervisor, supervisor.connect() as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps(asked(stream=True, max_tokens=20_000)).encode()
        client.send(f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: state_of(supervisor)["running"] == 1, "the request")
        until = time.monotonic() + 3 * STALL
        while time.monotonic() < until:
            if every:
                assert client.socket.recv(2000)
            is_left_alone(supervisor, every or STALL)
        assert state_of(supervisor)["running"] == 1  # not all of it is sent
        if not environ:
            none_runs = 'num_requests_running{engine="0",model_name="m"} 0.0'
            wait_until(lambda: none_runs in supervisor.client.get("/metrics").text, "all tokens made", 30)


def floods(client: httpx.Client, stop: threading.Event) -> int:
    count = 0
    while not stop.is_set():
        assert client.post(CHAT, content=b"{").status_code == 400
        count += 1
    return count


def flooded(**environ: str) -> None:
    """Somebody is always in flight, and the engine, which is well, never hears of it."""
    with supervised(**environ) as supervisor, concurrent.futures.ThreadPoolExecutor(8) as pool:
        stop = threading.Event()
        floodings = [pool.submit(floods, supervisor.client, stop) for _ in range(8)]
        try:
            is_left_alone(supervisor)
        finally:
            stop.set()
        assert sum(flooding.result() for flooding in floodings) > 100


def switched_off() -> None:
    """SUPERVISOR_STALL_TIMEOUT=0: nobody looks, which costs nothing, and whoever froze the engine may thaw it."""
    with supervised(SUPERVISOR_STALL_TIMEOUT="0") as supervisor:
        engine, process = state_of(supervisor)["engine_pid"], psutil.Process(supervisor.process.pid)
        before = sum(process.cpu_times()[:2])
        is_left_alone(supervisor, 3)
        assert sum(process.cpu_times()[:2]) - before < 0.3
        with frozen_stream(supervisor) as pieces:
            is_left_alone(supervisor, 3.5)
            assert state_of(supervisor)["scrapes"] == 0
            os.kill(engine, signal.SIGCONT)
            assert b"".join(pieces).count(b"data: {") == 100 - 2 + 1  # the last says why it ends


@pytest.mark.slow
def test_what_is_no_hang_is_left_alone() -> None:
    together(
        {
            "idle": idle,
            "a silent WebSocket": silent_websocket,
            "a silent WebSocket, no counters": lambda: silent_websocket(f"{sys.executable} {WEBSOCKET_VLLM}"),
            "long prefills": long_prefills,
            "missed scrapes": missed_scrapes,
            "no counters, slow but living": lambda: slow_but_living(**NO_COUNTERS),
            "a long whole answer of an odd name": lambda: long_whole_answer(ODD_NAME),
            "a client that does not read": lambda: client_does_not_read(0),
            "switched off": switched_off,
        }
    )


@pytest.mark.slow
def test_what_is_no_hang_is_left_alone_in_odder_cases() -> None:
    together(
        {
            "a prefill in chunks, longer than the timeout": prefill_in_chunks,
            "a client that reads slowly": lambda: client_does_not_read(0.3),
            "no counters, long prefills": lambda: long_prefills(**NO_COUNTERS),
            "no counters, slow but living, comments": lambda: slow_but_living(**NO_COUNTERS, **COMMENTS),
            "no counters, a client that does not read": lambda: client_does_not_read(0, **NO_COUNTERS),
            "no counters, a client that reads slowly": lambda: client_does_not_read(0.3, **NO_COUNTERS),
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("environ", [{}, NO_COUNTERS], ids=["counters", "no counters"])
def test_a_flood_of_nonsense_is_no_hang(environ: dict[str, str]) -> None:
    flooded(**environ)
