"""The queue of a RunPod endpoint, in memory: jobs, the workers that take them, limits of size and time. No HTTP.

Everything runs on one event loop, and no method changes anything across an `await`. Times are seconds of the monotonic
clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

CHUNK_BYTES = 1_000_000
# By whether the job came through /runsync: requests and results alike.
JOB_BYTES = {False: 10_000_000, True: 20_000_000}
RETENTION = {False: 30 * 60.0, True: 60.0}
EXECUTION_TIMEOUT = 600.0
TTL = 24 * 3600.0
DELIVERED = ("input", "webhook", "policy", "s3Config")
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


OPEN = (State.IN_QUEUE, State.IN_PROGRESS)


def parse(text: bytes) -> Any:
    """What the JSON says, whatever its content type; ValueError if it is none (NaN is none)."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


class Pulse:
    """Wakes all who wait for a change. There is no flag: who waits looks again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def beat(self) -> None:
        self._event.set()  # those who wait are on their way already, so it can be cleared at once
        self._event.clear()

    async def until(self, condition: Callable[[], object], seconds: float | None = None) -> None:
        """Returns when the condition holds, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._event.wait()


@dataclass(frozen=True, slots=True)
class Policy:
    execution_timeout: float = EXECUTION_TIMEOUT
    ttl: float = TTL
    low_priority: bool = False

    @classmethod
    def read(cls, given: Any) -> Policy:
        """From the request's `policy`, where times are milliseconds. ValueError says what is wrong."""
        if given is None:
            return cls()
        if not isinstance(given, dict):
            raise ValueError("policy must be an object")  # noqa: TRY004 - the request's value, not the caller's type
        times = {}
        for name, default in (("executionTimeout", EXECUTION_TIMEOUT), ("ttl", TTL)):
            value = given.get(name, default * 1000)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"policy.{name} must be a number of milliseconds")
            times[name] = value / 1000
        return cls(times["executionTimeout"], times["ttl"], bool(given.get("lowPriority")))


@dataclass(eq=False)
class Job:
    id: str
    request: dict[str, Any]
    sync: bool
    policy: Policy
    created: float
    state: State = State.IN_QUEUE
    taken: float | None = None
    done: float | None = None
    worker: str | None = None
    gone: bool = False  # its TTL or retention is over: nobody can ask for it any more
    retries: int = 0
    result: dict[str, Any] = field(default_factory=dict)  # `output` and `error`, where there are any
    chunks: list[Any] = field(default_factory=list)  # the `output` of each
    read: int = 0  # chunks that /stream has given out
    keys: set[str | None] = field(default_factory=set)
    changed: Pulse = field(default_factory=Pulse)
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.gone or self.state not in OPEN

    def delivery(self) -> dict[str, Any]:
        """As a worker gets it. An empty input is left out, as the platform does."""
        kept = {name: self.request[name] for name in DELIVERED if name in self.request}
        if kept["input"] == {}:
            del kept["input"]
        return {"id": self.id, **kept}

    def view(self) -> dict[str, Any]:
        """As a client sees it."""
        shown: dict[str, Any] = {"id": self.id, "status": self.state}
        if self.taken is not None:
            shown["delayTime"] = round((self.taken - self.created) * 1000)
            shown["workerId"] = self.worker
            if self.done is not None:
                shown["executionTime"] = round((self.done - self.taken) * 1000)
        if self.retries:
            shown["retries"] = self.retries
        return shown | self.result


@dataclass(slots=True)
class Worker:
    seen: float = 0.0
    is_unhealthy: bool = False  # by its last ping
    stops: list[str] = field(default_factory=list)  # jobs that it must stop and was not told yet
    told: Pulse = field(default_factory=Pulse)


