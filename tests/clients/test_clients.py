"""Clients as a user has them, over the fake vLLM: they get their answers, and understand what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.clients.programs import (
    AI,
    ANTHROPIC,
    ANTHROPIC_NPM,
    AZURE,
    CLIENTS,
    HOSTED_VLLM,
    LITELLM,
    MODEL,
    PROMPT,
    TOKENS,
    Client,
    Clients,
    Told,
)
from tests.harness import Supervisor, http, wait_until

pytestmark = pytest.mark.slow

KEY = "the-right-key"
EACH = pytest.mark.parametrize("client", CLIENTS, ids=str)
EVERYTHING = [(client, what) for client in CLIENTS for what in client.whats if what != "tokens"]
PASSED_OVER = "litellm's hosted_vllm passes over an event that is an error, vLLM's own too, and ends with `stop`"
STREAMS = [(client, what) for client, what in EVERYTHING if what != "whole"]


@pytest.fixture(scope="module")
def keyed() -> Iterator[Supervisor]:
    with Supervisor(MODEL, environ={"SUPERVISOR_API_KEYS": KEY}) as served:
        served.ready()
        served.client.headers["Authorization"] = f"Bearer {KEY}"
        yield served
        served.engine()


@pytest.fixture(scope="module")
def mortal() -> Iterator[Supervisor]:
    """For tests that kill its engine; every crash counts as the first."""
    environ = {"SUPERVISOR_MAX_RESTARTS": "100", "SUPERVISOR_RESTART_WINDOW": "0.05"}
    with Supervisor(MODEL, environ=environ) as served:
        yield served.ready()


def said(served: Supervisor) -> str:
    """What the fake answers them all, as it comes to who asks by hand."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS}
    text: str = served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return text


def raised(told: Told, client: Client, name: str, status: int) -> str:
    """That it raised its error of that name; `ai` has one for all. Returns its message."""
    assert told.error is not None, told
    assert told.error.status == status
    assert ("APICallError" if client is AI else name) in told.error.names
    return told.error.message


# Answers


@pytest.mark.parametrize(("client", "what"), EVERYTHING, ids=str)
def test_it_gets_the_whole_answer(clients: Clients, keyed: Supervisor, client: Client, what: str) -> None:
    told = clients.ask(client, keyed, what, key=KEY)
    assert told.text == said(keyed)
    assert len(told.pieces) == (1 if what == "whole" else TOKENS)


@pytest.mark.parametrize("client", [ANTHROPIC, ANTHROPIC_NPM], ids=str)
def test_anthropics_count_tokens(clients: Clients, keyed: Supervisor, client: Client) -> None:
    assert clients.ask(client, keyed, "tokens", key=KEY).text == str(len(PROMPT.split()))


# Keys


@EACH
def test_a_wrong_key_is_its_authentication_error(clients: Clients, keyed: Supervisor, client: Client) -> None:
    for what in client.whats:
        told = clients.ask(client, keyed, what, key="a-stale-one")
        assert "A valid key is needed" in raised(told, client, "AuthenticationError", 401)


@pytest.mark.parametrize("client", [ANTHROPIC, ANTHROPIC_NPM], ids=str)
def test_one_valid_credential_of_two_is_enough(clients: Clients, keyed: Supervisor, client: Client) -> None:
    """Claude Code sends both where both are set."""

    def told(key: str, token: str) -> Told:
        return clients.ask(client, keyed, "streamed", token=token, headers={"X-Api-Key": key})

    for key, token in ((KEY, "a-stale-one"), ("a-stale-one", KEY), (KEY, KEY)):
        assert told(key, token).text == said(keyed), (key, token)
    raised(told("a-stale-one", "another"), client, "AuthenticationError", 401)


def test_the_order_of_two_credentials_means_nothing(keyed: Supervisor) -> None:
    valid, stale = ("Authorization", f"Bearer {KEY}"), ("X-Api-Key", "a-stale-one")
    for headers in ([valid, stale], [stale, valid], [("X-Api-Key", KEY), ("Authorization", "Bearer stale")]):
        assert http.get(f"http://127.0.0.1:{keyed.port}/v1/models", headers=headers).status_code == 200


def test_azures_header_for_the_key_is_known(clients: Clients, keyed: Supervisor) -> None:
    assert clients.ask(AZURE, keyed, "responses", key=KEY).text == said(keyed)
    raised(clients.ask(AZURE, keyed, "responses", key="a-stale-one"), AZURE, "AuthenticationError", 401)
    # For chat it puts the deployment into the path, which is none of vLLM's.
    hint = raised(clients.ask(AZURE, keyed, "whole", key=KEY), AZURE, "NotFoundError", 404)
    assert "Did you mean /v1/chat/completions?" in hint


# Wrong addresses


