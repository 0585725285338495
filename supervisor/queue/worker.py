"""The runpod SDK's worker, as a child of the supervisor: takes RunPod's jobs and asks the gateway for their answers.

The supervisor writes the engine's state to our standard input, a word per line; its end means that the supervisor is
gone. The SDK is imported while vLLM loads, and joins the queue when the engine is ready (or has failed for good: then
each job gets the diagnosis). Reading vLLM's answer and posting it to RunPod go on side by side: what arrives while a
chunk is being posted becomes the next chunk.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from supervisor.queue.events import CHUNK_LIMIT, Events
from supervisor.queue.jobs import JSON, Job, JobError, Reader, Request, batch_result
from supervisor.queue.report import tell

# Seconds from the end of one chunk's POST to the next one: some tokens gather, and nobody reads faster.
CHUNK_GAP = 0.05
# RunPod's limits on a result, with room for what is around it.
RESULT_LIMIT, SYNC_RESULT_LIMIT = 10_000_000 - 50_000, 20_000_000 - 50_000
ERROR_LIMIT = 1_000_000
# Seconds; the SDK begins a job that it has within 0.1 s.
FORGOTTEN_AFTER = 5.0
START_PATIENCE = 1.0
# Of one batch, at once; the rest of it waits its turn here instead of in vLLM.
BATCH_CONCURRENCY = 100
SHUT_DOWN = JobError(
    "The worker was shut down before this job was done (SUPERVISOR_DRAIN_TIMEOUT). Please send it again.",
    503,
    "service_unavailable",
    code="shutting_down",
)
CUT = JobError(
    "The engine stopped in the middle of this answer. Please send the job again.", 503, "service_unavailable"
)


class Orders:
    """The supervisor's words on standard input: `wait()` for the next ones before there is an event loop, then
    `follow`. `latest` is what holds now."""

    def __init__(self) -> None:
        self.latest = "starting"
        self._rest = b""

    def wait(self) -> str:
        self._read()
        return self.latest

    def follow(self, changed: Any) -> None:
        loop = asyncio.get_running_loop()

        def readable() -> None:
            self._read()
            if self.latest == "gone":
                loop.remove_reader(0)
            changed(self.latest)

        loop.add_reader(0, readable)

    def _read(self) -> None:
        data = os.read(0, 4096)
        *words, self._rest = (self._rest + data).split(b"\n")
        if words:
            self.latest = words[-1].decode()
        if not data:
            self.latest = "gone"


START = Request("GET", "/status")


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
        headers = {"X-Request-Id": request_id, **dict(request.headers)}
        return self._session.request(request.method, url, data=request.body, headers=headers)

    async def start_of_engine(self) -> JSON | None:
        """How long vLLM's latest start took, phase by phase."""
        try:
            async with asyncio.timeout(START_PATIENCE), self.ask(START, "start") as response:
                phases = (await response.json())["phases"]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError):
            return None
        return {"seconds": round(sum(row["seconds"] for row in phases), 3), "phases": phases}

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class Run:
    """One job. A task of its own reads the answer, so that it is never held up by a POST, nor left open by a cancel.

    `pieces()` gives what the SDK has to post: chunks of text of an event stream, or the one object.
    """

    def __init__(self, job_id: str, client: Client, reader: Reader, content: object) -> None:
        self.job_id = job_id
        self.client = client
        self.reader = reader
        self.events = Events()
        self.object: object = None
        self.error: JobError | None = None
        self.as_list = True
        self.streams = False
        self.cancelled = False
        self.unwanted = False  # RunPod says that nobody waits for it
        self.began = time.monotonic()
        self.first_at = 0.0  # when vLLM's first bytes came
        self.posts: Counter[str] = Counter()  # "chunk taken": how many, and so on
        self.told = False  # how it ended
        self.attempt = os.urandom(4).hex()  # RunPod may give the same job out again
        self.sequence = 0  # of the chunks posted
        self._size = 0
        self._limit = SYNC_RESULT_LIMIT if job_id.startswith("sync-") else RESULT_LIMIT
        self._arrived = asyncio.Event()
        self._task = asyncio.create_task(self._read(content), name=f"job {job_id}")

    def cancel(self) -> None:
        """vLLM hears of it at once: the connection is closed."""
        self.cancelled = True
        self._task.cancel()

    def tell(self, outcome: str, reason: str = "", level: str = "INFO") -> None:
        """How it ended: a line of log, and what the supervisor counts."""
        if self.told:
            return
        self.told = True
        seconds = time.monotonic() - self.began
        line = f"job {outcome} after {seconds:.2f} s"
        if self.first_at:
            line += f", first bytes after {self.first_at - self.began:.3f} s"
        count = self.posts.total()
        line += f", {count} POST{'s' * (count != 1)}" + (f": {reason}" if reason else "")
        job = {"id": self.job_id, "outcome": outcome, "seconds": round(seconds, 4), "posts": self.posts}
        tell(line, level, job_id=self.job_id, job=job)

    def fail(self, error: JobError) -> None:
        """Ends it with an error, whatever vLLM would still say."""
        self.error = self.error or error
        self._task.cancel()

    async def pieces(self) -> AsyncIterator[object]:
        """Raises JobError."""
        posted_at = 0.0
        while True:
            ended = self._task.done()
            if self.error is not None:
                raise self.error
            if self.cancelled:
                raise asyncio.CancelledError
            gap = posted_at + CHUNK_GAP - time.monotonic()
            if self.events.buffer and gap > 0 and not ended and len(self.events.buffer) < CHUNK_LIMIT:
                await asyncio.wait({self._task}, timeout=gap)
            elif text := self.events.cut(ended=ended):
                yield text
                posted_at = time.monotonic()
            elif ended:
                break
            else:
                self._arrived.clear()
                await self._arrived.wait()
        if not self.streams:
            yield self.object

    async def _read(self, content: object) -> None:
        try:
            job = self.reader.read(content)
            self.as_list = job.as_list
            if job.batch:
                self.object = batch_result(self.reader.model, await self._batch(job.batch))
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
        turn = asyncio.Semaphore(BATCH_CONCURRENCY)

        async def one(number: int, item: Job | JobError) -> object:
            try:
                if isinstance(item, JobError):
                    raise item
                async with turn:
                    return await self._single(item, f"{self.job_id}-{number}", stream=False)
            except Exception as error:  # noqa: BLE001  # it does not sink the others
                return {"error": _as_job_error(error).message}

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, item)) for number, item in enumerate(items)]
        return [task.result() for task in tasks]

    async def _single(self, job: Job, request_id: str, *, stream: bool) -> object:
        assert job.request is not None
        async with self.client.ask(job.request, request_id) as response:
            if response.status >= 400:
                raise JobError.of_answer(response.status, await _beginning(response))
            if stream and response.content_type == "text/event-stream":
                self.streams = True
                async for data in response.content.iter_any():
                    # As it grows in JSON: quotes, backslashes and line ends are two bytes there.
                    self._check(len(data) + data.count(b'"') + data.count(b"\\") + data.count(b"\n"))
                    self.first_at = self.first_at or time.monotonic()
                    self.events.feed(data)
                    self._arrived.set()
                return None
            body = bytearray()
            async for data in response.content.iter_any():
                self._check(len(data))
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
        return CUT
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
        if isinstance(answer, dict) and answer.get("error"):  # the SDK would make a Python repr of it
            raise JobError.of_answer(502, body)
        return job.shape(answer) if job.shape is not None and isinstance(answer, dict) else answer
    if content_type.startswith("text/") or not body:
        return body.decode("utf-8", "replace")
    return {"content_type": content_type, "base64": base64.b64encode(body).decode()}


