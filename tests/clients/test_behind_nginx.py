"""Behind nginx as most have it: `proxy_pass`, and what it does by itself."""

from __future__ import annotations

import os
import signal
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients.programs import AI, ANTHROPIC, MODEL, OPENAI, Client, Clients
from tests.clients.test_clients import said
from tests.engine.nginx import plain_nginx_before
from tests.harness import Supervisor, http, self_signed, wait_until

pytestmark = pytest.mark.slow

REDIRECTING = f"{sys.executable} {Path(__file__).parent / 'redirecting_vllm.py'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def served() -> Iterator[Supervisor]:
    with Supervisor(MODEL) as served:
        yield served.ready()


@pytest.fixture(scope="module")
def nginx(served: Supervisor, folder: Path) -> Iterator[int]:
    with plain_nginx_before(served.port, folder) as port:
        yield port


# Streams


@pytest.mark.parametrize(
    ("client", "what"),
    [(OPENAI, "streamed"), (OPENAI, "responses"), (ANTHROPIC, "streamed"), (AI, "streamed")],
    ids=str,
)
def test_a_stream_comes_event_by_event(
    clients: Clients, served: Supervisor, nginx: int, client: Client, what: str
) -> None:
    """The engine stands still behind the third token, until the first has arrived: a proxy that waited for more would
    wait for ever."""
    asking = clients.begin(client, nginx, what, fake={"freeze_after_tokens": 3})
    try:
        first = asking.first.result(10)
        wait_until(lambda: in_flight(served) == 1, "it to stand still")
        assert not asking.end.done()
    finally:
        os.kill(served.client.get("/fake/state").json()["engine_pid"], signal.SIGCONT)
    told = asking.told()
    assert told.text == said(served)
    assert told.pieces[0] == first


def in_flight(served: Supervisor) -> object:
    return served.client.get("/status").json()["in_flight"]


def test_a_whole_answer_and_an_error_pass(clients: Clients, served: Supervisor, nginx: int) -> None:
    assert clients.ask(OPENAI, nginx).text == said(served)
    error = clients.ask(OPENAI, nginx, base="/v1/v1").error
    assert error is not None
    assert "NotFoundError" in error.names


