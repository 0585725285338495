"""How a job ends, without RunPod, the SDK or a gateway: each cell of the table, and what is posted on the way."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from supervisor.gateway.counts import OUTCOMES
from supervisor.queue import delivery as deliveries
from supervisor.queue.delivery import TABLE, Delivery, Event, PostError, PostRefusal, State
from supervisor.queue.jobs import JobError, TakenJob

REFUSED, DOWN = PostRefusal("RunPod answers 400"), PostError("RunPod answers 502")
BROKEN = JobError("The engine stopped.", 503, "service_unavailable")


class Scripted:
    """An answer whose pieces are known; `error` is there once they are through, as of a stream that breaks off."""

    job = TakenJob("j")
    first_byte_at = 0.0

    def __init__(
        self, *pieces: object, as_list: bool = True, error: JobError | None = None, hangs: bool = False
    ) -> None:
        self.given = pieces
        self.is_list = as_list
        self.error = error
        self.hangs = hangs
        self.closed = False

    async def pieces(self) -> AsyncGenerator[object, None]:
        try:
            for piece in self.given:
                yield piece
            if self.hangs:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


class Listener:
    """RunPod: what it got, and what it says to each POST, in order; then it takes all."""

    done_url, stream_url = "done", "stream://"

    def __init__(self, *says: PostError | None) -> None:
        self.says = list(says)
        self.got: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str] = []

    async def post(self, template: str, job_id: str, body: bytes, key: str, *, stream: bool) -> None:
        assert job_id == "j"
        self.keys.append(key.partition("/")[2])
        if self.says and (error := self.says.pop(0)) is not None:
            raise error
        self.got.append((template.partition(":")[0], json.loads(body)))


async def nothing() -> dict[str, Any] | None:
    return None


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(deliveries, "RETRY_SECONDS", 0.0)


def deliver(
    answer: Callable[[], Scripted],
    runpod: Listener,
    meanwhile: Callable[[Delivery], object] | None = None,
    first: Callable[[], Awaitable[dict[str, Any] | None]] = nothing,
) -> Delivery:
    async def all_of_it() -> Delivery:
        one = Delivery(answer(), runpod, first)  # type: ignore[arg-type]
        if meanwhile is not None:
            await asyncio.sleep(0)
            meanwhile(one)
        await one.task
        return one

    return asyncio.run(all_of_it())


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[str, str]]:
    """Its outcome and its line of log; there must be one."""

    def read() -> tuple[str, str]:
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        (last,) = [line for line in said if line["job"]]
        return last["job"]["outcome"], last["message"]

    return read


Ends = Callable[[], tuple[str, str]]


def test_every_cell_of_the_table() -> None:
    """What is not in it can't be: while an answer comes no result is posted, and an error is the last word."""
    posting = {Event.DONE, Event.REFUSED, Event.UNREACHED, Event.UNWANTED}
    expected = {State.ANSWERING: {*Event}, State.RESULT: posting, State.ERROR: posting}
    for state, event in itertools.product(State, Event):
        assert ((state, event) in TABLE) == (event in expected.get(state, set()))
    for (state, event), following in TABLE.items():
        assert following in expected or following.value in OUTCOMES
        assert (event is Event.UNWANTED) == (following is State.CANCELLED)
        if following is State.COMPLETED:
            assert (state, event) == (State.RESULT, Event.DONE)


def test_a_stream_is_posted_as_it_comes_and_once_more_as_a_whole(ends: Ends) -> None:
    runpod = Listener()
    deliver(lambda: Scripted("a", "b"), runpod)
    assert runpod.got == [("stream", {"output": "a"}), ("stream", {"output": "b"}), ("done", {"output": ["a", "b"]})]
    assert runpod.keys == ["1", "2", ""]
    assert ends()[0] == "completed"


def test_a_stream_that_breaks_off_is_a_failed_job_with_all_that_came(ends: Ends) -> None:
    runpod = Listener()
    deliver(lambda: Scripted("a", 'data: {"error": 1}', error=BROKEN), runpod)
    assert [kind for kind, _ in runpod.got] == ["stream", "stream", "done"]
    assert json.loads(runpod.got[-1][1]["error"])["status"] == 503
    outcome, line = ends()
    assert outcome == "failed"
    assert line.endswith(": 503, The engine stopped.")


def test_a_whole_answer_is_a_chunk_and_a_result(ends: Ends) -> None:
    runpod = Listener()
    deliver(lambda: Scripted({"id": 1}), runpod)
    assert runpod.got == [("stream", {"output": {"id": 1}}), ("done", {"output": [{"id": 1}]})]
    assert ends()[0] == "completed"


def test_where_nobody_reads_streams_the_result_has_it_all(ends: Ends) -> None:
    """The Hub's tests give the variable's name for an address."""
    runpod = Listener()
    runpod.stream_url = "JOB_STREAM_URL"
    deliver(lambda: Scripted("a", "b"), runpod)
    assert runpod.got == [("done", {"output": ["a", "b"]})]
    assert ends()[0] == "completed"


def test_runpod_llms_is_the_object_itself(ends: Ends) -> None:
    runpod = Listener()
    deliver(lambda: Scripted({"id": 1}, as_list=False), runpod)
    assert runpod.got == [("done", {"output": {"id": 1}})]
    assert ends()[0] == "completed"


