"""One RunPod job's answer, as it is read from the gateway's private socket: whole, as a stream, or as a batch of these.
Who posts is delivery.py."""

from __future__ import annotations

import asyncio
import base64
import codecs
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from supervisor.queue.jobs import JSON, JobError, Taken
from supervisor.queue.shapes import Job, Reader, Request

CHUNK_GAP = 0.05  # seconds from the end of one chunk's POST to the next: some tokens gather, and nobody reads faster
# Bytes. RunPod's limits on a result, and the room that is kept for what is around it.
RESULT_LIMIT, SYNC_RESULT_LIMIT, AROUND = 10_000_000, 20_000_000, 50_000
BATCH_CONCURRENCY = 100  # requests of one batch; the rest of it waits its turn here instead of in vLLM
CHUNK_LIMIT = 256 * 1024  # bytes; RunPod takes more, but that would only delay what comes behind
# A single event that is longer than this is cut, between two characters: quotes and backslashes double in JSON.
EVENT_LIMIT = 450_000
FIRST, ALL = re.compile(rb".*?\n\r?\n", re.S), re.compile(rb".*\n\r?\n", re.S)  # an empty line ends an event
# An event that says that the answer is broken off: the gateway's, and vLLM's own, by the dialects of both. It begins a
# line, as no text of a model's can: line ends and quotes are escaped there.
BROKEN = re.compile(
    r'^data: ?(?=\{"error")(.*)$|^event: ?error\r?\ndata: ?(.*)$|^data:.*"finish_reason": ?"(?:abort|error)"', re.M
)


def tell(message: str = "", level: str = "INFO", job: JSON | None = None) -> None:
    """A line for the supervisor, which logs and counts (queue/child.py), in the shape of the SDK's own. `job`: `{"id",
    "outcome": "taken"}`, or how it ended with its seconds and POSTs."""
    print(json.dumps({"requestId": job and job["id"], "message": message, "level": level, "job": job}), flush=True)


def check_size(size: int, job_id: str) -> None:
    """Of a result, in bytes. Raises JobError."""
    limit = SYNC_RESULT_LIMIT if job_id.startswith("sync-") else RESULT_LIMIT
    if size > limit - AROUND:
        least = f"The result is larger than the {limit // 1_000_000} MB that RunPod takes"
        raise JobError(f"{least}: ask for less, or send it as several jobs.", 413)


