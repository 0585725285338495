"""WebSockets through the gateway, as vLLM's /v1/realtime. Client and server are real; the gateway only passes bytes."""

from __future__ import annotations

import base64
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.engine.test_relay import get, raw_script
from tests.harness import Supervisor, wait_until

PROGRAM = Path(__file__).parent / "websocket_vllm.py"
KEY = "a-key-for-this-test"


@pytest.fixture(scope="module")
def served() -> Iterator[Supervisor]:
    environ = {"SUPERVISOR_API_KEYS": KEY, "SUPERVISOR_MAX_CONCURRENCY": "2"}
    with Supervisor("m", vllm=f"{sys.executable} {PROGRAM}", environ=environ) as supervisor:
        supervisor.says("supervisor: ready: http")
        yield supervisor


def opened(served: Supervisor, **more: Any) -> ClientConnection:
    headers = {"Authorization": f"Bearer {KEY}"} | dict(more.pop("headers", {}))
    url = f"ws://127.0.0.1:{served.port}/v1/realtime?model=m"
    connection: ClientConnection = connect(url, additional_headers=headers, max_size=None, **more)
    return connection


def test_messages_pass_both_ways(served: Supervisor) -> None:
    with opened(served, subprotocols=["realtime"]) as socket:
        assert socket.subprotocol == "realtime"
        assert socket.response is not None
        assert socket.response.headers["X-Request-Id"]
        for message in ("hello", b"\x00\xff" * 100, "ä" * 70_000, b"x" * 1_000_000):
            socket.send(message)
            assert socket.recv(timeout=10) == message


def test_close_codes_pass_both_ways(served: Supervisor) -> None:
    with opened(served) as socket:
        socket.send("close 4001 enough of this")
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "enough of this")
    with opened(served) as socket:
        socket.close(4002, "bye")
    served.says("websocket ended with 4002")


def test_a_refused_one_is_a_plain_answer(served: Supervisor) -> None:
    with pytest.raises(InvalidStatus) as caught:
        opened(served, headers={"X-Refuse": "1"})
    assert caught.value.response.status_code == 403


def test_it_needs_the_key(served: Supervisor) -> None:
    with pytest.raises(InvalidStatus) as caught:
        opened(served, headers={"Authorization": "Bearer wrong"})
    assert caught.value.response.status_code == 401
    assert b"invalid_api_key" in caught.value.response.body


def test_a_client_that_is_gone_ends_it_at_vllm_and_frees_its_place(served: Supervisor) -> None:
    for _ in range(4):  # two places: the third would wait for ever
        with opened(served) as socket:
            socket.send("x")
            assert socket.recv(timeout=10) == "x"
            socket.socket.close()
    served.says("websocket ended with 100[56]")


def test_a_client_that_does_not_read_is_waited_for(served: Supervisor) -> None:
    with opened(served, max_queue=1) as socket:
        socket.send("flood 400")  # 26 MB
        received = sum(len(socket.recv(timeout=20)) for _ in range(400))
        assert received == 400 * 65536


def test_when_the_engine_dies_the_client_gets_a_close_frame() -> None:
    with Supervisor("m", vllm=f"{sys.executable} {PROGRAM}", environ={"SUPERVISOR_API_KEYS": KEY}) as supervisor:
        supervisor.ready()
        with opened(supervisor) as socket:
            pid = int(supervisor.client.get("/status", headers={"X-API-Key": KEY}).json()["pid"])
            socket.send("ä" * 70_000)
            assert socket.recv(timeout=10) == "ä" * 70_000
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(timeout=10)
    assert caught.value.rcvd is not None, "no close frame came"
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (1011, "The engine closed the connection.")


def test_a_drain_that_takes_too_long_says_that_the_server_goes() -> None:
    environ = {"SUPERVISOR_API_KEYS": KEY, "SUPERVISOR_DRAIN_TIMEOUT": "0.3"}
    with Supervisor("m", vllm=f"{sys.executable} {PROGRAM}", environ=environ) as supervisor:
        supervisor.ready()
        with opened(supervisor) as socket:
            supervisor.signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(timeout=10)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1001


def test_frames_that_come_with_the_request_are_passed_on(running: Supervisor) -> None:
    """A client need not wait for the 101; what it sent at once is not lost."""
    head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    script = raw_script((head, 0.05), (b"first", 0.0))
    query = base64.urlsafe_b64encode(script.replace(b'"close": false', b'"close": false, "echo": true')).decode()
    request = get(f"/fake/raw?raw={query}&no-read-body", "1.1", "Connection: Upgrade", "Upgrade: websocket")
    before = running.client.get("/status").json()["in_flight"]
    with running.connect() as raw:
        raw.send(request + b"early")
        seen = raw.until(b"\r\n\r\n")
        assert seen.startswith(b"HTTP/1.1 101 ")
        assert b"Upgrade: websocket\r\n" in seen
        raw.send(b"later")
        assert raw.until(b"later") == b"firstearlylater"
    wait_until(lambda: running.client.get("/status").json()["in_flight"] == before, "its place to be free")
