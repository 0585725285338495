"""Two things at once that each work alone: a comment and an `Expect`, a cache and a slow reader, a drain and a 500."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from supervisor.gateway.policy import Origins, Routes
from tests.gateway.world import CHAT, ScriptedClient, World, get, post

STREAM = b'{"temperature": 0, "stream": true}'
WEBSOCKET = (
    "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)  # fmt: skip
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
ADMIN = "X-API-Key: admin-key"


def expecting(body: bytes = b"{}") -> bytes:
    """The head of a POST whose client waits for a 100."""
    return post(CHAT, body, "Expect: 100-continue")[: -len(body)]


def least_seconds(call: Callable[[], object]) -> float:
    """Of five calls: others may take the machine's time meanwhile."""
    found = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


# An opened prefix, and what vLLM's server does not see of a path


@pytest.mark.parametrize("behind", ["", "#x", "#", "%0A", "?x#y", "/"])
@pytest.mark.parametrize("opened", ["/v1", "/", ""])
def test_an_admin_route_stays_closed_however_it_is_written(behind: str, opened: str) -> None:
    with World(keys=["client-key"]) as world:
        world.gateway.policy.routes = Routes([opened])
        client = world.client()
        client.asks(f"/v1/load_lora_adapter{behind}", b"{}", "X-API-Key: client-key")
        assert client.statuses == [403]


def test_a_path_is_looked_up_in_a_time_that_its_length_does_not_decide() -> None:
    routes = Routes()
    short, long = (least_seconds(partial(routes.find, b"/" * length)) for length in (1000, 8000))
    assert long < 20 * short  # 64 times as long it was


# A page of another's, and a WebSocket, which knows no CORS


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("localhost:8000", "https://evil.example", False),
        ("localhost:8000", "null", False),
        ("localhost:8000", "http://localhost:3000", False),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("localhost:8000", "http://localhost:8000", True),
        ("LOCALHOST:8000", "http://localhost:8000", True),
        ("localhost", "https://a.example", True),
        ("localhost:8000", None, True),
    ],
)
def test_without_keys_only_allowed_pages_open_a_websocket(host: str, origin: str | None, allowed: bool) -> None:
    with World() as world:
        world.gateway.policy.hosts = ()  # as on loopback without keys
        world.gateway.policy.origins = Origins(("https://a.example",))
        fields = [f"Origin: {origin}"] if origin is not None else []
        client = world.client()
        client.sends(get("/v1/realtime", *fields, *WEBSOCKET).replace(b"Host: x", b"Host: " + host.encode()))
        assert world.engine.waits is allowed
        assert allowed or client.statuses == [403]


def test_with_a_key_any_page_opens_a_websocket() -> None:
    with World(keys=["client-key"]) as world:
        world.client().gets("/v1/realtime", "Origin: https://b.example", "X-API-Key: client-key", *WEBSOCKET)
        assert world.engine.waits


# Comments, which begin an answer before there is one


def test_an_interim_answer_does_not_get_into_a_stream_that_a_comment_has_begun() -> None:
    with World(engine="starting", event_keep_alive=2) as world:
        client = world.client()
        client.sends(post(CHAT, STREAM, "Expect: 100-continue"))
        world.passes(3)
        world.engine_is("ready")
        request = world.engine.request()
        request.sends(INTERIM)
        request.streams(b"data: 1")
        request.finishes()
        assert b"data: 1" in client.answer().body


def test_a_stream_that_a_comment_has_begun_may_be_read_by_the_page() -> None:
    with World(engine="starting", event_keep_alive=2) as world:
        world.gateway.policy.origins = Origins(("https://a.example",))
        client = world.client()
        client.asks(CHAT, STREAM, "Origin: https://a.example")
        world.passes(3)
        assert client.answers()[0].header(b"access-control-allow-origin") == b"https://a.example"


def test_a_head_request_gets_no_comment() -> None:
    with World(engine="starting", event_keep_alive=2) as world:
        client = world.client()
        client.sends(post(CHAT, STREAM).replace(b"POST", b"HEAD"))
        world.passes(3)
        world.engine_is("ready")
        world.engine.request().answers()
        assert client.answer().status == 200


def test_a_websocket_gets_no_comment() -> None:
    with World(engine="starting", event_keep_alive=2) as world:
        client = world.client()
        client.gets("/v1/realtime", 'X: "stream": true', *WEBSOCKET)
        world.passes(3)
        world.engine_is("ready")
        request = world.engine.request()
        request.switches()
        request.sends(b"\x81\x02hi")
        assert client.tunnelled == b"\x81\x02hi"


# A refusal while the client still sends


def refused_by_its_key(world: World, client: ScriptedClient) -> None:
    client.sends(post(CHAT, b"x" * 1_000_000, "Connection: close"))


