"""What becomes of a job that was taken: its chunks and its result, posted to RunPod, and how it ended, told once.

`TABLE` says what follows what; docs/jobs.md shows it to users as "How a job ends".
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import aiohttp
import tenacity

from supervisor.queue.errors import JSON, JobError
from supervisor.queue.worker import Answer, tell

POST_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
# A result or chunk is sent again for so long, in seconds.
PATIENCE = 90.0
FIRST_PAUSE = 0.2
# Nothing but these is worth another try.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
# What RunPod takes as one chunk.
CHUNK_BYTES = 1_000_000
# As the SDK sends them: RunPod is used to it.
POST_HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}
SHUT_DOWN = JobError(
    "The worker was shut down before this job was done (SUPERVISOR_DRAIN_TIMEOUT). Please send it again.",
    503,
    "service_unavailable",
    code="shutting_down",
)


class State(Enum):
    ANSWERING = "its answer comes, and is posted as it comes"
    RESULT = "its result is posted"
    ERROR = "its error is posted"
    OVER = "it is told how it ended"


class Event(Enum):
    ANSWERED = "all of the answer is there"
    FAILED = "there is no answer, or it broke off, or a part of it could not be delivered"
    TAKEN = "RunPod has it"
    REFUSED = "RunPod does not take it"
    UNDELIVERED = "RunPod could not be reached for 90 s"
    UNWANTED = "RunPod says that nobody waits for it: it was cancelled, or its time is over"


class Outcome(Enum):
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNDELIVERED = "undelivered"


TABLE: Mapping[tuple[State, Event], tuple[State, Outcome | None]] = {
    (State.ANSWERING, Event.ANSWERED): (State.RESULT, None),
    (State.ANSWERING, Event.FAILED): (State.ERROR, None),
    (State.ANSWERING, Event.UNWANTED): (State.OVER, Outcome.CANCELLED),
    (State.RESULT, Event.TAKEN): (State.OVER, Outcome.COMPLETED),
    # Too large, most likely. An error is small, and says more to who waits than an empty result.
    (State.RESULT, Event.REFUSED): (State.ERROR, None),
    (State.RESULT, Event.UNDELIVERED): (State.OVER, Outcome.UNDELIVERED),
    (State.RESULT, Event.UNWANTED): (State.OVER, Outcome.CANCELLED),
    (State.ERROR, Event.TAKEN): (State.OVER, Outcome.FAILED),
    (State.ERROR, Event.REFUSED): (State.OVER, Outcome.UNDELIVERED),
    (State.ERROR, Event.UNDELIVERED): (State.OVER, Outcome.UNDELIVERED),
    (State.ERROR, Event.UNWANTED): (State.OVER, Outcome.CANCELLED),
}


class NotTaken(Exception):
    """RunPod did not take a POST; `transient`: it may take the same one later."""

    def __init__(self, reason: str, *, transient: bool) -> None:
        super().__init__(reason)
        self.transient = transient


@dataclass(frozen=True, slots=True)
class RunPod:
    """Where results go. `done`, `stream`: addresses with `$ID` for the job's."""

    session: aiohttp.ClientSession
    done: str
    stream: str

    @property
    def listens(self) -> bool:
        """Not so in the Hub's tests, where nobody reads streams."""
        return "://" in self.stream

    async def post(self, template: str, job_id: str, body: bytes, key: str, *, stream: bool) -> None:
        """Once. `key` is the same for all tries of one: after a reset nobody knows whether it was taken, but who knows
        this header does. Raises NotTaken."""
        url = template.replace("$ID", job_id)
        url += f"{'&' if '?' in url else '?'}isStream={'true' if stream else 'false'}"
        headers = {**POST_HEADERS, "X-Request-ID": job_id, "Idempotency-Key": key}
        try:
            async with self.session.post(
                url, data=body, headers=headers, timeout=POST_TIMEOUT, allow_redirects=False
            ) as response:
                if response.status >= 300:
                    transient = response.status in TRANSIENT
                    raise NotTaken(f"RunPod answers {response.status}", transient=transient)
                await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise NotTaken(f"{error or type(error).__name__}", transient=True) from error


