"""A frozen EngineCore of the real vLLM, whose API server goes on answering; on the fake: tests/engine/test_hang.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.engine.test_hang import notices, sent
from tests.harness import DEMO, RawClient, Supervisor, wait_until
from tests.vllm.conftest import START, VLLM
from tests.vllm.test_faults import part
from tests.vllm.test_serving import CHAT, greedy

pytestmark = pytest.mark.vllm

MESSAGES = "/v1/messages"  # into these streams vLLM sends no comments
END = b"\r\n0\r\n\r\n"  # of the framing
STALL = 10.0


@pytest.fixture(scope="module")
def watched() -> Iterator[Supervisor]:
    environ = {
        "SUPERVISOR_STALL_TIMEOUT": str(STALL),
        "SUPERVISOR_HOLD_TIMEOUT": str(START),
        "SSE_KEEP_ALIVE_INTERVAL": "1",
    }
    with Supervisor(DEMO, vllm=VLLM, environ=environ) as supervisor:
        yield supervisor.ready(START)


def is_silent(client: RawClient) -> bool:
    """Whether nothing comes any more, in half a second, of an answer that has not ended."""
    client.socket.settimeout(0.5)
    try:
        while END not in client.received:
            data = client.socket.recv(65536)
            assert data, f"closed within the answer: {client.received[-300:]!r}"
            client.received += data
    except TimeoutError:
        client.socket.settimeout(60)
        return True
    return False


@contextlib.contextmanager
def frozen_stream(supervisor: Supervisor, path: str, body: dict[str, object]) -> Iterator[RawClient]:
    """A stream whose engine is stopped in its midst. It may be over too soon for that, and is then begun again."""
    engine = part(supervisor, "VLLM::EngineCore")
    for _ in range(300):  # on a busy machine a stream of some tokens is mostly over before its reader is awake
        with sent(supervisor, json.dumps(body).encode(), path) as client:
            client.until(b"data: ")
            os.kill(engine, signal.SIGSTOP)
            try:
                if is_silent(client):
                    yield client
                    return
            finally:
                with contextlib.suppress(ProcessLookupError):  # it has been noticed
                    os.kill(engine, signal.SIGCONT)
    pytest.fail("each stream was over before its engine was stopped")


def comes_back(supervisor: Supervisor, before: int) -> None:
    def ready() -> object:
        status = supervisor.client.get("/status").json()
        return status["state"] == "ready" and status["restarts"] == before + 1

    wait_until(ready, "another start", START)
    assert supervisor.client.post(CHAT, json=greedy(), timeout=START).status_code == 200


def restarts(supervisor: Supervisor) -> int:
    return int(supervisor.client.get("/status").json()["restarts"])


def test_a_hang_is_noticed_while_models_are_listed(watched: Supervisor) -> None:
    before, seen = restarts(watched), list[int]()
    with frozen_stream(watched, MESSAGES, greedy(stream=True, max_tokens=1500, temperature=1)) as client:
        notices(watched, lambda: seen.append(watched.client.get("/v1/models").status_code), STALL)
        assert seen.count(200) == len(seen) > STALL / 2
        rest = client.until(END)
        assert b"event: error" in rest
        assert b": keep-alive" not in rest
    comes_back(watched, before)


def test_a_hang_is_noticed_while_comments_are_sent(watched: Supervisor) -> None:
    before = restarts(watched)
    body = greedy(stream=True, max_tokens=1900, ignore_eos=True, n=4, temperature=1)
    with frozen_stream(watched, CHAT, body) as client:
        notices(watched, stall=STALL)
        assert client.until(END).count(b": keep-alive\n\n") > STALL / 2
    comes_back(watched, before)
