"""The queue of a RunPod endpoint, in memory: jobs, the workers that take them, limits of size and time. No HTTP.

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

CHUNK_BYTES = 1_000_000
# By whether the job came through /runsync: requests and results alike.
JOB_BYTES = {False: 10_000_000, True: 20_000_000}
RETENTION = {False: 30 * 60.0, True: 60.0}
# Where a request says nothing else. Its times are milliseconds.
POLICY = {"executionTimeout": 600_000, "ttl": 24 * 3_600_000, "lowPriority": False}
DELIVERED = ("input", "webhook", "policy", "s3Config")  # of a request, to the worker
RESULT = ("output", "metadata", "error")  # of a worker, to the client; whether RunPod keeps metadata is not known
LOST = "job timed out after 1 retries"
# A worker that was not heard of for the hold of a poll and this long is no worker any more.
FORGOTTEN_AFTER = 60.0


class State(StrEnum):
    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"
    EXPIRED = "EXPIRED"  # its TTL or retention is over: nobody can ask for it any more


class Refused(Exception):
    """What was sent is not taken; the text says why."""


class Pulse(asyncio.Event):
    """Wakes all who wait for a change. It is never left set: who waits looks again."""

    def beat(self) -> None:
        self.set()  # those who wait are on their way already, so it can be cleared at once
        self.clear()

    async def until(self, condition: Callable[[], object], seconds: float | None = None) -> None:
        """Returns when the condition holds, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    await self.wait()


@dataclass(slots=True, eq=False)
class Worker:
    name: str
    seen: float = 0.0
    is_unhealthy: bool = False  # by its last ping
    stops: list[str] = field(default_factory=list)  # jobs that it must stop and was not told yet
    told: Pulse = field(default_factory=Pulse)


@dataclass(eq=False)
class Job:
    id: str
    request: dict[str, Any]
    sync: bool
    policy: dict[str, Any]
    created: float = field(default_factory=time.monotonic)
    state: State = State.IN_QUEUE
    taken: float | None = None
    done: float | None = None
    worker: Worker | None = None  # that has it now, or had it last
    retries: int = 0
    result: dict[str, Any] = field(default_factory=dict)  # `output`, `metadata` and `error`, where there are any
    chunks: list[Any] = field(default_factory=list)  # the `output` of each
    read: int = 0  # chunks that /stream has given out
    keys: set[str] = field(default_factory=set)  # of the posts that were taken
    changed: Pulse = field(default_factory=Pulse)
    ends: dict[Callable[[Job], None], asyncio.TimerHandle] = field(default_factory=dict)  # of its state: what, and when

    @property
    def over(self) -> bool:
        return self.state not in (State.IN_QUEUE, State.IN_PROGRESS)

    def delivery(self) -> dict[str, Any]:
        """As a worker gets it. An empty object is left out, as the platform does with an input."""
        return {"id": self.id} | {name: self.request[name] for name in DELIVERED if self.request.get(name, {}) != {}}

    def view(self) -> dict[str, Any]:
        """As a client sees it."""
        shown: dict[str, Any] = {"id": self.id, "status": self.state}
        if self.taken is not None and self.worker is not None:
            shown |= {"delayTime": round((self.taken - self.created) * 1000), "workerId": self.worker.name}
            if self.done is not None:
                shown["executionTime"] = round((self.done - self.taken) * 1000)
        if self.retries:
            shown["retries"] = self.retries
        return shown | self.result


