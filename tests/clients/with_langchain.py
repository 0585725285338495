"""LangChain's packages for RunPod, as a program of their own. `url` is RunPod's API, without the endpoint's id.

None of them asks for a stream: langchain-runpod's are the whole answer, handed on character by character.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import requests
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import AIMessage
from langchain_runpod import ChatRunPod, RunPod
from runpod_langchain import RunPodChatModel

from tests.clients.answering import Asked, Client, Pieces, serve

# Where RunPodChatModel asks; it has no setting for it.
FIXED = "https://api.runpod.ai/v2"


def with_chat(asked: Asked) -> Pieces:
    model = ChatRunPod(api_base=asked["url"], poll_interval=0.05, **_options(asked))
    if asked["do"] == "counted":
        answer = model.invoke(asked["prompt"])
        assert isinstance(answer, AIMessage) and answer.usage_metadata is not None
        yield "{input_tokens} + {output_tokens}".format_map(answer.usage_metadata)
    else:
        yield from _texts(model, asked)


def with_llm(asked: Asked) -> Pieces:
    yield from _texts(RunPod(api_base=asked["url"], poll_interval=0.05, **_options(asked)), asked)


def with_another_chat(asked: Asked) -> Pieces:
    with _in_place_of_runpod(asked["url"]):
        yield from _texts(RunPodChatModel(**_options(asked)), asked)


def _options(asked: Asked) -> dict[str, Any]:
    return {"endpoint_id": asked["endpoint"], "api_key": asked["key"], "max_tokens": asked["tokens"]}


def _texts(model: BaseLanguageModel[Any], asked: Asked) -> Pieces:
    """A chat model gives messages, an LLM bare text."""
    answers = [model.invoke(asked["prompt"])] if asked["do"] == "whole" else model.stream(asked["prompt"])
    for answer in answers:
        yield answer if isinstance(answer, str) else answer.content


@contextlib.contextmanager
def _in_place_of_runpod(address: str) -> Iterator[None]:
    """Its address is within a call of requests.post: there is nothing smaller to replace. What goes elsewhere than
    expected is not sent."""
    request = requests.Session.request

    def to_us(session: requests.Session, method: str, url: str, **more: Any) -> requests.Response:
        assert url.startswith(FIXED), url
        return request(session, method, address + url.removeprefix(FIXED), **more)

    with mock.patch.object(requests.Session, "request", to_us):
        yield


CLIENTS: dict[str, Client] = {"chat": with_chat, "llm": with_llm, "another_chat": with_another_chat}


if __name__ == "__main__":
    serve(CLIENTS)
