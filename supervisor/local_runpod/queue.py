"""A RunPod endpoint's queue in memory: jobs, the workers that take them, limits of size and time. No HTTP.

Everything runs on one event loop, and no method changes anything across an `await`. Times are seconds of the monotonic
clock, which is the loop's.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

RUNPOD_CHUNK_LIMIT = 1_000_000  # bytes
# Bytes and seconds, by whether the job came through /runsync. The limits are for requests and results alike.
JOB_LIMITS = {False: 10_000_000, True: 20_000_000}
RETENTION = {False: 30 * 60.0, True: 60.0}
# This holds where a request says nothing else. Its times are milliseconds.
DEFAULT_POLICY = {"executionTimeout": 600_000, "ttl": 24 * 3_600_000, "lowPriority": False}
JOB_FIELDS = ("input", "webhook", "policy", "s3Config")  # a worker gets these of a request
RESULT_FIELDS = ("output", "metadata", "error")  # clients get these; whether RunPod keeps metadata is not known
LOST_MESSAGE = "job timed out after 1 retries"
# A worker that was not heard of for the hold of a poll and so many seconds more is no worker any more.
WORKER_EXPIRY = 60.0


class Status(StrEnum):
    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"
    EXPIRED = "EXPIRED"  # its TTL or retention is over: nobody can ask for it any more


class BadRequest(Exception):
    """What was sent is not taken; the text says why."""


class Pulse(asyncio.Event):
    """Wakes all who wait for a change. It is never left set: who waits looks again."""

    def beat(self) -> None:
        self.set()  # those who wait are on their way already, so it can be cleared at once
        self.clear()

    async def wait_until(self, condition: Callable[[], object], seconds: float | None = None) -> None:
        """Returns when the condition holds, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    await self.wait()


@dataclass(slots=True, eq=False)
class Worker:
    name: str
    last_seen_at: float = 0.0
    is_unhealthy: bool = False  # by its last ping
    stop_ids: list[str] = field(default_factory=list)  # jobs that it must stop and was not told yet
    stop_signal: Pulse = field(default_factory=Pulse)


@dataclass(eq=False)
class Job:
    id: str
    request: dict[str, Any]
    is_sync: bool
    policy: dict[str, Any]
    created_at: float = field(default_factory=time.monotonic)
    status: Status = Status.IN_QUEUE
    taken_at: float | None = None
    done_at: float | None = None
    worker: Worker | None = None  # the one that has it now, or had it last
    retries: int = 0
    result: dict[str, Any] = field(default_factory=dict)  # `output`, `metadata` and `error`, where there are any
    chunks: list[Any] = field(default_factory=list)  # each one's `output`
    chunks_read: int = 0  # how many of these /stream has given out
    post_keys: set[str] = field(default_factory=set)  # the keys of the posts that were taken
    change: Pulse = field(default_factory=Pulse)
    timers: dict[Callable[[Job], None], asyncio.TimerHandle] = field(default_factory=dict)  # what ends its status

    @property
    def is_over(self) -> bool:
        return self.status not in (Status.IN_QUEUE, Status.IN_PROGRESS)

    def worker_view(self) -> dict[str, Any]:
        """Returns the job as a worker gets it. An empty object is left out, as the platform does with an input."""
        return {"id": self.id} | {name: self.request[name] for name in JOB_FIELDS if self.request.get(name, {}) != {}}

    def client_view(self) -> dict[str, Any]:
        """Returns the job as a client sees it."""
        view: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.taken_at is not None and self.worker is not None:
            view |= {"delayTime": round((self.taken_at - self.created_at) * 1000), "workerId": self.worker.name}
            if self.done_at is not None:
                view["executionTime"] = round((self.done_at - self.taken_at) * 1000)
        if self.retries:
            view["retries"] = self.retries
        return view | self.result


