"""Clients that wait for long, and clients that are too many."""

from __future__ import annotations

import json
import resource

import pytest

from supervisor.gateway import exchange
from tests.gateway.world import CHAT, DONE, World, post

STREAM = b'{"messages": [], "stream": true}'


def test_a_stream_that_waits_is_kept_alive_where_that_was_asked_for() -> None:
    with World(engine="starting", event_keep_alive=10) as world:
        client = world.client()
        client.asks(CHAT, STREAM)
        world.passes(9)
        assert client.statuses == []
        world.passes(26)
        assert client.statuses == [200]
        world.engine_is("ready")
        request = world.engine.request()
        request.streams(b"data: 1")
        request.finishes()
        answer = client.answer()
        assert answer.header(b"content-type") == b"text/event-stream; charset=utf-8"
        assert answer.body == b":\n\n" * 3 + b"data: 1\n\n" + DONE


def test_of_a_request_that_waits_for_its_turn_it_is_the_same() -> None:
    with World(limit=1, event_keep_alive=10) as world:
        first, second = world.client(), world.client()
        first.asks()
        second.asks(CHAT, STREAM)
        world.passes(12)
        world.engine.request().answers()
        request = world.engine.request()
        world.passes(30)  # vLLM has it: what it keeps alive is its own affair
        request.streams(b"data: 1")
        request.finishes()
        assert second.answer().body == b":\n\n" + b"data: 1\n\n" + DONE


@pytest.mark.parametrize(
    ("path", "end"),
    [
        (CHAT, b"data: {}\n\ndata: [DONE]\n\n"),
        ("/v1/responses", b"event: error\ndata: {}\n\n"),
        ("/v1/messages", b"event: error\ndata: {}\n\n"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_what_vllm_refuses_then_is_an_event(path: str, end: bytes, known: bool) -> None:
    refusal = b'{"error": {"message": "no such model"}}'
    with World(event_keep_alive=10) as world:
        if known:  # its head is one that came before
            world.client().asks(path)
            world.engine.request().answers(404, refusal)
        world.engine_is("restarting")
        client = world.client()
        client.asks(path, STREAM)
        world.passes(12)
        world.engine_is("ready")
        world.engine.request().answers(404, refusal)
        assert client.answer().body == b":\n\n" + end.replace(b"{}", refusal)
        assert world.active == 0


def test_with_a_cache_what_is_no_stream_becomes_an_event_as_well() -> None:
    """It was passed as it came, into a stream of chunks."""
    body, refusal = b'{"stream": true, "seed": 7}', b'{"error": {"message": "No such model."}}'
    with World(engine="starting", event_keep_alive=10, cache=1_000_000) as world:
        clients = [world.client() for _ in range(2)]
        for client in clients:
            client.asks(CHAT, body)
        world.passes(12)
        world.engine_is("ready")
        world.engine.request().answers(404, refusal)
        for client in clients:
            assert client.answer().body == b":\n\ndata: " + refusal + b"\n\ndata: [DONE]\n\n"


def test_an_engine_that_fails_then_is_told_by_an_event() -> None:
    with World(engine="starting", event_keep_alive=10) as world:
        client = world.client()
        client.asks(CHAT, STREAM)
        world.passes(12)
        world.engine_is("failed")
        comment, error, done = client.answer().body.split(b"\n\n")[:3]
        assert (comment, done) == (b":", b"data: [DONE]")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize(
    "sent",
    [
        post(CHAT, b"{}"),
        post(CHAT, b'{"stream": false}'),
        post(CHAT, STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post(CHAT, STREAM)[:-1],
    ],
    ids=["no stream", "asked for none", "HTTP/1.0", "not all of it"],
)
def test_who_asked_for_no_stream_gets_no_comment(sent: bytes) -> None:
    with World(engine="starting", event_keep_alive=10) as world:
        client = world.client()
        client.sends(sent)
        world.passes(50)
        assert client.statuses == []


def test_the_body_of_one_that_waits_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with World(engine="starting", event_keep_alive=10) as world:
        looks: list[bytes] = []

        class Pattern:
            def search(self, data: bytes) -> None:
                looks.append(data)

        monkeypatch.setattr(exchange, "WANTS_EVENTS", Pattern())
        world.client().asks(CHAT, b"{}")
        world.passes(100)
        assert len(looks) == 1


def test_it_is_off_unless_asked_for() -> None:
    with World(engine="starting") as world:
        client = world.client()
        client.asks(CHAT, STREAM)
        world.passes(200)
        assert client.statuses == []


def test_before_the_last_file_is_taken_idle_clients_go_and_only_our_own_routes_are_served() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with World() as world:
        idle, busy, new = world.client(), world.client(), world.client()
        idle.asks()
        world.engine.request().answers()
        busy.asks()
        running = world.engine.request()
        late = world.client(file=most - 10)
        assert idle.closed
        assert not new.closed  # it has just come
        late.gets("/ping")
        late.asks()
        assert late.statuses == [200, 503]
        assert late.closed
        running.answers()
        assert busy.statuses == [200]
        assert world.told("Raise the limit (ulimit -n)") == 1
        world.client(file=most - 9)
        assert world.told("Raise the limit (ulimit -n)") == 1
        world.passes(700)
        world.client(file=most - 9)
        assert world.told("Raise the limit (ulimit -n)") == 2


@pytest.mark.parametrize("how", ["nobody listens", "the connection breaks"])
def test_who_came_before_its_death_was_known_waits_for_a_restart(how: str) -> None:
    """It was told that it had waited for an engine that was ready."""
    with World() as world:
        client = world.client()
        if how == "nobody listens":
            world.engine.dies()
        client.asks()
        if how == "the connection breaks":
            world.engine.request()
            world.engine.dies()
        world.engine_is("restarting")
        world.passes(3)
        world.engine_is("ready")
        world.engine.request().answers()
        assert client.answer().header(b"x-supervisor-state") == b"restarting"
