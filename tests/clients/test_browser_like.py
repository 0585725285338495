"""The official client from npm on a page of another origin, over a `fetch` that does what a browser does: a preflight
without a key, then the request, and no look at an answer that does not allow the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.clients.programs import BROWSER, MODEL, PAGE, PROMPT, Clients
from tests.clients.test_clients import held_up, said, waiting
from tests.harness import Supervisor, wait_until

pytestmark = pytest.mark.slow

KEY, ORIGIN, ELSEWHERE = "the-right-key", "http://app.example", "http://elsewhere.example"
ALLOWED = {"ALLOWED_ORIGINS": f'["{ORIGIN}"]', "SUPERVISOR_API_KEYS": KEY}


def with_key(served: Supervisor) -> Supervisor:
    served.client.headers["Authorization"] = f"Bearer {KEY}"
    return served


@pytest.fixture(scope="module")
def open_to_pages() -> Iterator[Supervisor]:
    with Supervisor(MODEL, environ={**ALLOWED, "SUPERVISOR_MAX_BODY": "20000"}) as served:
        yield with_key(served.ready())
        served.engine()


def preflight(served: Supervisor, path: str, origin: str = ORIGIN) -> httpx.Response:
    """Without a key."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.options(f"http://127.0.0.1:{served.port}{path}", headers={"Origin": origin, **asked})


@pytest.mark.parametrize("what", ["whole", "streamed", "responses"])
def test_a_page_of_an_allowed_origin_gets_its_answer(clients: Clients, open_to_pages: Supervisor, what: str) -> None:
    told = clients.ask(BROWSER, open_to_pages, what, key=KEY, origin=ORIGIN)
    assert told.text == said(open_to_pages)
    assert told.log == ["OPTIONS 204", "POST 200"]


def test_it_may_list_the_models(clients: Clients, open_to_pages: Supervisor) -> None:
    told = clients.ask(BROWSER, open_to_pages, "models", key=KEY, origin=ORIGIN)
    assert (told.text, told.log) == (MODEL, ["OPTIONS 204", "GET 200"])


def test_another_origin_is_refused_before_it_asks(clients: Clients, open_to_pages: Supervisor) -> None:
    told = clients.ask(BROWSER, open_to_pages, key=KEY, origin=ELSEWHERE)
    assert told.error is not None
    assert "APIConnectionError" in told.error.names
    assert "the preflight does not allow this origin" in told.error.message
    assert told.log == ["OPTIONS 400"]


def test_another_origin_can_not_read_what_it_gets_without_asking(clients: Clients, open_to_pages: Supervisor) -> None:
    told = clients.ask(PAGE, open_to_pages, "look", base="/ping", key="", origin=ELSEWHERE)
    assert told.error is not None
    assert (told.log, told.pieces) == (["GET 200"], [])


@pytest.mark.parametrize("path", ["/status", "/metrics", "/ping", "/health", "/v1/models"])
def test_a_page_may_look_at_our_own_routes(clients: Clients, open_to_pages: Supervisor, path: str) -> None:
    told = clients.ask(PAGE, open_to_pages, "look", base=path, key=KEY, origin=ORIGIN)
    assert (told.text, told.log) == ("200", ["OPTIONS 204", "GET 200"])


@pytest.mark.parametrize("path", ["/status", "/metrics"])
def test_it_reads_that_these_need_a_key(clients: Clients, open_to_pages: Supervisor, path: str) -> None:
    assert clients.ask(PAGE, open_to_pages, "look", base=path, key="", origin=ORIGIN).text == "401"


# Refusals can be read


@pytest.mark.parametrize(
    ("more", "name", "status", "says"),
    [
        ({"key": "a-stale-one"}, "AuthenticationError", 401, "A valid key is needed"),
        ({"base": "/v1/v1"}, "NotFoundError", 404, "Did you mean /v1/chat/completions?"),
        ({"base": "/sleep"}, "PermissionDeniedError", 403, "admin key"),
        ({"prompt": PROMPT * 1000}, "APIError", 413, "larger than 20000 bytes"),
        ({"headers": {"Content-Encoding": "gzip"}}, "APIError", 415, "Content-Encoding"),
    ],
    ids=["401", "404", "403", "413", "415"],
)
def test_a_page_reads_why_it_is_refused(
    clients: Clients, open_to_pages: Supervisor, more: dict[str, Any], name: str, status: int, says: str
) -> None:
    told = clients.ask(BROWSER, open_to_pages, **{"key": KEY, "origin": ORIGIN, **more})
    assert told.error is not None
    assert told.error.status == status, told.error
    assert name in told.error.names
    assert says in told.error.message


