"""A delivery posts to RunPod the chunks and the result of a job that was taken, and tells once how the job ended.

`TABLE` says which state follows a state and an event; docs/queue.md shows it to users as "How a job ends".
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

from supervisor.queue.jobs import JSON, JobError, encode_json
from supervisor.queue.worker import Answer, check_size, tell_supervisor

POST_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
RETRY_SECONDS = 90.0  # a result or a chunk is sent again for so long
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds: the longest pause before the second try, and before any other
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})  # worth another try
RUNPOD_CHUNK_LIMIT = 1_000_000  # bytes that RunPod takes as one chunk
POST_HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}  # as the SDK sends them
SHUTDOWN_MESSAGE = "The worker was shut down before this job was done (SUPERVISOR_DRAIN_TIMEOUT). Please send it again."


class State(Enum):
    ANSWERING = "its answer comes, and is posted as it comes"
    RESULT = "its result is posted"
    ERROR = "its error is posted"
    COMPLETED = "completed"  # this one and those below say how the job ended
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
    # A chunk was not taken, and a stream with a gap is worse than none.
    (State.ANSWERING, Event.REFUSED): State.ERROR,
    (State.ANSWERING, Event.UNREACHED): State.ERROR,
    (State.ANSWERING, Event.UNWANTED): State.CANCELLED,
    (State.RESULT, Event.DONE): State.COMPLETED,
    # The result is too large, most likely. An error is small, and says more to who waits than an empty result.
    (State.RESULT, Event.REFUSED): State.ERROR,
    (State.RESULT, Event.UNREACHED): State.UNDELIVERED,
    (State.RESULT, Event.UNWANTED): State.CANCELLED,
    (State.ERROR, Event.DONE): State.FAILED,
    (State.ERROR, Event.REFUSED): State.UNDELIVERED,
    (State.ERROR, Event.UNREACHED): State.UNDELIVERED,
    (State.ERROR, Event.UNWANTED): State.CANCELLED,
}


class PostError(Exception):
    """RunPod did not take a POST."""


class PostRefusal(PostError):
    """RunPod did not take a POST, and will not take the same one later."""


class RunPod(NamedTuple):
    """Where results go: `$ID` is the job's id. In the Hub's tests nobody reads streams: `stream_url` is none."""

    session: aiohttp.ClientSession
    done_url: str
    stream_url: str

    async def post(self, template: str, job_id: str, body: bytes, key: str, *, stream: bool) -> None:
        """Posts once. All tries of one POST have the same `key`: after a reset nobody knows whether it was taken, but
        a receiver that knows this header does. Raises PostError."""
        url = template.replace("$ID", job_id)
        url += f"{'&' if '?' in url else '?'}isStream={'true' if stream else 'false'}"
        headers = {**POST_HEADERS, "X-Request-ID": job_id, "Idempotency-Key": key}
        post = self.session.post(url, data=body, headers=headers, timeout=POST_TIMEOUT, allow_redirects=False)
        try:
            async with post as response:
                if response.status >= 300:
                    error_class = PostError if response.status in TRANSIENT_STATUSES else PostRefusal
                    raise error_class(f"RunPod answers {response.status}")
                await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise PostError(f"{error or type(error).__name__}") from error


class Delivery:
    """Delivers one job by a task of its own, which is to be cancelled where nobody waits for the job any more.
    `find_metadata` returns what the worker's first result has beside its output."""

    def __init__(self, answer: Answer, runpod: RunPod, find_metadata: Callable[[], Awaitable[JSON | None]]) -> None:
        self.answer, self.runpod, self.find_metadata = answer, runpod, find_metadata
        self.job_id = answer.job.job_id
        self.state = State.ANSWERING
        self.output: list[object] = []  # the pieces that came and were posted: the result has all of them once more
        self.output_bytes = 0  # the size of these pieces
        self.error: JobError | None = None
        self.reason = ""  # why it did not end well
        self.posts: Counter[str] = Counter()  # how many POSTs are a "chunk taken", and so on
        self.started_at = time.monotonic()
        self.attempt_id = os.urandom(4).hex()  # a part of each key, as RunPod may give the same job out again
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._report_end)

    def expire(self) -> None:
        """Ends the answer, for which there is no more time; that is still reported."""
        if self.state is State.ANSWERING:
            self.error = JobError(SHUTDOWN_MESSAGE, 503, code="shutting_down")
            self.task.cancel()

    async def _run(self) -> None:
        steps = {State.ANSWERING: self._post_answer, State.RESULT: self._post_result, State.ERROR: self._post_error}
        while (step := steps.get(self.state)) is not None:
            try:
                await step()
                event = Event.DONE
            except JobError as error:
                self.error, event = error, Event.BROKEN
            except RecursionError:  # JSON that could just be read, and not be written with what is around it
                self.error, event = JobError("The result is nested too deeply.", 502), Event.REFUSED
            except PostError as error:
                part = "a part of the stream" if self.state is State.ANSWERING else "the result"
                self.error = self.error or JobError(f"RunPod did not take {part} ({error}).", 502)
                self.reason, event = str(error), Event.REFUSED if isinstance(error, PostRefusal) else Event.UNREACHED
            except asyncio.CancelledError:
                has_expired = self.state is State.ANSWERING and self.error is not None
                event = Event.BROKEN if has_expired else Event.UNWANTED
                self.task.uncancel()
            self.state = TABLE[self.state, event]

    async def _post_answer(self) -> None:
        async with contextlib.aclosing(self.answer.pieces()) as pieces:
            async for piece in pieces:
                self.output.append(piece)
                body = encode_json({"output": piece})
                self.output_bytes += len(body)
                check_size(self.output_bytes, self.job_id)
                # What is not posted as a chunk is in the result alone.
                if len(body) <= RUNPOD_CHUNK_LIMIT and self.answer.is_list and "://" in self.runpod.stream_url:
                    await self._post_with_retries("chunk", body, f"/{len(self.output)}")

    async def _post_result(self) -> None:
        result: JSON = {"output": self.output if self.answer.is_list else self.output[0]}
        if (metadata := await self.find_metadata()) is not None:
            with contextlib.suppress(PostRefusal):  # RunPod may not like what it does not know: posted without it
                await self._post_with_retries("result", encode_json({**result, "metadata": metadata}), "/metadata")
                return
        await self._post_with_retries("result", encode_json(result), "")

    async def _post_error(self) -> None:
        assert self.error is not None
        await self._post_with_retries("result", encode_json({"error": self.error.text}), "/error")
        # The words of a 4xx are left out: vLLM's quote what the user sent.
        self.reason = f"{self.error.status}, {self.error.message if self.error.status >= 500 else self.error.kind}"

    async def _post_with_retries(self, kind: str, body: bytes, key: str) -> None:
        """Posts until RunPod has taken it. The order is kept, as the next POST waits for this. Raises PostError."""
        is_result = kind == "result"
        template, stream = (self.runpod.done_url, self.answer.is_list) if is_result else (self.runpod.stream_url, False)
        deadline = time.monotonic() + RETRY_SECONDS
        for tries in itertools.count():  # by hand: tenacity costs a sixth of the worker's time on every chunk
            try:
                await self.runpod.post(template, self.job_id, body, f"{self.attempt_id}{key}", stream=stream)
            except PostError as error:
                self.posts[f"{kind} {'refused' if isinstance(error, PostRefusal) else 'failed'}"] += 1
                if isinstance(error, PostRefusal) or (tries and time.monotonic() > deadline):
                    raise
                await asyncio.sleep(random.uniform(0, min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE)))  # noqa: S311
            else:
                self.posts[f"{kind} taken"] += 1
                return

    def _report_end(self, task: asyncio.Task[None]) -> None:
        """Tells the supervisor how the job ended: a line of log, and what is counted."""
        if task.cancelled():  # before the task's first step
            self.state = State.CANCELLED
        elif (error := task.exception()) is not None:  # a fault of ours: RunPod gives the job out again
            self.state, self.reason = State.UNDELIVERED, f"{type(error).__name__}: {error}"
        level = {State.FAILED: "WARNING", State.UNDELIVERED: "ERROR"}.get(self.state, "INFO")
        seconds, count, first_at = time.monotonic() - self.started_at, self.posts.total(), self.answer.first_byte_at
        first_byte = f", first bytes after {first_at - self.started_at:.3f} s" if first_at else ""
        reason = f": {self.reason}" if level != "INFO" else ""
        line = f"job {self.state.value} after {seconds:.2f} s{first_byte}, {count} POST{'s' * (count != 1)}{reason}"
        job = {"id": self.job_id, "outcome": self.state.value, "seconds": round(seconds, 4), "posts": self.posts}
        tell_supervisor("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line), level, job)
