"""The time limit of a body is its client's: what we make it wait for does not count."""

from __future__ import annotations

from tests.gateway.world import World

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n"


def test_a_client_that_waits_for_a_100_is_not_too_slow_while_it_is_held() -> None:
    with World(engine="starting", client_timeout=60) as world:
        client = world.client()
        client.sends(HEAD + b"Expect: 100-continue\r\n\r\n")
        world.passes(70)
        assert client.statuses == []


def test_a_client_that_was_kept_from_sending_has_its_time_when_it_may_go_on() -> None:
    with World(engine="starting", client_timeout=60) as world:
        client = world.client()
        client.sends(HEAD + b"\r\n" + b"x" * 100_000)
        world.passes(200)
        world.engine_is("ready")
        world.passes(5)
        assert client.statuses == []
        client.sends(b"x" * 100_000)
        world.engine.request().answers()
        assert client.answer().status == 200


def test_a_client_that_stops_when_it_may_go_on_is_too_slow_in_the_end() -> None:
    with World(client_timeout=60) as world:
        client = world.client()
        client.sends(HEAD + b"\r\n" + b"x" * 100_000)
        world.passes(62)
        assert client.statuses == [408]


def test_the_body_of_a_request_that_is_refused_already_is_not_read_for_ever() -> None:
    with World(keys=["right"], client_timeout=10) as world:
        client = world.client()
        client.sends(HEAD + b"\r\n")
        assert client.statuses == [401]
        for _ in range(40):
            client.sends(b"x")
            world.passes(1)
        assert client.closed


def test_the_body_of_one_of_our_own_routes_neither() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        client.sends(b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n")
        assert client.statuses == [200]
        for _ in range(40):
            client.sends(b"x")
            world.passes(1)
        assert client.closed
