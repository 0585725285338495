"""Every shape of job on the real vLLM: what comes out is what vLLM gives over HTTP."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import signal
from types import ModuleType
from typing import Any

import openai
import psutil
import pytest

from supervisor.queue.older_workers import Batches
from supervisor.queue.shapes import Plan, Reader
from tests.harness import Supervisor, events, session_pids, wait_until
from tests.queue.conftest import RunPod
from tests.queue.test_tokens import cut
from tests.vllm.test_serving import CHAT, WEATHER, timeless

pytestmark = pytest.mark.vllm

COMPLETIONS = "/v1/completions"
QUESTION: list[Any] = [{"role": "user", "content": "What are you?"}]
FORECAST = [{"role": "user", "content": "What is the weather in Paris?"}]
COLD = {"temperature": 0, "max_tokens": 20}
TOLD = {"model": "demo", **COLD}
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}


def greedy(**more: object) -> dict[str, object]:
    """A body for `/v1/chat/completions` with everything that is filled in elsewhere."""
    return {"messages": QUESTION, **TOLD, **more}


def idless(stream: bytes) -> bytes:
    """Without ids and times; the events of a response name the item that they belong to."""
    return re.sub(rb'"item_id":"[^"]*"', b'"item_id":""', timeless(stream))


def comparable(content: object) -> object:
    """Without ids and times."""
    return json.loads(timeless(json.dumps(content).encode()))


def over_http(served: Supervisor, path: str, body: object) -> Any:
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def only(output: Any) -> Any:
    """The one element of what a job of a shape that may stream gives."""
    assert isinstance(output, list)
    assert len(output) == 1
    return output[0]


def text_of(answer: Any) -> str:
    (choice,) = answer["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert isinstance(text, str)
    return text


def still_works(runpod: RunPod) -> None:
    assert text_of(only(runpod.done({"messages": QUESTION, "temperature": 0, "max_tokens": 3}))) == "I am the"


# The shapes that pass a request on: the answer is that of HTTP


@pytest.mark.parametrize(
    ("content", "path", "body"),
    [
        ({"openai_route": CHAT, "openai_input": greedy()}, CHAT, greedy()),
        ({"openai_input": {"messages": QUESTION, **COLD}}, CHAT, greedy()),
        ({"openai_route": CHAT, "openai_input": json.dumps(greedy())}, CHAT, greedy()),
        (
            {"openai_route": COMPLETIONS, "openai_input": {"prompt": "The supervisor is", **TOLD}},
            COMPLETIONS,
            {"prompt": "The supervisor is", **TOLD},
        ),
        (
            {"openai_route": "/openai/v1/responses", "openai_input": {"input": "What are you?", "temperature": 0}},
            "/v1/responses",
            {"model": "demo", "input": "What are you?", "temperature": 0},
        ),
        ({"openai_route": "/v1/messages", "openai_input": greedy()}, "/v1/messages", greedy()),
        (
            {"openai_route": "/tokenize", "openai_input": {"prompt": "naïve 日本 🙂"}},
            "/tokenize",
            {"model": "demo", "prompt": "naïve 日本 🙂"},
        ),
        ({"route": CHAT, "body": {"messages": QUESTION, **COLD}}, CHAT, greedy()),
        ({"route": "v1/messages", "method": "POST", "body": greedy()}, "/v1/messages", greedy()),
        ({"route": "/tokenize", "body": '{"prompt": "a"}'}, "/tokenize", {"model": "demo", "prompt": "a"}),
        (
            {
                "route": "/tokenize",
                "body": {
                    "content_type": "application/json",
                    "base64": base64.b64encode(b'{"model": "demo", "prompt": "a"}').decode(),
                },
            },
            "/tokenize",
            {"model": "demo", "prompt": "a"},
        ),
        ({"messages": QUESTION, "sampling_params": COLD}, CHAT, greedy()),
        ({"messages": QUESTION, "sampling_params": COLD, "max_tokens": 3, "stream": False}, CHAT, greedy()),
        (
            {"messages": FORECAST, "temperature": 0, "tools": [WEATHER], "max_tokens": 60},
            CHAT,
            greedy(messages=FORECAST, tools=[WEATHER], max_tokens=60),
        ),
        ({"prompt": "What are you?", "apply_chat_template": True, "sampling_params": COLD}, CHAT, greedy()),
        ({"prompt": "Once upon", "sampling_params": COLD}, COMPLETIONS, {"prompt": "Once upon", **TOLD}),
        ({"prompt": ["Once", "upon"], **COLD}, COMPLETIONS, {"prompt": ["Once", "upon"], **TOLD}),
        ({"prompt": "Once upon", "max_batch_size": 5, **COLD}, COMPLETIONS, {"prompt": "Once upon", **TOLD}),
    ],
    ids=[
        "chat",
        "chat-by-default",
        "chat-as-text",
        "completions",
        "responses",
        "anthropic",
        "tokenize",
        "route",
        "route-and-method",
        "route-with-text",
        "route-with-bytes",
        "messages",
        "messages-and-fields",
        "messages-with-tools",
        "prompt-with-template",
        "prompt",
        "prompts",
        "prompt-for-an-old-worker",
    ],
)
def test_a_job_gives_what_http_gives(
    served: Supervisor, runpod: RunPod, content: object, path: str, body: object
) -> None:
    given = only(runpod.done(content))
    assert comparable(given) == comparable(over_http(served, path, body))


@pytest.mark.parametrize(
    "content",
    [
        {"openai_route": "/v1/models"},
        {"openai_route": "/openai/v1/models", "openai_input": {}},
        {"route": "/v1/models"},
        {"route": "v1/models", "method": "get", "query": {"any": "thing"}},
    ],
    ids=["openai", "openai-empty", "route", "route-and-query"],
)
def test_models(runpod: RunPod, content: object) -> None:
    assert [model["id"] for model in only(runpod.done(content))["data"]] == ["demo"]


def test_text_is_text(runpod: RunPod) -> None:
    assert "<html" in only(runpod.done({"route": "/docs"}))


def test_a_query_arrives(runpod: RunPod) -> None:
    error = runpod.failed({"route": "/v1/responses/resp_none", "query": {"starting_after": "no number"}})
    assert error["status"] == 400
    assert "no number" in error["message"]


@pytest.mark.parametrize("name", ["X-Request-Id", "x-request-id"])
def test_headers_arrive(runpod: RunPod, name: str) -> None:
    answer = only(runpod.done({"route": CHAT, "body": greedy(max_tokens=1), "headers": {name: "mine"}}))
    assert answer["id"] == "chatcmpl-mine"


def test_a_request_has_its_jobs_id(runpod: RunPod) -> None:
    job_id = runpod.run({"messages": QUESTION, "max_tokens": 1})
    assert only(runpod.result(job_id)["output"])["id"] == f"chatcmpl-{job_id}"


def test_a_prompt_without_a_limit_goes_on_after_vllms_16_tokens(served: Supervisor, runpod: RunPod) -> None:
    answer = only(runpod.done({"prompt": "Once upon", "temperature": 0}))
    assert answer["usage"]["completion_tokens"] > 16
    body = {"model": "demo", "prompt": "Once upon", "temperature": 0, "max_tokens": 512}
    assert comparable(answer) == comparable(over_http(served, COMPLETIONS, body))


def test_the_limit_that_is_filled_in_leaves_room_for_a_long_prompt(runpod: RunPod) -> None:
    answer = only(runpod.done({"prompt": [7] * 2040}))
    assert answer["usage"]["total_tokens"] <= 2048


# Streams


@pytest.mark.parametrize(
    ("content", "path", "body"),
    [
        ({"openai_route": CHAT, "openai_input": greedy(stream=True)}, CHAT, greedy(stream=True)),
        (
            {"messages": QUESTION, "sampling_params": COLD, "stream": True, "stream_options": {"include_usage": True}},
            CHAT,
            greedy(stream=True, stream_options={"include_usage": True}),
        ),
        ({"messages": QUESTION, "sampling_params": {**COLD, "stream": True}}, CHAT, greedy(stream=True)),
        (
            {"messages": [{"role": "user", "content": "Say hello in Japanese"}], **COLD, "stream": True},
            CHAT,
            greedy(messages=[{"role": "user", "content": "Say hello in Japanese"}], stream=True),
        ),
        (
            {"messages": FORECAST, "stream": True, "tools": [WEATHER], "temperature": 0, "max_tokens": 60},
            CHAT,
            greedy(messages=FORECAST, stream=True, tools=[WEATHER], max_tokens=60),
        ),
        (
            {"prompt": "Once upon", **COLD, "stream": True},
            COMPLETIONS,
            {"prompt": "Once upon", **TOLD, "stream": True},
        ),
        ({"route": "/v1/messages", "body": greedy(stream=True)}, "/v1/messages", greedy(stream=True)),
        (
            {
                "openai_route": "/v1/responses",
                "openai_input": {"input": "What are you?", **{"temperature": 0}, "stream": True},
            },
            "/v1/responses",
            {"model": "demo", "input": "What are you?", "temperature": 0, "stream": True},
        ),
    ],
    ids=["openai", "usage", "sampling-params", "japanese", "tools", "prompt", "anthropic", "responses"],
)
def test_a_stream_is_that_of_http(served: Supervisor, runpod: RunPod, content: object, path: str, body: object) -> None:
    for _ in range(6):
        expected = served.client.post(path, json=body)
        assert expected.status_code == 200, expected.text
        job_id = runpod.run(content)
        chunks = runpod.result(job_id)["output"]
        stream = "".join(chunks).encode()
        # vLLM joins tokens into one event when it is behind, so that two streams may be cut into events differently.
        if idless(stream) == idless(expected.content):
            break
    else:
        assert idless(stream) == idless(expected.content)
    assert len(list(events(stream))) > 3
    assert all(chunk.endswith("\n\n") for chunk in chunks)
    assert chunks[0].count("\n\n") == 1
    posted = runpod.job(job_id)["chunks"]
    assert [chunk["output"] for chunk in posted] == chunks


def test_without_streaming_there_is_one_chunk(runpod: RunPod) -> None:
    job_id = runpod.run({"messages": QUESTION, **COLD})
    output = runpod.result(job_id)["output"]
    assert [chunk["output"] for chunk in runpod.job(job_id)["chunks"]] == output


# runpod-LLM


def choice_of(result: Any, mode: str) -> Any:
    assert result.keys() == {"id", "model", "mode", "choices", "usage"}
    assert (result["model"], result["mode"]) == ("demo", mode)
    usage = result["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 1
    (choice,) = result["choices"]
    assert choice["index"] == 0
    return choice


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"best_of": 1}], ids=["", "stream", "best-of"])
def test_mode_chat(runpod: RunPod, more: dict[str, object]) -> None:
    choice = choice_of(runpod.done({"mode": "chat", "messages": QUESTION, "temperature": 0, **more}), "chat")
    assert choice["finish_reason"] == "stop"
    assert choice["message"].keys() == {"role", "content"}
    assert "demo model" in choice["message"]["content"]


def test_mode_complete(served: Supervisor, runpod: RunPod) -> None:
    result = runpod.done({"mode": "complete", "prompt": "Once upon", **COLD})
    expected = over_http(served, COMPLETIONS, {"prompt": "Once upon", **TOLD, "top_p": 1.0})
    assert choice_of(result, "complete") == {
        "index": 0,
        "finish_reason": expected["choices"][0]["finish_reason"],
        "text": text_of(expected),
    }


@pytest.mark.parametrize(
    "more",
    [
        {"mode": "json", "messages": FORECAST, "json_schema": PLACE},
        {"messages": FORECAST, "schema": json.dumps(PLACE)},
        {"messages": FORECAST, "json_schema": {"name": "place", "schema": PLACE, "strict": True}},
    ],
    ids=["json-schema", "text", "openais"],
)
def test_mode_json_holds_a_schema(runpod: RunPod, more: dict[str, object]) -> None:
    choice = choice_of(runpod.done({"temperature": 0, "max_tokens": 60, **more}), "json")
    assert choice["json"].keys() == {"city", "sunny"}
    assert choice["json"]["city"] in ("Paris", "Rome")
    assert choice["json"]["sunny"] in (True, False)
    assert json.loads(choice["message"]["content"]) == choice["json"]


def test_mode_json_with_a_prompt(runpod: RunPod) -> None:
    asked = {"mode": "json", "prompt": "The weather is", "schema": {"enum": ["sunny", "rainy"]}, **COLD}
    choice = choice_of(runpod.done(asked), "json")
    assert choice["json"] in ("sunny", "rainy")
    assert json.loads(choice["text"]) == choice["json"]


@pytest.mark.parametrize("name", ["regex", "guided_regex"])
def test_mode_json_holds_a_regex(runpod: RunPod, name: str) -> None:
    choice = choice_of(runpod.done({"mode": "json", "messages": QUESTION, name: "[1-9][0-9]{3}"}), "json")
    assert re.fullmatch("[1-9][0-9]{3}", choice["message"]["content"])
    assert choice["json"] == int(choice["message"]["content"])


def test_json_that_is_cut_off_is_told(runpod: RunPod) -> None:
    asked = {"mode": "json", "messages": FORECAST, "schema": PLACE, "temperature": 0, "max_tokens": 2}
    choice = choice_of(runpod.done(asked), "json")
    assert choice["finish_reason"] == "length"
    assert choice["json_parse_error"]
    assert "json" not in choice


@pytest.mark.parametrize(
    "tool_choice",
    ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["auto", "required", "named"],
)
def test_tools(runpod: RunPod, tool_choice: object) -> None:
    asked = {"mode": "chat", "messages": FORECAST, "tools": [WEATHER], "tool_choice": tool_choice, "temperature": 0}
    choice = choice_of(runpod.done(asked), "chat")
    (call,) = choice["message"]["tool_calls"]
    assert call["id"]
    assert (call["type"], call["function"]["name"]) == ("function", "get_weather")
    assert json.loads(call["function"]["arguments"]) == {"location": "Paris"}
    assert choice["message"]["content"] is None


def test_tool_choice_none(runpod: RunPod) -> None:
    asked = {"mode": "chat", "messages": FORECAST, "tools": [WEATHER], "tool_choice": "none", "temperature": 0}
    assert "tool_calls" not in choice_of(runpod.done(asked), "chat")["message"]


def test_several_choices(runpod: RunPod) -> None:
    result = runpod.done({"mode": "chat", "messages": QUESTION, "n": 2, "max_tokens": 5})
    assert [choice["index"] for choice in result["choices"]] == [0, 1]


# A batch


def test_a_batch_of_mixed_requests_with_some_that_fail(runpod: RunPod) -> None:
    result = runpod.done(
        {
            "requests": [
                {"messages": QUESTION, "temperature": 0},
                {"mode": "complete", "prompt": "Once upon", "temperature": 0, "max_tokens": 20},
                {"prompt": "The weather is", "json_schema": {"enum": ["sunny", "rainy"]}, "temperature": 0},
                {"mode": "poem", "prompt": "a"},
                {"messages": QUESTION, "model": "nobody"},
                {"messages": QUESTION, "sampling_params": {**COLD, "stream": True}, "stream": True},
                {"openai_input": greedy(stream=True, stream_options={"include_usage": True})},
                {"route": "/tokenize", "body": {"prompt": "a"}},
                {"openai_route": "/v1/models"},
                "text",
            ]
        }
    )
    assert (result["model"], result["count"]) == ("demo", 10)
    chat, completion, constrained, no_mode, no_model, short, passed_on, tokens, models, no_object = result["results"]
    assert "demo model" in choice_of(chat, "chat")["message"]["content"]
    assert choice_of(completion, "complete")["text"]
    assert choice_of(constrained, "json")["json"] in ("sunny", "rainy")
    assert no_mode["error"] == "mode 'poem' is not one of: chat, complete, completion, json."
    assert no_model["error"].startswith("The model `nobody` does not exist.")
    assert short["object"] == passed_on["object"] == "chat.completion"
    assert text_of(short) == text_of(passed_on)
    assert tokens["count"] >= 1
    assert models["data"][0]["id"] == "demo"
    assert no_object["error"].startswith("The input must be an object")


def test_a_large_batch_comes_in_its_order(runpod: RunPod) -> None:
    names = [f"number {number}" for number in range(150)]
    result = runpod.done({"requests": [{"route": "/tokenize", "body": {"prompt": name}} for name in names]})
    tokens = [each["tokens"] for each in result["results"]]
    detokenized = runpod.done({"requests": [{"route": "/detokenize", "body": {"tokens": each}} for each in tokens]})
    assert [each["prompt"].removeprefix("<s>") for each in detokenized["results"]] == names


# Errors

LONG = "demo " * 1_000_000


@pytest.mark.parametrize(
    ("content", "path", "body", "status"),
    [
        ({"messages": QUESTION, "model": "nobody"}, CHAT, greedy(model="nobody"), 404),
        ({"mode": "chat", "messages": QUESTION, "model": "nobody"}, CHAT, greedy(model="nobody"), 404),
        ({"openai_input": greedy(model="nobody", stream=True)}, CHAT, greedy(model="nobody"), 404),
        (
            {"route": "/v1/messages", "body": greedy(model="nobody")},
            "/v1/messages",
            greedy(model="nobody"),
            404,
        ),
        (
            {"messages": QUESTION, "max_tokens": -1},
            CHAT,
            {"model": "demo", "messages": QUESTION, "max_tokens": -1},
            400,
        ),
        ({"messages": "text"}, CHAT, {"model": "demo", "messages": "text"}, 400),
        ({"prompt": LONG, "max_tokens": 5}, COMPLETIONS, {"model": "demo", "prompt": LONG, "max_tokens": 5}, 400),
        (
            {"openai_route": "/v1/embeddings", "openai_input": {"input": "a"}},
            "/v1/embeddings",
            {"model": "demo", "input": "a"},
            404,
        ),
        ({"openai_route": "/v1/nowhere", "openai_input": {"input": "a"}}, "/v1/nowhere", {"input": "a"}, 404),
    ],
    ids=[
        "wrong-model",
        "wrong-model-llm",
        "wrong-model-stream",
        "wrong-model-anthropic",
        "negative-max-tokens",
        "messages-are-text",
        "5-mb",
        "embeddings",
        "no-such-route",
    ],
)
def test_errors_are_vllms(
    served: Supervisor, runpod: RunPod, content: object, path: str, body: object, status: int
) -> None:
    answer = served.client.post(path, json=body)
    assert answer.status_code == status
    error = runpod.failed(content)
    assert error.keys() == {"message", "type", "param", "code", "status"}
    assert error["status"] == status
    expected = answer.json()
    if "error" in expected:
        for name in error.keys() & expected["error"].keys():
            assert error[name] == expected["error"][name]
    else:
        assert expected == {"detail": "Not Found"}
        assert error["message"] == f"The model has no route {path}: it is for another task, or there is none."
    still_works(runpod)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"question": "What are you?"}, "The input must be an object with one of: openai_route, route,"),
        ({}, "The input must be an object with one of: openai_route, route,"),
        ({"mode": "json", "prompt": "a", "schema": "{no"}, "schema is text that is no JSON"),
        ({"openai_input": "[" * 100_000}, "The input is nested too deeply."),
    ],
    ids=["unknown", "empty", "schema", "deep"],
)
def test_what_is_no_request_is_told(runpod: RunPod, content: object, message: str) -> None:
    error = runpod.failed(content)
    assert error["status"] == 400
    assert error["message"].startswith(message)
    still_works(runpod)


def test_a_method_that_vllm_does_not_take(runpod: RunPod) -> None:
    error = runpod.failed({"route": CHAT, "method": "DELETE"})
    assert error["status"] == 405


def test_a_transcription_without_a_model_for_it(served: Supervisor, runpod: RunPod) -> None:
    silence = b"RIFF" + bytes(40)
    path = "/v1/audio/transcriptions"
    expected = served.client.post(path, files={"file": ("a.wav", silence, "audio/wav")}, data={"model": "demo"})
    error = runpod.failed(
        {
            "route": path,
            "files": {"file": {"base64": base64.b64encode(silence).decode(), "filename": "a.wav"}},
            "body": {"language": "en"},
        }
    )
    assert error["status"] == expected.status_code == 404
    assert error["message"].startswith(f"The model has no route {path}")


def test_half_a_surrogate_pair_is_answered(runpod: RunPod) -> None:
    # httpx would not send it.
    content = json.dumps({"input": {"messages": [{"role": "user", "content": "What are you? \ud83d"}], **COLD}})
    answer = runpod.http.post(f"{runpod.url}/run", content=content.encode())
    assert answer.status_code == 200, answer.text
    status = runpod.result(answer.json()["id"])
    assert status["status"] == "COMPLETED", status
    assert text_of(only(status["output"]))
    still_works(runpod)


# As clients know it


@pytest.fixture
def client(runpod: RunPod) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{runpod.url}/openai/v1", api_key="any", max_retries=0)


def test_openai_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "demo model" in (answer.choices[0].message.content or "")
    assert [model.id for model in client.models.list()] == ["demo"]


def test_openai_client_streams(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(parts) > 5
    assert "".join(parts) == whole.choices[0].message.content


def test_openai_client_asks_for_a_response(client: openai.OpenAI) -> None:
    assert "demo model" in client.responses.create(model="demo", input="What are you?", temperature=0).output_text


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_openai_client_sees_the_error(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError, match="`nobody` does not exist"):
        client.chat.completions.create(model="nobody", messages=QUESTION, stream=stream)


@pytest.fixture(scope="module")
def sdk() -> ModuleType:
    """RunPod's own client; its import takes two seconds."""
    return importlib.import_module("runpod")


