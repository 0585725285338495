"""What went wrong once, or could: each case is written down turn by turn."""

from __future__ import annotations

import pytest

from tests.gateway.transport import READ_SIZE
from tests.gateway.world import CHAT, DONE, ScriptedRequest, World, chunk, get, post

WEBSOCKET = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
CLOSED_ROUTE = get("/no/route")
LARGE = b"data: " + b"x" * 150_000


# A silent WebSocket is no hang


def test_a_websocket_in_which_nobody_speaks_does_not_count_as_waiting_for_vllm() -> None:
    with World() as world:
        world.client().sends(WEBSOCKET)
        world.engine.request().switches()
        world.passes(600)
        assert world.awaited == 0
        world.client().asks()
        assert world.awaited == 1


# An event larger than 64 KiB, and the end of its stream


def large_event(request: ScriptedRequest, *, behind: bytes) -> None:
    """An event of 150 kB in one chunk, of which its first 100 kB come, and then `behind` as the next read."""
    sent = chunk(LARGE + b"\n\n")
    request.sends(sent[:100_000])
    if behind:
        request.sends(behind)


REST = chunk(LARGE + b"\n\n")[100_000:]
BEHIND = {
    "nothing": b"",
    "a piece": b"x" * 1000,
    "all but its last byte": REST[:-1],
    "all but its line end": REST[:-2],
    "half of its end": REST[:-3],
    "all, and half of the next": REST + b"9\r\ndata",
    "all": REST,
}
every_place = pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)


@every_place
def test_an_answer_that_stops_within_or_behind_a_large_event_is_ended_or_cut(behind: bytes) -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        large_event(request, behind=behind)
        world.engine.dies()
        world.engine_is("restarting")
        answer = client.answers()[0]
        assert answer.ended or (answer.cut and client.closed), answer
        if answer.ended:
            assert answer.body.endswith(DONE)
            assert b"engine_stopped" in answer.events[-3]
        assert (world.active, world.in_flight) == (0, 0)


@every_place
def test_a_large_event_that_stops_keeps_no_time_limit_from_others(behind: bytes) -> None:
    with World(client_timeout=2, request_timeout=30) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        large_event(request, behind=behind)
        world.passes(31)
        slow = world.client()
        slow.sends(b"POST / HTTP/1.1\r\nHost:")
        world.passes(4)
        assert slow.statuses == [408]
        assert client.answers()[0].ended or client.closed


@every_place
def test_a_large_event_that_stops_keeps_no_shutdown_from_ending_all_the_others(behind: bytes) -> None:
    with World() as world:
        clients = [world.client() for _ in range(8)]
        for client in clients:
            client.asks()
            world.engine.request().streams(b"data: 1")
        for request in world.engine.requests[:4]:
            large_event(request, behind=behind)
        world.terminates(patience=10)
        world.passes(11)
        assert world.over
        assert all(client.answers()[0].ended or client.answers()[0].cut for client in clients)
        assert all(client.answers()[0].ended for client in clients[4:])
        assert (world.active, world.in_flight, world.connections) == (0, 0, 0)


def test_a_large_event_passes_before_it_is_whole_and_the_stream_goes_on() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        large_event(request, behind=b"")
        assert len(client.received) > 100_000
        request.sends(REST[:10], REST[10:-1], REST[-1:])
        request.event(b"data: 2")
        request.finishes()
        assert client.answer().events == [b"data: 1", LARGE, b"data: 2", b"data: [DONE]", b""]


# A time limit of a request that waits behind another's answer


def test_a_body_that_does_not_come_is_not_refused_in_the_midst_of_the_answer_before() -> None:
    with World(client_timeout=2) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        for number in range(5):
            world.passes(1)
            request.event(b"data: %d" % number)
        request.finishes()
        assert client.answers()[0].ended
        world.passes(5)
        assert client.statuses in ([200], [200, 408])
        assert client.closed


