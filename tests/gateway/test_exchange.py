"""One request and its answer, with whatever may come between."""

from __future__ import annotations

import pytest

from tests.gateway.messages import Answer
from tests.gateway.world import CHAT, DONE, STREAM_HEAD, World, chunk, get, post

WEBSOCKET = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TEXT_FRAME = b"\x81\x02hi"


def is_idle(world: World) -> bool:
    return (world.active, world.waiting, world.in_flight) == (0, 0, 0)


# What passes


def test_a_request_and_its_answer_pass() -> None:
    with World() as world:
        client = world.client()
        client.asks(body=b'{"prompt": "x"}')
        request = world.engine.request()
        assert (request.method, request.target, request.body) == (b"POST", CHAT.encode(), b'{"prompt": "x"}')
        request.answers(200, b'{"text": "y"}')
        answer = client.answer()
        assert answer.body == b'{"text": "y"}'
        assert answer.header(b"x-request-id") == request.id
        assert [(ended.status, ended.id) for ended in world.ended] == [(200, request.id)]
        assert is_idle(world)


def test_requests_and_answers_may_come_byte_by_byte() -> None:
    with World() as world:
        client = world.client()
        for byte in post(body=b"abc"):
            client.sends(bytes([byte]))
        request = world.engine.request()
        assert request.body == b"abc"
        for byte in STREAM_HEAD + chunk(b"data: 1\n\n") + chunk(DONE) + b"0\r\n\r\n":
            request.sends(bytes([byte]))
        assert client.answer().body == b"data: 1\n\n" + DONE
        assert is_idle(world)


def test_a_streams_events_pass_as_they_come() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams()
        for number in range(5):
            request.event(b"data: %d" % number)
            assert client.answers()[0].events[-2] == b"data: %d" % number
        assert client.answers()[0].open
        request.finishes()
        assert client.answer().ended


def test_connections_are_used_again_on_both_sides() -> None:
    with World() as world:
        client = world.client()
        for number in range(5):
            client.asks(body=b"%d" % number)
            request = world.engine.request()
            assert request.body == b"%d" % number
            request.answers(200, request.body)
        assert [answer.body for answer in client.answers()] == [b"0", b"1", b"2", b"3", b"4"]
        assert len(world.engine.connections) == 1


def test_a_chunked_request_reaches_vllm_whole() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab")
        request = world.engine.request()
        client.sends(b"c\r\n2;x=y\r\nde\r\n0\r\n")
        assert not request.whole
        client.sends(b"\r\n")
        assert (request.whole, request.body) == (True, b"abcde")
        request.answers()
        assert client.answer().status == 200


def test_a_large_body_waits_while_vllm_does_not_take_it() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n")
        request = world.engine.request()
        request.stops_reading()
        for _ in range(40):
            client.sends(b"x" * 100_000)
        assert client.unread_by_gateway > 3_000_000
        request.reads()
        assert request.whole
        request.answers()
        assert client.answer().status == 200


def test_a_stream_waits_while_its_client_does_not_take_it() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams()
        client.stops_reading()
        for _ in range(60):
            request.event(b"data: " + b"x" * 50_000)
        assert request.connection.unread_by_gateway > 2_500_000
        assert client.unread < 300_000
        client.reads()
        request.finishes()
        assert len(client.answer().events) == 62


