"""The queue worker is a child of the supervisor: the runpod SDK (1.12) with its loops replaced. Importing this module
imports the SDK, which takes 2 s while vLLM loads. The SDK starts the worker, tells RunPod that it lives and which jobs
it has (by a process of its own), and knows RunPod's addresses and the key. Below is what is replaced, and why;
`tests/queue/test_sdk.py` fails when a new SDK no longer has the fault, or moves the seam:

- `rp_scale.JobScaler.run` has the loops. They
  - ask again at once after a 401, a refused connection or a 204: 1000s of times per second
  - lose all jobs that came with one that can't be read or has no `input`
  - begin a job up to 0.1 s late; half-full looks full to them, and then they sleep for 1 s
  - write a line of log per second where there is no stop channel, and can't stop a queued job
  - wait for long polls when they drain, and drop a job that these still bring
  - lose what a 429, a reset, a timeout or a lone surrogate meets, and make a Python repr of an error
- `cpuinfo` is imported for a debugger, and runs several programs: 1 s
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
from supervisor.queue.jobs import JSON, TakenJob, split_jobs
from supervisor.queue.older_workers import Batches
from supervisor.queue.shapes import Reader
from supervisor.queue.worker import Answer, GatewayClient, tell_supervisor

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
# Orders are the supervisor's words (queue/child.py). Jobs are taken with the first ones, and none after the others.
JOIN_ORDERS = frozenset({"ready", "failed"})  # with `failed`, jobs are taken only to be told why
END_ORDERS = frozenset({"draining", "expire", "gone"})  # `gone`: the supervisor itself is no more
LAST_REPORTS = 3.0  # seconds that jobs have to be reported as failed once the supervisor is gone
POLL_TIMEOUT = aiohttp.ClientTimeout(total=85, sock_connect=10)  # RunPod holds a poll for up to half a minute
# An answer without a job that comes sooner than this was no long poll: the next one waits, longer each time.
SHORTEST_LONG_POLL, LONGEST_POLL_PAUSE = 0.5, 10.0
STDIN = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  # it is open as long as we live


def read_order() -> str:
    """Reads the supervisor's next word on standard input, byte by byte: what is behind it is for the next call."""
    return STDIN.readline().decode().strip() or "gone"


@dataclass
class LongPoll(Generic[T]):
    """Asks RunPod again and again: at once after an answer, else after 0.1 s, 0.2 s ... 10 s."""

    purpose: str
    session: aiohttp.ClientSession
    read: Callable[[bytes], list[T]]
    pause: float = 0.0
    problem: str = ""  # the last one that was told
    wait_timeout: asyncio.Timeout | None = None  # runs while no answer is on its way

    async def ask(self, url: str) -> list[T]:
        """Returns what `read` finds in the answer; nothing without one. RunPod's key follows no redirect."""
        items, problem = list[T](), ""
        try:
            async with asyncio.timeout(None) as self.wait_timeout:
                await asyncio.sleep(self.pause)
                started_at = time.monotonic()
                response = await self.session.get(url, timeout=POLL_TIMEOUT, allow_redirects=False)
            async with response:
                if response.status == 200:
                    items = await asyncio.to_thread(self.read, await response.read())
                elif response.status not in (204, 400):  # 400: FlashBoot, says the SDK
                    problem = f"RunPod answers {response.status}"
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                return []  # the poll was held for longer than we wait, or broken off
            problem = f"{error or type(error).__name__}"
        is_working = not problem and (any(items) or time.monotonic() - started_at > SHORTEST_LONG_POLL)
        if is_working and self.problem:
            tell_supervisor(f"{self.purpose}: RunPod answers again")
        if problem not in ("", self.problem):
            tell_supervisor(f"{self.purpose}: {problem}", "WARNING")
        self.problem = "" if is_working else problem or self.problem
        self.pause = 0.0 if is_working else min(max(2 * self.pause, 0.1), LONGEST_POLL_PAUSE)
        return items

    def break_off(self) -> None:
        """Ends the poll, unless an answer is on its way: its jobs must not be dropped."""
        with contextlib.suppress(RuntimeError):  # it does not wait any more
            if self.wait_timeout is not None:
                self.wait_timeout.reschedule(0)


def read_stops(body: bytes) -> list[str]:
    """Returns the ids of the jobs that nobody waits for any more."""
    content = json.loads(body or b"null")
    ids = content.get("jobsToStop") if isinstance(content, dict) else None
    return [job_id for job_id in ids if isinstance(job_id, str)] if isinstance(ids, list) else []


