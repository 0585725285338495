"""worker-vllm's own output of old: whole, and streamed in its batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import chain
from typing import Any

import pytest

from supervisor.queue.jobs import JobError
from supervisor.queue.older_workers import OWN_FIELDS, Batches
from supervisor.queue.older_workers import to_tokens as whole
from supervisor.queue.shapes import Reader
from tests.harness import Supervisor
from tests.queue.conftest import RunPod, in_queue_mode, joined

HI = [{"role": "user", "content": "hi"}]
DONE = "data: [DONE]\n\n"


def event(index: int, text: str, count: int = 0) -> str:
    usage = {"prompt_tokens": 5, "completion_tokens": count}
    choices = [{"index": index, "delta": {"content": text}}] if text else []
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


def cut(batches: Batches, *texts: str) -> list[dict[str, Any]]:
    async def stream() -> AsyncIterator[str]:
        for text in texts:
            yield text

    async def collect() -> list[dict[str, Any]]:
        return [batch async for batch in batches.group(stream())]

    return asyncio.run(collect())


def test_a_whole_answer() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    chat = {"choices": [{"message": {"content": "hi"}}, {"message": {"content": None}}], "usage": usage}
    assert whole(chat) == {"choices": [{"tokens": ["hi"]}, {"tokens": [""]}], "usage": {"input": 5, "output": 2}}
    assert whole({"choices": [{"text": "hi"}]}) == {"choices": [{"tokens": ["hi"]}], "usage": {"input": 0, "output": 0}}


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [
        (Batches(), [1, 3, 9, 27, 10]),
        (Batches(4, 1, 2), [1, 2, *[4] * 11, 3]),
        (Batches(8, 1, 1.5), [1, 2, 3, 4, 6, 8, 8, 8, 8, 2]),
        (Batches(50, 50), [50]),
    ],
)
def test_batches_grow(batches: Batches, sizes: list[int]) -> None:
    found = cut(batches, *(event(0, f"t{number} ", number + 1) for number in range(50)), DONE, DONE)
    pieces: list[Any] = [batch["choices"][0]["tokens"] for batch in found]
    assert [len(each) for each in pieces] == sizes
    assert list(chain.from_iterable(pieces)) == [f"t{number} " for number in range(50)]
    assert found[-1]["usage"] == {"input": 5, "output": 50}


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_python_takes_for_a_line_end_is_text(sign: str, end: str) -> None:
    """vLLM writes such signs as they are, where JSON lets it."""
    content = {"choices": [{"index": 0, "delta": {"content": f"a{sign}b"}}]}
    data = json.dumps(content, ensure_ascii=ord(sign) < 32)
    (batch,) = cut(Batches(2, 2), f"data: {data}{end * 2}data: [DONE]{end * 2}")
    assert batch["choices"] == [{"tokens": [f"a{sign}b"]}]


def test_several_answers_are_told_apart() -> None:
    assert cut(Batches(2, 2), event(1, "b") + event(0, "a")) == [
        {"choices": [{"tokens": ["a"]}, {"tokens": ["b"]}], "usage": {"input": 5, "output": 0}}
    ]


def test_the_sizes_of_batches_are_the_workers_own_fields() -> None:
    """vLLM gets none of them."""
    assert OWN_FIELDS.issuperset(Batches._fields)


@pytest.mark.parametrize("wrong", ["x", 0, -1, True, 1e9])
def test_a_size_of_batches_that_is_none(wrong: object) -> None:
    with pytest.raises(JobError, match="max_batch_size must be a number from 1 on"):
        Reader("m", token_batches=Batches()).read({"prompt": "a", "max_batch_size": wrong})


def test_only_the_short_shape_gives_it() -> None:
    reader = Reader("m", token_batches=Batches())
    job = reader.read({"messages": HI, "stream": True, "max_batch_size": 7, "batch_size_growth_factor": 2})
    assert job.token_batches == Batches(7, 1, 2.0)
    assert job.request is not None
    assert json.loads(job.request.body or b"")["stream_options"]["continuous_usage_stats"] is True
    for other in ({"mode": "chat", "messages": HI}, {"openai_input": {"messages": HI}}, {"route": "/v1/models"}):
        assert reader.read(other).token_batches is None


@pytest.fixture
def old() -> Any:
    environ = {"SUPERVISOR_JOB_OUTPUT": "tokens", "MIN_BATCH_SIZE": "2", "DEFAULT_BATCH_SIZE": "6"}
    with RunPod("--hold", "2") as runpod, in_queue_mode(runpod, environ=environ) as supervisor:
        supervisor.ready()
        joined(runpod)
        yield supervisor, runpod


@pytest.mark.slow
def test_from_end_to_end(old: tuple[Supervisor, RunPod]) -> None:
    supervisor, runpod = old
    assert "has no effect" not in supervisor.output
    (one,) = runpod.done({"messages": HI, "max_tokens": 20})
    assert one.keys() == {"choices", "usage"}
    (text,) = one["choices"][0]["tokens"]
    assert one["usage"] == {"input": one["usage"]["input"], "output": 20}
    job = runpod.run({"messages": HI, "max_tokens": 20, "stream": True})
    batches = runpod.result(job)["output"]
    assert [len(batch["choices"][0]["tokens"]) for batch in batches] == [2, 6, 6, 6]
    assert "".join(chain.from_iterable(batch["choices"][0]["tokens"] for batch in batches)) == text
    assert [batch["usage"]["output"] for batch in batches] == [2, 8, 14, 20]
    assert [chunk["output"] for chunk in runpod.job(job)["chunks"]] == batches
    assert runpod.done({"openai_input": {"messages": HI, "max_tokens": 2}})[0]["object"] == "chat.completion"
