"""The cache of deterministic answers before the real vLLM, asked by its clients."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.harness import Supervisor
from tests.vllm.conftest import link_to

pytestmark = pytest.mark.vllm
RESULT = "x-supervisor-cache"
ASKED: list[Any] = [{"role": "user", "content": "Tell me of the sea."}]


@pytest.fixture(scope="module")
def caching(served: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """A second supervisor, for the same engine."""
    vllm = link_to(served, tmp_path_factory.mktemp("vllm"))
    environ = {"SUPERVISOR_RESPONSE_CACHE": "10MB", "MODEL": "demo"}
    with Supervisor(vllm=vllm, environ=environ) as supervisor:
        yield supervisor.ready()


def test_openais_client_gets_the_same_answer_whole_and_streamed(caching: Supervisor) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{caching.port}/v1", api_key="none")
    create = client.chat.completions.with_raw_response.create
    raws = [create(model="demo", messages=ASKED, temperature=0, max_tokens=20) for _ in range(3)]
    assert [raw.headers[RESULT] for raw in raws] == ["miss", "hit", "hit"]
    assert len({raw.parse().choices[0].message.content for raw in raws}) == 1
    texts = []
    for _ in range(2):
        stream = client.chat.completions.create(model="demo", messages=ASKED, temperature=0, max_tokens=20, stream=True)
        texts.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    assert texts == [raws[0].parse().choices[0].message.content] * 2


def test_anthropics_client(caching: Supervisor) -> None:
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{caching.port}", api_key="none")
    create = client.messages.with_raw_response.create
    more = {"temperature": 0}
    raws = [create(model="demo", messages=ASKED, max_tokens=20, extra_body=more) for _ in range(2)]
    assert [raw.headers[RESULT] for raw in raws] == ["miss", "hit"]
    assert raws[0].parse().content == raws[1].parse().content


def test_those_who_ask_at_once_share_one_generation(caching: Supervisor, served: Supervisor) -> None:
    def generated() -> float:
        lines = served.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total{"))

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{caching.port}/v1", api_key="none")
    before = generated()

    def one(_: int) -> str:
        stream = client.completions.create(
            model="demo", prompt="The sea is", seed=7, temperature=0.8, max_tokens=200, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return "".join(chunk.choices[0].text for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(8)))
    assert len(set(texts)) == 1
    assert generated() == before + 200


def test_what_is_sampled_differs(caching: Supervisor) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{caching.port}/v1", api_key="none")
    create = client.completions.with_raw_response.create
    raws = [create(model="demo", prompt="The sea is", temperature=1.5, max_tokens=60) for _ in range(3)]
    assert all(RESULT not in raw.headers for raw in raws)
    assert len({raw.parse().choices[0].text for raw in raws}) > 1
