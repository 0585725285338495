"""One RunPod job's answer, as it is read from the gateway's private socket: whole, as a stream, or as a batch of these.

A task of its own reads it, so that it is never held up by a POST to RunPod, nor left open by a cancel; what arrives
while a chunk is being posted becomes the next chunk. Who posts is delivery.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
from multidict import CIMultiDict

from supervisor.queue.errors import JSON, JobError
from supervisor.queue.events import CHUNK_LIMIT, Events
from supervisor.queue.shapes import Job, Reader, Request
from supervisor.queue.taken import Taken
from supervisor.queue.tokens import Tokens

# Seconds from the end of one chunk's POST to the next one: some tokens gather, and nobody reads faster.
CHUNK_GAP = 0.05
# RunPod's limits on a result, with room for what is around it.
RESULT_LIMIT, SYNC_RESULT_LIMIT = 10_000_000 - 50_000, 20_000_000 - 50_000
ERROR_LIMIT = 1_000_000
START_PATIENCE = 1.0
# Of one batch, at once; the rest of it waits its turn here instead of in vLLM.
BATCH_CONCURRENCY = 100
# An event that says that the answer is broken off: the gateway's, and vLLM's own, by the dialects of both. It begins a
# line, as no text of a model's can: line ends and quotes are escaped there.
BROKEN = re.compile(
    r'^data: ?(?=\{"error")(.*)$|^event: ?error\r?\ndata: ?(.*)$|^data:.*"finish_reason": ?"(?:abort|error)"', re.M
)
START = Request("GET", "/status", CIMultiDict())
MODELS = Request("GET", "/v1/models", CIMultiDict())


def tell(message: str = "", level: str = "INFO", *, job_id: str | None = None, job: JSON | None = None) -> None:
    """A line for the supervisor, which logs and counts (queue/child.py), in the shape of the SDK's own: `requestId` is
    the job's. `job`: `{"id", "outcome": "taken"}`, or how it ended with its seconds and POSTs."""
    line = {"requestId": job_id, "message": message, "level": level}
    print(json.dumps(line | ({"job": job} if job is not None else {})), flush=True)