class Queue:
    """`hold`: how long an empty poll stays open. `lost_after`: how long a taken job may be in no ping of its worker."""

    def __init__(self, hold: float, lost_after: float) -> None:
        self.hold = hold
        self.lost_after = lost_after
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, Worker] = {}
        self.retried = 0
        self._waiting: dict[bool, deque[Job]] = {False: deque(), True: deque()}  # by `lowPriority`
        self._arrived = Pulse()
        self._line = asyncio.Lock()  # it is fair: pollers are served in the order in which they came

    # The client's side

    def submit(self, request: dict[str, Any], *, sync: bool) -> Job:
        """ValueError if the request is not one."""
        if not isinstance(request, dict) or "input" not in request:
            raise ValueError("the body must be an object with the key `input`")
        policy = Policy.read(request.get("policy"))
        name = f"{'sync-' if sync else ''}{uuid.uuid4()}-u1"
        job = self.jobs[name] = Job(name, request, sync, policy, time.monotonic())
        self._arm(job, "ttl", policy.ttl, self._drop)
        self._enqueue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Does nothing to a job that is over."""
        if not job.over:
            self._withdraw(job)
            self._end(job, State.CANCELLED)

    def retry(self, job: Job) -> None:
        """Runs a job again that failed, as if it were new; ValueError for others."""
        if job.state not in (State.FAILED, State.TIMED_OUT):
            raise ValueError("only jobs that are FAILED or TIMED_OUT can be retried")
        self._disarm(job, "retention")
        self.retried += 1
        job.done, job.read, job.retries = None, 0, 0
        job.chunks.clear()
        job.keys.clear()
        self._requeue(job)

    def purge(self) -> int:
        waiting = [job for line in self._waiting.values() for job in line]
        for job in waiting:
            self.cancel(job)
        return len(waiting)

    def health(self) -> dict[str, dict[str, int]]:
        states = Counter(job.state for job in self.jobs.values())
        busy = {job.worker for job in self.jobs.values() if job.state is State.IN_PROGRESS}
        oldest = time.monotonic() - self.hold - FORGOTTEN_AFTER
        known = {name: worker for name, worker in self.workers.items() if worker.seen > oldest}
        unhealthy = {name for name, worker in known.items() if worker.is_unhealthy}
        ready = known.keys() - unhealthy
        return {
            "jobs": {
                "completed": states[State.COMPLETED],
                "failed": states[State.FAILED] + states[State.TIMED_OUT],
                "inProgress": states[State.IN_PROGRESS],
                "inQueue": states[State.IN_QUEUE],
                "retried": self.retried,
            },
            "workers": {
                "idle": len(ready - busy),
                "initializing": 0,
                "ready": len(ready),
                "running": len(ready & busy),
                "throttled": 0,
                "unhealthy": len(unhealthy),
            },
        }

    # The workers' side

    def worker(self, name: str) -> Worker:
        return self.workers.setdefault(name, Worker())

    async def take(self, worker: str, count: int, gone: Callable[[], bool]) -> list[Job]:
        """Up to `count` jobs, the oldest first, as soon as there is one; none after the hold.

        None, too, if the poller is `gone` by the time that a job is there: the job is for the next one.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.hold), self._line:
                await self._arrived.until(self._any_waiting)
                if not gone():
                    return [self._hand_out(worker) for _ in range(count) if self._any_waiting()]
        return []

    def put_back(self, jobs: list[Job]) -> None:
        """To the front: they never reached the worker."""
        for job in reversed(jobs):
            if job.state is State.IN_PROGRESS:
                self._requeue(job, front=True)

    async def stops(self, worker: str, gone: Callable[[], bool]) -> list[str]:
        """The jobs that the worker must stop, as soon as there is one; none after the hold."""
        told = self.worker(worker)
        await told.told.until(lambda: told.stops, self.hold)
        if gone():
            return []
        ids, told.stops = told.stops, []
        return ids

    def ping(self, name: str, params: dict[str, str]) -> None:
        self.worker(name).is_unhealthy = params.get("status") == "unhealthy"
        for named in params.get("job_id", "").split(","):
            job = self.jobs.get(named)
            if job and job.state is State.IN_PROGRESS and job.worker == name:
                self._arm(job, "lost", self.lost_after, self._lost)

    def chunk(self, worker: str, job: Job, body: bytes, key: str | None) -> int:
        """Stores a part of the output; returns the status of the answer."""
        if self.ignores(worker, job, key):
            return 200
        if len(body) > CHUNK_BYTES or (content := _content(body)) is None or "output" not in content:
            return 400
        job.keys.add(key)
        job.chunks.append(content["output"])
        job.changed.beat()
        return 200

    def result(self, worker: str, job: Job, body: bytes, key: str | None) -> int:
        """Stores progress or ends the job; returns the status of the answer."""
        if self.ignores(worker, job, key):
            return 200
        if len(body) > JOB_BYTES[job.sync]:
            job.result = {}
            self._end(job, State.COMPLETED)  # without output, which is what users of the platform have seen
            return 400
        if (content := _content(body)) is None:
            return 400
        job.keys.add(key)
        job.result = {"output": content["output"]} if "output" in content else {}
        if isinstance(content.get("metadata"), dict):  # whether RunPod keeps it is not known
            job.result["metadata"] = content["metadata"]
        if content.get("error") is not None:
            job.result["error"] = content["error"]
        if content.get("status") == "IN_PROGRESS":
            job.changed.beat()
        else:
            self._end(job, State.FAILED if "error" in job.result else State.COMPLETED)
        return 200

    def ignores(self, worker: str, job: Job, key: str | None) -> bool:
        """Whether the job has this post already, or waits for none from this worker."""
        return self.has(job, key) or job.state is not State.IN_PROGRESS or job.worker != worker

    def has(self, job: Job, key: str | None) -> bool:
        return key is not None and key in job.keys

    # What a job goes through

    def _any_waiting(self) -> bool:
        return any(self._waiting.values())

    def _enqueue(self, job: Job, *, front: bool = False) -> None:
        line = self._waiting[job.policy.low_priority]
        if front:
            line.appendleft(job)
        else:
            line.append(job)
        job.changed.beat()
        self._arrived.beat()

    def _hand_out(self, worker: str) -> Job:
        job = (self._waiting[False] or self._waiting[True]).popleft()
        job.state, job.worker, job.taken = State.IN_PROGRESS, worker, time.monotonic()
        self._arm(job, "execution", job.policy.execution_timeout, self._time_out)
        self._arm(job, "lost", self.lost_after, self._lost)
        job.changed.beat()
        return job

    def _requeue(self, job: Job, *, front: bool = False) -> None:
        self._disarm(job, "execution", "lost")
        job.state, job.worker, job.taken, job.result = State.IN_QUEUE, None, None, {}
        self._enqueue(job, front=front)

    def _withdraw(self, job: Job) -> None:
        """Takes the job out of the queue, or tells its worker to stop."""
        if job.state is State.IN_QUEUE:
            self._waiting[job.policy.low_priority].remove(job)
        elif job.state is State.IN_PROGRESS and job.worker is not None:
            worker = self.worker(job.worker)
            worker.stops.append(job.id)
            worker.told.beat()

    def _end(self, job: Job, state: State) -> None:
        self._disarm(job, "execution", "lost")
        job.state, job.done = state, time.monotonic()
        self._arm(job, "retention", RETENTION[job.sync], self._drop)
        job.changed.beat()

    def _time_out(self, job: Job) -> None:
        self._withdraw(job)
        self._end(job, State.TIMED_OUT)

    def _lost(self, job: Job) -> None:
        if job.retries:
            job.result = {"error": LOST}
            self._end(job, State.FAILED)
        else:
            job.retries = 1
            self.retried += 1
            self._requeue(job, front=True)

    def _drop(self, job: Job) -> None:
        self._withdraw(job)
        self._disarm(job, *list(job.timers))
        del self.jobs[job.id]
        job.gone = True
        job.changed.beat()

    def _arm(self, job: Job, name: str, seconds: float, act: Callable[[Job], None]) -> None:
        self._disarm(job, name)
        job.timers[name] = asyncio.get_running_loop().call_later(seconds, act, job)

    def _disarm(self, job: Job, *names: str) -> None:
        for name in names:
            if timer := job.timers.pop(name, None):
                timer.cancel()


def _content(body: bytes) -> dict[str, Any] | None:
    try:
        content = parse(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
