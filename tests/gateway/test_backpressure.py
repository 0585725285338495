"""Who takes nothing, or no more: an engine that reads no further, a client that is slow, an answer that is over."""

from __future__ import annotations

import pytest

from tests.gateway.test_combined import STREAM, WEBSOCKET
from tests.gateway.world import CHAT, EngineConnection, World, chunk, get, post


def deaf(world: World) -> None:
    """Whatever the gateway writes on the engine's next connections is not taken, as by an API server that is busy."""
    accepts = world.engine.accepts

    def accept() -> EngineConnection:
        connection = accepts()
        connection.stops_reading()
        return connection

    world.engine.accepts = accept  # type: ignore[method-assign]


@pytest.mark.parametrize("size", [1_500_000, 3_000_000])
def test_a_long_body_behind_others_is_sent_once_and_whole_with_a_cache(size: int) -> None:
    with World(cache=10_000_000) as world:
        client = world.client()
        with world.at_once():
            client.sends(post("/v1/completions") * 9 + post(CHAT, b"x" * size))
        for _ in range(9):
            world.engine.request().answers()
        request = world.engine.request()
        assert (len(request.body), world.engine.waits, world.active) == (size, False, 1)
        request.answers()
        assert (client.statuses, world.active) == ([200] * 10, 0)


def test_an_upload_is_read_no_further_while_the_engine_takes_nothing() -> None:
    with World() as world:
        deaf(world)
        client = world.client()
        client.sends(post(CHAT, b"x" * 50_000_000)[:20_000_000])
        assert client.read_by_gateway < 2_000_000


def test_frames_that_came_early_are_bounded_while_the_engine_takes_nothing() -> None:
    with World() as world:
        client = world.client()
        client.garbage = True
        client.sends(get("/v1/realtime", *WEBSOCKET))
        client.sends(b"\x82\x7e\xff\xff" * 100_000)
        request = world.engine.request()
        request.stops_reading()
        request.switches()
        for _ in range(20):
            client.sends(b"x" * 500_000)
        assert client.read_by_gateway < 2_000_000


def test_a_connection_that_takes_nothing_is_not_used_again() -> None:
    with World() as world:
        client = world.client()
        whole = post(CHAT, b"x" * 200_000)
        client.sends(whole[:100])
        request = world.engine.request()
        request.stops_reading()
        client.sends(whole[100:])
        request.answers(400)
        deaf(world)
        client.sends(post(CHAT, b"x" * 50_000_000)[:20_000_000])
        assert client.read_by_gateway < 2_000_000


def test_an_upload_behind_bytes_that_waited_for_the_parser_is_bounded() -> None:
    with World(keys=["k"]) as world:
        first = world.client()
        first.asks(CHAT, b"{}", "X-API-Key: k")
        world.engine.request().answers()
        world.engine.connections[0].stops_reading()
        client = world.client()
        with world.at_once():
            client.sends(get("/ping") + post() * 9 + post(CHAT, b"x" * 50_000_000, "X-API-Key: k")[:200_000])
        client.sends(*[b"x" * 500_000] * 40)
        assert client.read_by_gateway < 2_000_000


def test_a_client_that_stopped_reading_before_the_answer() -> None:
    with World(event_keep_alive=2) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        client.stops_reading()
        request.answers(200, b"x" * 65_200)  # just below what pauses
        world.engine_is("restarting")
        client.asks(CHAT, STREAM)
        world.passes(40)  # the comments are what is too much
        world.engine_is("ready")
        request = world.engine.request()
        request.streams(*[b"data: " + b"y" * 100_000] * 50)
        assert client.unread < 1_000_000


@pytest.mark.parametrize("line", [b"CONTENT-LENGTH: 0", b"Content-Length:0", b"Content-Length:\t0"])
def test_an_empty_body_whose_length_is_spelt_otherwise(line: bytes) -> None:
    with World() as world:
        client = world.client()
        for _ in range(3):
            client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % line)
            world.engine.request().sends(b"HTTP/1.1 404 No\r\n%b\r\n\r\n" % line)
        assert client.statuses == [404] * 3


def test_an_answer_that_only_the_close_ends_does_not_look_whole_when_it_is_cut() -> None:
    with World(client_timeout=5) as world:
        client = world.client()
        client.stops_reading()
        client.sends(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        world.engine.request().sends(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"x" * 60_000), b"0\r\n\r\n"
        )
        client.reads(30_000)
        world.passes(20)
        client.reads()
        assert not client.answers()[0].whole


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("temperature", [0, 1])
def test_with_a_cache_who_sends_on_after_the_failure_is_told_at_once(temperature: int, limit: int | None) -> None:
    with World(cache=1_000_000, limit=limit) as world:
        other = world.client()
        other.asks()
        world.engine.request().streams(b"data: 1")
        client = world.client()
        whole = post(CHAT, b'{"temperature": %d}' % temperature)
        client.sends(whole[:-4])
        world.engine_is("failed")
        client.sends(whole[-4:])
        assert client.statuses == [503]


def test_a_broken_chunk_of_the_next_request_does_not_cut_this_ones_answer() -> None:
    with World() as world:
        client = world.client()
        client.garbage = True
        client.asks()
        head = post(CHAT, b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        client.sends(head + b"2\r\n{}\r\nZZ\r\n")
        world.engine.request().answers()
        assert client.statuses == [200, 400]


def test_a_loss_that_is_seen_when_the_next_engine_is_there() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        world.engine_is("restarting")
        world.engine_is("ready")
        request.closes()
        world.passes(1)
        world.engine.request().answers()
        assert client.statuses == [200]


def test_a_request_that_waits_behind_another_has_the_keys_of_its_turn() -> None:
    with World(keys=["old"]) as world:
        client = world.client()
        client.sends(post(CHAT, b"{}", "X-API-Key: old") * 2)
        request = world.engine.request()
        world.gateway.set_keys(["new"], [])
        request.answers()
        assert client.statuses == [200, 401]


def test_who_is_behind_the_last_answer_has_not_left() -> None:
    with World() as world:
        client = world.client()
        client.sends(post() * 3)
        request = world.engine.request()
        world.terminates(30)
        request.answers()
        world.passes(5)
        assert not any(ended.client_gone for ended in world.ended)


def test_http_1_0_knows_no_upgrade() -> None:
    with World() as world:
        world.client().sends(get("/v1/realtime", *WEBSOCKET).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert world.engine.request().header("upgrade") is None