@pytest.fixture
def endpoint(sdk: ModuleType, runpod: RunPod, monkeypatch: pytest.MonkeyPatch) -> Any:
    base, _, endpoint_id = runpod.url.rpartition("/")
    monkeypatch.setattr(sdk, "endpoint_url_base", base)
    return sdk.Endpoint(endpoint_id, api_key="any")


def test_runpods_client_waits_for_a_result(endpoint: Any) -> None:
    assert "demo model" in text_of(only(endpoint.run_sync({"messages": QUESTION, **COLD})))
    assert choice_of(endpoint.run_sync({"input": {"mode": "chat", "messages": QUESTION, **COLD}}), "chat")


def test_runpods_client_reads_a_stream(endpoint: Any) -> None:
    job = endpoint.run({"input": {"messages": QUESTION, **COLD, "stream": True}})
    stream = "".join(job.stream())
    assert stream.endswith("data: [DONE]\n\n")
    deltas = [event["choices"][0]["delta"] for event in events(stream.encode())]  # type: ignore[index]
    assert "demo model" in "".join(delta.get("content") or "" for delta in deltas)
    assert (job.status(), "".join(job.output())) == ("COMPLETED", stream)


def test_runpods_client_sees_that_a_job_failed(endpoint: Any) -> None:
    job = endpoint.run({"input": {"messages": QUESTION, "model": "nobody"}})
    assert list(job.stream()) == []
    assert job.status() == "FAILED"
    assert endpoint.health()["workers"]["ready"] == 1