class Queue:
    """An empty poll stays open for `hold` seconds; a taken job may be in no ping of its worker for `lost_after`."""

    def __init__(self, hold: float, lost_after: float) -> None:
        self.hold = hold
        self.lost_after = lost_after
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, Worker] = {}
        self.retries = 0
        self._waiting_jobs: list[Job] = []  # the next one first
        self._arrival = Pulse()
        self._poll_lock = asyncio.Lock()  # it is fair: pollers are served in the order in which they came

    # The client's side

    def submit(self, request: Any, *, sync: bool) -> Job:
        """Puts a request in the queue, and returns its job. Raises BadRequest if it is none."""
        if not isinstance(request, dict) or "input" not in request:
            raise BadRequest("the body must be an object with the key `input`")
        overrides = request.get("policy")
        if not isinstance(overrides, dict | None):
            raise BadRequest("policy must be an object")
        policy = DEFAULT_POLICY | (overrides or {})
        for name in ("executionTimeout", "ttl"):
            if type(policy[name]) not in (int, float) or not 0 < policy[name] < 1e15:
                raise BadRequest(f"policy.{name} must be a number of milliseconds")
        job = Job(f"{'sync-' if sync else ''}{uuid.uuid4()}-u1", request, sync, policy)
        self.jobs[job.id] = job
        self._enqueue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Cancels a job, but does nothing to one that is over."""
        if not job.is_over:
            self._end(job, Status.CANCELLED)

    def retry(self, job: Job) -> None:
        """Runs a job again that failed, as if it were new. Raises BadRequest for others."""
        if job.status not in (Status.FAILED, Status.TIMED_OUT):
            raise BadRequest("only jobs that are FAILED or TIMED_OUT can be retried")
        self.retries += 1
        job.created_at, job.chunks_read, job.retries = time.monotonic(), 0, 0
        job.chunks, job.post_keys = [], set()
        self._enqueue(job)

    def purge(self) -> int:
        waiting = list(self._waiting_jobs)
        for job in waiting:
            self.cancel(job)
        return len(waiting)

    def health(self) -> dict[str, dict[str, int]]:
        counts = Counter(job.status for job in self.jobs.values())
        cutoff = time.monotonic() - self.hold - WORKER_EXPIRY
        known = [worker for worker in self.workers.values() if worker.last_seen_at > cutoff]
        ready = {worker for worker in known if not worker.is_unhealthy}
        running = ready & {job.worker for job in self.jobs.values() if job.status is Status.IN_PROGRESS}
        jobs = {"inQueue": counts[Status.IN_QUEUE], "inProgress": counts[Status.IN_PROGRESS], "retried": self.retries}
        jobs |= {"completed": counts[Status.COMPLETED], "failed": counts[Status.FAILED] + counts[Status.TIMED_OUT]}
        workers = {"ready": len(ready), "running": len(running), "idle": len(ready - running)}
        workers |= {"unhealthy": len(known) - len(ready), "initializing": 0, "throttled": 0}
        return {"jobs": jobs, "workers": workers}

    # The workers' side

    def note_worker(self, name: str) -> Worker:
        """Returns the worker of that name, and notes that it has just been heard of."""
        worker = self.workers.setdefault(name, Worker(name))
        worker.last_seen_at = time.monotonic()
        return worker

    async def take(self, worker: Worker, count: int) -> list[Job]:
        """Returns up to `count` jobs, the oldest first, as soon as there is one; none after the hold."""
        jobs: list[Job] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.hold), self._poll_lock:
                await self._arrival.wait_until(lambda: self._waiting_jobs)
                jobs, self._waiting_jobs = self._waiting_jobs[:count], self._waiting_jobs[count:]
        for job in jobs:
            job.worker = worker
            self._enter(job, Status.IN_PROGRESS)
        return jobs

    def put_back(self, jobs: list[Job]) -> None:
        """Puts these jobs back into the queue, as they never reached the worker."""
        for job in jobs:
            if job.status is Status.IN_PROGRESS:
                self._enqueue(job)

    def stop(self, worker: Worker, job_ids: list[str]) -> None:
        """Tells the worker that it must stop these jobs."""
        worker.stop_ids += job_ids
        worker.stop_signal.beat()

    async def take_stops(self, worker: Worker) -> list[str]:
        """Returns the ids of jobs that the worker must stop, as soon as there is one; none after the hold."""
        await worker.stop_signal.wait_until(lambda: worker.stop_ids, self.hold)
        ids, worker.stop_ids = worker.stop_ids, []
        return ids

    def receive_ping(self, worker: Worker, params: Mapping[str, str]) -> None:
        worker.is_unhealthy = params.get("status") == "unhealthy"
        for name in params.get("job_id", "").split(","):
            job = self.jobs.get(name)
            if job and job.worker is worker and job.status is Status.IN_PROGRESS:
                self._set_timer(job, self._lose, self.lost_after)

    def store_chunk(self, worker: Worker, job: Job, body: bytes, key: str) -> None:
        """Stores a part of the output. Raises BadRequest where it is none."""
        if self.is_ignored(worker, job, key):
            return
        if len(body) > RUNPOD_CHUNK_LIMIT or "output" not in (content := parse_json(body, dict)):
            raise BadRequest(f"a chunk is an object with the key `output`, of {RUNPOD_CHUNK_LIMIT} bytes at most")
        job.post_keys.add(key)
        job.chunks.append(content["output"])
        job.change.beat()

    def store_result(self, worker: Worker, job: Job, body: bytes, key: str) -> None:
        """Stores progress, or ends the job. Raises BadRequest where it is neither."""
        if self.is_ignored(worker, job, key):
            return
        if len(body) > JOB_LIMITS[job.is_sync]:
            job.result = {}
            self._enter(job, Status.COMPLETED)  # without output, which is what users of the platform have seen
            raise BadRequest("the result is too large")
        content = parse_json(body, dict)
        job.post_keys.add(key)
        job.result = {name: content[name] for name in RESULT_FIELDS if content.get(name) is not None}
        if content.get("status") == "IN_PROGRESS":
            job.change.beat()
        else:
            self._enter(job, Status.FAILED if "error" in job.result else Status.COMPLETED)

    def is_ignored(self, worker: Worker, job: Job, key: str) -> bool:
        """Says whether the job has this post already, or waits for none from this worker."""
        return key in job.post_keys or job.status is not Status.IN_PROGRESS or job.worker is not worker

    # What a job goes through

    def _enter(self, job: Job, status: Status) -> None:
        """Changes the status: what would have ended the old one is off, and what ends the new one by itself is set."""
        for timer in job.timers.values():
            timer.cancel()
        job.timers.clear()
        job.status, now = status, time.monotonic()
        remaining_ttl = job.created_at + job.policy["ttl"] / 1000 - now
        match status:
            case Status.IN_QUEUE:
                self._set_timer(job, self._expire, remaining_ttl)
            case Status.IN_PROGRESS:
                job.taken_at = now
                self._set_timer(job, self._expire, remaining_ttl)
                self._set_timer(job, self._time_out, job.policy["executionTimeout"] / 1000)
                self._set_timer(job, self._lose, self.lost_after)
            case Status.EXPIRED:
                del self.jobs[job.id]
            case _:
                job.done_at = now
                self._set_timer(job, self._expire, min(remaining_ttl, RETENTION[job.is_sync]))
        job.change.beat()

    def _set_timer(self, job: Job, end: Callable[[Job], None], seconds: float) -> None:
        if timer := job.timers.get(end):
            timer.cancel()
        job.timers[end] = asyncio.get_running_loop().call_later(seconds, end, job)

    def _enqueue(self, job: Job) -> None:
        """Puts a job in its place, even if it comes again: the oldest first, those of low priority last."""
        job.taken_at, job.done_at, job.worker, job.result = None, None, None, {}
        self._enter(job, Status.IN_QUEUE)
        bisect.insort(self._waiting_jobs, job, key=lambda job: (bool(job.policy["lowPriority"]), job.created_at))
        self._arrival.beat()

    def _end(self, job: Job, status: Status) -> None:
        """Ends a job from outside: it leaves the queue, or its worker is told."""
        if job.status is Status.IN_QUEUE:
            self._waiting_jobs.remove(job)
        elif job.status is Status.IN_PROGRESS and job.worker is not None:
            self.stop(job.worker, [job.id])
        self._enter(job, status)

    def _expire(self, job: Job) -> None:
        self._end(job, Status.EXPIRED)

    def _time_out(self, job: Job) -> None:
        self._end(job, Status.TIMED_OUT)

    def _lose(self, job: Job) -> None:
        """Queues a job again, once, because no ping of its worker names it any more."""
        if job.retries:
            job.result = {"error": LOST_MESSAGE}
            self._enter(job, Status.FAILED)
        else:
            job.retries = 1
            self.retries += 1
            self._enqueue(job)


def parse_json(text: bytes, expected_type: type = object) -> Any:
    """Returns what JSON of any content type says. Raises BadRequest if it is none (as NaN), or of another type."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(content, expected_type):
        raise BadRequest("the body is not the JSON that is expected")
    return content


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