@pytest.mark.parametrize("says", [(REFUSED,), (DOWN, DOWN)])
def test_a_chunk_that_can_not_be_delivered_fails_the_job(ends: Ends, says: tuple[PostError, ...]) -> None:
    runpod = Listener(None, *says)
    one = deliver(lambda: Scripted("a", "b", "c"), runpod)
    assert runpod.got[0] == ("stream", {"output": "a"})
    assert [kind for kind, _ in runpod.got] == ["stream", "done"]
    assert "did not take a part of the stream (RunPod answers" in json.loads(runpod.got[1][1]["error"])["message"]
    assert one.answer.closed  # type: ignore[attr-defined]  # the scripted one
    assert ends()[0] == "failed"


def test_a_result_that_is_refused_becomes_an_error(ends: Ends) -> None:
    runpod = Listener(None, REFUSED)
    deliver(lambda: Scripted("a"), runpod)
    assert "did not take the result (RunPod answers 400)" in json.loads(runpod.got[-1][1]["error"])["message"]
    assert runpod.keys == ["1", "", "error"]
    assert ends()[0] == "failed"


@pytest.mark.parametrize("says", [(None, DOWN, DOWN), (None, REFUSED, REFUSED)])
def test_what_nobody_takes_is_undelivered(ends: Ends, says: tuple[PostError | None, ...]) -> None:
    deliver(lambda: Scripted("a"), Listener(*says))
    outcome, line = ends()
    assert outcome == "undelivered"
    assert "RunPod answers" in line


def test_what_is_taken_at_the_second_try_is_delivered_under_one_key(ends: Ends) -> None:
    runpod = Listener(DOWN, None, DOWN)
    one = deliver(lambda: Scripted("a"), runpod)
    assert runpod.keys == ["1", "1", "", ""]
    assert one.posts == {"chunk failed": 1, "chunk taken": 1, "result failed": 1, "result taken": 1}
    assert ends()[0] == "completed"


def test_what_runpod_does_not_know_is_left_out_at_the_second_try(ends: Ends) -> None:
    async def start() -> dict[str, Any]:
        return {"cold_start": {"seconds": 1.0}}

    runpod = Listener(None, REFUSED)
    deliver(lambda: Scripted("a"), runpod, first=start)
    assert runpod.got[-1] == ("done", {"output": ["a"]})
    assert runpod.keys == ["1", "metadata", ""]
    assert ends()[0] == "completed"


def test_one_that_nobody_waits_for_is_cancelled(ends: Ends) -> None:
    runpod = Listener()
    one = deliver(lambda: Scripted("a", hangs=True), runpod, lambda one: one.task.cancel())
    assert [kind for kind, _ in runpod.got] == ["stream"]
    assert one.answer.closed  # type: ignore[attr-defined]  # the scripted one
    assert ends()[0] == "cancelled"


def test_one_whose_time_is_over_is_told_so(ends: Ends) -> None:
    runpod = Listener()
    one = deliver(lambda: Scripted("a", hangs=True), runpod, Delivery.expire)
    assert one.answer.closed  # type: ignore[attr-defined]  # the scripted one
    assert json.loads(runpod.got[-1][1]["error"])["code"] == "shutting_down"
    assert ends()[0] == "failed"


def test_whose_time_is_over_does_not_wait_for_a_chunk(ends: Ends) -> None:
    """RunPod could not be reached for a minute and more, and then nothing was reported at all."""

    class Stuck(Listener):
        async def post(self, template: str, job_id: str, body: bytes, key: str, *, stream: bool) -> None:
            if template == self.stream_url:
                await asyncio.Event().wait()
            await super().post(template, job_id, body, key, stream=stream)

    runpod = Stuck()
    one = deliver(lambda: Scripted("a", "b"), runpod, Delivery.expire)
    assert json.loads(runpod.got[-1][1]["error"])["code"] == "shutting_down"
    assert one.answer.closed  # type: ignore[attr-defined]  # the scripted one
    assert ends()[0] == "failed"


def test_no_word_of_a_clients_mistake_is_in_the_log(ends: Ends) -> None:
    """vLLM's quote what was sent."""
    deliver(lambda: Scripted(error=JobError("no such thing as SECRET", 400)), Listener())
    assert ends()[1].endswith(": 400, invalid_request_error")


def test_what_an_error_says_makes_no_line_and_no_colour(ends: Ends) -> None:
    """vLLM's words may be a client's. RunPod gets them as they are."""
    runpod = Listener()
    words = "no\n03:45:11 supervisor: forged\x1b[2J\u2028caf\xe9"
    deliver(lambda: Scripted(error=JobError(words, 500)), runpod)
    _, line = ends()
    assert line.endswith(r": 500, no\n03:45:11 supervisor: forged\x1b[2J\u2028caf" + "\xe9")
    assert json.loads(runpod.got[-1][1]["error"])["message"] == words


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("as_list", [True, False])
def test_a_result_that_can_not_be_written_is_an_error(ends: Ends, as_list: bool) -> None:
    """JSON could just be read at this depth, and not be written within a result: the job was never reported."""
    runpod = Listener()
    deliver(lambda: Scripted(nested(200_000), as_list=as_list), runpod)
    ((where, posted),) = runpod.got
    assert (where, json.loads(posted["error"])["message"]) == ("done", "The result is nested too deeply.")
    assert ends()[0] == "failed"
