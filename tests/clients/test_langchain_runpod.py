"""LangChain's packages for RunPod, at an endpoint of the simulated RunPod: they read worker-vllm's answers of old
(`SUPERVISOR_JOB_OUTPUT=tokens`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.clients.programs import CHAT_RUNPOD, PROMPT, RUNPOD_CHAT_MODEL, RUNPOD_LLM, TOKENS, Client, Clients, Told
from tests.harness import Supervisor
from tests.queue.conftest import RunPod, in_queue_mode, joined

pytestmark = pytest.mark.slow

# What each makes of a user's message.
WRITTEN = {CHAT_RUNPOD: f"User: {PROMPT}", RUNPOD_LLM: PROMPT, RUNPOD_CHAT_MODEL: f"Human: {PROMPT}"}
EACH = pytest.mark.parametrize("client", WRITTEN, ids=str)


class Endpoint(NamedTuple):
    runpod: RunPod
    supervisor: Supervisor

    def ask(self, clients: Clients, client: Client, what: str = "whole", **more: Any) -> Told:
        port, _, path = self.runpod.url.rpartition(":")[2].partition("/")
        return clients.ask(client, int(port), what, endpoint=path.rpartition("/")[2], **more)

    def said(self, client: Client) -> dict[str, Any]:
        """What vLLM answers to the prompt that the client writes."""
        body = {"prompt": WRITTEN[client], "max_tokens": TOKENS}
        answer: dict[str, Any] = self.supervisor.client.post("/v1/completions", json=body).json()
        return answer


@contextlib.contextmanager
def endpoint(**environ: str) -> Iterator[Endpoint]:
    with RunPod("--hold", "2") as runpod, in_queue_mode(runpod, environ=environ) as supervisor:
        supervisor.ready()
        joined(runpod)
        yield Endpoint(runpod, supervisor)


@pytest.fixture(scope="module")
def old() -> Iterator[Endpoint]:
    with endpoint(SUPERVISOR_JOB_OUTPUT="tokens") as found:
        yield found


@pytest.fixture(scope="module")
def new() -> Iterator[Endpoint]:
    with endpoint() as found:
        yield found


@EACH
def test_invoke_gives_the_text(clients: Clients, old: Endpoint, client: Client) -> None:
    assert old.ask(clients, client).pieces == [old.said(client)["choices"][0]["text"]]


@EACH
def test_stream_gives_it_in_pieces(clients: Clients, old: Endpoint, client: Client) -> None:
    told = old.ask(clients, client, "streamed")
    text = old.said(client)["choices"][0]["text"]
    assert told.text == text
    # RunPodChatModel has no stream: LangChain hands on its one answer.
    assert (len(told.pieces) == 1) == (client is RUNPOD_CHAT_MODEL)


def test_the_tokens_are_counted(clients: Clients, old: Endpoint) -> None:
    usage = old.said(CHAT_RUNPOD)["usage"]
    assert usage["completion_tokens"] == TOKENS
    assert old.ask(clients, CHAT_RUNPOD, "counted").text == f"{usage['prompt_tokens']} + {TOKENS}"


@EACH
def test_of_todays_answers_they_make_no_text(clients: Clients, new: Endpoint, client: Client) -> None:
    """But the source text of an object. Where a version of theirs reads them, the setting has had its day."""
    assert f"'text': {new.said(client)['choices'][0]['text']!r}" in new.ask(clients, client).text