def test_a_limit_beyond_the_models_length_is_as_much_as_there_is_room_for(runpod: RunPod) -> None:
    """vLLM itself refuses it."""
    answer = only(runpod.done({"messages": QUESTION, "max_tokens": 1_000_000_000, "temperature": 0}))
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    error = runpod.failed({"openai_input": {"messages": QUESTION, "max_tokens": 1_000_000_000}})
    assert error["status"] == 400


def test_a_constraint_of_old_holds(runpod: RunPod) -> None:
    """It was passed over without a word."""
    for content in (
        {"messages": QUESTION, "guided_choice": ["sunny", "rainy"], "temperature": 0},
        {"prompt": "Once", "sampling_params": {"guided_choice": ["sunny", "rainy"], "temperature": 0}},
        {"openai_input": {"messages": QUESTION, "guided_choice": ["sunny", "rainy"], "temperature": 0}},
    ):
        assert text_of(only(runpod.done(content))) in ("sunny", "rainy")


@pytest.mark.breaks_vllm
@pytest.mark.parametrize("content", [{"prompt": "Once upon"}, {"messages": QUESTION}], ids=["prompt", "chat"])
def test_worker_vllms_output_of_old(served: Supervisor, content: dict[str, object]) -> None:
    """As the worker makes it of vLLM's answers; tests/queue/test_tokens.py has the way through RunPod."""
    reader = Reader("demo", token_batches=Batches(8, 1, 2))

    def asked(**more: object) -> tuple[Plan, Any]:
        job = reader.read({**content, "sampling_params": COLD, **more})
        assert job.request is not None
        answer = served.client.post(job.request.path, content=job.request.body, headers=dict(job.request.headers))
        assert answer.status_code == 200, answer.text
        return job, answer

    job, answer = asked()
    assert job.reshape is not None
    (choice,), usage = job.reshape(answer.json()).values()
    assert usage == {"input": answer.json()["usage"]["prompt_tokens"], "output": 20}
    job, answer = asked(stream=True)
    assert job.token_batches is not None
    batches = cut(job.token_batches, answer.text)
    assert ["".join(piece for batch in batches for piece in batch["choices"][0]["tokens"])] == choice["tokens"]
    assert [len(batch["choices"][0]["tokens"]) for batch in batches][:4] == [1, 2, 4, 8]
    assert batches[-1]["usage"] == usage