def test_an_answer_to_head_has_no_body() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        world.engine.request().sends(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
        assert client.answer().header(b"content-length") == b"100"
        client.asks()
        world.engine.request().answers()
        assert client.statuses == [200, 200]


def test_an_http_1_0_client_gets_the_stream_until_the_connection_closes() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"POST /v1/completions HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
        request = world.engine.request()
        request.streams(b"data: 1")
        request.finishes()
        answer = client.answer()
        assert not answer.chunked
        assert answer.body == b"data: 1\n\n" + DONE
        assert client.closed


def test_an_answer_that_the_close_ends_passes() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.sends(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nab", b"cd")
        request.closes()
        assert client.answer().body == b"abcd"
        assert client.closed


def test_an_answer_that_is_no_http_becomes_502() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.request().sends(b"SSH-2.0-OpenSSH\r\n\r\n")
        assert client.answer().status == 502
        assert is_idle(world)


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate"])
def test_what_vllm_sends_behind_its_answer_reaches_nobody(late: bytes) -> None:
    with World() as world:
        client = world.client()
        client.asks(body=b"first")
        first = world.engine.request()
        first.answers(200, b"first")
        first.sends(late)
        client.asks(body=b"second")
        world.engine.request().answers(200, b"second")
        assert [answer.body for answer in client.answers()] == [b"first", b"second"]


# Pipelining


def test_pipelined_requests_are_answered_in_order() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"".join(post(body=b"%d" % number) for number in range(6)) + get("/ping") + get("/no/route"))
        for number in range(6):
            assert len(world.engine.requests) == number + 1
            request = world.engine.request()
            assert request.body == b"%d" % number
            request.answers(200, request.body)
        assert [answer.body for answer in client.answers()][:6] == [b"%d" % number for number in range(6)]
        assert client.statuses[6:] == [200, 404]


def test_a_pipelined_request_may_come_while_the_answer_before_it_is_streamed() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        client.sends(post(body=b"second")[:-3])
        request.event(b"data: 2")
        client.sends(b"ond")
        request.finishes()
        second = world.engine.request()
        assert second.body == b"second"
        second.answers(200, b"second")
        assert client.answers()[0].ended
        assert client.answers()[1].body == b"second"


def test_behind_a_request_that_closes_the_connection_nothing_is_answered() -> None:
    with World() as world:
        client = world.client()
        client.sends(post(CHAT, b"{}", "Connection: close") + post())
        world.engine.request().answers()
        assert client.answer().closes
        assert client.closed
        assert not world.engine.waits


# Expect


def test_a_client_that_waits_for_100_is_told_by_vllm() -> None:
    with World() as world:
        client = world.client()
        client.sends(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
        )
        request = world.engine.request()
        assert request.header("expect") == b"100-continue"
        request.sends(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.sends(b"abc")
        assert request.body == b"abc"
        request.answers()
        assert [interim.status for interim in client.answer().interim] == [100]


def test_a_client_that_waits_for_100_and_is_refused_is_closed() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"POST /no/route HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert client.answer().closes
        assert client.closed


# WebSockets


def test_a_websocket_is_a_tunnel_both_ways() -> None:
    with World() as world:
        client = world.client()
        client.sends(WEBSOCKET)
        request = world.engine.request()
        assert request.header("upgrade") == b"websocket"
        request.switches()
        assert client.statuses == [101]
        client.sends(b"from the client")
        request.sends(b"from vLLM")
        assert (request.tunnelled, client.tunnelled) == (b"from the client", b"from vLLM")
        client.leaves()
        assert request.gone
        assert is_idle(world)


def test_a_websocket_whose_engine_dies_between_two_frames_is_closed_by_one() -> None:
    with World() as world:
        client = world.client()
        client.sends(WEBSOCKET)
        request = world.engine.request()
        request.switches()
        request.sends(TEXT_FRAME)
        world.engine.dies()
        assert client.tunnelled.startswith(TEXT_FRAME + b"\x88")
        assert client.tunnelled[6:8] == (1011).to_bytes(2)
        world.passes(3)
        assert client.closed
        assert is_idle(world)


def test_a_websocket_whose_engine_dies_within_a_frame_is_cut() -> None:
    with World() as world:
        client = world.client()
        client.sends(WEBSOCKET)
        request = world.engine.request()
        request.switches()
        request.sends(TEXT_FRAME[:3])
        world.engine.dies()
        world.passes(3)
        assert client.tunnelled == TEXT_FRAME[:3]
        assert client.closed


# Holding


def test_a_request_is_held_until_the_engine_is_ready() -> None:
    with World(engine="starting") as world:
        client = world.client()
        client.asks()
        world.passes(200)
        assert (world.waiting, world.engine.requests) == (1, [])
        world.engine_is("ready")
        world.engine.request().answers()
        answer = client.answer()
        assert (answer.status, answer.header(b"x-supervisor-state")) == (200, b"starting")
        another = world.client()
        another.asks()
        world.engine.request().answers()
        assert another.answer().header(b"x-supervisor-state") is None
        assert is_idle(world)


def test_a_known_answer_to_one_that_was_held_tells_it_too() -> None:
    with World() as world:
        for held in (False, False, True):
            client = world.client()
            if held:
                world.engine_is("restarting")
            client.asks()
            if held:
                world.engine_is("ready")
            world.engine.request().answers()
            assert client.answer().header(b"x-supervisor-state") == (b"restarting" if held else None)


def test_a_request_is_held_for_the_hold_timeout_at_most() -> None:
    with World(engine="starting", hold_timeout=30) as world:
        client = world.client()
        client.asks()
        world.passes(29)
        assert client.statuses == []
        world.passes(1.5)
        assert client.answer().status == 503
        assert client.answer().header(b"retry-after") == b"5"
        assert client.answer().header(b"x-supervisor-state") == b"starting"
        assert is_idle(world)


def test_requests_above_the_limit_wait_in_the_order_in_which_they_came() -> None:
    with World(limit=1, waiting=2) as world:
        clients = [world.client() for _ in range(4)]
        for number, client in enumerate(clients):
            client.asks(body=b"%d" % number)
        assert clients[3].answer().status == 429
        for number in range(3):
            request = world.engine.request()
            assert request.body == b"%d" % number
            assert world.active == 1
            request.answers()
        assert [client.statuses for client in clients] == [[200], [200], [200], [429]]


def test_who_leaves_while_it_waits_makes_room() -> None:
    with World(limit=1, waiting=2) as world:
        clients = [world.client() for _ in range(3)]
        for number, client in enumerate(clients):
            client.asks(body=b"%d" % number)
        clients[1].leaves()
        assert world.waiting == 1
        world.engine.request().answers()
        assert world.engine.request().body == b"2"


def test_each_key_has_a_rate_of_its_own() -> None:
    with World(keys=["one", "two"], rate=5) as world:

        def asked(path: str, key: str) -> Answer:
            client = world.client()
            client.gets(path, f"X-API-Key: {key}")
            if world.engine.waits:
                world.engine.request().answers()
            return client.answer()

        answers = [asked("/v1/models", "one") for _ in range(6)]
        assert [answer.status for answer in answers] == [200] * 5 + [429]
        assert b"rate_limit_error" in answers[-1].body
        assert 1 <= int(answers[-1].header(b"retry-after") or 0) <= 12
        assert asked("/v1/models", "two").status == 200
        assert asked("/status", "one").status == 200  # what is ours costs nothing
        assert asked("/v1/models", "one").status == 429


# An engine that dies


def test_a_request_whose_engine_dies_is_sent_to_the_next_one() -> None:
    with World() as world:
        client = world.client()
        client.asks(body=b"again")
        world.engine.request()
        world.engine.dies()
        world.engine_is("restarting")
        assert world.waiting == 1
        world.passes(30)
        world.engine_is("starting")
        world.engine_is("ready")
        request = world.engine.request()
        assert request.body == b"again"
        request.answers()
        assert client.answer().status == 200
        assert is_idle(world)


def test_a_request_is_not_sent_a_third_time() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        for _ in range(2):
            world.engine.request()
            world.engine.dies()
            world.engine_is("restarting")
            world.engine_is("ready")
        assert client.answer().status in (502, 503)
        assert len(world.engine.requests) == 2


def test_a_request_without_an_answer_is_not_sent_again_to_an_engine_that_lives() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.request().closes()
        world.passes(2)
        assert client.answer().status == 502
        assert len(world.engine.requests) == 1


def test_a_request_on_a_connection_that_vllm_has_just_closed_is_sent_on_another_at_once() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        first = world.engine.request()
        first.answers()
        with world.at_once():
            client.asks(body=b"second")
            first.closes()
        assert [request.body for request in world.engine.requests if not request.gone or request.claimed][
            -1
        ] == b"second"
        world.engine.requests[-1].answers()
        assert client.statuses == [200, 200]


def test_an_engine_whose_socket_is_overrun_is_asked_again() -> None:
    with World() as world:
        client = world.client()
        world.engine.refusal = BlockingIOError(11, "Resource temporarily unavailable")
        client.asks()
        world.engine.refusal = None
        world.passes(2)
        world.engine.request().answers()
        assert client.answer().status == 200


def test_a_500_of_an_engine_that_lives_is_believed() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.request().answers(500, b'{"error": "yours"}')
        world.passes(1)
        assert (client.answer().status, client.answer().body) == (500, b'{"error": "yours"}')
        assert len(world.engine.requests) == 1


def test_a_500_of_an_engine_that_dies_is_not_shown_and_the_request_is_sent_again() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.health = 503
        world.engine.request().answers(500, b'{"error": "EngineCore died"}')
        world.passes(1)
        world.engine.dies()
        world.engine_is("restarting")
        world.passes(1)
        assert client.statuses == []
        world.engine.health = 200
        world.engine_is("ready")
        world.engine.request().answers()
        assert client.answer().status == 200


def test_a_stream_whose_engine_dies_between_two_events_is_ended_by_an_error() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.request().streams(b"data: 1")
        world.engine.dies()
        answer = client.answers()[0]
        assert answer.ended
        assert answer.events[0] == b"data: 1"
        assert b"engine_stopped" in answer.events[1]
        assert answer.events[2:] == [b"data: [DONE]", b""]
        assert is_idle(world)


def test_half_an_event_of_an_engine_that_dies_is_dropped() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        request.sends(chunk(b"data: 2\n\n")[:-5])
        world.engine.dies()
        answer = client.answers()[0]
        assert answer.ended
        assert b"data: 2" not in answer.body


def test_a_whole_answer_whose_engine_dies_is_cut() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        world.engine.request().sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        world.engine.dies()
        assert client.answers()[0].cut
        assert is_idle(world)


# A client that leaves


@pytest.mark.parametrize(
    ("how", "when"),
    [
        *(
            (how, when)
            for how in ("leaves", "breaks")
            for when in ("before its answer", "within its body", "within its stream")
        ),
        ("half_closes", "within its body"),  # which can't be whole any more
    ],
)
def test_vllm_is_told_at_once_that_a_client_is_gone(how: str, when: str) -> None:
    with World() as world:
        client = world.client()
        client.sends(post(body=b"x" * 100)[: -50 if when == "within its body" else None])
        request = world.engine.request()
        if when == "within its stream":
            request.streams(b"data: 1")
        getattr(client, how)()
        assert request.gone
        assert [ended.client_gone for ended in world.ended] == [True]
        assert is_idle(world)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_says_no_more_gets_its_answers_and_is_closed_on(stream: bool, begun: bool) -> None:
    with World() as world:
        client = world.client()
        client.sends(post() * 2)
        first = world.engine.request()
        if stream and begun:
            first.streams(b"data: 1")
        client.half_closes()
        world.passes(30)
        assert not first.gone
        if not (stream and begun):
            first.streams(b"data: 1") if stream else first.answers()
        if stream:
            first.finishes()
        world.engine.request().answers()
        assert client.statuses == [200, 200]
        assert all(answer.whole for answer in client.answers())
        assert client.closed
        assert is_idle(world)


@pytest.mark.parametrize("begun", ["no answer", "a refusal", "a stream", "a whole answer", "a known answer"])
def test_a_client_of_http_1_0_that_says_no_more_gets_its_answer(begun: str) -> None:
    """It knows no interim answers: one looks for it with the first bytes of its own."""
    with World(hold_timeout=40) as world:
        if begun == "a known answer":
            before = world.client()
            before.asks()
            world.engine.request().answers()
        if begun == "a refusal":
            world.engine_is("starting")
        client = world.client()
        client.sends(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.half_closes()
        world.passes(30)
        if begun == "a stream":
            world.engine.request().streams(b"data: 1")
            world.engine.requests[-1].finishes()
        elif begun != "a refusal":
            world.engine.request().answers(200)
        world.passes(30)
        assert client.answer().status == (503 if begun == "a refusal" else 200)
        assert client.received.count(b"HTTP/1.1") == 1
        assert client.closed
        assert is_idle(world)


def test_a_client_of_http_1_0_that_is_gone_is_known_to_be() -> None:
    """nginx, as it is shipped, speaks so to us: a request whose own client left would go on for nobody."""
    with World() as world:
        client = world.client()
        client.sends(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.leaves()
        assert world.engine.request().gone
        assert is_idle(world)


@pytest.mark.parametrize(
    ("sent", "waits", "status", "path"),
    [
        (b"GARBAGE\r\n\r\n", 0, 400, b"-"),
        (b"\x16\x03\x01\x02\x00\x01", 0, 400, b"-"),
        (b"GET /v1/models?key=x HTTP/1.1\r\nHost: x\r\nAccept: x\r\nno header\r\n\r\n", 0, 400, b"/v1/models"),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000, 0, 431, b"/v1/models"),
        (b"POST /v1/comp", 70, 408, b"-"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le", 70, 408, b"/v1/completions"),
    ],
)
def test_what_is_no_request_is_counted_and_logged_as_one(sent: bytes, waits: int, status: int, path: bytes) -> None:
    with World() as world:
        client = world.client()
        client.sends(sent)
        world.passes(waits)
        assert client.answer().status == status
        assert client.answer().header(b"connection") == b"close"
        assert [(ended.status, ended.path) for ended in world.ended] == [(status, path)]
        assert client.answer().header(b"x-request-id") == world.ended[0].id
        assert world.gateway.counts.statuses == {status: 1}
        world.passes(5)
        assert client.closed
        assert is_idle(world)


def test_a_client_that_leaves_while_it_is_held_is_not_answered() -> None:
    with World(engine="starting") as world:
        client = world.client()
        client.asks()
        client.leaves()
        assert is_idle(world)
        world.engine_is("ready")
        assert world.engine.requests == []


def test_a_client_that_leaves_while_its_connection_is_opened_is_not_sent() -> None:
    with World() as world:
        client = world.client()
        with world.at_once():
            client.asks()
            client.leaves()
        world.passes(1)
        assert all(request.gone for request in world.engine.requests)
        assert is_idle(world)


# Refusals, and what is too slow


def test_a_route_that_is_closed_is_refused_and_the_connection_goes_on() -> None:
    with World() as world:
        client = world.client()
        client.asks("/no/route", b"x" * 1000)
        client.asks()
        world.engine.request().answers()
        assert client.statuses == [404, 200]
        assert [ended.status for ended in world.ended] == [404, 200]


def test_a_body_that_is_too_large_is_refused_before_it_came() -> None:
    with World(max_body=1000) as world:
        client = world.client()
        client.sends(post(body=b"x" * 1001)[:100])
        assert client.answer().status == 413
        assert not world.engine.waits


def test_garbage_is_refused_and_the_connection_closed() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        assert client.answer().status == 400
        world.passes(5)
        assert client.closed


@pytest.mark.parametrize(
    "behind",
    [b"}}", b"\x16\x03\x01 \r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000],
    ids=["a body's rest", "TLS", "a head"],
)
@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_no_request_behind_whole_ones_costs_them_nothing(behind: bytes, requests: int, stream: bool) -> None:
    """A Content-Length that counts letters is too small by what they take more."""
    with World() as world:
        client = world.client()
        client.sends(post() * requests + behind)
        for number in range(requests):
            request = world.engine.request()
            if stream:
                request.streams(b"data: 1")
            if number == requests - 1:
                client.sends(behind)
            if stream:
                request.finishes()
            else:
                request.answers(200, b"whole")
        assert client.statuses == [200] * requests
        assert all(answer.ended if stream else answer.body == b"whole" for answer in client.answers())
        world.passes(5)
        assert client.closed
        assert [one.status for one in world.ended] == [200] * requests


def test_a_body_that_does_not_come_is_refused() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        client.sends(post(body=b"x" * 100)[:-50])
        world.passes(9)
        assert client.statuses == []
        world.passes(5)
        assert client.answer().status == 408
        assert world.engine.requests[0].gone
        world.passes(5)
        assert client.closed


def test_a_connection_without_requests_is_closed_after_a_while() -> None:
    with World(keep_alive=75) as world:
        client = world.client()
        client.asks()
        world.engine.request().answers()
        world.passes(74)
        assert not client.closed
        world.passes(3)
        assert client.closed


def test_a_client_that_takes_nothing_for_too_long_is_cut() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams()
        client.stops_reading()
        request.sends(chunk(b"data: " + b"x" * 100_000 + b"\n\n"))
        world.passes(14)
        assert client.closed
        assert request.gone
        assert is_idle(world)


def test_a_request_has_the_request_timeout() -> None:
    with World(request_timeout=30) as world:
        slow, streaming = world.client(), world.client()
        slow.asks()
        streaming.asks()
        world.engine.request()
        world.engine.request().streams(b"data: 1")
        world.passes(32)
        assert slow.answer().status == 504
        assert streaming.answer().ended
        assert b"request_timeout" in streaming.answer().body
        assert all(request.gone for request in world.engine.requests)


# The end


def test_after_the_signal_what_runs_is_done_and_what_comes_is_refused() -> None:
    with World() as world:
        client, late, idle = world.client(), world.client(), world.client()
        client.asks()
        world.terminates()
        late.asks()
        assert late.answer().status == 503
        assert not world.over
        world.engine.request().answers()
        assert client.answer().status == 200
        assert client.answer().closes
        assert world.over
        assert idle.closed
        assert world.connections == 0


def test_after_the_signal_what_is_held_is_refused() -> None:
    with World(engine="starting") as world:
        client = world.client()
        client.asks()
        world.terminates()
        assert client.answer().status == 503
        assert world.over


def test_what_still_runs_when_the_patience_is_over_is_ended_or_cut() -> None:
    with World() as world:
        waiting, streaming, half = world.client(), world.client(), world.client()
        for client in (waiting, streaming, half):
            client.asks()
        world.engine.request()
        world.engine.request().streams(b"data: 1")
        world.engine.request().sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        world.terminates(patience=10)
        world.passes(11)
        assert world.over
        assert waiting.answer().status == 503
        assert streaming.answer().ended
        assert b"shutting_down" in streaming.answer().body
        assert half.answers()[0].cut
        assert all(request.gone for request in world.engine.requests)
        assert world.connections == 0
        assert is_idle(world)


def test_bytes_are_counted_as_they_go() -> None:
    """An alert looks at whether there are any."""
    with World() as world:
        client = world.client()
        for size in (100, 50):  # the second head is one that came before
            client.asks()
            world.engine.request().answers(200, b"x" * size)
        assert world.sent_bytes == 150
        client.asks()
        request = world.engine.request()
        request.streams(b"data: {}", b"data: {}")
        assert world.sent_bytes == 150 + 2 * len(chunk(b"data: {}\n\n"))


OPENAI_ERROR = b'data: {"error":{"message":"EngineCore died","type":"InternalServerError","code":500}}\n\n'
ANTHROPIC_ERROR = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"dead"}}\n\n'


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ((chunk(OPENAI_ERROR), chunk(DONE)), "engine_error"),
        ((chunk(OPENAI_ERROR) + chunk(DONE),), "engine_error"),
        ((chunk(OPENAI_ERROR + DONE),), "engine_error"),
        ((chunk(OPENAI_ERROR)[:30], chunk(OPENAI_ERROR)[30:], chunk(DONE)), "engine_error"),
        ((chunk(ANTHROPIC_ERROR), chunk(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')), "engine_error"),
        ((chunk(ANTHROPIC_ERROR),), "engine_error"),  # as /v1/responses ends
        ((chunk(b'data: {"choices":[{"delta":{"content":"data: {\\"error\\":"}}]}\n\n'), chunk(DONE)), ""),
        ((chunk(b'data: {"choices":[],"error":null}\n\n'), chunk(DONE)), ""),
    ],
)
def test_a_stream_that_vllm_ends_by_an_error_is_no_plain_success(end: tuple[bytes, ...], code: str) -> None:
    with World() as world:
        told: list[str] = []
        world.watched_by(lambda record: told.append(record.code))  # type: ignore[attr-defined]
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b'data: {"choices":[{}]}', b'data: {"choices":[{}]}')
        for piece in end:
            request.sends(piece)
        request.sends(b"0\r\n\r\n")
        assert client.answer().status == 200
        assert told == [code]
