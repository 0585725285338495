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
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, Any, Protocol

from supervisor.bounded import Call
from supervisor.engine.child import how_it_ended
from supervisor.settings.secrets import SECRET_NAME

# Seconds before a worker that died is started again: the first, the longest; after so long it counts as healthy.
FIRST_RESTART, SLOWEST_RESTART, HEALTHY_AFTER = 0.5, 30.0, 60.0
SWEEP_PATIENCE = 2.0
LONGEST_LINE = 64 * 1024
JSON = dict[str, Any]
# Without the current folder among the places to import from: a `queue.py` of the user's would be imported first.
SAFELY = ("-P", "-m")
LEVELS = frozenset({"NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR"})


# What the worker is given besides RunPod's own variables, beside a hundred packages that are not ours.
NEEDED = frozenset({
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
})  # fmt: skip
RUNPODS_KEY = "RUNPOD_AI_API_KEY"


def _is_needed(name: str) -> bool:
    """The only secret is the key by which RunPod knows the worker."""
    if name.startswith("RUNPOD_"):
        return name == RUNPODS_KEY or SECRET_NAME.search(name) is None
    return name.upper() in NEEDED or name.startswith("PYTHON")


def environment(
    environ: Mapping[str, str], address: str, model: str, jobs: int, *, llm: bool, root: str = "", tokens: str = ""
) -> dict[str, str]:
    """What the worker is started with: RunPod's own variables, made safe for the SDK, and the gateway's address.

    The SDK reads most of these while it is imported, and has no other way to be told.
    """
    found = {name: value for name, value in environ.items() if _is_needed(name)}
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
        "SUPERVISOR_QUEUE_TOKENS": tokens,
    }


class Counts(Protocol):
    """Who counts jobs."""

    def report(self, job: JSON) -> None:
        """What the worker tells of one (queue/delivery.py)."""

    def worker_died(self) -> None: ...


class Kept:
    """A child that is started again when it dies, later each time, until it is to leave."""

    def __init__(self) -> None:
        self.log = logging.getLogger("supervisor.queue")
        self.child: subprocess.Popen[bytes] | None = None
        self.leaving = asyncio.Event()
        self.ended = asyncio.Event()

    async def once(self) -> int:
        """Starts it, as `child`, and returns with its exit code."""
        raise NotImplementedError

    def died(self, how: str, again: float) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        delay = FIRST_RESTART
        while not self.leaving.is_set():
            began = time.monotonic()
            code = await self.once()
            if self.leaving.is_set():
                break
            if time.monotonic() - began > HEALTHY_AFTER:
                delay = FIRST_RESTART
            self.died(how_it_ended(code), delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self.leaving.wait()
            delay = min(delay * 2, SLOWEST_RESTART)
        self.ended.set()


class QueueWorker(Kept):
    """`run()` keeps it alive until `finish()`; `tell()` passes on the engine's state."""

    def __init__(self, environ: Mapping[str, str], counts: Counts) -> None:
        super().__init__()
        self.environ = environ
        self.counts = counts
        self.word = "starting"

    def tell(self, word: str) -> None:
        """starting, ready, restarting, failed; draining: take nothing more, and leave when all is done; expire: fail
        what still runs, and leave."""
        self.word = word
        if self.child is not None and self.child.stdin is not None:
            with contextlib.suppress(OSError):  # it is dead, or about to be: the next one is told
                os.write(self.child.stdin.fileno(), f"{word}\n".encode())

    def died(self, how: str, again: float) -> None:
        self.counts.worker_died()
        self.log.error("the queue worker ended (%s), the jobs it had are lost: again in %.1f s", how, again)

    async def once(self) -> int:
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
        self.leaving.set()
        for word, seconds in (("draining", patience), ("expire", reserve)):
            self.tell(word)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.ended.wait()
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