def test_a_head_that_does_not_come_is_not_refused_in_the_midst_of_the_answer_before() -> None:
    with World(client_timeout=2) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        client.sends(b"POST /v1/compl")
        world.passes(6)
        request.finishes()
        assert client.answers()[0].ended
        world.passes(5)
        assert client.statuses in ([200], [200, 408])
        assert client.closed


def test_vllm_is_told_when_a_client_goes_whose_next_request_was_half() -> None:
    with World(client_timeout=2) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        world.passes(5)
        client.leaves()
        assert request.gone
        assert world.active == 0


# One client that pipelines without end, and takes nothing

PIPELINED = get("/v1/models") * 5_000  # some 200 kB
SOME = 64


def test_a_read_full_of_requests_is_not_made_into_as_many() -> None:
    with World() as world:
        client = world.client()
        before = world.requests_in_memory
        client.sends(PIPELINED)
        assert world.engine.waits
        assert world.requests_in_memory - before < SOME


def test_no_more_is_read_of_a_client_than_two_reads_while_answers_are_outstanding() -> None:
    with World() as world:
        client = world.client()
        before = world.requests_in_memory
        with world.at_once():
            for _ in range(5):
                client.sends(PIPELINED)
        for _ in range(100):
            world.engine.request().answers()
        assert client.read_by_gateway <= 2 * READ_SIZE
        assert client.unread_by_gateway >= 5 * len(PIPELINED) - 2 * READ_SIZE
        assert world.requests_in_memory - before < SOME


def test_the_next_request_does_not_go_to_vllm_while_the_client_takes_no_answer() -> None:
    with World() as world:
        client = world.client()
        client.stops_reading()
        client.sends(get("/v1/models") * 30)
        for _ in range(30):
            if world.engine.waits:
                world.engine.request().answers(200, b"x" * 100_000)
        assert len(world.engine.requests) <= 2
        assert client.unread < 300_000
        client.reads()
        while world.engine.waits:
            world.engine.request().answers(200, b"x" * 100_000)
        assert client.statuses == [200] * 30


@pytest.mark.parametrize("ours", [get("/status"), CLOSED_ROUTE], ids=["a route of our own", "a refusal"])
def test_the_next_answer_of_our_own_waits_as_well(ours: bytes) -> None:
    with World() as world:
        client = world.client()
        client.asks()
        client.stops_reading()
        client.sends(ours * 1_500)
        world.engine.request().answers(200, b"x" * 100_000)
        world.passes(1)
        assert client.unread < 110_000
        client.reads()
        assert len(client.answers()) == 1_501
        assert all(answer.whole for answer in client.answers())


# Requests that are answered at once, many in a row


def test_many_refused_requests_behind_a_slow_one_are_all_answered() -> None:
    with World() as world:
        client = world.client()
        client.sends(post() + CLOSED_ROUTE * 1_500)
        world.engine.request().answers()
        assert client.statuses == [200, *[404] * 1_500]
        client.asks()
        world.engine.request().answers()
        assert client.statuses[-1] == 200


def test_many_answers_of_the_cache_behind_a_slow_request_are_all_given() -> None:
    cached = post("/v1/embeddings", b'{"input": "x"}')
    with World(cache=1_000_000) as world:
        client = world.client()
        client.sends(cached)
        world.engine.request().answers()
        client.sends(post() + cached * 800)
        world.engine.request().answers()
        assert client.statuses == [200] * 802


def test_many_requests_of_our_own_behind_a_slow_one_are_all_answered() -> None:
    with World() as world:
        client = world.client()
        client.sends(post() + get("/ping") * 1_500)
        world.engine.request().answers()
        assert client.statuses == [200] * 1_501


# Slow clients


def test_a_head_that_comes_byte_by_byte_has_the_client_timeout_from_its_first_byte() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        for byte in post("/v1/completions")[:14]:
            if client.closed or client.answers():
                break
            client.sends(bytes([byte]))
            world.passes(1)
        assert client.statuses == [408]
        assert 10 <= world.now <= 13
        world.passes(5)
        assert client.closed


