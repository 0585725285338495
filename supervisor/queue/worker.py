"""Reads one RunPod job's answer from the gateway's private socket: as a whole, as a stream, or as a batch of answers.
delivery.py posts it."""

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

from supervisor.queue.jobs import JSON, JobError, TakenJob
from supervisor.queue.shapes import Plan, Reader, Request

CHUNK_GAP = 0.05  # seconds from the end of a chunk's POST to the next one: some tokens gather, and nobody reads faster
# These are RunPod's limits on a result, and the room that is kept for what is around it, in bytes.
RESULT_LIMIT, SYNC_RESULT_LIMIT, ENVELOPE_ROOM = 10_000_000, 20_000_000, 50_000
BATCH_CONCURRENCY = 100  # requests of one batch; the rest of it waits its turn here instead of in vLLM
CHUNK_LIMIT = 256 * 1024  # bytes; RunPod takes more, but that would only delay what comes behind
# A single event that is longer than this is cut, between two characters: quotes and backslashes double in JSON.
EVENT_LIMIT = 450_000
FIRST_EVENT, ALL_EVENTS = re.compile(rb".*?\n\r?\n", re.S), re.compile(rb".*\n\r?\n", re.S)  # an empty line ends each
# Such an event, in both dialects, breaks the answer off. It begins a line, as no text of a model's can.
ERROR_EVENT = re.compile(
    r'^data: ?(?=\{"error")(.*)$|^event: ?error\r?\ndata: ?(.*)$|^data:.*"finish_reason": ?"(?:abort|error)"', re.M
)


def tell_supervisor(message: str = "", level: str = "INFO", job: JSON | None = None) -> None:
    """Prints a line for the supervisor, which logs and counts (queue/child.py), in the shape of the SDK's own. `job` is
    `{"id", "outcome": "taken"}`, or how the job ended, with its seconds and POSTs."""
    print(json.dumps({"requestId": job and job["id"], "message": message, "level": level, "job": job}), flush=True)


def check_size(size: int, job_id: str) -> None:
    """Raises JobError where a result of so many bytes is more than RunPod takes."""
    limit = SYNC_RESULT_LIMIT if job_id.startswith("sync-") else RESULT_LIMIT
    if size > limit - ENVELOPE_ROOM:
        message = f"The result is larger than the {limit // 1_000_000} MB that RunPod takes"
        raise JobError(f"{message}: ask for less, or send it as several jobs.", 413)


class GatewayClient:
    """Speaks HTTP over the gateway's private socket. Its `session` is to be closed."""

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
        """Sends the request, and gives the answer. Raises JobError where that is an error."""
        url = URL(f"http://gateway{request.path}", encoded=True)
        headers = {"X-Request-Id": request_id, **request.headers}
        async with self.session.request(request.method, url, data=request.body, headers=headers) as response:
            if response.status >= 400:
                raise JobError.from_answer(await response.read(), response.status, request.path)
            yield response

    async def read(self, route: str, find: Callable[[Any], Any]) -> Any:
        """Returns what `find` sees in a small answer's JSON; None where it fails, or nothing comes within a second."""
        try:
            async with asyncio.timeout(1), self.session.get(f"http://gateway{route}") as response:
                return find(await response.json())
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return None