class Client:
    """HTTP over the gateway's private socket. `session` is to be closed."""

    def __init__(self, socket: str) -> None:
        self.session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            headers={"Accept-Encoding": "identity", "User-Agent": "supervisor-queue"},
            skip_auto_headers=("Content-Type",),
            read_bufsize=RESULT_LIMIT,  # more than gathers while RunPod can't be reached: vLLM is not held up by a POST
        )

    @contextlib.asynccontextmanager
    async def ask(self, request: Request, request_id: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """Raises JobError where the answer is an error."""
        url = URL(f"http://gateway{request.path}", encoded=True)
        headers = {"X-Request-Id": request_id, **request.headers}
        async with self.session.request(request.method, url, data=request.body, headers=headers) as response:
            if response.status >= 400:
                raise JobError.of(await response.read(), response.status, request.path)
            yield response

    async def look(self, route: str, find: Callable[[Any], Any]) -> Any:
        """What `find` sees in a small answer's JSON; None where it fails, or nothing comes within a second."""
        try:
            async with asyncio.timeout(1), self.session.get(f"http://gateway{route}") as response:
                return find(await response.json())
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return None


@dataclass(slots=True)
class Answer:
    """Of one job."""

    taken: Taken
    client: Client
    reader: Reader
    as_list: bool = True  # RunPod's clients get a list of what came, or the object itself
    first_at: float = 0.0  # when vLLM's first bytes came

    async def pieces(self) -> AsyncGenerator[object, None]:
        """Those of a stream as they come, or else the one that there is. To be closed, and then vLLM hears of it at
        once. Raises JobError where there is no answer, or it breaks off."""
        try:
            if self.taken.error is not None:
                raise self.taken.error
            job = self.reader.read(self.taken.content)
            self.as_list = job.as_list
            if job.request is None:
                results = await self._batch(job.batch)
                yield {"model": self.reader.model, "count": len(results), "results": results}
                return
            async with self.client.ask(job.request, self.taken.job_id) as response:
                if job.as_list and response.content_type == "text/event-stream":
                    stream = self._stream(response.content)
                    async for piece in job.tokens.cut(stream) if job.tokens else stream:
                        yield piece
                else:
                    yield await self._whole(response, job)
        except Exception as error:  # noqa: BLE001  # whatever it is, the job must not end as if it were done
            raise _as_job_error(error) from None

    async def _stream(self, content: aiohttp.StreamReader) -> AsyncIterator[str]:
        """The first event at once and by itself, then whatever has gathered by the time the last piece is posted."""
        buffer, begun, broken, text = bytearray(), False, None, ""
        while text or not content.at_eof():
            buffer += content.read_nowait() if text else await content.readany()
            self.first_at = self.first_at or time.monotonic()
            if text := cut(buffer, begun=begun, ended=content.at_eof()):
                begun, broken = True, broken or BROKEN.search(text)
                yield text
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CHUNK_GAP):
                        await content.wait_eof()  # for the end nobody waits
        if broken is not None:
            raise JobError.of((broken[1] or broken[2] or "").encode())

    async def _batch(self, items: tuple[Callable[[], Job], ...]) -> list[object]:
        """Raises JobError where all failed for the engine's sake: what is the same for all is the job's."""
        turn = asyncio.Semaphore(BATCH_CONCURRENCY)

        async def one(number: int, read: Callable[[], Job]) -> object:
            job = read()
            assert job.request is not None
            async with turn, self.client.ask(job.request, f"{self.taken.job_id}-{number}") as response:
                return await self._whole(response, job)

        answers = await asyncio.gather(*(one(*each) for each in enumerate(items)), return_exceptions=True)
        results = [_as_job_error(answer) if isinstance(answer, Exception) else answer for answer in answers]
        failed = [result for result in results if isinstance(result, JobError) and result.status >= 500]
        if len(failed) == len(results):
            raise failed[0]
        return [result.item if isinstance(result, JobError) else result for result in results]

    async def _whole(self, response: aiohttp.ClientResponse, job: Job) -> object:
        """JSON as an object, text as text, everything else as base64 with its type."""
        self.first_at = self.first_at or time.monotonic()
        try:
            body = await response.content.readexactly(SYNC_RESULT_LIMIT)
        except asyncio.IncompleteReadError as error:
            body = error.partial
        check_size(len(body), self.taken.job_id)
        content_type = response.content_type
        if content_type == "application/json" or content_type.endswith("+json"):
            try:
                answer = json.loads(body, parse_constant=lambda _: None)  # NaN, which is no JSON
            except ValueError as error:
                raise JobError(f"The answer is no JSON ({error}).", 502) from None
            if isinstance(answer, dict) and answer.get("error"):
                raise JobError.of(body, 502)
            return job.shape(answer) if job.shape is not None and isinstance(answer, dict) else answer
        if content_type.startswith("text/") or not body:
            return body.decode("utf-8", "replace")
        return {"content_type": content_type, "base64": base64.b64encode(body).decode()}


def _as_job_error(error: Exception) -> JobError:
    if isinstance(error, JobError):
        return error
    if isinstance(error, aiohttp.ClientPayloadError):
        return JobError.of(b"")
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return JobError(f"The gateway gave no answer ({error or type(error).__name__}).", 502)
    return JobError(f"The worker could not do this job ({type(error).__name__}).", 500)


def cut(buffer: bytearray, *, begun: bool, ended: bool = False) -> str:
    """Takes the next chunk off the buffer, as text: "" where no event is complete. `begun`: the first event is through;
    `ended`: what is left is a chunk although no event's end follows."""
    found = (begun and ALL.match(buffer, 0, CHUNK_LIMIT)) or FIRST.match(buffer)
    at = found.end() if found else 0
    if at > EVENT_LIMIT or (not at and (ended or len(buffer) > EVENT_LIMIT)):
        at = CHUNK_LIMIT
    # A character that would be torn stays. What is no UTF-8 has no place in JSON; vLLM's events are JSON themselves.
    text, at = codecs.utf_8_decode(buffer[:at], "replace", ended and at >= len(buffer))
    del buffer[:at]
    return text