def test_the_clients_time_for_its_head_begins_anew_with_each_request() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        for _ in range(3):
            whole = post("/v1/completions")
            client.sends(whole[:10])
            world.passes(6)
            client.sends(whole[10:])
            world.engine.request().answers()
        assert client.statuses == [200] * 3


def test_a_body_that_comes_byte_by_byte_ends_within_a_few_client_timeouts() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(60):
            if client.closed or client.answers():
                break
            client.sends(b"x")
            world.passes(1)
        assert client.statuses == [408]
        world.passes(5)
        assert client.closed
        assert world.active == 0


def test_a_large_body_that_comes_steadily_has_as_long_as_it_takes() -> None:
    with World(client_timeout=10) as world:
        client = world.client()
        client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 12000000\r\n\r\n")
        for _ in range(120):  # 100 kB/s
            client.sends(b"x" * 100_000)
            world.passes(1)
        world.engine.request().answers()
        assert client.answer().status == 200


# Clients that take nothing, of answers below the mark above which writing pauses


def test_a_small_answer_that_its_client_does_not_take_is_not_kept_for_ever() -> None:
    with World(client_timeout=10, keep_alive=20) as world:
        client = world.client()
        client.stops_reading()
        client.asks()
        world.engine.request().answers()
        world.passes(60)
        assert client.closed
        assert world.connections == 0


def test_a_client_that_half_closes_and_takes_nothing_is_not_kept_for_ever() -> None:
    with World(client_timeout=10, keep_alive=20) as world:
        client = world.client()
        client.stops_reading()
        client.asks()
        request = world.engine.request()
        request.streams(b"data: 1")
        client.half_closes()
        world.passes(60)
        assert request.gone
        assert world.connections == 0