class Link:
    """Stands between RunPod and the gateway: takes jobs while there is room for them, and sees each delivered."""

    def __init__(self, order: str, runpod: RunPod, gateway: GatewayClient, reader: Reader, max_jobs: int) -> None:
        """`order` is the supervisor's latest word; `max_jobs` may run at once."""
        self.order, self.max_jobs = order, max_jobs
        self.runpod, self.gateway, self.reader = runpod, gateway, reader
        self.deliveries: dict[str, Delivery] = {}
        self.change = asyncio.Event()  # an order came, or a job ended
        self.job_poll = LongPoll("taking jobs", runpod.session, split_jobs)
        self.must_report_start = True  # nobody was told yet how long vLLM's start took

    async def run(self) -> None:
        """Runs until the supervisor wants the end and every taken job is reported, whatever poll is open."""
        loop = asyncio.get_running_loop()
        # The SDK's handler would end its loops with a job on its way to them. `docker stop` does not reach us anyway.
        loop.add_signal_handler(signal.SIGTERM, self.order_received, "draining")
        loop.add_reader(0, lambda: self.order_received(read_order()))
        async with asyncio.TaskGroup() as group:
            stop_task = group.create_task(self._cancel_stopped_jobs())
            await self._take_jobs()
            await self._wait_until(lambda: not self.deliveries)
            stop_task.cancel()

    def order_received(self, order: str) -> None:
        """Obeys an order: the engine's state changed, or the supervisor ends."""
        self.order, loop = order, asyncio.get_running_loop()
        if order not in JOIN_ORDERS:
            self.job_poll.break_off()  # nothing is taken that could not be done
        if order in ("expire", "gone"):
            for delivery in self.deliveries.values():
                loop.call_soon(delivery.expire)  # behind its first step, without which it can report nothing
        if order == "gone":
            loop.remove_reader(0)
            loop.call_later(LAST_REPORTS, os._exit, 1)
        self.change.set()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.change.clear()
            await self.change.wait()

    async def _take_jobs(self) -> None:
        while True:
            await self._wait_until(
                lambda: self.order in END_ORDERS or (self.order in JOIN_ORDERS and len(self.deliveries) < self.max_jobs)
            )
            if self.reader.max_len is None and self.order == "ready":
                self.reader.max_len = await self.gateway.read("/v1/models", lambda it: it["data"][0]["max_model_len"])
            if self.order in END_ORDERS:
                return
            for job in await self.job_poll.ask(rp_job._job_get_url(self.max_jobs - len(self.deliveries))):
                if job is None:
                    tell_supervisor("a job came without an id: nobody can be told", "ERROR")
                elif job.job_id not in self.deliveries:  # else RunPod took us for dead, and gave it out again
                    self._start_delivery(job)

    def _start_delivery(self, job: TakenJob) -> None:
        tell_supervisor(job={"id": job.job_id, "outcome": "taken"})
        JobsProgress().add(job.job_id)
        delivery = Delivery(Answer(job, self.gateway, self.reader), self.runpod, self._read_cold_start)
        self.deliveries[job.job_id] = delivery

        def delivery_ended(_: object) -> None:
            del self.deliveries[job.job_id]
            JobsProgress().remove(job.job_id)
            self.change.set()

        delivery.task.add_done_callback(delivery_ended)

    async def _read_cold_start(self) -> JSON | None:
        """Returns what the first result since vLLM's start tells beside its output: its job waited for all of this."""
        must_report, self.must_report_start = self.must_report_start, False
        phases = await self.gateway.read("/status", lambda status: status["phases"]) if must_report else None
        if not phases:
            return None
        seconds = sum(phase["seconds"] for phase in phases)
        summary = ", ".join(f"{phase['name']} {phase['seconds']:.1f} s" for phase in phases)
        tell_supervisor(f"the first job since vLLM's start ({seconds:.1f} s: {summary})")
        return {"cold_start": {"seconds": round(seconds, 3), "phases": phases}}

    async def _cancel_stopped_jobs(self) -> None:
        stop_poll, url = LongPoll("stop channel", self.runpod.session, read_stops), rp_job._job_stop_url()
        while url is not None:
            for job_id in await stop_poll.ask(url):
                if (delivery := self.deliveries.get(job_id)) is not None:
                    delivery.task.cancel()


async def work(order: str) -> None:
    """Replaces the loops. `order` is the last word of the supervisor, which wrote SUPERVISOR_QUEUE (queue/child.py)."""
    options = json.loads(os.environ["SUPERVISOR_QUEUE"])
    batches = Batches(*options["batches"]) if options["batches"] else None
    reader = Reader(options["model"], is_runpod_llm=options["llm"], root=options["root"], token_batches=batches)
    gateway = GatewayClient(options["socket"])
    async with AsyncClientSession() as session, gateway.session:
        runpod = RunPod(session, rp_http.JOB_DONE_URL, rp_http.JOB_STREAM_URL)
        await Link(order, runpod, gateway, reader, options["jobs"]).run()


def main() -> None:
    while (order := read_order()) not in JOIN_ORDERS | END_ORDERS:
        pass  # vLLM is not there yet
    if order in END_ORDERS:
        return
    # mypy sees no types in the SDK; tests/queue/test_sdk.py checks that these are there.
    rp_scale.JobScaler.run = lambda _: work(order)
    if sys.platform == "linux":
        die_with_parent = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.register_at_fork(after_in_child=die_with_parent)
    runpod.serverless.start({"handler": work})  # the SDK wants one, which the replaced loops would call
    # All is reported. Python's own way out of so many modules takes half a second that the drain may not have.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":  # the SDK's heartbeat is a process that imports this file again, from Python 3.14 on
    main()