def refused_by_an_older_protocol(world: World, client: ScriptedClient) -> None:
    client.sends(post(CHAT, b"x" * 1_000_000).replace(b"HTTP/1.1", b"HTTP/1.0"))


@pytest.mark.parametrize("ask", [refused_by_its_key, refused_by_an_older_protocol])
def test_who_has_no_key_and_closes_behind_the_answer_reads_it(ask: Callable[[World, ScriptedClient], None]) -> None:
    with World(keys=["client-key"]) as world:
        client = world.client()
        with world.at_once():
            ask(world, client)
        assert (client.statuses, client.reset) == ([401], False)


@pytest.mark.parametrize("state", ["failed", "draining"])
def test_who_sends_when_the_engine_is_over_reads_why(state: str) -> None:
    with World(engine="starting") as world:
        client = world.client()
        if state == "draining":
            world.engine_is(state)
        with world.at_once():
            client.sends(post(CHAT, b"x" * 1_000_000))
        world.engine_is(state)
        assert (client.statuses, client.reset) == ([503], False)


def test_who_waits_for_a_100_and_sends_all_the_same_reads_that_it_was_held_too_long() -> None:
    with World(engine="starting", hold_timeout=5) as world:
        client = world.client()
        with world.at_once():
            client.sends(post(CHAT, b"x" * 1_000_000, "Expect: 100-continue"))
        world.passes(6)
        assert (client.statuses, client.reset) == ([503], False)


def test_who_is_one_too_many_reads_why() -> None:
    with World() as world:
        client = world.client(file=10**9)
        with world.at_once():
            client.sends(post(CHAT, b"x" * 1_000_000))
        assert (client.statuses, client.reset) == ([503], False)


# One of our own routes, and a POST right behind it


def test_a_post_behind_an_own_route_is_answered_however_long_it_is() -> None:
    for cache in (0, 10_000_000):
        with World(cache=cache) as world:
            client = world.client()
            with world.at_once():
                client.sends(get("/ping") + post(CHAT, b'{"temperature": 0, "x": "' + b"x" * 400_000 + b'"}'))
            world.passes(5)
            world.engine.request().answers()
            assert client.statuses == [200, 200]


