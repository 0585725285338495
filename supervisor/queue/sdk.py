"""The runpod SDK (1.12), with its faults contained. Importing this imports the SDK: 2 s.

What is replaced, and why; `tests/queue/test_sdk.py` fails when a new SDK no longer has the fault, or moves the seam:

| seam | fault |
| --- | --- |
| `rp_scale.get_job` | asks again at once after 401, refused, 204: 1000s per second; loses jobs without `input` |
| the same | a job that waits to be begun counts twice: half-full looks full, and the SDK sleeps for 1 s |
| `rp_scale.get_stop_signals` | a line of log per second where there is no stop channel; a queued job can't be stopped |
| `rp_job.stream_result`, `rp_job.send_result` | a 429, a reset, a timeout or a lone surrogate loses the data |
| `rp_scale.JobScaler.run` | its own drain waits for long polls, and drops a job that they still bring |
| `cpuinfo` | imported for a debugger, it runs several programs: 1 s |
| `os.fork` | the heartbeat's process outlives the worker and keeps it alive for RunPod |
"""

# ruff: noqa: E402
from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import tenacity

# For a debugger that nobody asked for, the SDK's import asks several programs about the CPU: 1 s of work.
sys.modules.setdefault("cpuinfo", types.SimpleNamespace(get_cpu_info=lambda: {"brand_raw": ""}))  # type: ignore[arg-type]

import runpod
from runpod.serverless.modules import rp_http, rp_job, rp_scale

from supervisor.queue.jobs import JSON, JobError
from supervisor.queue.report import tell

if TYPE_CHECKING:
    from supervisor.queue.worker import Run, Worker

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
# The supervisor's words (see queue/child.py): with these jobs are taken (`failed`: only to be told why) ...
JOINED = frozenset({"ready", "failed"})
# ... and after these none is. `expire`: no more time for those that run; `gone`: the supervisor itself is no more.
ENDING = frozenset({"draining", "expire", "gone"})
# How long jobs have, in seconds, to be reported as failed once the supervisor is gone.
LAST_WORDS = 3.0
# Seconds. RunPod holds a poll for up to half a minute; the SDK gives up after 90.
POLL_TIMEOUT = aiohttp.ClientTimeout(total=85, sock_connect=10)
POST_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
# An answer without a job that comes sooner than this was no long poll: the next one waits, longer each time.
INSTANT = 0.5
SLOWEST_POLL = 10.0
# A result or chunk is sent again for so long.
PATIENCE = 90.0
FIRST_PAUSE = 0.2
# Nothing but these is worth another try.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
# What RunPod takes as one chunk.
CHUNK_BYTES = 1_000_000
# As the SDK sends them: RunPod is used to it.
POST_HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}


class NotTaken(Exception):
    """RunPod did not take a POST; `transient`: it may take the same one later."""

    def __init__(self, reason: str, *, transient: bool) -> None:
        super().__init__(reason)
        self.transient = transient


def serve(worker: Worker, jobs: int) -> None:
    """Joins the queue, with up to `jobs` at once; returns when the supervisor has said to end and all is reported."""
    link = Link(worker, jobs)
    # mypy sees no types in the SDK; tests/queue/test_sdk.py checks that all of these are there.
    rp_scale.get_job = link.take
    rp_scale.get_stop_signals = link.stops
    rp_job.stream_result = link.post_chunk
    rp_job.send_result = link.post_result
    run = rp_scale.JobScaler.run
    rp_scale.JobScaler.run = lambda scaler: link.run(run(scaler))
    os.register_at_fork(after_in_child=_die_with_parent)
    runpod.serverless.start(
        {
            "handler": worker.handle,
            "return_aggregate_stream": True,
            # A change would stop the intake until all jobs are done; a pause is `Link.take` waiting.
            # And it counts a job that waits to be begun twice, and sleeps for 1 s when it thinks that it is full: it is
            # told more than that comes to, and `Link.take` keeps the limit.
            "concurrency_modifier": lambda _: 2 * jobs + 1,
        }
    )


def _die_with_parent() -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def encode(content: JSON) -> bytes:
    """A lone surrogate, which a model can write and JSON can carry, is no UTF-8."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


class Pace:
    """How long to wait before the next poll: not at all after a good one, then 0.1 s, 0.2 s ... 10 s."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.failures = 0
        self._told = ""

    def delay(self) -> float:
        return 0.0 if not self.failures else min(0.1 * 2 ** (self.failures - 1), SLOWEST_POLL)

    def good(self) -> None:
        if self._told:
            tell(f"{self.what}: RunPod answers again")
        self.failures, self._told = 0, ""

    def bad(self, problem: str = "") -> None:
        """`problem` is logged when it is a new one; without one it was only too fast."""
        self.failures = min(self.failures + 1, 20)
        if problem and problem != self._told:
            tell(f"{self.what}: {problem}", "WARNING")
            self._told = problem