@EACH
@pytest.mark.parametrize("mistake", ["/v1 is missing, or too much", "/v1 is there twice", "another prefix"])
def test_a_wrong_base_url_is_its_not_found_error_with_a_hint(
    clients: Clients, keyed: Supervisor, client: Client, mistake: str
) -> None:
    wrong = {
        "/v1 is missing, or too much": "" if client.base else "/v1",
        "/v1 is there twice": "/v1/v1",
        "another prefix": "/api",
    }
    route = "/v1/chat/completions" if client.base else "/v1/messages"
    told = clients.ask(client, keyed, base=wrong[mistake], key=KEY)
    # By the error's type, which is OpenAI's own for it: invalid_request_error.
    name = "BadRequestError" if client is HOSTED_VLLM else "NotFoundError"
    assert f"Did you mean {route}?" in raised(told, client, name, 404)


# Too much


@pytest.fixture(scope="module")
def busy() -> Iterator[Supervisor]:
    """It has its one request, which stays."""
    limits = {"SUPERVISOR_MAX_CONCURRENCY": "1", "SUPERVISOR_MAX_WAITING": "0"}
    with Supervisor(MODEL, environ=limits) as served:
        served.ready()
        with served.connect() as stays:
            stays.send(b"GET /fake/hang HTTP/1.1\r\nHost: h\r\n\r\n")
            wait_until(lambda: served.client.get("/status").json()["in_flight"] == 1, "it to run")
            yield served


@EACH
def test_a_busy_engine_is_its_rate_limit_error_and_says_when_to_come_again(
    clients: Clients, busy: Supervisor, client: Client
) -> None:
    for what in client.whats:
        told = clients.ask(client, busy, what)
        raised(told, client, "RateLimitError", 429)
        assert told.error is not None
        if client not in (LITELLM, HOSTED_VLLM):  # it shows no headers
            assert told.error.headers["retry-after"] == "5"


# Ends in the midst


@pytest.mark.parametrize("how", ["engine", "api"])
@pytest.mark.parametrize(
    ("client", "what"),
    [
        pytest.param(*one, marks=pytest.mark.xfail(strict=True, reason=PASSED_OVER) if one[0] is HOSTED_VLLM else ())
        for one in STREAMS
    ],
    ids=str,
)
def test_an_engine_that_dies_in_mid_stream_is_an_error_and_no_end(
    clients: Clients, mortal: Supervisor, client: Client, what: str, how: str
) -> None:
    """Of the engine's death vLLM itself may tell, if it is quicker than we are."""
    told = clients.ask(client, mortal, what, fake={"die_after_tokens": 3, "how": how, "token_interval": 0.02})
    assert told.error is not None
    assert re.search("EngineCore encountered an issue|The engine stopped", told.error.message)
    assert 1 <= len(told.pieces) <= 3
    assert said(mortal).startswith("".join(told.pieces))


# While it loads


def held_up(served: Supervisor) -> Callable[[], None]:
    """Its load stands still until what this returns is called."""

    def core() -> int | None:
        pid = served.client.get("/status").json().get("pid")
        family = psutil.Process(pid).children(recursive=True) if pid else []
        return next((one.pid for one in family if one.name().startswith("VLLM::EngineCor")), None)

    found = wait_until(core, "the engine's process")
    assert isinstance(found, int)
    os.kill(found, signal.SIGSTOP)
    assert served.client.get("/status").json()["state"] == "starting"
    return lambda: os.kill(found, signal.SIGCONT)


def waiting(served: Supervisor, count: int) -> None:
    wait_until(lambda: served.client.get("/status").json()["waiting"] == count, f"{count} requests to wait")


def test_a_request_is_held_through_a_start(clients: Clients, keyed: Supervisor) -> None:
    expected = said(keyed)
    with Supervisor(MODEL, plan={"load_seconds": 3}) as served:
        go_on = held_up(served)
        under_way = [(client, what, clients.begin(client, served, what)) for client, what in EVERYTHING]
        waiting(served, len(under_way))
        go_on()
        for client, what, asking in under_way:
            assert asking.told().text == expected, (client, what)
        served.engine()


def test_comments_while_it_loads_are_understood(clients: Clients, keyed: Supervisor) -> None:
    expected = said(keyed)
    # Of the last one the error would be passed over.
    streams = [(client, what) for client, what in STREAMS if client is not HOSTED_VLLM]
    with Supervisor(MODEL, plan={"load_seconds": 3}, environ={"SUPERVISOR_SSE_KEEP_ALIVE": "1"}) as served:
        go_on = held_up(served)
        well = [(client, what, clients.begin(client, served, what)) for client, what in streams]
        # What vLLM answers with a 404 then comes as an event.
        unknown = [(client, what, clients.begin(client, served, what, model="another")) for client, what in streams]
        with served.connect() as by_hand:
            body = json.dumps({"messages": [{"role": "user", "content": PROMPT}], "stream": True}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)
            by_hand.send(head + body)
            waiting(served, len(well) + len(unknown) + 1)
            for _ in range(2):
                by_hand.until(b"3\r\n:\n\n\r\n")
            go_on()
            by_hand.until(b"data: ")
        for client, what, asking in well:
            assert asking.told().text == expected, (client, what)
        for client, what, asking in unknown:
            error = asking.told().error
            assert error is not None, (client, what)
            assert "The model `another` does not exist." in error.message, (client, what)
        served.engine()
