"""The queue worker, a child of the supervisor: the runpod SDK (1.12) with its loops replaced. Importing this imports
the SDK: 2 s, while vLLM loads.

The SDK starts the worker, tells RunPod that it lives and which jobs it has (a process of its own), and knows RunPod's
addresses and the key. What is replaced, and why; `tests/queue/test_sdk.py` fails when a new SDK no longer has the
fault, or moves the seam:

- `rp_scale.JobScaler.run`, the loops: they
  - ask again at once after 401, refused, 204: 1000s per second
  - lose all that came with a job that can't be read, or has no `input`
  - begin a job up to 0.1 s late; half-full looks full, and then they sleep for 1 s
  - write a line of log per second where there is no stop channel, and can't stop a queued job
  - wait for long polls when they drain, and drop a job that these still bring
  - lose what a 429, a reset, a timeout or a lone surrogate meets, and make a Python repr of an error
- `cpuinfo`: imported for a debugger, it runs several programs: 1 s
- `os.fork`: the heartbeat's process outlives the worker and keeps it alive for RunPod

The supervisor writes the engine's state to our standard input, a word per line; its end means that the supervisor is
gone. The queue is joined when the engine is ready, or has failed for good: then each job gets the diagnosis.
"""

# ruff: noqa: E402
from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import aiohttp

sys.modules.setdefault("cpuinfo", types.SimpleNamespace(get_cpu_info=lambda: {"brand_raw": ""}))  # type: ignore[arg-type]

import runpod
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, rp_job, rp_scale
from runpod.serverless.modules.worker_state import JobsProgress

from supervisor.queue.delivery import Delivery, RunPod
from supervisor.queue.jobs import JSON, Taken, apart
from supervisor.queue.older_workers import Batches
from supervisor.queue.shapes import Reader
from supervisor.queue.worker import Answer, Client, tell

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
# The supervisor's words (queue/child.py): with these jobs are taken (`failed`: only to be told why), after those none.
JOINED = frozenset({"ready", "failed"})
ENDING = frozenset({"draining", "expire", "gone"})  # `gone`: the supervisor itself is no more
LAST_WORDS = 3.0  # seconds that jobs have to be reported as failed once the supervisor is gone
POLL_TIMEOUT = aiohttp.ClientTimeout(total=85, sock_connect=10)  # RunPod holds a poll for up to half a minute
# An answer without a job that comes sooner than this was no long poll: the next one waits, longer each time.
INSTANT = 0.5
SLOWEST_POLL = 10.0
STDIN = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  # as long as we are


def next_order() -> str:
    """The supervisor's next word on standard input. Byte by byte: what is behind it is for the next call."""
    return STDIN.readline().decode().strip() or "gone"


@dataclass
class LongPoll(Generic[T]):
    """Asks RunPod again and again: at once after an answer, else after 0.1 s, 0.2 s ... 10 s."""

    what: str
    session: aiohttp.ClientSession
    read: Callable[[bytes], list[T]]
    pause: float = 0.0
    problem: str = ""  # that was told
    waiting: asyncio.Timeout | None = None  # runs while no answer is on its way

    async def ask(self, url: str) -> list[T]:
        """What is read in the answer; nothing without one. RunPod's key follows no redirect."""
        found, problem = list[T](), ""
        try:
            async with asyncio.timeout(None) as self.waiting:
                await asyncio.sleep(self.pause)
                began = time.monotonic()
                response = await self.session.get(url, timeout=POLL_TIMEOUT, allow_redirects=False)
            async with response:
                if response.status == 200:
                    found = await asyncio.to_thread(self.read, await response.read())
                elif response.status not in (204, 400):  # 400: FlashBoot, says the SDK
                    problem = f"RunPod answers {response.status}"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                return []  # held for longer than we wait, or broken off
            problem = f"{error or type(error).__name__}"
        well = not problem and (any(found) or time.monotonic() - began > INSTANT)
        if well and self.problem:
            tell(f"{self.what}: RunPod answers again")
        if problem not in ("", self.problem):
            tell(f"{self.what}: {problem}", "WARNING")
        self.problem = "" if well else problem or self.problem
        self.pause = 0.0 if well else min(max(2 * self.pause, 0.1), SLOWEST_POLL)
        return found

    def break_off(self) -> None:
        """Unless an answer is on its way: its jobs must not be dropped."""
        with contextlib.suppress(RuntimeError):  # it does not wait any more
            if self.waiting is not None:
                self.waiting.reschedule(0)


def stopped(body: bytes) -> list[str]:
    """The jobs that nobody waits for any more."""
    content = json.loads(body or b"null")
    ids = content.get("jobsToStop") if isinstance(content, dict) else None
    return [job_id for job_id in ids or [] if isinstance(job_id, str)]


