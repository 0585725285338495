"""The gateway facing the internet: keys and their files, routes, rates, limits, slow clients, TLS, metrics."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.engine.test_relay import CHAT, chat, get, post
from tests.harness import RawClient, Supervisor, http, self_signed, wait_until

SLOW = "0.4"  # seconds: SUPERVISOR_CLIENT_TIMEOUT of the tests of slow clients


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """With keys in a file, an administrator's key, and a rate of 6,000 a minute."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first-key-1\nsecond-key-2\n")
    environ = {
        "SUPERVISOR_API_KEYS": f"@{keys}",
        "SUPERVISOR_ADMIN_KEYS": "the-admin-key",
        "SUPERVISOR_RATE_LIMIT": "6000",
        "SUPERVISOR_ALLOW_ROUTES": "/fake/echo",
    }
    with Supervisor("some/model", environ=environ) as supervisor:
        supervisor.says("supervisor: ready: http")
        supervisor.keys = keys  # type: ignore[attr-defined]
        yield supervisor


def ask(served: Supervisor, path: str, key: str | None = None, **more: object) -> httpx.Response:
    headers = {"X-API-Key": key} if key else {}
    with httpx.Client(verify=False, base_url=f"http://127.0.0.1:{served.port}") as client:
        return client.get(path, headers=headers, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "without", "client", "admin"),
    [
        ("/ping", 200, 200, 200),
        ("/health", 200, 200, 200),
        ("/status", 401, 200, 200),
        ("/metrics", 401, 200, 200),
        ("/", 401, 200, 200),
        ("/v1/models", 401, 200, 200),
        ("/fake/echo/x", 401, 200, 200),
        ("/fake/state", 401, 404, 200),  # not among the open ones
        ("/sleep", 401, 403, 404),  # the fake has no such route: it was asked
        ("/%73leep", 401, 403, 404),
        ("/collective_rpc", 401, 403, 404),
    ],
)
def test_who_may_ask_for_what(guarded: Supervisor, path: str, without: int, client: int, admin: int) -> None:
    found = [ask(guarded, path, key).status_code for key in (None, "second-key-2", "the-admin-key")]
    assert found == [without, client, admin]
    assert ask(guarded, path, "wrong").status_code == without


def test_refusals_are_in_the_dialect_of_the_route_and_have_an_id(guarded: Supervisor) -> None:
    answer = ask(guarded, "/sleep", "first-key-1")
    assert answer.json()["error"]["code"] == "admin_key_needed"
    assert answer.headers["x-request-id"]
    assert "server" not in answer.headers
    answer = ask(guarded, "/v1/messages")
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_head_that_was_let_in_once_lets_nobody_else_in(guarded: Supervisor) -> None:
    """The gateway remembers heads: one without the key is another head, and so is one with a wrong key."""
    body = json.dumps(chat(max_tokens=1)).encode()
    good = post(CHAT, body, "1.1", "X-API-Key: first-key-1", "Content-Type: application/json")
    with guarded.connect() as raw:
        for _ in range(4):
            assert raw.send(good).answer().status == 200
        for bad in (good.replace(b"first-key-1", b"first-key-0"), good.replace(b"X-API-Key: first-key-1\r\n", b"")):
            assert raw.send(bad).answer().status == 401
        assert raw.send(good).answer().status == 200


def test_keys_are_read_again_on_sighup_and_the_old_ones_are_void(guarded: Supervisor) -> None:
    keys: Path = guarded.keys  # type: ignore[attr-defined]
    before = keys.read_text()
    good = get("/v1/models", "1.1", "X-API-Key: second-key-2")
    with guarded.connect() as raw:
        for _ in range(3):
            assert raw.send(good).answer().status == 200
        keys.write_text("third-key-3\n")
        guarded.process.send_signal(signal.SIGHUP)
        guarded.says("keys read again: 1 for clients, 1 for administrators")
        assert raw.send(good).answer().status == 401  # on the same connection, too
    assert ask(guarded, "/v1/models", "third-key-3").status_code == 200
    assert ask(guarded, "/v1/third-key-3", "third-key-3").status_code == 404  # a secret of every line from now on
    guarded.says(r"GET /v1/\*\*\*\* 404")
    assert "third-key-3" not in guarded.output
    keys.unlink()
    guarded.process.send_signal(signal.SIGHUP)
    guarded.says("the keys stay as they were")
    assert ask(guarded, "/v1/models", "third-key-3").status_code == 200
    os.mkfifo(keys)  # as a disk that hangs
    guarded.process.send_signal(signal.SIGHUP)
    assert ask(guarded, "/v1/models", "third-key-3").elapsed.total_seconds() < 5
    keys.unlink()
    keys.write_text(before)
    guarded.process.send_signal(signal.SIGHUP)
    guarded.says("keys read again: 2 for clients")
    assert ask(guarded, "/v1/models", "second-key-2").status_code == 200


# Heads


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/v1/models?" + "x" * 8200), 414),
        (get("/v1/models", "1.1", *(f"X-{number}: 1" for number in range(150))), 431),
        (get("/v1/models", "1.1", "X-Large: " + "x" * 33_000), 431),
        (b"GET /v1/models HTTP/1.1\r\nX-Endless: " + b"x" * 400_000, 431),
    ],
    ids=["target", "headers", "header", "endless"],
)
def test_a_head_that_is_too_large_is_refused(running: Supervisor, request_: bytes, status: int) -> None:
    with running.connect() as raw:
        answer = raw.send(request_).answer()
        assert answer.status == status
        assert answer.headers["connection"] == "close"
    assert running.client.get("/ping").status_code == 200


# Slow clients


