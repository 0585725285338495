"""The clients from Python, as a program of their own."""

from __future__ import annotations

from typing import Any

import litellm
from anthropic import Anthropic
from langchain_openai import ChatOpenAI
from openai import AzureOpenAI, OpenAI

from tests.clients.answering import Asked, Client, Pieces, serve

litellm.suppress_debug_info = True


class ErrorEvent(Exception):
    """What a client hands on as an event of the stream, and does not raise."""


def messages(asked: Asked) -> list[Any]:
    return [{"role": "user", "content": asked["prompt"]}]


def with_openai(asked: Asked) -> Pieces:
    yield from all_that_it_does(OpenAI(base_url=asked["url"], **_options(asked)), asked)


def with_azure(asked: Asked) -> Pieces:
    """Its key is in the header `api-key`."""
    yield from all_that_it_does(AzureOpenAI(base_url=asked["url"], api_version="2024-10-21", **_options(asked)), asked)


def _options(asked: Asked) -> dict[str, Any]:
    return {"api_key": asked["key"], "default_headers": asked["headers"], "max_retries": 0}


def all_that_it_does(client: Any, asked: Asked) -> Pieces:
    body = {"model": asked["model"], "messages": messages(asked), "max_tokens": asked["tokens"]}
    if asked["do"] == "whole":
        yield client.chat.completions.create(**body).choices[0].message.content
    elif asked["do"] == "streamed":
        for chunk in client.chat.completions.create(**body, stream=True):
            yield from (choice.delta.content or "" for choice in chunk.choices)
    else:
        body = {"model": asked["model"], "input": asked["prompt"], "max_output_tokens": asked["tokens"]}
        for event in client.responses.create(**body, stream=True):
            if event.type == "response.output_text.delta":
                yield event.delta
            elif event.type == "error":
                raise ErrorEvent(event.message)


def with_anthropic(asked: Asked) -> Pieces:
    options = _options(asked)
    if asked.get("token"):  # it takes one of the two
        options |= {"api_key": None, "auth_token": asked["token"]}
    client = Anthropic(base_url=asked["url"], **options)
    body = {"model": asked["model"], "messages": messages(asked), "max_tokens": asked["tokens"]}
    if asked["do"] == "whole":
        yield client.messages.create(**body).content[0].text
    elif asked["do"] == "streamed":
        with client.messages.stream(**body) as stream:
            yield from stream.text_stream
    else:
        yield str(client.messages.count_tokens(model=asked["model"], messages=messages(asked)).input_tokens)


def with_langchain(asked: Asked) -> Pieces:
    client = ChatOpenAI(
        base_url=asked["url"],
        model=asked["model"],
        max_tokens=asked["tokens"],
        use_responses_api=asked["do"] == "responses",
        **_options(asked),
    )
    if asked["do"] == "whole":
        yield client.invoke(asked["prompt"]).text
    else:
        for chunk in client.stream(asked["prompt"]):
            yield chunk.text


def with_litellm(asked: Asked) -> Pieces:
    streamed = asked["do"] == "streamed"
    answer = litellm.completion(
        model=f"{'hosted_vllm' if asked['client'] == 'hosted_vllm' else 'openai'}/{asked['model']}",
        messages=messages(asked),
        max_tokens=asked["tokens"],
        api_base=asked["url"],
        api_key=asked["key"],
        extra_headers=asked["headers"],
        max_retries=0,
        stream=streamed,
    )
    if streamed:
        for chunk in answer:
            yield chunk.choices[0].delta.content or ""
    else:
        yield answer.choices[0].message.content


CLIENTS: dict[str, Client] = {
    "openai": with_openai,
    "azure": with_azure,
    "anthropic": with_anthropic,
    "langchain": with_langchain,
    "litellm": with_litellm,
    "hosted_vllm": with_litellm,
}


if __name__ == "__main__":
    serve(CLIENTS)