def test_a_stream_of_an_engine_that_is_killed_is_failed(served: Supervisor, runpod: RunPod) -> None:
    """Or it was whole before. On a busy machine vLLM's API server comes to its first event when the engine has made all
    of the answer, which is then in that event: such a job is COMPLETED, and rightly; another one is tried."""
    statuses: list[str] = []
    while "FAILED" not in statuses:
        assert len(statuses) < 5
        runpod.done(
            {"messages": QUESTION, "max_tokens": 3}, 400
        )  # by an engine that is there: others may have broken it
        session = served.client.get("/status").json()["pid"]
        (core,) = [pid for pid in session_pids(session) if psutil.Process(pid).name().startswith("VLLM::Engine")]
        job = runpod.run({"prompt": "Once upon", "max_tokens": 2000, "ignore_eos": True, "stream": True})
        wait_until(lambda job=job: runpod.job(job)["chunks"], "the stream", 60)  # type: ignore[misc]
        os.kill(core, signal.SIGKILL)
        status = runpod.result(job, 60)
        statuses.append(status["status"])
        text = "".join(chunk["output"] for chunk in runpod.job(job)["chunks"])
        is_whole = '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")
        assert (status["status"], is_whole) in (("FAILED", False), ("COMPLETED", True)), text[-500:]
    assert json.loads(status["error"])["status"] in (500, 503)
    assert '"error"' in runpod.job(job)["chunks"][-1]["output"]
    runpod.done({"messages": QUESTION, "max_tokens": 3}, 400)  # by the next engine