class Client:
    """HTTP over the gateway's private socket."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._session: aiohttp.ClientSession | None = None

    def ask(self, request: Request, request_id: str) -> Any:
        """An aiohttp response, to be used with `async with`."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self.socket, limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
                headers={"Accept-Encoding": "identity", "User-Agent": "supervisor-queue"},
                skip_auto_headers=("Content-Type",),
                read_bufsize=256 * 1024,
            )
        from yarl import URL  # noqa: PLC0415  # aiohttp's own type

        url = URL(f"http://gateway{request.path}", encoded=True)
        headers = {"X-Request-Id": request_id, **request.headers}
        return self._session.request(request.method, url, data=request.body, headers=headers)

    async def look(self, request: Request) -> Any:
        """A small answer's JSON; None without one within a second."""
        try:
            async with asyncio.timeout(START_PATIENCE), self.ask(request, "worker") as response:
                return await response.json()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None

    async def start_of_engine(self) -> JSON | None:
        """How long vLLM's latest start took, phase by phase."""
        status = await self.look(START)
        phases = status.get("phases") if isinstance(status, dict) else None
        if not phases:
            return None
        return {"seconds": round(sum(row["seconds"] for row in phases), 3), "phases": phases}

    async def longest(self) -> int | None:
        """How many tokens the model can take, its prompt's and its own."""
        models = await self.look(MODELS)
        rows = models.get("data") if isinstance(models, dict) else None
        found = rows[0].get("max_model_len") if rows and isinstance(rows[0], dict) else None
        return found if isinstance(found, int) else None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class Answer:
    """Of one job. `chunk` gives a stream as it comes; once there is none, `object` or `error` is set."""

    def __init__(self, taken: Taken, client: Client, reader: Reader) -> None:
        self.job_id = taken.job_id
        self.client = client
        self.reader = reader
        self.as_list = True  # RunPod's clients get a list of what came, or the object itself
        self.streams = False
        self.object: object = None
        self.error: JobError | None = None
        self.first_at = 0.0  # when vLLM's first bytes came
        self._events = Events()
        self._size = 0
        self._limit = SYNC_RESULT_LIMIT if self.job_id.startswith("sync-") else RESULT_LIMIT
        self._tokens: Tokens | None = None
        self._arrived = asyncio.Event()
        self._task = asyncio.create_task(self._read(taken), name=f"job {self.job_id}")

    def stop(self, error: JobError | None = None) -> None:
        """vLLM hears of it at once: the connection is closed. `error`: why there is no answer, whatever came of it."""
        self.error = self.error or error
        self._task.cancel()
        self._arrived.set()

    async def chunk(self, since: float) -> Sequence[object]:
        """The next pieces of a stream, none where no more comes. `since`: when the last one was posted, 0: none was."""
        while True:
            ended = self._task.done()
            gap = since + CHUNK_GAP - time.monotonic()
            if self._events.buffer and gap > 0 and not ended and len(self._events.buffer) < CHUNK_LIMIT:
                await asyncio.wait({self._task}, timeout=gap)
            elif text := self._events.cut(ended=ended):
                if (broken := BROKEN.search(text)) is not None:
                    self.error = self.error or JobError.of_event(broken[1] or broken[2] or "")
                if pieces := [text] if self._tokens is None else list(self._tokens.feed(text)):
                    return pieces
            elif ended:
                return list(self._tokens.rest()) if self._tokens is not None else ()
            else:
                self._arrived.clear()
                await self._arrived.wait()

    async def _read(self, taken: Taken) -> None:
        try:
            if taken.error is not None:
                raise taken.error
            job = self.reader.read(taken.content)
            self.as_list = job.as_list
            self._tokens = Tokens(job.tokens) if job.tokens is not None else None
            if job.batch:
                results = await self._batch(job.batch)
                self.object = {"model": self.reader.model, "count": len(results), "results": results}
            else:
                self.object = await self._single(job, self.job_id, stream=job.as_list)
            self._check(
                0 if self.streams else len(json.dumps(self.object, ensure_ascii=False).encode("utf-8", "replace"))
            )
        except Exception as error:  # noqa: BLE001  # whatever it is, the job must not end as if it were done
            self.error = self.error or _as_job_error(error)
        finally:
            self._arrived.set()

    async def _batch(self, items: tuple[Job | JobError, ...]) -> list[object]:
        """Raises JobError where all failed for the engine's sake: what is the same for all is the job's."""
        turn = asyncio.Semaphore(BATCH_CONCURRENCY)

        async def one(number: int, item: Job | JobError) -> object:
            try:
                if isinstance(item, JobError):
                    raise item
                async with turn:
                    return await self._single(item, f"{self.job_id}-{number}", stream=False)
            except Exception as error:  # noqa: BLE001  # it does not sink the others
                return _as_job_error(error)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, item)) for number, item in enumerate(items)]
        results = [task.result() for task in tasks]
        failed = [result for result in results if isinstance(result, JobError) and result.status >= 500]
        if len(failed) == len(results):
            raise failed[0]
        return [result.item if isinstance(result, JobError) else result for result in results]

    async def _single(self, job: Job, request_id: str, *, stream: bool) -> object:
        assert job.request is not None
        async with self.client.ask(job.request, request_id) as response:
            if response.status >= 400:
                raise JobError.of_answer(response.status, await _beginning(response), job.request.path)
            if stream and response.content_type == "text/event-stream":
                self.streams = True
                async for data in response.content.iter_any():
                    # As it grows in JSON: quotes, backslashes and line ends are two bytes there.
                    self._check(len(data) + data.count(b'"') + data.count(b"\\") + data.count(b"\n"))
                    self.first_at = self.first_at or time.monotonic()
                    self._events.feed(data)
                    self._arrived.set()
                return None
            body = bytearray()
            async for data in response.content.iter_any():
                self._check(len(data))
                self.first_at = self.first_at or time.monotonic()
                body += data
            self._size -= len(body)  # counted again as it is posted
            return _result(bytes(body), response.content_type, job)

    def _check(self, more: int) -> None:
        self._size += more
        if self._size > self._limit:
            limit = f"{(self._limit + 50_000) // 1_000_000} MB"
            raise JobError(
                f"The result is larger than the {limit} that RunPod takes: ask for less, or send it as several jobs.",
                413,
                "result_too_large",
            )


def _as_job_error(error: Exception) -> JobError:
    if isinstance(error, JobError):
        return error
    if isinstance(error, aiohttp.ClientPayloadError):
        return JobError.cut()
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return JobError(f"The gateway gave no answer ({error or type(error).__name__}).", 502, "upstream_error")
    return JobError(f"The worker could not do this job ({type(error).__name__}).", 500, "server_error")


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """The body of an error, or as much of it as anybody would read."""
    body = bytearray()
    async for data in response.content.iter_any():
        body += data
        if len(body) > ERROR_LIMIT:
            break
    return bytes(body)


def _result(body: bytes, content_type: str, job: Job) -> object:
    """JSON as an object, text as text, everything else as base64 with its type."""
    if content_type == "application/json" or content_type.endswith("+json"):
        try:
            answer = json.loads(body, parse_constant=lambda _: None)  # NaN, which is no JSON
        except ValueError as error:
            raise JobError(f"The answer is no JSON ({error}).", 502, "upstream_error") from None
        if isinstance(answer, dict) and answer.get("error"):
            raise JobError.of_answer(502, body)
        return job.shape(answer) if job.shape is not None and isinstance(answer, dict) else answer
    if content_type.startswith("text/") or not body:
        return body.decode("utf-8", "replace")
    return {"content_type": content_type, "base64": base64.b64encode(body).decode()}