@pytest.fixture(scope="module")
def impatient() -> Iterator[Supervisor]:
    with Supervisor("some/model", environ={"SUPERVISOR_CLIENT_TIMEOUT": SLOW}) as supervisor:
        yield supervisor.ready()


@pytest.mark.parametrize(
    "sent",
    [b"G", b"GET /v1/models HTTP/1.1\r\nHost: h\r\nX-Slow: "],
    ids=["first-byte", "head"],
)
def test_a_head_that_does_not_come_is_not_waited_for(impatient: Supervisor, sent: bytes) -> None:
    with impatient.connect() as raw:
        answer = raw.send(sent).answer()
        assert answer.status == 408
        assert raw.rest() == b""


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_not_waited_for(impatient: Supervisor, framing: str) -> None:
    with impatient.connect() as raw:
        raw.send(f"POST /fake/sink HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n".encode())
        assert raw.answer().status == 408
        assert raw.rest() == b""
    wait_until(lambda: impatient.client.get("/status").json()["in_flight"] == 0, "its place to be free")


def test_a_client_that_does_not_read_is_not_waited_for(impatient: Supervisor) -> None:
    with impatient.connect() as raw:
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.send(get("/fake/bytes?n=20000000&chunk=65536&framing=chunked"))
        wait_until(lambda: impatient.client.get("/status").json()["in_flight"] == 0, "its place to be free", 15)


@pytest.mark.slow
def test_an_answer_that_takes_long_is_no_slow_client(impatient: Supervisor) -> None:
    headers = {"X-Fake": '{"prefill_seconds": 1.5}'}
    assert impatient.client.post(CHAT, json=chat(max_tokens=2), headers=headers).status_code == 200
    body = json.dumps(chat(max_tokens=2)).encode()
    with impatient.connect() as raw:  # the second has a head that was seen before
        for _ in range(3):
            request = post(CHAT, body, "1.1", 'X-Fake: {"prefill_seconds": 0.9}', "Content-Type: application/json")
            assert raw.send(request).answer().status == 200


def test_slow_loris_takes_no_place_from_others(impatient: Supervisor) -> None:
    held = [RawClient(impatient.port).send(b"POST /v1/x HTTP/1.1\r\nHost: h\r\n") for _ in range(60)]
    assert impatient.client.get("/v1/models").status_code == 200
    for raw in held:
        assert raw.answer().status == 408
        raw.socket.close()


# Open files


def crowd(served: Supervisor, count: int) -> list[socket.socket]:
    """Clients that have connected, and are known to be there, for each has had an answer."""
    found = []
    for _ in range(count):
        found.append(socket.create_connection(("127.0.0.1", served.port), timeout=10))
        found[-1].sendall(b"GET /ping HTTP/1.1\r\nHost: h\r\n\r\n")
        assert found[-1].recv(4096).startswith(b"HTTP/1.1 200")
        found[-1].sendall(b"P")  # no idle one, which would be closed for the next
    return found


def test_of_too_many_clients_the_last_are_told_so_and_health_checks_are_answered() -> None:
    with Supervisor("some/model", within=("bash", "-c", 'ulimit -n 192; exec "$@"', "bash")) as served:
        served.ready()
        clients = crowd(served, 120)
        assert ask(served, "/ping").status_code == 200
        answer = ask(served, "/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
        assert answer.headers["Retry-After"] == "5"
        for client in clients:
            client.close()
        wait_until(lambda: ask(served, "/v1/models").status_code == 200, "the next client is served")
        assert served.output.count("files may be open, and nearly all are") == 1


def test_there_may_be_as_many_clients_as_the_system_allows_files() -> None:
    with Supervisor("some/model", within=("bash", "-c", 'ulimit -Sn 192; exec "$@"', "bash")) as served:
        served.ready()
        clients = crowd(served, 150)
        assert ask(served, "/v1/models").status_code == 200
        for client in clients:
            client.close()


# TLS


def test_tls(tmp_path: Path) -> None:
    with Supervisor("some/model", environ=self_signed(tmp_path)) as served:
        port = int(served.says(r"ready: https://127\.0\.0\.1:(\d+)")[1])
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{port}") as client:
            for _ in range(3):
                assert client.get("/v1/models").status_code == 200
            with client.stream("POST", CHAT, json=chat(stream=True, max_tokens=20)) as answer:
                assert b"".join(answer.iter_raw()).endswith(b"data: [DONE]\n\n")
            body = bytes(range(256)) * 8192
            assert client.post("/fake/sink", content=body).json()["body_len"] == len(body)
            served.engine_pid = client.get("/status").json()["pid"]
        with pytest.raises(httpx.TransportError):
            http.get(f"http://127.0.0.1:{port}/ping")


def test_a_certificate_that_is_none_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nonsense")
    with Supervisor("m", environ={"SUPERVISOR_TLS_CERT": str(tmp_path / "cert.pem")}) as served:
        assert served.exit_code() == 2
        assert "SUPERVISOR_TLS_CERT" in served.output
        assert "Traceback" not in served.output


def test_a_listener_for_everybody_without_keys_warns() -> None:
    with Supervisor("m", environ={"SUPERVISOR_HOST": "0.0.0.0"}) as served:
        served.says("everybody who reaches 0.0.0.0 may use the model: set SUPERVISOR_API_KEYS")


def test_a_model_that_takes_images_from_anywhere_warns_once_at_the_start(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {"depth": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Supervisor(str(tmp_path)) as served:
        served.ready()
        served.says("the model takes images and videos by URL, .*Set ALLOWED_MEDIA_DOMAINS")
        assert served.output.count("ALLOWED_MEDIA_DOMAINS") == 1