class Worker:
    """What the SDK's worker is given: the handler, and the state of the supervisor. See `queue/sdk.py`."""

    def __init__(self, orders: Orders, client: Client, reader: Reader) -> None:
        self.orders = orders
        self.client = client
        self.reader = reader
        self.runs: dict[str, Run] = {}
        self.changed = asyncio.Event()  # a job ended, among others
        self.done = 0  # jobs

    def begin(self, job: JSON) -> None:
        """A job was taken: its request goes out at once, the SDK gets to it up to 0.1 s later."""
        tell(job={"id": job["id"], "outcome": "taken"})
        self.runs[job["id"]] = Run(job["id"], self.client, self.reader, job.get("input"))

    async def handle(self, job: JSON) -> AsyncIterator[object]:
        """The SDK's handler, a generator. Never raises, or the SDK would post a traceback."""
        if job["id"] not in self.runs:
            self.begin(job)
        run = self.runs[job["id"]]
        task = asyncio.current_task()
        assert task is not None
        # Not `finally`: a generator that is cancelled while its chunk is being posted is left as it stands.
        task.add_done_callback(lambda _: self._over(run))
        try:
            async for piece in run.pieces():
                yield piece
        except JobError as error:
            yield {"error": error.text}

    def _over(self, run: Run) -> None:
        run.cancel()
        run.tell("cancelled" if run.unwanted else "undelivered")
        if self.runs.get(run.job_id) is run:
            del self.runs[run.job_id]
        self.changed.set()

    def cancel(self, job_id: str) -> None:
        """RunPod says that nobody waits for it any more."""
        if run := self.runs.get(job_id):
            run.unwanted = True
            run.cancel()
            # Where the SDK's task is stopped before its first step, nobody else would ever forget it.
            asyncio.get_running_loop().call_later(FORGOTTEN_AFTER, self._over, run)

    def expire(self) -> None:
        for run in list(self.runs.values()):
            run.fail(SHUT_DOWN)


def main() -> None:
    del sys.argv[1:]  # the SDK reads them, abbreviations included
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor
    from supervisor.queue import sdk  # noqa: PLC0415  # 2 s, while vLLM loads

    orders = Orders()
    while orders.latest not in sdk.JOINED:
        if orders.latest in sdk.ENDING:
            return
        orders.wait()
    reader = Reader(
        os.environ["SUPERVISOR_QUEUE_MODEL"],
        llm=os.environ.get("SUPERVISOR_QUEUE_SHAPE") == "llm",
        root=os.environ.get("SUPERVISOR_QUEUE_ROOT", ""),
    )
    worker = Worker(orders, Client(os.environ["SUPERVISOR_QUEUE_SOCKET"]), reader)
    sdk.serve(worker, int(os.environ["SUPERVISOR_QUEUE_JOBS"]))
    # All is reported. Python's own way out of so many modules takes half a second that the drain may not have.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":  # the SDK's heartbeat is a process that imports this file again, from Python 3.14 on
    main()
