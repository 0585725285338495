"""The queue worker, a child of the supervisor: the runpod SDK (1.12) with its loops replaced. Importing this imports
the SDK: 2 s, while vLLM loads.

The SDK starts the worker, tells RunPod that it lives and which jobs it has (a process of its own), and knows RunPod's
addresses and the key. What is replaced, and why; `tests/queue/test_sdk.py` fails when a new SDK no longer has the
fault, or moves the seam:

| seam | fault |
| --- | --- |
| `rp_scale.JobScaler.run`: the loops | asks again at once after 401, refused, 204: 1000s per second |
| the same | a job that can't be read, or comes without `input`, loses all that came with it |
| the same | begins a job up to 0.1 s late; half-full looks full, and then it sleeps for 1 s |
| the same | a line of log per second where there is no stop channel; a queued job can't be stopped |
| the same | its drain waits for long polls, and drops a job that they still bring |
| the same: posts | a 429, a reset, a timeout or a lone surrogate loses the data; an error becomes a Python repr |
| `cpuinfo` | imported for a debugger, it runs several programs: 1 s |
| `os.fork` | the heartbeat's process outlives the worker and keeps it alive for RunPod |

The supervisor writes the engine's state to our standard input, a word per line; its end means that the supervisor is
gone. The queue is joined when the engine is ready, or has failed for good: then each job gets the diagnosis.
"""

# ruff: noqa: E402
from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import time
import types
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp

# For a debugger that nobody asked for, the SDK's import asks several programs about the CPU: 1 s of work.
sys.modules.setdefault("cpuinfo", types.SimpleNamespace(get_cpu_info=lambda: {"brand_raw": ""}))  # type: ignore[arg-type]

import runpod
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_scale
from runpod.serverless.modules.worker_state import JobsProgress

from supervisor.queue.delivery import SHUT_DOWN, Delivery, NotTaken, Outcome, RunPod
from supervisor.queue.errors import JSON
from supervisor.queue.shapes import Reader
from supervisor.queue.taken import Taken, apart
from supervisor.queue.tokens import Batches
from supervisor.queue.worker import Answer, Client, tell

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
# An answer without a job that comes sooner than this was no long poll: the next one waits, longer each time.
INSTANT = 0.5
SLOWEST_POLL = 10.0
STDIN = io.FileIO(0, closefd=False)