def test_many_small_chunks_behind_an_own_route_take_a_time_that_grows_as_they_do() -> None:
    def sends(count: int) -> None:
        with World(keys=["client-key"]) as world:
            client = world.client()
            client.garbage = True
            head = post(CHAT, b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
            with world.at_once():
                client.sends(get("/ping") + head + b"1\r\nx\r\n" * count)

    few, many = (least_seconds(partial(sends, count)) for count in (5_000, 40_000))
    assert many < 40 * few  # 64 times as long it was, beside what is linear


# The cache


def test_who_joins_a_slow_reader_is_not_slow() -> None:
    with World(cache=100_000_000) as world:
        slow, other = world.client(), world.client()
        slow.asks(CHAT, STREAM)
        request = world.engine.request()
        request.streams(b"data: 1")
        slow.stops_reading()
        for _ in range(3):
            request.event(b"data: " + b"y" * 30_000)
        other.asks(CHAT, STREAM)
        request.event(b"data: last")
        request.finishes()
        assert other.answer().whole


def test_each_that_shares_an_answer_counts_as_waiting() -> None:
    with World(engine="starting", cache=1_000_000) as world:
        for _ in range(3):
            world.client().asks(CHAT, STREAM)
        assert world.gateway.count_requests() == {"in_flight": 0, "waiting": 3}
        world.engine_is("ready")
        assert world.gateway.count_requests() == {"in_flight": 3, "waiting": 0}


def test_nothing_is_kept_while_nobody_knows_whether_a_change_of_weights_is_done() -> None:
    with World(cache=1_000_000) as world:
        world.gateway.policy.admin_keys = ("admin-key",)
        administrator = world.client()
        administrator.asks("/update_weights", b"{}", ADMIN)
        world.engine.request()
        administrator.leaves()  # curl -m 5; vLLM goes on
        for _ in range(2):
            world.client().asks(CHAT, STREAM)
            world.engine.request().answers(200, b"old")
        again = world.client()
        again.asks("/update_weights", b"{}", ADMIN)
        world.engine.request().answers()
        world.client().asks(CHAT, STREAM)
        world.engine.request().answers(200, b"new")
        last = world.client()
        last.asks(CHAT, STREAM)
        assert last.answer().body == b"new"


def test_what_was_changed_by_hand_is_forgotten_with_its_engine() -> None:
    for changed in (False, True):
        with World(cache=1_000_000) as world:
            world.gateway.policy.admin_keys = ("admin-key",)
            if changed:
                world.client().asks("/update_weights", b"{}", ADMIN)
                world.engine.request().answers()
            world.client().asks(CHAT, STREAM)
            world.engine.request().answers(200, b"kept")
            world.engine_is("restarting")
            world.engine_is("ready")
            client = world.client()
            client.asks(CHAT, STREAM)
            assert world.engine.waits is changed


# A drain


def test_in_a_drain_vllms_own_error_is_passed_on() -> None:
    for private in (False, True):
        with World() as world:
            client = world.client(private=private)
            client.asks()
            request = world.engine.request()
            world.terminates(30)
            request.answers(500, b'{"error": "mine"}')
            world.passes(1)
            assert client.answer().body == b'{"error": "mine"}'


def test_in_a_drain_a_stale_connection_is_tried_again() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.request().answers()
        client.asks()
        world.terminates(30)
        world.engine.request().closes()
        world.passes(1)
        world.engine.request().answers()
        assert client.statuses == [200, 200]


# Connections that are used again, and clients that have said their last word


def test_a_connection_that_has_given_a_100_and_a_known_answer_may_be_stale_later() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.request().answers()
        client.sends(expecting())
        request = world.engine.request()
        request.sends(INTERIM)
        client.sends(b"{}")
        request.answers()
        client.asks()
        world.engine.request().closes()
        world.passes(3)
        world.engine.request().answers()
        assert client.statuses == [200, 200, 200]


@pytest.mark.parametrize("before", [0, 1])
def test_a_half_closed_client_has_two_seconds_from_the_head_of_its_answer(before: int) -> None:
    with World() as world:
        client = world.client()
        client.sends(post() * (before + 1))
        client.half_closes()
        for _ in range(before):
            world.passes(0.9)
            world.engine.request().sends(
                b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            )
        request = world.engine.request()
        world.passes(0.9)
        request.sends(b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\nTransfer-Encoding: chunked\r\n\r\n")
        world.passes(1.0)
        request.sends(b"1\r\nx\r\n0\r\n\r\n")
        assert client.answers()[-1].body == b"x"


def test_nothing_is_written_behind_the_last_answer() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        client.sends(b"POST /v1/c")
        world.terminates(60)
        client.stops_reading()
        world.passes(5)
        request.answers()
        world.passes(7)
        client.reads()
        world.passes(1)
        assert client.statuses == [200]


def test_frames_that_come_with_the_opening_are_counted() -> None:
    with World() as world:
        client = world.client()
        client.gets("/v1/realtime", *WEBSOCKET)
        opening = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        world.engine.request().sends(opening + b"\x81\x02hi")
        assert (client.tunnelled, world.sent_bytes) == (b"\x81\x02hi", 4)


def test_who_has_no_key_is_told_by_which_scheme_to_send_one() -> None:
    with World(keys=["client-key"]) as world:
        client = world.client()
        client.asks()
        assert (client.answer().status, client.answer().header(b"www-authenticate")) == (401, b"Bearer")


# What is no reason for any of this


@pytest.mark.parametrize("fields", [["Connection: close"], []])
def test_who_has_sent_all_is_not_waited_for(fields: list[str]) -> None:
    """A refusal is made at a request's head, before the parser says that no body follows."""
    with World(keys=["client-key"]) as world:
        client = world.client()
        client.sends(get("/v1/models", *fields) if fields else get("/v1/models").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (client.statuses, world.connections) == ([401], 0)


def test_a_change_that_never_reached_vllm_changes_nothing() -> None:
    with World(cache=1_000_000) as world:
        world.gateway.policy.admin_keys = ("admin-key",)
        world.client().asks(CHAT, STREAM)
        world.engine.request().answers(200, b"kept")
        world.gateway.public_door.max_body = 10
        world.client().asks("/update_weights", b"x" * 100, ADMIN)
        client = world.client()
        client.asks(CHAT, STREAM)
        assert client.statuses in ([200], [413])
        assert not world.engine.waits


def test_a_doubt_about_a_change_ends_with_its_engine() -> None:
    with World(cache=1_000_000) as world:
        world.gateway.policy.admin_keys = ("admin-key",)
        administrator = world.client()
        administrator.asks("/update_weights", b"{}", ADMIN)
        world.engine.request()
        administrator.leaves()
        world.engine_is("restarting")
        world.engine_is("ready")
        world.client().asks(CHAT, STREAM)
        world.engine.request().answers(200, b"kept")
        client = world.client()
        client.asks(CHAT, STREAM)
        assert client.answer().body == b"kept"


def test_who_is_behind_an_own_route_that_closes_has_not_left() -> None:
    with World() as world:
        client = world.client()
        client.garbage = True
        with world.at_once():
            client.sends(post() + post("/ping", b"x" * 70_000, "Connection: close") + post())
        world.engine.request().answers()
        world.passes(5)
        assert not any(ended.client_gone for ended in world.ended)