def test_a_page_reads_that_it_is_busy(clients: Clients) -> None:
    limits = {"SUPERVISOR_MAX_CONCURRENCY": "1", "SUPERVISOR_MAX_WAITING": "0"}
    with Supervisor(MODEL, environ=ALLOWED | limits) as served:
        with_key(served.ready())
        with served.connect() as stays:
            stays.send(b"GET /fake/hang HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %b\r\n\r\n" % KEY.encode())
            wait_until(lambda: served.client.get("/status").json()["in_flight"] == 1, "it to run")
            told = clients.ask(BROWSER, served, key=KEY, origin=ORIGIN)
        assert told.error is not None
        assert (told.error.status, told.log) == (429, ["OPTIONS 204", "POST 429"])
        assert "RateLimitError" in told.error.names
        served.engine()


def test_while_it_loads_preflights_are_answered_at_once_and_a_page_reads_why_it_waited_in_vain(
    clients: Clients,
) -> None:
    plan = {"load_seconds": 600}
    with Supervisor(MODEL, plan=plan, environ=ALLOWED | {"SUPERVISOR_HOLD_TIMEOUT": "1"}) as served:
        answer = preflight(served, "/v1/chat/completions")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, ORIGIN)
        told = clients.ask(BROWSER, served, key=KEY, origin=ORIGIN)
        assert told.error is not None
        assert (told.error.status, told.log) == (503, ["OPTIONS 204", "POST 503"])
        assert "InternalServerError" in told.error.names
        for path, status in (("/ping", "204"), ("/health", "503"), ("/status", "200"), ("/metrics", "200")):
            assert clients.ask(PAGE, served, "look", base=path, key=KEY, origin=ORIGIN).text == status
        with_key(served).engine()


def test_a_page_is_held_through_a_start(clients: Clients, open_to_pages: Supervisor) -> None:
    expected = said(open_to_pages)
    with Supervisor(MODEL, plan={"load_seconds": 3}, environ=ALLOWED) as served:
        go_on = held_up(with_key(served))
        asking = clients.begin(BROWSER, served, "streamed", key=KEY, origin=ORIGIN)
        waiting(served, 1)
        go_on()
        assert asking.told().text == expected
        served.engine()


# Preflights


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/status", "/", "/sleep", "/no/such/route"])
def test_a_preflight_needs_no_key_whatever_the_path(open_to_pages: Supervisor, path: str) -> None:
    answer = preflight(open_to_pages, path)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in answer.headers["access-control-allow-methods"].split(", ")
    assert "Origin" in answer.headers["vary"]
    refused = preflight(open_to_pages, path, ELSEWHERE)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


def test_preflights_cost_nothing_of_the_rate() -> None:
    with Supervisor(MODEL, environ={**ALLOWED, "SUPERVISOR_RATE_LIMIT": "2"}) as served:
        with_key(served.ready())
        assert {preflight(served, "/v1/models").status_code for _ in range(10)} == {204}
        assert [served.client.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        served.engine()


def test_options_that_are_no_preflight_need_the_key(open_to_pages: Supervisor) -> None:
    url = f"http://127.0.0.1:{open_to_pages.port}/v1/models"
    assert httpx.options(url).status_code == 401
    assert httpx.options(url, headers={"Origin": ORIGIN}).status_code == 401


def test_without_allowed_origins_no_page_is_let_in(clients: Clients) -> None:
    with Supervisor(MODEL) as served:
        told = clients.ask(BROWSER, served.ready(), origin=ORIGIN)
        assert told.error is not None
        assert told.log == ["OPTIONS 400"]
        body = json.dumps({"messages": []})
        answer = served.client.post("/v1/chat/completions", content=body, headers={"Origin": ORIGIN})
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        served.engine()
