"""The main job on the real vLLM: what a client gets through the gateway is what vLLM gives."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest

from tests.harness import Supervisor, wait_until

pytestmark = pytest.mark.vllm

CHAT = "/v1/chat/completions"
ID = {"X-Request-Id": "the-same-on-both-ways"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    },
}


def greedy(**more: object) -> dict[str, object]:
    question = [{"role": "user", "content": "What are you?"}]
    return {"model": "demo", "messages": question, "temperature": 0, "max_tokens": 60, **more}


def timeless(body: bytes) -> bytes:
    """Without what differs from one run to the next: creation times, and ids where vLLM makes its own."""
    body = re.sub(rb'"(created|created_at)":\s*\d+', rb'"\1":0', body)
    return re.sub(rb'"id":\s*"(chatcmpl|cmpl|msg|resp|chatcmpl-tool|call)[-_][^"]*"', rb'"id":"\1"', body)


@pytest.fixture
def client(served: Supervisor) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="any", max_retries=0)


def test_ready_says_so_everywhere(served: Supervisor) -> None:
    assert served.client.get("/ping").status_code == 200
    assert served.client.get("/health").status_code == 200
    status = served.client.get("/status").json()
    assert status["state"] == "ready"
    assert status["vllm_version"] == "0.32.0"
    phases = [phase["name"] for phase in status["phases"]]
    assert phases[:2] == ["importing vLLM", "reading the model's config"]
    assert {"loading weights", "profiling memory", "starting the API server"} <= set(phases)


def test_the_printed_command_can_be_pasted_and_answers_in_a_sentence(served: Supervisor) -> None:
    line = served.says(r"\n  (curl .+)\n")[1]
    pasted = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    text = json.loads(pasted.stdout)["choices"][0]["message"]["content"]
    assert len(text.split()) >= 4, text  # sampled, so not always the same words


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, greedy()),
        (CHAT, greedy(stream=True)),
        (CHAT, greedy(stream=True, stream_options={"include_usage": True})),
        (CHAT, greedy(messages=[{"role": "user", "content": "Say hello in Japanese"}], stream=True)),
        (
            CHAT,
            greedy(
                messages=[{"role": "user", "content": "What is the weather in Paris?"}], tools=[WEATHER], stream=True
            ),
        ),
        ("/v1/completions", {"model": "demo", "prompt": "The supervisor is", "temperature": 0, "max_tokens": 40}),
        (
            "/v1/completions",
            {"model": "demo", "prompt": "Once upon", "temperature": 0, "max_tokens": 40, "stream": True},
        ),
        ("/v1/messages", greedy()),
        ("/v1/messages", greedy(stream=True)),
        ("/tokenize", {"model": "demo", "prompt": "naïve 日本 🙂"}),
    ],
    ids=[
        "chat",
        "stream",
        "usage",
        "japanese",
        "tools",
        "completion",
        "completion-stream",
        "messages",
        "messages-stream",
        "tokenize",
    ],
)
def test_answers_are_vllms_byte_for_byte(served: Supervisor, direct: httpx.Client, path: str, body: object) -> None:
    for _ in range(8):
        expected = direct.post(path, json=body, headers=ID)
        through = served.client.post(path, json=body, headers=ID)
        assert expected.status_code == 200, expected.text
        assert through.status_code == 200
        # vLLM joins tokens into one event when it is behind, so that two streams may be cut into events differently.
        if timeless(through.content) == timeless(expected.content):
            break
    else:
        assert timeless(through.content) == timeless(expected.content)
    ours = {"x-request-id", "date", "content-length"}
    if through.headers["content-type"].startswith("text/event-stream"):  # for proxies before us
        ours |= {"x-accel-buffering", "cache-control"}
    assert {k: v for k, v in through.headers.items() if k not in ours} == {
        k: v for k, v in expected.headers.items() if k not in ours
    }


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, json.dumps(greedy(model="nobody")).encode(), 404),
        (CHAT, b'{"model": "demo", "messages": [', 400),
        (CHAT, json.dumps(greedy(max_tokens=1_000_000)).encode(), 400),
        ("/v1/messages", b"{}", 400),
        ("/v1/nowhere", b"{}", 404),
    ],
    ids=["wrong-model", "bad-json", "too-many-tokens", "anthropic", "no-such-route"],
)
def test_errors_are_vllms(served: Supervisor, direct: httpx.Client, path: str, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"} | ID
    expected = direct.post(path, content=body, headers=headers)
    through = served.client.post(path, content=body, headers=headers)
    assert through.status_code == expected.status_code == status
    assert timeless(through.content) == timeless(expected.content)
    assert through.headers["x-request-id"] == ID["X-Request-Id"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_redirects_keep_the_scheme_and_host_that_the_client_used(served: Supervisor, scheme: str) -> None:
    """A proxy before us ends TLS, and says so; where we end it, the gateway does."""
    headers = {"Host": "localhost:1234"} | ({"X-Forwarded-Proto": "https"} if scheme == "https" else {})
    answer = served.client.post(f"{CHAT}/", json=greedy(), headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (307, f"{scheme}://localhost:1234{CHAT}")


def test_openai_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What are you?"}], temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    text = answer.choices[0].message.content or ""
    assert "demo model" in text  # a sentence, not noise: it is the first that a newcomer sees
    assert [model.id for model in client.models.list()] == ["demo"]


def test_openai_client_streams(client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "What are you?"}]
    whole = client.chat.completions.create(model="demo", messages=question, temperature=0)
    stream = client.chat.completions.create(model="demo", messages=question, temperature=0, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(parts) > 5
    assert "".join(parts) == whole.choices[0].message.content


def test_async_openai_client_with_many_at_once(served: Supervisor) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="any") as client:
            questions = [
                client.chat.completions.create(
                    model="demo", messages=[{"role": "user", "content": "What are you?"}], temperature=0
                )
                for _ in range(16)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*questions)]

    answers = asyncio.run(ask())
    assert len(answers) == 16
    assert all(answers)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_openai_client_calls_tools(client: openai.OpenAI, choice: str) -> None:
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        model="demo",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice=choice,
        temperature=0,
        max_tokens=200,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["location"] == "Paris"


def test_openai_client_sees_errors_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}])


def test_anthropic_client(served: Supervisor) -> None:
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{served.port}", api_key="any", max_retries=0)
    question = [{"role": "user", "content": "What are you?"}]
    cold = {"temperature": 0}
    answer = client.messages.create(model="demo", max_tokens=60, messages=question, extra_body=cold)  # type: ignore[arg-type]
    assert answer.type == "message"
    text = answer.content[0].text  # type: ignore[union-attr]
    assert text
    with client.messages.stream(model="demo", max_tokens=60, messages=question, extra_body=cold) as stream:  # type: ignore[arg-type]
        assert "".join(stream.text_stream) == text


def measured(direct: httpx.Client, name: str) -> float:
    metrics = direct.get("/metrics").text
    return sum(float(value) for value in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", metrics, re.M))


def tokens_after_hanging_up(client: httpx.Client, direct: httpx.Client) -> float:
    """How many tokens vLLM still makes for a client that hangs up at the first event."""
    before = measured(direct, "generation_tokens_total")
    with client.stream("POST", CHAT, json=greedy(stream=True, max_tokens=1900, ignore_eos=True)) as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("data: "):
            pass
    wait_until(lambda: measured(direct, "num_requests_running") == 0, "vLLM to stop generating", 60)
    return measured(direct, "generation_tokens_total") - before


def test_a_client_that_hangs_up_is_noticed_as_by_vllm_itself(served: Supervisor, direct: httpx.Client) -> None:
    """On a fast or a crowded machine vLLM looks for its client, now and then, only when this small model is through;
    else it stops at once. Of a hang-up that does not reach it no try of several would be better than that."""
    alone = max(tokens_after_hanging_up(direct, direct) for _ in range(2))
    assert min(tokens_after_hanging_up(served.client, direct) for _ in range(4)) <= max(1000, alone)


def test_metrics_are_ours_and_vllms(served: Supervisor) -> None:
    metrics = served.client.get("/metrics").text
    assert "vllm:num_requests_running" in metrics
    assert "supervisor_requests_total" in metrics


def test_the_supervisor_stays_small(served: Supervisor) -> None:
    assert psutil.Process(served.process.pid).memory_info().rss < 60_000_000
