"""The queue worker as the supervisor sees it: a child that is told the engine's state, and started again when it dies.

It is told through its standard input, a word per line; that this ends is how it learns of our death.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Protocol

from supervisor.bounded import Call
from supervisor.engine.child import how_it_ended
from supervisor.settings.sources import Settings

# Seconds before a worker that died is started again: the first, the longest; after so long it counts as healthy.
FIRST_RESTART, SLOWEST_RESTART, HEALTHY_AFTER = 0.5, 30.0, 60.0
SWEEP_PATIENCE = 2.0
LONGEST_LINE = 64 * 1024
JSON = dict[str, Any]
# Without the current folder among the places to import from: a `queue.py` of the user's would be imported first.
SAFELY = ("-P", "-m")
LEVELS = frozenset({"NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR"})


def environment(
    environ: Mapping[str, str], address: str, model: str, jobs: int, *, llm: bool, root: str = ""
) -> dict[str, str]:
    """What the worker is started with: RunPod's own variables, made safe for the SDK, and the gateway's address.

    The SDK reads most of these while it is imported, and has no other way to be told.
    """
    found = dict(environ)
    # By default it logs every token, and at INFO three lines for each job, beside ours. RunPod sets RUNPOD_DEBUG_LEVEL;
    # a level that it does not know ends its import.
    if found.get("RUNPOD_LOG_LEVEL") not in LEVELS:
        found["RUNPOD_LOG_LEVEL"] = "WARN"
    # Its checks import torch and take memory on each GPU after vLLM has filled it. Ours come before: queue/fitness.py.
    found.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    found.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")
    # Below 1000 ms it becomes zero, and the heartbeat dies of that without a word.
    interval = found.get("RUNPOD_PING_INTERVAL", "")
    if interval and (not interval.isdigit() or int(interval) < 1000):
        found["RUNPOD_PING_INTERVAL"] = "1000" if interval.isdigit() else "10000"
    # The Hub's tests give an address without a query, to which the SDK appends `&...`, and the variable unexpanded.
    take = found["RUNPOD_WEBHOOK_GET_JOB"].replace("$RUNPOD_POD_ID", found.get("RUNPOD_POD_ID") or "local")
    found["RUNPOD_WEBHOOK_GET_JOB"] = take if "?" in take else f"{take}?"
    # With this it would serve HTTP instead of the queue.
    found.pop("RUNPOD_REALTIME_PORT", None)
    # With this a line of log and its end are two writes, and the heartbeat's gets in between.
    found.pop("PYTHONUNBUFFERED", None)
    found.setdefault("RUNPOD_ENDPOINT_ID", "none")  # without it the SDK's lines of log are no JSON
    return found | {
        "SUPERVISOR_QUEUE_SOCKET": address,
        "SUPERVISOR_QUEUE_MODEL": model,
        "SUPERVISOR_QUEUE_JOBS": str(jobs),
        "SUPERVISOR_QUEUE_SHAPE": "llm" if llm else "",
        "SUPERVISOR_QUEUE_ROOT": root,
    }


def simulated(url: str) -> dict[str, str]:
    """What RunPod would set, for a worker of the simulator at `url` (`http://127.0.0.1:8000/v2/local`)."""
    return {
        "RUNPOD_POD_ID": "local",
        "RUNPOD_ENDPOINT_ID": "local",
        "RUNPOD_AI_API_KEY": "local",
        "RUNPOD_PING_INTERVAL": "4000",
        "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=local",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
        "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID?gpu=local",
    }


class Simulator:
    """RunPod's side of the queue, as a process beside us, on a socket that is bound already."""

    def __init__(self, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v2/local"
        self.child = subprocess.Popen(
            [sys.executable, *SAFELY, "supervisor.queue.simulator", "--fd", str(listener.fileno()), "--with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            process_group=0,
        )

    def stop(self) -> None:
        """When nobody is left to post to it."""
        self.child.terminate()
        self.child.wait()


class Counts(Protocol):
    """Who counts jobs."""

    def report(self, job: JSON) -> None:
        """What the worker tells of one (`queue/worker.py`)."""

    def worker_died(self) -> None: ...


class QueueWorker:
    """`run()` keeps it alive until `finish()`; `tell()` passes on the engine's state."""

    def __init__(self, environ: Mapping[str, str], counts: Counts) -> None:
        self.environ = environ
        self.counts = counts
        self.log = logging.getLogger("supervisor.queue")
        self.word = "starting"
        self.child: subprocess.Popen[bytes] | None = None
        self._ended = asyncio.Event()
        self._leaving = asyncio.Event()

    def tell(self, word: str) -> None:
        """starting, ready, restarting, failed; draining: take nothing more, and leave when all is done; expire: fail
        what still runs, and leave."""
        self.word = word
        if self.child is not None and self.child.stdin is not None:
            with contextlib.suppress(OSError):  # it is dead, or about to be: the next one is told
                os.write(self.child.stdin.fileno(), f"{word}\n".encode())

    async def run(self) -> None:
        delay = FIRST_RESTART
        while not self._leaving.is_set():
            began = time.monotonic()
            code = await self._once()
            if self._leaving.is_set():
                break
            if time.monotonic() - began > HEALTHY_AFTER:
                delay = FIRST_RESTART
            ended = how_it_ended(code)
            self.counts.worker_died()
            self.log.error("the queue worker ended (%s), the jobs it had are lost: again in %.1f s", ended, delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._leaving.wait()
            delay = min(delay * 2, SLOWEST_RESTART)
        self._ended.set()

    async def _once(self) -> int:
        self.child = subprocess.Popen(  # noqa: ASYNC220  # a thread waits for it, as for vLLM
            [sys.executable, *SAFELY, "supervisor.queue.sdk"],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the supervisor; with its heartbeat it ends as one
        )
        self.tell(self.word)
        loop = asyncio.get_running_loop()
        readers = [
            asyncio.ensure_future(Call(partial(_read, stream, loop, heard)))
            for stream, heard in ((self.child.stdout, self._said), (self.child.stderr, self._complained))
        ]
        try:
            return await Call(self.child.wait)
        finally:
            child, self.child = self.child, None
            await Call(partial(_sweep, child))
            await asyncio.wait(readers, timeout=SWEEP_PATIENCE)

    def _said(self, line: str) -> None:
        """The SDK's lines, and the worker's own: JSON, as RunPod's console reads it; or whatever was printed."""
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            said = {"message": line}
        if isinstance(job := said.get("job"), dict):
            self.counts.report(job)
        if said.get("message"):
            level = logging.getLevelNamesMapping().get(str(said.get("level")), logging.INFO)
            # `each`: of a job's own line none is too much.
            self.log.log(level, "%s", said["message"], extra={"request": said.get("requestId"), "each": True})

    def _complained(self, line: str) -> None:
        self.log.warning("%s", line, extra={"each": True})

    async def finish(self, patience: float, reserve: float) -> None:
        """Lets it end its jobs for `patience` seconds, then has it report the others as failed for `reserve` more."""
        self._leaving.set()
        for word, seconds in (("draining", patience), ("expire", reserve)):
            self.tell(word)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._ended.wait()
                    return
        if self.child is not None:
            self.log.warning("the queue worker did not end: killed")
            self.child.kill()


def _sweep(child: subprocess.Popen[bytes]) -> None:
    """Its heartbeat dies with it, by itself, and is then ours to reap. Should it live, RunPod would think that the
    worker does."""
    deadline = time.monotonic() + SWEEP_PATIENCE
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-child.pid, os.WNOHANG)
            time.sleep(0.005)  # it may still be its dead parent's
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()


def _read(stream: IO[bytes] | None, loop: asyncio.AbstractEventLoop, heard: Callable[[str], object]) -> None:
    assert stream is not None
    with stream, contextlib.suppress(RuntimeError):  # the loop is gone
        while line := stream.readline(LONGEST_LINE):
            loop.call_soon_threadsafe(heard, line.decode("utf-8", "replace").rstrip())


@dataclass(frozen=True, slots=True)
class Queue:
    """What runs beside the gateway in queue mode: the worker, and outside of RunPod its simulator."""

    worker: QueueWorker
    simulator: Simulator | None

    @classmethod
    def start(
        cls,
        settings: Settings,
        simulated_on: socket.socket | None,
        address: str,
        model: str,
        counts: Counts,
    ) -> Queue:
        """The simulator takes over `simulated_on`; the worker asks the gateway at the unix socket `address`."""
        simulator = Simulator(simulated_on) if simulated_on is not None else None
        environ = {**settings.environ, **(simulated(simulator.url) if simulator is not None else {})}
        # Who names the model as runpod-LLM does has clients who know its answers.
        llm = settings.model.source.endswith("LLM_MODEL")
        jobs, root = settings.knobs.max_concurrency or 1, str(settings.option("root_path") or "")
        return cls(QueueWorker(environment(environ, address, model, jobs, llm=llm, root=root), counts), simulator)

    def stop(self) -> None:
        if self.simulator is not None:
            self.simulator.stop()