def next_order() -> str:
    """The supervisor's next word on standard input. Byte by byte: what is behind it is for the next call."""
    return STDIN.readline().decode().strip() or "gone"


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
    """Between RunPod and the gateway: takes jobs while there is room for them, and sees each delivered."""

    def __init__(self, order: str, client: Client, reader: Reader, jobs: int) -> None:
        """`order`: the supervisor's latest word; `jobs`: that may run at once."""
        self.order = order
        self.client = client
        self.reader = reader
        self.jobs = jobs
        self.running: dict[str, tuple[Delivery, asyncio.Task[None]]] = {}
        self.poll: asyncio.Task[Any] | None = None  # for jobs, while none is on its way
        self.receiving = False  # jobs are on their way, and must not be dropped
        self.changed = asyncio.Event()  # an order came, a job ended, a poll
        self.delivered_one = False
        self.session: aiohttp.ClientSession = None  # type: ignore[assignment]  # set by `run`, before any use
        self.runpod: RunPod = None  # type: ignore[assignment]  # as well

    async def run(self) -> None:
        """Until the supervisor wants the end and every job that was taken is reported, whatever poll is open."""
        loop = asyncio.get_running_loop()
        # The SDK's handler would end its loops with a job on its way to them. `docker stop` does not reach us anyway.
        loop.add_signal_handler(signal.SIGTERM, self.heard, "draining")
        loop.add_reader(0, lambda: self.heard(next_order()))
        async with AsyncClientSession() as self.session, asyncio.TaskGroup() as group:
            self.runpod = RunPod(self.session, rp_http.JOB_DONE_URL, rp_http.JOB_STREAM_URL)
            loops = [group.create_task(self._take()), group.create_task(self._hear_stops())]
            await self._until(lambda: self.order in ENDING and not self.running and not self.receiving)
            for task in loops:
                task.cancel()
        await self.client.close()

    def heard(self, order: str) -> None:
        """The engine's state changed, or the supervisor ends."""
        self.order = order
        if order not in JOINED and self.poll is not None:
            self.poll.cancel()  # nothing is taken that could not be done
        if order in ("expire", "gone"):
            for delivery, _ in self.running.values():
                delivery.answer.stop(SHUT_DOWN)  # its failure is still reported
        if order == "gone":
            asyncio.get_running_loop().remove_reader(0)
            asyncio.get_running_loop().call_later(LAST_WORDS, os._exit, 1)
        self.changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    # Jobs

    async def _take(self) -> None:
        pace = Pace("taking jobs")
        while True:
            await self._until(lambda: self.order in JOINED and len(self.running) < self.jobs)
            if self.reader.longest is None and self.order == "ready":
                self.reader.longest = await self.client.longest()
            poll = self.poll = asyncio.create_task(self._paced(pace, self._ask_for_jobs))
            await asyncio.wait({poll})
            self.poll = None
            for taken in (None if poll.cancelled() else poll.result()) or []:
                # Not one that we have already: RunPod took us for dead, and gave it out again.
                if taken.job_id not in self.running:
                    self._begin(taken)
            self.receiving = False
            self.changed.set()

    async def _ask_for_jobs(self) -> list[Taken] | None:
        body = await self._ask(rp_job._job_get_url(self.jobs - len(self.running)), receives_jobs=True)
        if body is None:
            return None
        jobs, nameless = await asyncio.to_thread(apart, body)
        if nameless:
            tell(f"{nameless} jobs came without an id: nobody can be told", "ERROR")
        return jobs

    def _begin(self, taken: Taken) -> None:
        tell(job={"id": taken.job_id, "outcome": "taken"})
        JobsProgress().add(taken.job_id)
        delivery = Delivery(Answer(taken, self.client, self.reader), self.runpod, self._first)
        task = asyncio.create_task(delivery.run())
        self.running[taken.job_id] = delivery, task
        task.add_done_callback(lambda task: self._over(taken.job_id, task))

    def _over(self, job_id: str, task: asyncio.Task[None]) -> None:
        delivery, _ = self.running.pop(job_id)
        JobsProgress().remove(job_id)
        self.changed.set()
        if task.cancelled():  # before its first step
            delivery.end(Outcome.CANCELLED)
        elif (error := task.exception()) is not None:  # a fault of ours: RunPod gives the job out again
            delivery.why = f"{type(error).__name__}: {error}"
            delivery.end(Outcome.UNDELIVERED)

    async def _first(self) -> JSON | None:
        """What RunPod's first result since vLLM's start tells beside its output: its job waited for all of this."""
        if self.delivered_one:
            return None
        self.delivered_one = True
        start = await self.client.start_of_engine()
        if start is None:
            return None
        phases = ", ".join(f"{row['name']} {row['seconds']:.1f} s" for row in start["phases"])
        tell(f"the first job since vLLM's start ({start['seconds']:.1f} s: {phases})")
        return {"cold_start": start}

    # Those that nobody waits for any more

    async def _hear_stops(self) -> None:
        pace, url = Pace("stop channel"), rp_job._job_stop_url()
        while url is not None:
            for job_id in await self._paced(pace, lambda: self._ask_for_stops(url)) or []:
                if (found := self.running.get(job_id)) is not None:
                    found[1].cancel()

    async def _ask_for_stops(self, url: str) -> list[str] | None:
        body = await self._ask(url)
        content = json.loads(body) if body else None
        ids = content.get("jobsToStop") if isinstance(content, dict) else None
        return [job_id for job_id in ids or [] if isinstance(job_id, str)] or None

    # Polls

    async def _paced(self, pace: Pace, poll: Callable[[], Awaitable[T | None]]) -> T | None:
        """A long poll, no sooner than its pace allows. None without an answer."""
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

    async def _ask(self, url: str, *, receives_jobs: bool = False) -> bytes | None:
        """RunPod's key follows no redirect."""
        async with self.session.get(url, timeout=POLL_TIMEOUT, allow_redirects=False) as response:
            if response.status in (204, 400):  # 400: FlashBoot, says the SDK
                return None
            if response.status != 200:
                raise NotTaken(f"RunPod answers {response.status}", transient=True)
            if receives_jobs:
                self.receiving, self.poll = True, None
            return await response.read()


def _die_with_parent() -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


async def _never(_: object) -> None:
    """The SDK wants a handler; its loops, which would call it, are replaced."""


def main() -> None:
    del sys.argv[1:]  # the SDK reads them, abbreviations included
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor
    order = "starting"
    while order not in JOINED:
        if order in ENDING:
            return
        order = next_order()
    about = json.loads(os.environ["SUPERVISOR_QUEUE"])  # serve.py
    batches = Batches(*about["batches"]) if about["batches"] else None
    reader = Reader(about["model"], llm=about["llm"], root=about["root"], tokens=batches)
    link = Link(order, Client(about["socket"]), reader, about["jobs"])
    # mypy sees no types in the SDK; tests/queue/test_sdk.py checks that these are there.
    rp_scale.JobScaler.run = lambda _: link.run()
    os.register_at_fork(after_in_child=_die_with_parent)
    runpod.serverless.start({"handler": _never})
    # All is reported. Python's own way out of so many modules takes half a second that the drain may not have.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":  # the SDK's heartbeat is a process that imports this file again, from Python 3.14 on
    main()
