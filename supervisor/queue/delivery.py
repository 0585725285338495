"""What becomes of a job that was taken: its chunks and its result, posted to RunPod, and how it ended, told once.

`TABLE` says what follows what; docs/queue.md shows it to users as "How a job ends".
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from typing import NamedTuple

import aiohttp

from supervisor.queue.jobs import JSON, JobError, encoded
from supervisor.queue.worker import Answer, check_size, tell

POST_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
PATIENCE = 90.0  # seconds: a result or chunk is sent again for so long, after pauses of up to these
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})  # worth another try
CHUNK_BYTES = 1_000_000  # what RunPod takes as one chunk
POST_HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}  # as the SDK sends them
SHUT_DOWN = "The worker was shut down before this job was done (SUPERVISOR_DRAIN_TIMEOUT). Please send it again."


class State(Enum):
    ANSWERING = "its answer comes, and is posted as it comes"
    RESULT = "its result is posted"
    ERROR = "its error is posted"
    # How it ended
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNDELIVERED = "undelivered"


class Event(Enum):
    DONE = "all of the answer is there, or RunPod has what was posted"
    BROKEN = "there is no answer, or it broke off"
    REFUSED = "RunPod does not take it"
    UNREACHED = "RunPod could not be reached for 90 s"
    UNWANTED = "RunPod says that nobody waits for it: it was cancelled, or its time is over"


TABLE: Mapping[tuple[State, Event], State] = {
    (State.ANSWERING, Event.DONE): State.RESULT,
    (State.ANSWERING, Event.BROKEN): State.ERROR,
    # A chunk: a stream with a gap is worse than none.
    (State.ANSWERING, Event.REFUSED): State.ERROR,
    (State.ANSWERING, Event.UNREACHED): State.ERROR,
    (State.ANSWERING, Event.UNWANTED): State.CANCELLED,
    (State.RESULT, Event.DONE): State.COMPLETED,
    # Too large, most likely. An error is small, and says more to who waits than an empty result.
    (State.RESULT, Event.REFUSED): State.ERROR,
    (State.RESULT, Event.UNREACHED): State.UNDELIVERED,
    (State.RESULT, Event.UNWANTED): State.CANCELLED,
    (State.ERROR, Event.DONE): State.FAILED,
    (State.ERROR, Event.REFUSED): State.UNDELIVERED,
    (State.ERROR, Event.UNREACHED): State.UNDELIVERED,
    (State.ERROR, Event.UNWANTED): State.CANCELLED,
}


class NotTaken(Exception):
    """RunPod did not take a POST."""


class Refused(NotTaken):
    """Nor will it take the same one later."""


class RunPod(NamedTuple):
    """Where results go. `done`, `stream`: addresses with `$ID` for the job's. In the Hub's tests, where nobody reads
    streams, theirs is none."""

    session: aiohttp.ClientSession
    done: str
    stream: str

    async def post(self, template: str, job_id: str, body: bytes, key: str, *, stream: bool) -> None:
        """Once. `key` is the same for all tries of one: after a reset nobody knows whether it was taken, but who knows
        this header does. Raises NotTaken."""
        url = template.replace("$ID", job_id)
        url += f"{'&' if '?' in url else '?'}isStream={'true' if stream else 'false'}"
        headers = {**POST_HEADERS, "X-Request-ID": job_id, "Idempotency-Key": key}
        post = self.session.post(url, data=body, headers=headers, timeout=POST_TIMEOUT, allow_redirects=False)
        try:
            async with post as response:
                if response.status >= 300:
                    refusal = NotTaken if response.status in TRANSIENT else Refused
                    raise refusal(f"RunPod answers {response.status}")
                await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise NotTaken(f"{error or type(error).__name__}") from error


class Delivery:
    """Of one job, by a task of its own, to be cancelled where nobody waits for it any more. `first`: what the worker's
    first result has beside its output."""

    def __init__(self, answer: Answer, runpod: RunPod, first: Callable[[], Awaitable[JSON | None]]) -> None:
        self.answer, self.runpod, self.first = answer, runpod, first
        self.job_id = answer.taken.job_id
        self.state = State.ANSWERING
        self.output: list[object] = []  # what came, and was posted: the result has all of it once more
        self.size = 0  # of that, in bytes
        self.error: JobError | None = None
        self.why = ""  # it did not end well
        self.posts: Counter[str] = Counter()  # "chunk taken": how many, and so on
        self.began = time.monotonic()
        self.attempt = os.urandom(4).hex()  # RunPod may give the same job out again
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._end)

    def expire(self) -> None:
        """There is no more time for an answer; that is still reported."""
        if self.state is State.ANSWERING:
            self.error = JobError(SHUT_DOWN, 503, code="shutting_down")
            self.task.cancel()

    async def _run(self) -> None:
        acts = {State.ANSWERING: self._answer, State.RESULT: self._result, State.ERROR: self._error}
        while (act := acts.get(self.state)) is not None:
            try:
                await act()
                event = Event.DONE
            except JobError as error:
                self.error, event = error, Event.BROKEN
            except NotTaken as error:
                part = "a part of the stream" if self.state is State.ANSWERING else "the result"
                self.error = self.error or JobError(f"RunPod did not take {part} ({error}).", 502)
                self.why, event = str(error), Event.REFUSED if isinstance(error, Refused) else Event.UNREACHED
            except asyncio.CancelledError:
                expired = self.state is State.ANSWERING and self.error is not None
                event = Event.BROKEN if expired else Event.UNWANTED
                self.task.uncancel()
            self.state = TABLE[self.state, event]

    async def _answer(self) -> None:
        async with contextlib.aclosing(self.answer.pieces()) as pieces:
            async for piece in pieces:
                self.output.append(piece)
                body = encoded({"output": piece})
                self.size += len(body)
                check_size(self.size, self.job_id)
                # Else the result has it.
                if len(body) <= CHUNK_BYTES and self.answer.as_list and "://" in self.runpod.stream:
                    await self._post("chunk", body, f"/{len(self.output)}")

    async def _result(self) -> None:
        content: JSON = {"output": self.output if self.answer.as_list else self.output[0]}
        if (more := await self.first()) is not None:
            with contextlib.suppress(Refused):  # RunPod may not like what it does not know: once more, without
                await self._post("result", encoded({**content, "metadata": more}), "/metadata")
                return
        await self._post("result", encoded(content), "")

    async def _error(self) -> None:
        assert self.error is not None
        await self._post("result", encoded({"error": self.error.text}), "/error")
        # Of a 4xx no words: vLLM's quote what the user sent.
        self.why = f"{self.error.status}, {self.error.message if self.error.status >= 500 else self.error.kind}"

    async def _post(self, what: str, body: bytes, key: str) -> None:
        """Until RunPod has taken it, in order: the next one waits for this. Raises NotTaken."""
        done = what == "result"
        template, stream = (self.runpod.done, self.answer.as_list) if done else (self.runpod.stream, False)
        deadline = time.monotonic() + PATIENCE
        for tries in itertools.count():  # by hand: tenacity costs a sixth of the worker's time on every chunk
            try:
                await self.runpod.post(template, self.job_id, body, f"{self.attempt}{key}", stream=stream)
            except NotTaken as error:
                refused = isinstance(error, Refused)
                self.posts[f"{what} {'refused' if refused else 'failed'}"] += 1
                if refused or (tries and time.monotonic() > deadline):
                    raise
                await asyncio.sleep(random.uniform(0, min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE)))  # noqa: S311
            else:
                self.posts[f"{what} taken"] += 1
                return

    def _end(self, task: asyncio.Task[None]) -> None:
        """The last of it: a line of log, and what the supervisor counts."""
        if task.cancelled():  # before its first step
            self.state = State.CANCELLED
        elif (error := task.exception()) is not None:  # a fault of ours: RunPod gives the job out again
            self.state, self.why = State.UNDELIVERED, f"{type(error).__name__}: {error}"
        level = {State.FAILED: "WARNING", State.UNDELIVERED: "ERROR"}.get(self.state, "INFO")
        seconds, count, first_at = time.monotonic() - self.began, self.posts.total(), self.answer.first_at
        first = f", first bytes after {first_at - self.began:.3f} s" if first_at else ""
        why = f": {self.why}" if level != "INFO" else ""
        line = f"job {self.state.value} after {seconds:.2f} s{first}, {count} POST{'s' * (count != 1)}{why}"
        job = {"id": self.job_id, "outcome": self.state.value, "seconds": round(seconds, 4), "posts": self.posts}
        tell(line, level, job)