@dataclass(slots=True)
class Answer:
    """Reads the answer of one job."""

    job: TakenJob
    gateway: GatewayClient
    reader: Reader
    is_list: bool = True  # RunPod's clients get a list of what came, or the object itself
    first_byte_at: float = 0.0  # when vLLM's first bytes came

    async def pieces(self) -> AsyncGenerator[object, None]:
        """Yields the pieces of a stream as they come, or else the only one. The generator is to be closed; then vLLM
        hears of it at once. Raises JobError where there is no answer, or it breaks off."""
        try:
            if self.job.error is not None:
                raise self.job.error
            plan = self.reader.read(self.job.content)
            self.is_list = plan.is_list
            if plan.request is None:
                results = await self._ask_batch(plan.batch)
                yield {"model": self.reader.model, "count": len(results), "results": results}
                return
            async with self.gateway.ask(plan.request, self.job.job_id) as response:
                if plan.is_list and response.content_type == "text/event-stream":
                    stream = self._read_stream(response.content)
                    async for piece in plan.token_batches.group(stream) if plan.token_batches else stream:
                        yield piece
                else:
                    yield await self._read_body(response, plan)
        except Exception as error:  # noqa: BLE001  # whatever it is, the job must not end as if it were done
            raise _convert_error(error) from None

    async def _read_stream(self, content: aiohttp.StreamReader) -> AsyncIterator[str]:
        """Yields the first event at once and by itself, then whatever has gathered when the last piece is posted."""
        buffer, has_begun, error_event, chunk = bytearray(), False, None, ""
        while chunk or not content.at_eof():
            buffer += content.read_nowait() if chunk else await content.readany()
            self.first_byte_at = self.first_byte_at or time.monotonic()
            if chunk := cut_chunk(buffer, has_begun=has_begun, has_ended=content.at_eof()):
                has_begun, error_event = True, error_event or ERROR_EVENT.search(chunk)
                yield chunk
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CHUNK_GAP):
                        await content.wait_eof()  # nothing is waited for once the end is there
        if error_event is not None:
            raise JobError.from_answer((error_event[1] or error_event[2] or "").encode())

    async def _ask_batch(self, items: tuple[Callable[[], Plan], ...]) -> list[object]:
        """Returns all results. Raises JobError where the engine failed each: what is the same for all is the job's."""
        results: list[object] = [None] * len(items)
        pending = iter(enumerate(items))

        async def ask_items() -> None:
            for index, read in pending:
                await asyncio.sleep(0)  # an item that can't be read must not hold up other jobs
                try:
                    plan = read()
                    assert plan.request is not None
                    async with self.gateway.ask(plan.request, f"{self.job.job_id}-{index}") as response:
                        results[index] = await self._read_body(response, plan)
                except Exception as error:  # noqa: BLE001  # whatever it is, it is this item's result
                    results[index] = _convert_error(error.with_traceback(None))

        await asyncio.gather(*(ask_items() for _ in range(min(BATCH_CONCURRENCY, len(items)))))
        failures = [result for result in results if isinstance(result, JobError) and result.status >= 500]
        if len(failures) == len(results):
            raise failures[0]
        return [result.batch_item if isinstance(result, JobError) else result for result in results]

    async def _read_body(self, response: aiohttp.ClientResponse, plan: Plan) -> object:
        """Returns JSON as an object, text as text, and everything else as base64 with its type."""
        self.first_byte_at = self.first_byte_at or time.monotonic()
        try:
            body = await response.content.readexactly(SYNC_RESULT_LIMIT)
        except asyncio.IncompleteReadError as error:
            body = error.partial
        check_size(len(body), self.job.job_id)
        content_type = response.content_type
        if body and (content_type == "application/json" or content_type.endswith("+json")):
            try:
                answer = json.loads(body, parse_constant=lambda _: None)  # NaN, which is no JSON
            except ValueError as error:
                raise JobError(f"The answer is no JSON ({error}).", 502) from None
            if isinstance(answer, dict) and answer.get("error"):
                raise JobError.from_answer(body, 502)
            return plan.reshape(answer) if plan.reshape is not None and isinstance(answer, dict) else answer
        if content_type.startswith("text/") or not body:
            return body.decode("utf-8", "replace")
        return {"content_type": content_type, "base64": base64.b64encode(body).decode()}


def _convert_error(error: Exception) -> JobError:
    if isinstance(error, JobError):
        return error
    if isinstance(error, aiohttp.ClientPayloadError):
        return JobError.from_answer(b"")
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return JobError(f"The gateway gave no answer ({error or type(error).__name__}).", 502)
    return JobError(f"The worker could not do this job ({type(error).__name__}).", 500)


def cut_chunk(buffer: bytearray, *, has_begun: bool, has_ended: bool = False) -> str:
    """Takes the next chunk off the buffer, as text: "" where no event is complete. `has_begun`: the first event is
    through. `has_ended`: what is left is a chunk although no event's end follows."""
    events = (has_begun and ALL_EVENTS.match(buffer, 0, CHUNK_LIMIT)) or FIRST_EVENT.match(buffer)
    end = events.end() if events else 0
    if end > EVENT_LIMIT or (not end and (has_ended or len(buffer) > EVENT_LIMIT)):
        end = CHUNK_LIMIT
    # A character that would be torn stays. What is no UTF-8 has no place in JSON; vLLM's events are JSON themselves.
    text, end = codecs.utf_8_decode(buffer[:end], "replace", has_ended and end >= len(buffer))
    del buffer[:end]
    return text