def test_a_client_that_leaves_nginx_is_gone_for_vllm_too(served: Supervisor, nginx: int) -> None:
    aborted = served.client.get("/fake/state").json()["aborted"]
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 500}
    headers = {"X-Fake": '{"token_interval": 0.05}'}
    with http.stream("POST", f"http://127.0.0.1:{nginx}/v1/chat/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    wait_until(lambda: served.client.get("/fake/state").json()["aborted"] == aborted + 1, "vLLM to know of it")


# Whose name it is


def test_by_itself_nginx_asks_by_our_address(served: Supervisor, nginx: int) -> None:
    answer = http.get(f"http://127.0.0.1:{nginx}/fake/echo", headers={"Host": "llm.example"})
    assert answer.status_code == 200
    assert dict(answer.json()["headers"])["Host"] == f"127.0.0.1:{served.port}"


@pytest.mark.parametrize("allowed", [None, "llm.example", "*.example"])
def test_a_name_that_nginx_hands_on_must_be_allowed(tmp_path: Path, allowed: str | None) -> None:
    """Where there are no keys."""
    environ = {"SUPERVISOR_ALLOWED_HOSTS": allowed or "another.name"}
    with Supervisor(MODEL, environ=environ) as served:
        served.ready()
        with plain_nginx_before(served.port, tmp_path, "proxy_set_header Host $host;") as port:
            for path in ("/v1/models", "/status"):
                answer = http.get(f"http://127.0.0.1:{port}{path}", headers={"Host": "llm.example"})
                assert answer.status_code == (200 if allowed else 403), path
                assert allowed or "SUPERVISOR_ALLOWED_HOSTS" in answer.text
            refusal = http.get(f"http://127.0.0.1:{port}/v1/models", headers={"Host": "llm.example"})
            assert allowed or refusal.json()["error"]["code"] == "host_not_allowed"
        served.engine()


def test_a_key_stands_for_the_name(tmp_path: Path) -> None:
    with Supervisor(MODEL, environ={"SUPERVISOR_API_KEYS": "the-right-key"}) as served:
        served.ready()
        with plain_nginx_before(served.port, tmp_path, "proxy_set_header Host $host;") as port:
            headers = {"Host": "llm.example", "Authorization": "Bearer the-right-key"}
            assert http.get(f"http://127.0.0.1:{port}/v1/models", headers=headers).status_code == 200
        served.client.headers["X-API-Key"] = "the-right-key"
        served.engine()


# HTTPS


def trusting(certificate: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)


def followed(address: str, verify: str, **headers: str) -> httpx.Response:
    """What lies behind the redirect of a path with a slash too many."""
    with httpx.Client(verify=trusting(verify), follow_redirects=True) as client:
        answer = client.get(f"{address}/v1/models/?q=1", headers=headers)
    assert [one.status_code for one in (*answer.history, answer)] == [307, 200]
    return answer


def test_redirects_keep_https_and_the_host_where_nginx_ends_tls(tmp_path: Path) -> None:
    tls = self_signed(tmp_path)
    with Supervisor("m", vllm=REDIRECTING) as served:
        served.ready()
        told = ("proxy_set_header Host $http_host;", "proxy_set_header X-Forwarded-Proto $scheme;")
        with plain_nginx_before(served.port, tmp_path, *told, tls=tls) as port:
            answer = followed(f"https://127.0.0.1:{port}", tls["SUPERVISOR_TLS_CERT"])
        assert answer.history[0].headers["location"] == f"https://127.0.0.1:{port}/v1/models?q=1"
        assert answer.json() == {"seen": f"https://127.0.0.1:{port}/v1/models?q=1"}
        served.engine()


def test_redirects_keep_https_and_the_host_where_we_end_tls(tmp_path: Path) -> None:
    tls = self_signed(tmp_path)
    with Supervisor("m", vllm=REDIRECTING, environ=tls) as served:
        served.says(r"ready: http")
        address = f"https://127.0.0.1:{https_port(served)}"
        for headers in ({}, {"X-Forwarded-Proto": "http"}):  # it is we who know
            answer = followed(address, tls["SUPERVISOR_TLS_CERT"], **headers)
            assert answer.history[0].headers["location"] == f"{address}/v1/models?q=1"
        served.engine_pid = httpx.get(f"{address}/status", verify=trusting(tls["SUPERVISOR_TLS_CERT"])).json()["pid"]


def https_port(served: Supervisor) -> int:
    return int(served.says(r"https://[^\s\"]+?:(\d+)")[1])


def test_vllm_is_told_of_https(tmp_path: Path) -> None:
    tls = self_signed(tmp_path)
    with Supervisor(MODEL, environ=tls) as served:
        served.says(r"ready: http")
        with httpx.Client(verify=trusting(tls["SUPERVISOR_TLS_CERT"])) as client:
            url = f"https://127.0.0.1:{https_port(served)}"
            for claimed in ({}, {"X-Forwarded-Proto": "http"}):
                seen = client.get(f"{url}/fake/echo", headers=claimed).json()["headers"]
                protos = [value for name, value in seen if name.lower() == "x-forwarded-proto"]
                assert protos == ["https"]
            served.engine_pid = client.get(f"{url}/status").json()["pid"]


def test_without_tls_vllm_is_told_what_the_proxy_says(served: Supervisor) -> None:
    seen = served.client.get("/fake/echo", headers={"X-Forwarded-Proto": "https"}).json()["headers"]
    assert [value for name, value in seen if name.lower() == "x-forwarded-proto"] == ["https"]
    assert "FORWARDED_ALLOW_IPS" in served.client.get("/fake/state").json()["env_names"]