def encode(content: JSON) -> bytes:
    """A lone surrogate, which a model can write and JSON can carry, is no UTF-8."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


class Delivery:
    """Of one job; `run` returns when it is over. `first`: what the worker's first result has beside its output."""

    def __init__(self, answer: Answer, runpod: RunPod, first: Callable[[], Awaitable[JSON | None]]) -> None:
        self.job_id = answer.job_id
        self.answer = answer
        self.runpod = runpod
        self.first = first
        self.state = State.ANSWERING
        self.chunks: list[object] = []  # what was posted: the result has all of it once more
        self.why = ""  # it did not end well
        self.posts: Counter[str] = Counter()  # "chunk taken": how many, and so on
        self.began = time.monotonic()
        self.attempt = os.urandom(4).hex()  # RunPod may give the same job out again

    async def run(self) -> None:
        """To be cancelled where nobody waits for it any more."""
        acts = {State.ANSWERING: self._answering, State.RESULT: self._result, State.ERROR: self._error}
        outcome = None
        while self.state is not State.OVER:
            try:
                event = await acts[self.state]()
            except NotTaken as error:
                self.why = str(error)
                event = Event.UNDELIVERED if error.transient else Event.REFUSED
            except asyncio.CancelledError:
                event = Event.UNWANTED
            self.state, outcome = TABLE[self.state, event]
        assert outcome is not None
        self.end(outcome)

    async def _answering(self) -> Event:
        """A chunk that can't be delivered fails the job: a stream with a gap is worse."""
        answer, since = self.answer, 0.0
        try:
            while pieces := await answer.chunk(since):
                for piece in pieces:
                    self.chunks.append(piece)
                    await self._chunk(piece)
                since = time.monotonic()
            if answer.error is None and not answer.streams and answer.as_list:
                self.chunks.append(answer.object)
                await self._chunk(answer.object)
        except NotTaken as error:
            tell(f"a chunk could not be delivered: {error}", "ERROR", job_id=self.job_id)
            text = f"A part of the stream could not be delivered to RunPod ({error})."
            answer.stop(JobError(text, 502, "upstream_error"))
        return Event.ANSWERED if answer.error is None else Event.FAILED

    async def _chunk(self, output: object) -> None:
        body = encode({"output": output})
        if self.runpod.listens and (self.answer.streams or len(body) <= CHUNK_BYTES):  # else the result has it
            await self._post("chunk", body, f"{self.attempt}/{len(self.chunks)}", stream=False)

    async def _result(self) -> Event:
        as_list = self.answer.as_list
        content: JSON = {"output": self.chunks if as_list else self.answer.object}
        more = await self.first()
        if more is not None:
            # Should RunPod not like what it does not know: once more, without.
            try:
                await self._post("result", encode({**content, "metadata": more}), self.attempt, stream=as_list)
            except NotTaken as error:
                if error.transient:
                    raise
            else:
                return Event.TAKEN
        key = self.attempt if more is None else f"{self.attempt}/again"  # chunks have numbers there
        await self._post("result", encode(content), key, stream=as_list)
        return Event.TAKEN

    async def _error(self) -> Event:
        answer = self.answer
        if answer.error is None:
            answer.error = JobError(f"RunPod did not take the result ({self.why}).", 502, "upstream_error")
        content = encode({"error": answer.error.text})
        await self._post("result", content, f"{self.attempt}/error", stream=answer.as_list)
        # Of a 4xx no words: vLLM's quote what the user sent.
        why = answer.error.message if answer.error.status >= 500 else answer.error.kind
        self.why = f"{answer.error.status}, {why}"
        return Event.TAKEN

    async def _post(self, what: str, body: bytes, key: str, *, stream: bool) -> None:
        """Until RunPod has taken it, in order: the next one waits for this. Raises NotTaken."""
        template = self.runpod.done if what == "result" else self.runpod.stream

        async def once() -> None:
            try:
                await self.runpod.post(template, self.job_id, body, key, stream=stream)
            except NotTaken as error:
                self.posts[f"{what} {'failed' if error.transient else 'refused'}"] += 1
                raise
            self.posts[f"{what} taken"] += 1

        try:
            return await once()  # without tenacity, which costs a sixth of the worker's time on every chunk
        except NotTaken as error:
            if not error.transient:
                raise
        await asyncio.sleep(random.uniform(0, FIRST_PAUSE))  # noqa: S311
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, NotTaken) and error.transient),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
            stop=tenacity.stop_after_delay(PATIENCE),
            reraise=True,
        )
        return await retrying(once)

    def end(self, outcome: Outcome) -> None:
        """The last of it: a line of log, and what the supervisor counts."""
        self.state = State.OVER
        self.answer.stop()
        level = {Outcome.FAILED: "WARNING", Outcome.UNDELIVERED: "ERROR"}.get(outcome, "INFO")
        seconds = time.monotonic() - self.began
        line = f"job {outcome.value} after {seconds:.2f} s"
        if self.answer.first_at:
            line += f", first bytes after {self.answer.first_at - self.began:.3f} s"
        count = self.posts.total()
        line += f", {count} POST{'s' * (count != 1)}" + (f": {self.why}" if level != "INFO" else "")
        job: dict[str, Any] = {"id": self.job_id, "outcome": outcome.value, "seconds": round(seconds, 4)}
        tell(line, level, job_id=self.job_id, job={**job, "posts": self.posts})
