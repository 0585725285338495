"""What becomes of a job at its edges, with RunPod and the gateway scripted. Importing the SDK takes 2 s, once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.queue.shapes import Reader
from supervisor.queue.taken import Taken

pytestmark = pytest.mark.slow  # the import


class Client:
    """The gateway; answers what it is told to when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.closed = 0

    def ask(self, request: Any, request_id: str) -> Any:
        return self

    async def __aenter__(self) -> Any:
        await self.go.wait()
        return SimpleNamespace(status=500, content=SimpleNamespace(iter_any=self.nothing), content_type="text/plain")

    async def __aexit__(self, *_: object) -> None:
        self.closed += 1

    async def nothing(self) -> Any:
        for part in (b"no",):
            yield part

    async def longest(self) -> int | None:
        return None

    async def start_of_engine(self) -> None:
        return None


class Posts:
    """RunPod's side of results."""

    done = stream = "http://runpod/$ID"
    listens = True

    def __init__(self, error: Exception | None = None) -> None:
        self.got: list[dict[str, Any]] = []
        self.error = error

    async def post(self, template: str, job_id: str, body: bytes, key: str, *, stream: bool) -> None:
        if self.error is not None:
            raise self.error
        self.got.append(json.loads(body))


@pytest.fixture(scope="module")
def sdk() -> Any:
    from supervisor.queue import sdk as found  # noqa: PLC0415  # 2 s, for these alone

    return found


def link_of(sdk: Any, posts: Posts, jobs: int = 3) -> Any:
    link = sdk.Link("ready", Client(), Reader("m"), jobs)
    link.runpod = posts
    return link


def told(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["job"]["id"], line["job"]["outcome"]) for line in said if "job" in line]


def within(sdk: Any, posts: Posts, act: Callable[[Any], Awaitable[None]]) -> None:
    async def run() -> None:
        await act(link_of(sdk, posts))

    asyncio.run(run())
    assert sdk.JobsProgress().get_job_list() is None


def test_one_that_is_cancelled_before_its_first_step_is_told(sdk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It would count as running for ever, and its answer be read to the end."""
    posts = Posts()

    async def act(link: Any) -> None:
        link._begin(Taken("a", {"prompt": "x"}))
        delivery, task = link.running["a"]
        task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert link.running == {}
        with pytest.raises(asyncio.CancelledError):
            await delivery.answer._task

    within(sdk, posts, act)
    assert told(capsys) == [("a", "taken"), ("a", "cancelled")]
    assert posts.got == []


def test_a_fault_of_ours_is_no_silence(sdk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async def act(link: Any) -> None:
        link._begin(Taken("a", {"prompt": "x"}))
        _, task = link.running["a"]
        link.client.go.set()
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert link.running == {}

    within(sdk, Posts(RuntimeError("a bug")), act)
    assert told(capsys) == [("a", "taken"), ("a", "undelivered")]
