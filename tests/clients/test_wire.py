"""What clients say by hand, or with other libraries: paths below a root path, compressed bodies, half-closed
connections, a WebSocket's key in its protocol."""

from __future__ import annotations

import gzip
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.clients.programs import ANTHROPIC, ANTHROPIC_NPM, MODEL, OPENAI, PROMPT, TOKENS, Client, Clients
from tests.clients.test_clients import held_up, raised, said, waiting
from tests.harness import Supervisor, events, wait_until

pytestmark = pytest.mark.slow

KEY = "the-right-key"
WEBSOCKET = f"{sys.executable} {Path(__file__).parents[1] / 'engine' / 'websocket_vllm.py'}"


@pytest.fixture(scope="module")
def served() -> Iterator[Supervisor]:
    with Supervisor(MODEL) as served:
        yield served.ready()


# Below a root path


ROOT = {"ROOT_PATH": "/llm", "SUPERVISOR_MAX_RESTARTS": "100", "SUPERVISOR_RESTART_WINDOW": "0.05"}


@pytest.fixture(scope="module")
def below() -> Iterator[Supervisor]:
    with Supervisor(MODEL, environ=ROOT) as served:
        yield served.ready()


@pytest.mark.parametrize("root", ["", "/llm"])
def test_below_the_root_path_our_own_routes_are_ours(below: Supervisor, root: str) -> None:
    assert below.client.get(f"{root}/ping").json() == {"status": "ready"}
    assert below.client.get(f"{root}/health").json() == {"status": "ok"}
    assert below.client.get(f"{root}/status").json()["state"] == "ready"
    metrics = below.client.get(f"{root}/metrics").text
    assert "supervisor_" in metrics
    assert "vllm:num_requests_running" in metrics
    assert "<title" in below.client.get(f"{root}/", headers={"Accept": "text/html"}).text


def test_below_the_root_path_are_vllms_routes(clients: Clients, below: Supervisor) -> None:
    assert below.client.get("/llm/v1/models").json()["data"][0]["id"] == MODEL
    assert clients.ask(OPENAI, below, "streamed", base="/llm/v1").text == said(below)
    assert clients.ask(ANTHROPIC, below, "streamed", base="/llm").text == said(below)


def test_no_other_prefix_is_a_root_path(below: Supervisor) -> None:
    for path in ("/other/ping", "/llmping", "/llm/llm/ping", "/other/v1/models"):
        answer = below.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found"), path
    assert below.client.get("/llm/sleep").status_code == 403


def test_while_it_loads_our_own_routes_below_the_root_path_answer_at_once() -> None:
    with Supervisor(MODEL, plan={"load_seconds": 600}, environ=ROOT) as served:
        assert served.client.get("/llm/ping").status_code == 204
        assert served.client.get("/llm/health").status_code == 503
        assert served.client.get("/llm/status").json()["state"] == "starting"
        served.engine()


# What becomes of it: an Anthropic client takes a stream that broke off for a short answer.
@pytest.mark.parametrize("client", [ANTHROPIC, ANTHROPIC_NPM], ids=str)
def test_below_the_root_path_errors_are_in_the_routes_dialect(
    clients: Clients, below: Supervisor, client: Client
) -> None:
    told = clients.ask(client, below, "streamed", base="/llm", fake={"die_after_tokens": 3, "how": "api"})
    assert told.error is not None
    assert "The engine stopped" in told.error.message


def test_below_the_root_path_refusals_are_in_the_routes_dialect() -> None:
    with Supervisor(MODEL, environ=ROOT | {"SUPERVISOR_API_KEYS": KEY}) as served:
        served.ready()
        answer = served.client.post("/llm/v1/messages", json={})
        assert answer.status_code == 401
        served.client.headers["X-API-Key"] = KEY
        served.engine()
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "authentication_error"


# Compressed bodies