@pytest.mark.parametrize(
    "how",
    [
        "its client takes nothing",
        "the shutdown cuts it",
        "the request timeout ends it",
    ],
)
def test_an_answer_whose_end_only_the_close_tells_never_looks_complete_when_it_is_not(how: str) -> None:
    with World(client_timeout=10, request_timeout=40) as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.sends(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        if how == "its client takes nothing":
            client.stops_reading()
            request.sends(b"x" * 100_000)
            world.passes(15)
        elif how == "the shutdown cuts it":
            world.terminates(patience=5)
            world.passes(6)
        else:
            world.passes(42)
        assert client.closed
        assert client.answers()[0].cut


# A client that leaves while more lies behind its request


@pytest.mark.parametrize(
    "behind",
    [get("/ping"), post() * 30, get("/ping") * 30, post(body=b"x" * 400_000), PIPELINED],
    ids=["our own", "relayed ones", "many of our own", "a large one", "thousands"],
)
@pytest.mark.parametrize("state", ["ready", "restarting"])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_behind_its_request(behind: bytes, state: str) -> None:
    with World(engine=state) as world:
        client = world.client()
        client.sends(post(body=b"x" * 10_000) + behind)
        assert world.in_flight == 1
        client.leaves()
        world.passes(2)
        assert all(request.gone for request in world.engine.requests)
        assert (world.active, world.waiting, world.connections) == (0, 0, 0)


def test_a_client_that_leaves_is_noticed_while_its_large_request_is_held() -> None:
    with World(engine="starting") as world:
        client = world.client()
        client.sends(post(body=b"x" * 300_000))
        assert world.waiting == 1
        client.leaves()
        world.passes(2)
        assert (world.active, world.waiting, world.connections) == (0, 0, 0)


def test_a_client_that_leaves_is_noticed_while_the_rest_of_its_held_body_lies_in_the_kernel() -> None:
    with World(engine="starting") as world:
        client = world.client()
        client.sends(post(body=b"x" * 3_000_000))
        client.leaves()
        world.passes(2)
        assert (world.active, world.waiting, world.connections) == (0, 0, 0)


def test_a_client_that_leaves_is_noticed_while_vllm_does_not_take_its_body() -> None:
    with World() as world:
        client = world.client()
        client.sends(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n")
        request = world.engine.request()
        request.stops_reading()
        client.sends(b"x" * 1_000_000)
        client.leaves()
        world.passes(2)
        assert request.gone
        assert (world.active, world.connections) == (0, 0)


def test_a_client_that_leaves_is_noticed_in_the_midst_of_its_stream() -> None:
    with World() as world:
        client = world.client()
        client.sends(post() + get("/ping"))
        request = world.engine.request()
        request.streams(b"data: 1")
        client.leaves()
        world.passes(2)
        assert request.gone


@pytest.mark.parametrize("behind", [b"", get("/ping"), post()], ids=["nothing", "our own", "a relayed one"])
def test_a_client_that_leaves_while_an_answer_of_ours_waits_for_it_to_read_is_no_fault(behind: bytes) -> None:
    with World() as world:
        client = world.client()
        client.stops_reading()
        client.sends(post() + get("/status") + behind)
        world.engine.request().answers(200, b"x" * 100_000)
        client.breaks()
        world.passes(61)
        assert (world.active, world.connections) == (0, 0)


# The smaller ones


def test_a_held_request_whose_engine_did_not_answer_health_once_is_decided_later() -> None:
    """vLLM closed the connection without an answer, was too busy to answer /health in time, and did not die."""
    with World(hold_timeout=300) as world:
        client = world.client()
        client.asks()
        world.engine.health = None
        world.engine.request().closes()
        world.passes(7)
        world.engine.health = 200
        world.passes(30)
        assert client.statuses == [502]


def test_a_watcher_that_raises_leaves_nothing_half_done() -> None:
    def raises(_: object) -> None:
        raise RuntimeError("a fault of a watcher")

    with World(limit=1, faults_expected=True) as world:
        world.watched_by(raises)
        first, second = world.client(), world.client()
        first.asks()
        second.asks()
        world.engine.request().answers()
        assert first.answer().status == 200
        world.engine.request().answers()
        assert second.answer().status == 200
        assert len(world.ended) == 2
        assert (world.active, world.waiting, world.in_flight) == (0, 0, 0)


def test_a_shared_answer_whose_end_only_the_close_tells_does_not_look_complete_when_it_is_not() -> None:
    with World(cache=1_000_000) as world:
        client = world.client()
        client.asks("/v1/embeddings", b'{"input": "x"}')
        request = world.engine.request()
        request.sends(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + b'{"half": ')
        world.engine.dies(reset=True)
        world.engine_is("restarting")
        answer = client.answers()[0]
        assert answer.cut, answer


def test_a_relayed_answer_whose_end_only_the_close_tells_does_not_look_complete_when_it_is_not() -> None:
    with World() as world:
        client = world.client()
        client.asks()
        request = world.engine.request()
        request.sends(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + b'{"half": ')
        world.engine.dies(reset=True)
        world.engine_is("restarting")
        assert client.answers()[0].cut


def test_wrong_keys_are_limited_by_rate() -> None:
    with World(keys=["right"]) as world:
        client = world.client()
        for _ in range(70):
            client.asks(CHAT, b"{}", "Authorization: Bearer wrong")
        assert client.statuses[0] == 401
        assert client.statuses[-1] == 429


def test_an_error_that_nobody_expects_of_a_connection_ends_its_request_and_is_told() -> None:
    with World(faults_expected=True) as world:
        world.engine.refusal = RuntimeError("a fault of the loop's")
        client = world.client()
        client.asks()
        world.passes(10)
        assert client.answer().status in (500, 502, 503)
        assert world.active == 0
        assert any("a fault of the loop's" in fault for fault in world.faults)


def test_our_own_routes_say_when_to_come_again() -> None:
    with World(keys=["right"]) as world:
        client = world.client()
        for _ in range(70):
            client.gets("/status", "Authorization: Bearer wrong")
        first, last = client.answers()[0], client.answers()[-1]
        assert (first.status, first.header(b"retry-after")) == (401, None)
        assert (last.status, last.header(b"retry-after")) == (429, b"60")