class Queue:
    """`hold`: how long an empty poll stays open. `lost_after`: how long a taken job may be in no ping of its worker."""

    def __init__(self, hold: float, lost_after: float) -> None:
        self.hold = hold
        self.lost_after = lost_after
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, Worker] = {}
        self.retried = 0
        self._waiting: list[Job] = []  # the next one first
        self._arrived = Pulse()
        self._line = asyncio.Lock()  # it is fair: pollers are served in the order in which they came

    # The client's side

    def submit(self, request: Any, *, sync: bool) -> Job:
        """Raises Refused if the request is not one."""
        if not isinstance(request, dict) or "input" not in request:
            raise Refused("the body must be an object with the key `input`")
        given = request.get("policy")
        if not isinstance(given, dict | None):
            raise Refused("policy must be an object")
        policy = POLICY | (given or {})
        for name in ("executionTimeout", "ttl"):
            if type(policy[name]) not in (int, float) or not 0 < policy[name] < 1e15:
                raise Refused(f"policy.{name} must be a number of milliseconds")
        job = Job(f"{'sync-' if sync else ''}{uuid.uuid4()}-u1", request, sync, policy)
        self.jobs[job.id] = job
        self._enqueue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Does nothing to a job that is over."""
        if not job.over:
            self._stop(job, State.CANCELLED)

    def retry(self, job: Job) -> None:
        """Runs a job again that failed, as if it were new; raises Refused for others."""
        if job.state not in (State.FAILED, State.TIMED_OUT):
            raise Refused("only jobs that are FAILED or TIMED_OUT can be retried")
        self.retried += 1
        job.created, job.read, job.retries = time.monotonic(), 0, 0
        job.chunks, job.keys = [], set()
        self._enqueue(job)

    def purge(self) -> int:
        waiting = list(self._waiting)
        for job in waiting:
            self.cancel(job)
        return len(waiting)

    def health(self) -> dict[str, dict[str, int]]:
        states = Counter(job.state for job in self.jobs.values())
        oldest = time.monotonic() - self.hold - FORGOTTEN_AFTER
        known = [worker for worker in self.workers.values() if worker.seen > oldest]
        ready = {worker for worker in known if not worker.is_unhealthy}
        running = ready & {job.worker for job in self.jobs.values() if job.state is State.IN_PROGRESS}
        jobs = {"inQueue": states[State.IN_QUEUE], "inProgress": states[State.IN_PROGRESS], "retried": self.retried}
        jobs |= {"completed": states[State.COMPLETED], "failed": states[State.FAILED] + states[State.TIMED_OUT]}
        workers = {"ready": len(ready), "running": len(running), "idle": len(ready - running)}
        workers |= {"unhealthy": len(known) - len(ready), "initializing": 0, "throttled": 0}
        return {"jobs": jobs, "workers": workers}

    # The workers' side

    def worker(self, name: str) -> Worker:
        """The one of that name, which has just been heard of."""
        worker = self.workers.setdefault(name, Worker(name))
        worker.seen = time.monotonic()
        return worker

    async def take(self, worker: Worker, count: int) -> list[Job]:
        """Up to `count` jobs, the oldest first, as soon as there is one; none after the hold."""
        jobs: list[Job] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.hold), self._line:
                await self._arrived.until(lambda: self._waiting)
                jobs, self._waiting = self._waiting[:count], self._waiting[count:]
        for job in jobs:
            job.worker = worker
            self._enter(job, State.IN_PROGRESS)
        return jobs

    def put_back(self, jobs: list[Job]) -> None:
        """They never reached the worker."""
        for job in jobs:
            if job.state is State.IN_PROGRESS:
                self._enqueue(job)

    def tell(self, worker: Worker, stops: list[str]) -> None:
        """It must stop these jobs."""
        worker.stops += stops
        worker.told.beat()

    async def stops(self, worker: Worker) -> list[str]:
        """The jobs that the worker must stop, as soon as there is one; none after the hold."""
        await worker.told.until(lambda: worker.stops, self.hold)
        ids, worker.stops = worker.stops, []
        return ids

    def ping(self, worker: Worker, params: Mapping[str, str]) -> None:
        worker.is_unhealthy = params.get("status") == "unhealthy"
        for name in params.get("job_id", "").split(","):
            job = self.jobs.get(name)
            if job and job.worker is worker and job.state is State.IN_PROGRESS:
                self._arm(job, self._lose, self.lost_after)

    def chunk(self, worker: Worker, job: Job, body: bytes, key: str) -> None:
        """Stores a part of the output; Refused where it is none."""
        if self.ignores(worker, job, key):
            return
        if len(body) > CHUNK_BYTES or "output" not in (content := parse(body, dict)):
            raise Refused(f"a chunk is an object with the key `output`, of {CHUNK_BYTES} bytes at most")
        job.keys.add(key)
        job.chunks.append(content["output"])
        job.changed.beat()

    def result(self, worker: Worker, job: Job, body: bytes, key: str) -> None:
        """Stores progress, or ends the job; Refused where it is neither."""
        if self.ignores(worker, job, key):
            return
        if len(body) > JOB_BYTES[job.sync]:
            job.result = {}
            self._enter(job, State.COMPLETED)  # without output, which is what users of the platform have seen
            raise Refused("the result is too large")
        content = parse(body, dict)
        job.keys.add(key)
        job.result = {name: content[name] for name in RESULT if content.get(name) is not None}
        if content.get("status") == "IN_PROGRESS":
            job.changed.beat()
        else:
            self._enter(job, State.FAILED if "error" in job.result else State.COMPLETED)

    def ignores(self, worker: Worker, job: Job, key: str) -> bool:
        """Whether the job has this post already, or waits for none from this worker."""
        return key in job.keys or job.state is not State.IN_PROGRESS or job.worker is not worker

    # What a job goes through

    def _enter(self, job: Job, state: State) -> None:
        """Changes the state: what would have ended the old one is off, what ends the new one by itself is set."""
        for timer in job.ends.values():
            timer.cancel()
        job.ends.clear()
        job.state, now = state, time.monotonic()
        to_live = job.created + job.policy["ttl"] / 1000 - now
        match state:
            case State.IN_QUEUE:
                self._arm(job, self._expire, to_live)
            case State.IN_PROGRESS:
                job.taken = now
                self._arm(job, self._expire, to_live)
                self._arm(job, self._time_out, job.policy["executionTimeout"] / 1000)
                self._arm(job, self._lose, self.lost_after)
            case State.EXPIRED:
                del self.jobs[job.id]
            case _:
                job.done = now
                self._arm(job, self._expire, min(to_live, RETENTION[job.sync]))
        job.changed.beat()

    def _arm(self, job: Job, end: Callable[[Job], None], seconds: float) -> None:
        if timer := job.ends.get(end):
            timer.cancel()
        job.ends[end] = asyncio.get_running_loop().call_later(seconds, end, job)

    def _enqueue(self, job: Job) -> None:
        """In its place, even if it comes again: the oldest first, those of low priority last."""
        job.taken, job.done, job.worker, job.result = None, None, None, {}
        self._enter(job, State.IN_QUEUE)
        bisect.insort(self._waiting, job, key=lambda job: (bool(job.policy["lowPriority"]), job.created))
        self._arrived.beat()

    def _stop(self, job: Job, state: State) -> None:
        """Ends a job from outside: it leaves the queue, or its worker is told."""
        if job.state is State.IN_QUEUE:
            self._waiting.remove(job)
        elif job.state is State.IN_PROGRESS and job.worker is not None:
            self.tell(job.worker, [job.id])
        self._enter(job, state)

    def _expire(self, job: Job) -> None:
        self._stop(job, State.EXPIRED)

    def _time_out(self, job: Job) -> None:
        self._stop(job, State.TIMED_OUT)

    def _lose(self, job: Job) -> None:
        """No ping of its worker names it any more: it is queued again, once."""
        if job.retries:
            job.result = {"error": LOST}
            self._enter(job, State.FAILED)
        else:
            job.retries = 1
            self.retried += 1
            self._enqueue(job)


def parse(text: bytes, kind: type = object) -> Any:
    """What the JSON says, whatever its content type; Refused if it is none (NaN is none), or not of that kind."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(found, kind):
        raise Refused("the body is not the JSON that is expected")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