@pytest.mark.parametrize("coding", ["gzip", "zstd", "deflate", "br", "GZIP"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_compressed_body_is_refused_by_name(served: Supervisor, coding: str, path: str) -> None:
    body = gzip.compress(json.dumps({"messages": []}).encode())
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    answer = served.client.post(path, content=body, headers=headers)
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.json()["error"]["message"]
    assert served.client.get("/v1/models").status_code == 200


def test_a_body_that_is_said_not_to_be_compressed_passes(served: Supervisor) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    answer = served.client.post("/v1/chat/completions", content=body, headers={"Content-Encoding": "identity"})
    assert answer.status_code == 200


def test_the_sdk_says_why_a_compressed_body_is_refused(clients: Clients, served: Supervisor) -> None:
    told = clients.ask(OPENAI, served, headers={"Content-Encoding": "gzip"})
    assert "Content-Encoding" in raised(told, OPENAI, "APIStatusError", 415)


# Half-closed connections


def asked(stream: bool, plan: dict[str, object] | None = None) -> bytes:
    content = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "stream": stream}
    body = json.dumps(content).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nX-Fake: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (json.dumps(plan or {}).encode(), len(body)) + body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_has_said_its_last_word_gets_its_answer(served: Supervisor, stream: bool) -> None:
    with served.connect() as client:
        client.send(asked(stream, {"token_interval": 0.05})).socket.shutdown(socket.SHUT_WR)
        answer = client.rest()
    assert b"HTTP/1.1 200 OK\r\n" in answer
    if stream:
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events(answer)]  # type: ignore[index]
        assert "".join(pieces) == said(served)
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    else:
        body = json.loads(answer.rpartition(b"\r\n\r\n")[2])
        assert body["choices"][0]["message"]["content"] == said(served)


def test_it_gets_it_also_where_it_was_held_through_a_start() -> None:
    with Supervisor(MODEL, plan={"load_seconds": 3}) as loading, loading.connect() as client:
        go_on = held_up(loading)
        client.send(asked(stream=True)).socket.shutdown(socket.SHUT_WR)
        waiting(loading, 1)
        go_on()
        assert client.rest().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        loading.engine()


def test_one_that_is_gone_is_told_from_one_that_listens(served: Supervisor) -> None:
    aborted = served.client.get("/fake/state").json()["aborted"]
    with served.connect() as client:
        client.send(asked(stream=True, plan={"token_interval": 5})).until(b"\r\n\r\n")
        client.socket.shutdown(socket.SHUT_WR)
    wait_until(lambda: served.client.get("/fake/state").json()["aborted"] == aborted + 1, "vLLM to know of it")


# A WebSocket's key, where the client is a browser and can set no header


@pytest.fixture(scope="module")
def realtime() -> Iterator[Supervisor]:
    with Supervisor("m", vllm=WEBSOCKET, environ={"SUPERVISOR_API_KEYS": KEY}) as served:
        served.ready().client.headers["X-API-Key"] = KEY
        yield served
        served.engine()


@pytest.mark.parametrize("first", ["realtime", "the key"])
def test_a_websocket_may_have_its_key_in_its_protocol_and_vllm_does_not_see_it(
    realtime: Supervisor, first: str
) -> None:
    protocols = ["realtime", f"openai-insecure-api-key.{KEY}", "openai-beta.realtime-v1"]
    if first == "the key":
        protocols[:2] = reversed(protocols[:2])
    url = f"ws://127.0.0.1:{realtime.port}/v1/realtime?model=m"
    with connect(url, subprotocols=protocols) as client:  # type: ignore[arg-type]
        assert client.subprotocol == "realtime"
        client.send("headers")
        seen = client.recv(timeout=10)
    assert isinstance(seen, str)
    assert KEY not in seen
    found = [value for name, value in json.loads(seen) if name == "sec-websocket-protocol"]
    assert found == ["realtime, openai-beta.realtime-v1"]


def test_a_wrong_key_in_its_protocol_is_refused(realtime: Supervisor) -> None:
    url = f"ws://127.0.0.1:{realtime.port}/v1/realtime?model=m"
    with pytest.raises(InvalidStatus) as caught:
        connect(url, subprotocols=["realtime", "openai-insecure-api-key.stale"])  # type: ignore[list-item]
    assert caught.value.response.status_code == 401
