"""One request and its answer, with whatever may come between."""

from __future__ import annotations

from tests.gateway.world import World


def test_a_request_and_its_answer_pass() -> None:
    with World() as world:
        client = world.client()
        client.asks(body=b'{"prompt": "x"}')
        request = world.engine.request()
        assert (request.method, request.target, request.body) == (b"POST", b"/v1/chat/completions", b'{"prompt": "x"}')
        request.answers(200, b'{"text": "y"}')
        assert client.answer().body == b'{"text": "y"}'
        assert [ended.status for ended in world.ended] == [200]
        assert (world.active, world.in_flight) == (0, 0)
