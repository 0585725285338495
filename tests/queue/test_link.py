"""What becomes of a job at its edges, with RunPod and the gateway scripted. Importing the SDK takes 2 s, once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from supervisor.queue.jobs import JobError, TakenJob
from supervisor.queue.shapes import Reader, Request

pytestmark = pytest.mark.slow  # the import


class Client:
    """The gateway; answers with an error when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked = 0

    @asynccontextmanager
    async def ask(self, request: Request, request_id: str) -> AsyncIterator[None]:
        self.asked += 1
        await self.go.wait()
        raise JobError("no", 500)
        yield

    async def read(self, *_: object) -> None: ...


class Posts:
    """RunPod's side of results."""

    done_url = stream_url = "http://runpod/$ID"
    session = None

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
    return sdk.Link("ready", posts, Client(), Reader("m"), jobs)


def told(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["job"]["id"], line["job"]["outcome"]) for line in said if line["job"]]


def within(sdk: Any, posts: Posts, act: Callable[[Any], Awaitable[None]]) -> None:
    async def run() -> None:
        await act(link_of(sdk, posts))

    asyncio.run(run())
    assert sdk.JobsProgress().get_job_list() is None


def test_one_that_is_cancelled_before_its_first_step_is_told(sdk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It would count as running for ever, and its answer be read to the end."""
    posts = Posts()

    async def act(link: Any) -> None:
        link._start_delivery(TakenJob("a", {"prompt": "x"}))
        task = link.deliveries["a"].task
        task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert link.deliveries == {}
        assert link.gateway.asked == 0

    within(sdk, posts, act)
    assert told(capsys) == [("a", "taken"), ("a", "cancelled")]
    assert posts.got == []


def test_one_whose_time_is_over_before_its_first_step_is_told_so(sdk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It counted as cancelled, and RunPod was told nothing."""
    posts = Posts()

    async def act(link: Any) -> None:
        link._start_delivery(TakenJob("a", {"prompt": "x"}))
        link.order_received("expire")
        await asyncio.wait({link.deliveries["a"].task})
        await asyncio.sleep(0)
        assert link.deliveries == {}

    within(sdk, posts, act)
    assert told(capsys) == [("a", "taken"), ("a", "failed")]
    (result,) = posts.got
    assert json.loads(result["error"])["code"] == "shutting_down"


def test_a_fault_of_ours_is_no_silence(sdk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async def act(link: Any) -> None:
        link._start_delivery(TakenJob("a", {"prompt": "x"}))
        task = link.deliveries["a"].task
        link.gateway.go.set()
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert link.deliveries == {}

    within(sdk, Posts(RuntimeError("a bug")), act)
    assert told(capsys) == [("a", "taken"), ("a", "undelivered")]


class Polls:
    """RunPod's side of a long poll: answers when it is told to, or never."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = list(answers)

    async def get(self, url: str, **_: object) -> Any:
        if not self.answers:
            await asyncio.Event().wait()
        self.status, self.body = self.answers.pop(0)
        return self

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def read(self) -> bytes:
        return self.body


def test_a_poll_is_broken_off_while_nothing_is_on_its_way(sdk: Any) -> None:
    """However often: a second word of the supervisor's found it half broken off, and nothing else of that word done."""

    async def run() -> None:
        poll = sdk.LongPoll("x", Polls(), sdk.read_stops)
        poll.break_off()
        asked = asyncio.create_task(poll.ask("u"))
        await asyncio.sleep(0)
        poll.break_off()
        poll.break_off()
        await asyncio.sleep(0)
        poll.break_off()
        assert await asked == []
        poll.break_off()

    asyncio.run(run())


def test_a_poll_that_is_no_long_one_waits_longer_each_time(
    sdk: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    jobs, none = b'{"jobsToStop": ["a", 5, "b"]}', b'{"jobsToStop": []}'
    answers = [(500, b""), (500, b""), (401, b""), (200, b"{"), (204, b""), (200, jobs), (200, none), (400, b"")]

    async def run() -> list[list[str]]:
        poll = sdk.LongPoll("stops", Polls(*answers), sdk.read_stops)
        return [await poll.ask("u") for _ in answers]

    assert asyncio.run(run()) == [[], [], [], [], [], ["a", "b"], [], []]
    assert pauses == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 0, 0.1])
    said = [json.loads(line)["message"].partition(" enclosed")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "stops: RunPod answers 500", "stops: RunPod answers 401", "stops: Expecting property name",
        "stops: RunPod answers again",
    ]  # fmt: skip


def test_a_runpod_that_can_not_be_connected_to_is_told(sdk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It counts as a timeout, too, but not as a poll that was held: nothing was ever said of it."""

    class Nobody:
        async def get(self, *_: object, **__: object) -> None:
            raise aiohttp.ConnectionTimeoutError("Connection timeout to host http://runpod")

    async def run() -> float:
        poll = sdk.LongPoll("taking jobs", Nobody(), sdk.read_stops)
        assert await poll.ask("u") == []
        return float(poll.pause)

    assert asyncio.run(run()) == 0.1
    (said,) = [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()]
    assert said == "taking jobs: Connection timeout to host http://runpod"


def test_no_poll_is_opened_by_one_who_leaves(sdk: Any) -> None:
    """Its end came while it asked how long the model's answers may be."""

    async def act(link: Any) -> None:
        async def look(*_: object) -> None:
            link.order_received("draining")

        link.gateway.read = look
        link.job_poll.ask = None
        await link._take_jobs()

    within(sdk, Posts(), act)


@pytest.mark.parametrize(
    "body", [b'{"jobsToStop": 1}', b'{"jobsToStop": "abc"}', b'{"jobsToStop": {"a": 1}}', b"[1]", b"", b"7"]
)
def test_what_names_no_jobs_stops_none(body: bytes) -> None:
    from supervisor.queue.sdk import read_stops  # noqa: PLC0415  # 2 s, as above

    assert read_stops(body) == []