class Link:
    """Between RunPod and the gateway: takes jobs while there is room for them, and sees each delivered."""

    def __init__(self, order: str, runpod: RunPod, client: Client, reader: Reader, jobs: int) -> None:
        """`order`: the supervisor's latest word; `jobs`: that may run at once."""
        self.order, self.jobs = order, jobs
        self.runpod, self.client, self.reader = runpod, client, reader
        self.running: dict[str, Delivery] = {}
        self.changed = asyncio.Event()  # an order came, or a job ended
        self.takes = LongPoll("taking jobs", runpod.session, apart)
        self.untold = True  # how long vLLM's start took

    async def run(self) -> None:
        """Until the supervisor wants the end and every job that was taken is reported, whatever poll is open."""
        loop = asyncio.get_running_loop()
        # The SDK's handler would end its loops with a job on its way to them. `docker stop` does not reach us anyway.
        loop.add_signal_handler(signal.SIGTERM, self.heard, "draining")
        loop.add_reader(0, lambda: self.heard(next_order()))
        async with asyncio.TaskGroup() as group:
            stops = group.create_task(self._hear_stops())
            await self._take()
            await self._until(lambda: not self.running)
            stops.cancel()

    def heard(self, order: str) -> None:
        """The engine's state changed, or the supervisor ends."""
        self.order, loop = order, asyncio.get_running_loop()
        if order not in JOINED:
            self.takes.break_off()  # nothing is taken that could not be done
        if order in ("expire", "gone"):
            for delivery in self.running.values():
                loop.call_soon(delivery.expire)  # behind its first step: one that has made none can report nothing
        if order == "gone":
            loop.remove_reader(0)
            loop.call_later(LAST_WORDS, os._exit, 1)
        self.changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def _take(self) -> None:
        while True:
            await self._until(lambda: self.order in ENDING or (self.order in JOINED and len(self.running) < self.jobs))
            if self.reader.longest is None and self.order == "ready":
                self.reader.longest = await self.client.look("/v1/models", lambda it: it["data"][0]["max_model_len"])
            if self.order in ENDING:
                return
            for taken in await self.takes.ask(rp_job._job_get_url(self.jobs - len(self.running))):
                if taken is None:
                    tell("a job came without an id: nobody can be told", "ERROR")
                elif taken.job_id not in self.running:  # else RunPod took us for dead, and gave it out again
                    self._begin(taken)

    def _begin(self, taken: Taken) -> None:
        tell(job={"id": taken.job_id, "outcome": "taken"})
        JobsProgress().add(taken.job_id)
        delivery = Delivery(Answer(taken, self.client, self.reader), self.runpod, self._first)
        self.running[taken.job_id] = delivery

        def over(_: object) -> None:
            del self.running[taken.job_id]
            JobsProgress().remove(taken.job_id)
            self.changed.set()

        delivery.task.add_done_callback(over)

    async def _first(self) -> JSON | None:
        """What RunPod's first result since vLLM's start tells beside its output: its job waited for all of this."""
        untold, self.untold = self.untold, False
        phases = await self.client.look("/status", lambda status: status["phases"]) if untold else None
        if not phases:
            return None
        seconds = sum(phase["seconds"] for phase in phases)
        shown = ", ".join(f"{phase['name']} {phase['seconds']:.1f} s" for phase in phases)
        tell(f"the first job since vLLM's start ({seconds:.1f} s: {shown})")
        return {"cold_start": {"seconds": round(seconds, 3), "phases": phases}}

    async def _hear_stops(self) -> None:
        poll, url = LongPoll("stop channel", self.runpod.session, stopped), rp_job._job_stop_url()
        while url is not None:
            for job_id in await poll.ask(url):
                if (delivery := self.running.get(job_id)) is not None:
                    delivery.task.cancel()


async def work(order: str) -> None:
    """`order`: the latest word of the supervisor's, which wrote SUPERVISOR_QUEUE as well (queue/child.py)."""
    about = json.loads(os.environ["SUPERVISOR_QUEUE"])
    batches = Batches(*about["batches"]) if about["batches"] else None
    reader = Reader(about["model"], llm=about["llm"], root=about["root"], tokens=batches)
    client = Client(about["socket"])
    async with AsyncClientSession() as session, client.session:
        runpod = RunPod(session, rp_http.JOB_DONE_URL, rp_http.JOB_STREAM_URL)
        await Link(order, runpod, client, reader, about["jobs"]).run()


def main() -> None:
    while (order := next_order()) not in JOINED | ENDING:
        pass  # vLLM is not there yet
    if order in ENDING:
        return
    # mypy sees no types in the SDK; tests/queue/test_sdk.py checks that these are there.
    rp_scale.JobScaler.run = lambda _: work(order)
    if sys.platform == "linux":
        die_with_parent = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.register_at_fork(after_in_child=die_with_parent)
    runpod.serverless.start({"handler": work})  # one is wanted, which the loops that are replaced would call
    # All is reported. Python's own way out of so many modules takes half a second that the drain may not have.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":  # the SDK's heartbeat is a process that imports this file again, from Python 3.14 on
    main()
