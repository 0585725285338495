"""A batch: how many of its requests are under way, and that one job of very many holds up no other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.queue import worker
from supervisor.queue.jobs import JobError, TakenJob
from supervisor.queue.shapes import Reader, Request
from supervisor.queue.worker import BATCH_CONCURRENCY, Answer


class Gateway:
    """Answers each request when `go` is set, and counts those that are under way."""

    def __init__(self) -> None:
        self.under_way = self.most = 0
        self.ids: list[str] = []
        self.go = asyncio.Event()

    @contextlib.asynccontextmanager
    async def ask(self, request: Request, request_id: str) -> AsyncIterator[str]:
        self.ids.append(request_id)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.go.wait()
        yield request_id
        self.under_way -= 1


def answer(content: object, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Answer:
    async def read_body(_: Answer, response: str, __: object) -> object:
        return response

    monkeypatch.setattr(worker.Answer, "_read_body", read_body)
    found: Any = SimpleNamespace(ask=gateway.ask)
    return Answer(TakenJob("j", content), found, Reader("m"))


async def result(one: Answer) -> Any:
    async with contextlib.aclosing(one.pieces()) as pieces:
        (found,) = [piece async for piece in pieces]
    return found


def test_a_hundred_are_under_way_and_the_results_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        gateway = Gateway()
        items = [{"route": "/x"} if number != 7 else {} for number in range(3 * BATCH_CONCURRENCY)]
        asking = asyncio.ensure_future(result(answer({"requests": items}, gateway, monkeypatch)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert gateway.under_way == BATCH_CONCURRENCY
        gateway.go.set()
        found = await asking
        assert gateway.most == BATCH_CONCURRENCY
        assert "error" in found["results"].pop(7)
        assert found["results"] == [f"j-{number}" for number in range(len(items)) if number != 7]

    asyncio.run(run())


def test_very_many_that_can_not_be_read_let_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of 10 MB has three million: they were all begun at once, and nothing else moved for two minutes."""

    async def run() -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.ensure_future(others())
        found = await result(answer({"requests": [{}] * 20_000}, Gateway(), monkeypatch))
        other.cancel()
        assert len(found["results"]) == 20_000
        assert turns > 100

    asyncio.run(run())


def test_a_batch_that_nobody_waits_for_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        gateway = Gateway()
        asking = asyncio.ensure_future(result(answer({"requests": [{"route": "/x"}] * 300}, gateway, monkeypatch)))
        for _ in range(20):
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_what_fails_all_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        gateway = Gateway()

        async def fail(*_: object) -> None:
            raise JobError("The engine stopped.", 503)

        one = answer({"requests": [{"route": "/x"}] * 3}, gateway, monkeypatch)
        monkeypatch.setattr(worker.Answer, "_read_body", fail)
        gateway.go.set()
        with pytest.raises(JobError, match="The engine stopped"):
            await result(one)

    asyncio.run(run())