class Link:
    """Between the SDK's loops and RunPod."""

    def __init__(self, worker: Worker, jobs: int) -> None:
        self.worker = worker
        self.jobs = jobs
        self.polls: set[asyncio.Task[Any]] = set()
        self.receiving: set[asyncio.Task[Any]] = set()  # of these: jobs are on their way, and must not be dropped
        self.taking = Pace("taking jobs")
        self.stopping = Pace("stop channel")
        self.joined = asyncio.Event()
        self.order = worker.orders.latest

    # The worker's life

    async def run(self, loops: Coroutine[Any, Any, None]) -> None:
        """In place of `JobScaler.run`: the SDK's loops, until the supervisor ends them."""
        running = asyncio.create_task(loops)
        loop = asyncio.get_running_loop()
        # The SDK's handler would end its loops with a job on its way to them. `docker stop` does not reach us anyway.
        loop.add_signal_handler(signal.SIGTERM, self.heard, "draining")
        self.worker.orders.follow(self.heard)
        self.heard(self.worker.orders.latest)
        ending = asyncio.create_task(self._drained())
        await asyncio.wait({running, ending}, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await self.worker.client.close()

    def heard(self, order: str) -> None:
        """The engine's state changed, or the supervisor ends."""
        if order in JOINED:
            self.joined.set()
        else:
            self.joined.clear()
            for poll in self.polls - self.receiving:  # nothing is taken that could not be done
                poll.cancel()
        if order in ("expire", "gone"):
            self.worker.expire()  # their failure is still reported
        if order == "gone":
            asyncio.get_running_loop().call_later(LAST_WORDS, os._exit, 1)
        self.order = order
        self.worker.changed.set()

    async def _drained(self) -> None:
        """Returns when the supervisor wants the end, no poll is open, and every job that was taken is reported."""
        while self.order not in ENDING or self.polls or self.worker.runs:
            self.worker.changed.clear()
            await self.worker.changed.wait()

    async def _poll(self, pace: Pace, poll: Callable[[], Coroutine[Any, Any, T | None]]) -> T | None:
        """One long poll that `heard` may cancel, no sooner than its pace allows. None without an answer."""
        task = asyncio.create_task(self._paced(pace, poll))
        self.polls.add(task)
        try:
            await asyncio.wait({task})
            return None if task.cancelled() else task.result()
        finally:
            task.cancel()
            self.polls.discard(task)
            self.receiving.discard(task)
            self.worker.changed.set()

    async def _paced(self, pace: Pace, poll: Callable[[], Coroutine[Any, Any, T | None]]) -> T | None:
        await asyncio.sleep(pace.delay())
        began = time.monotonic()
        try:
            answer = await poll()
        except TimeoutError:
            return None  # held for longer than we wait
        except (aiohttp.ClientError, OSError, ValueError, NotTaken) as error:
            pace.bad(f"{error or type(error).__name__}")
            return None
        if answer or time.monotonic() - began > INSTANT:
            pace.good()
        else:
            pace.bad()
        return answer

    # In place of the SDK's functions

    async def take(self, session: aiohttp.ClientSession, count: int) -> list[JSON] | None:
        """`rp_scale.get_job`: as many jobs as there is room for, once the engine can do them."""
        while not self.joined.is_set() or len(self.worker.runs) >= self.jobs:
            self.worker.changed.clear()
            await self.worker.changed.wait()
        room = min(count, self.jobs - len(self.worker.runs))
        jobs = await self._poll(self.taking, lambda: self._ask_for_jobs(session, room)) or []
        # One that we have already: RunPod took us for dead, and gave it out again.
        jobs = [job for job in jobs if job["id"] not in self.worker.runs]
        for job in jobs:
            self.worker.begin(job)
        return jobs

    async def _ask_for_jobs(self, session: aiohttp.ClientSession, count: int) -> list[JSON] | None:
        async with session.get(rp_job._job_get_url(count), timeout=POLL_TIMEOUT) as response:
            if response.status in (204, 400):  # 400: FlashBoot, says the SDK
                return None
            if response.status != 200:
                raise NotTaken(f"RunPod answers {response.status}", transient=True)
            self.receiving |= {task for task in self.polls if task is asyncio.current_task()}
            body = await response.read()
        try:
            content = json.loads(body) if body else None
        except RecursionError:
            raise NotTaken("a job came that is nested too deeply to be read", transient=False) from None
        found = content if isinstance(content, list) else [content]
        jobs = [job for job in found if isinstance(job, dict) and isinstance(job.get("id"), str) and job["id"]]
        if len(jobs) < len(found) and content is not None:
            tell(f"{len(found) - len(jobs)} jobs came without an id: nobody can be told", "ERROR")
        for job in jobs:
            job.setdefault("input", {})  # left out by RunPod where it is empty
        return jobs

    async def stops(self, session: aiohttp.ClientSession) -> list[str]:
        """`rp_scale.get_stop_signals`: ids of jobs that nobody waits for any more."""
        ids = await self._poll(self.stopping, lambda: self._ask_for_stops(session)) or []
        for job_id in ids:
            self.worker.cancel(job_id)  # the SDK knows it only from when it is at work on it
        return ids

    async def _ask_for_stops(self, session: aiohttp.ClientSession) -> list[str] | None:
        url = rp_job._job_stop_url()
        assert url is not None  # or the SDK does not ask
        async with session.get(url, timeout=POLL_TIMEOUT) as response:
            if response.status == 204:
                return None
            if response.status != 200:
                raise NotTaken(f"RunPod answers {response.status}", transient=True)
            content = json.loads(await response.read())
        ids = content.get("jobsToStop") if isinstance(content, dict) else None
        return [job_id for job_id in ids or [] if isinstance(job_id, str)]

    async def post_chunk(self, session: aiohttp.ClientSession, content: JSON, job: JSON) -> None:
        """`rp_job.stream_result`. A chunk that can't be delivered fails the job: a stream with a gap is worse."""
        run = self.worker.runs.get(job["id"])
        template = rp_http.JOB_STREAM_URL
        if run is None or not run.as_list or "://" not in template:  # in the Hub's tests nobody listens to streams
            return
        body = encode(content)
        if not run.streams and len(body) > CHUNK_BYTES:
            return  # RunPod would refuse it as a chunk; the result has it
        run.sequence += 1
        try:
            await self._post(session, template, body, run, f"{run.attempt}/{run.sequence}", stream=False)
        except NotTaken as error:
            tell(f"a chunk could not be delivered: {error}", "ERROR", job_id=run.job_id)
            run.fail(
                JobError(f"A part of the stream could not be delivered to RunPod ({error}).", 502, "upstream_error")
            )

    async def post_result(
        self, session: aiohttp.ClientSession, content: JSON, job: JSON, is_stream: bool = False
    ) -> None:
        """`rp_job.send_result`."""
        run = self.worker.runs[job["id"]]
        stream = is_stream and run.as_list
        if not run.as_list and content.get("output"):  # the object itself, as of a handler that is no generator
            content = {"output": content["output"][0]}
        bodies = [content]
        self.worker.done += 1
        if self.worker.done == 1 and (start := await self.worker.client.start_of_engine()) is not None:
            # The first job waited for all of this. Should RunPod not like what it does not know: once more, without.
            bodies.insert(0, {**content, "metadata": {"cold_start": start}})
            phases = ", ".join(f"{row['name']} {row['seconds']:.1f} s" for row in start["phases"])
            tell(f"the first job since vLLM's start ({start['seconds']:.1f} s: {phases})", job_id=run.job_id)
        try:
            await self._post_result(session, bodies, run, stream=stream)
        except NotTaken as error:
            run.tell("undelivered", str(error), "ERROR")
            return
        if run.error is not None:
            # Of a 4xx no words: vLLM's quote what the user sent.
            why = run.error.message if run.error.status >= 500 else run.error.kind
            run.tell("failed", f"{run.error.status}, {why}", "WARNING")
        else:
            run.tell("completed")

    async def _post_result(self, session: aiohttp.ClientSession, bodies: list[JSON], run: Run, *, stream: bool) -> None:
        """The first of them that RunPod takes; if none, an error. Raises NotTaken."""
        refused: NotTaken | None = None
        for number, content in enumerate(bodies):
            key = f"{run.attempt}/again" if number else run.attempt  # chunks have numbers there
            try:
                return await self._post(session, rp_http.JOB_DONE_URL, encode(content), run, key, stream=stream)
            except NotTaken as error:
                if error.transient:
                    raise
                refused = error
        # Too large, most likely. An error is small, and says more to who waits than an empty result.
        run.error = JobError(f"RunPod did not take the result ({refused}).", 502, "upstream_error")
        body = encode({"error": run.error.text})
        await self._post(session, rp_http.JOB_DONE_URL, body, run, f"{run.attempt}/error", stream=stream)
        return None

    async def _post(
        self, session: aiohttp.ClientSession, template: str, body: bytes, run: Run, key: str, *, stream: bool
    ) -> None:
        """Until RunPod has taken it, in order: the next one waits for this. Raises NotTaken."""
        job_id, what = run.job_id, "result" if template == rp_http.JOB_DONE_URL else "chunk"
        url = template.replace("$ID", job_id)
        url += f"{'&' if '?' in url else '?'}isStream={'true' if stream else 'false'}"
        # After a reset nobody knows whether it was taken; who knows this header does.
        headers = {**POST_HEADERS, "X-Request-ID": job_id, "Idempotency-Key": key}

        async def once() -> None:
            try:
                async with session.post(url, data=body, headers=headers, timeout=POST_TIMEOUT) as response:
                    if response.status >= 400:
                        transient = response.status in TRANSIENT
                        run.posts[f"{what} {'failed' if transient else 'refused'}"] += 1
                        raise NotTaken(f"RunPod answers {response.status}", transient=transient)
                    await response.read()
                    run.posts[f"{what} taken"] += 1
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                run.posts[f"{what} failed"] += 1
                raise NotTaken(f"{error or type(error).__name__}", transient=True) from error

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
        await retrying(once)
