"""Programs of ours beside vLLM, each a child that is started again when it dies: the queue worker, a simulated RunPod.

Each is told what it needs through its standard input, a word per line. Where that input ends, it knows that we died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO

from supervisor.bounded import Call
from supervisor.engine.child import describe_exit

# Seconds until a dead program is started again, at first and at most; after so many seconds it counts as healthy.
FIRST_BACKOFF, LONGEST_BACKOFF, HEALTHY_UPTIME = 0.5, 30.0, 60.0
LAST_LINES_PATIENCE = 2.0
LONGEST_LINE = 64 * 1024


class KeptProgram:
    """A program that `run()` keeps alive, until `stop_requested` is set and the program is gone."""

    def __init__(
        self,
        program: Sequence[str],
        environ: Mapping[str, str],
        child_died: Callable[[str, float], object],
        line_receivers: tuple[Callable[[str], object], ...] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        """`program` is a module of ours and its arguments. `child_died` gets how it ended, and in how many seconds it
        starts again; `line_receivers` get the lines of its stdout and of its stderr; it inherits `descriptors`."""
        # -P keeps the current folder, where a user may have a `queue.py`, out of the places to import from.
        self.command = [sys.executable, "-P", "-m", *program]
        self.environ = environ
        self.child_died = child_died
        self.line_receivers = line_receivers
        self.descriptors = descriptors
        self.word = ""
        self.child: subprocess.Popen[bytes] | None = None
        self.stop_requested = asyncio.Event()
        self.ended = asyncio.Event()

    def say(self, word: str) -> None:
        """Sends a word to the child, and as the first one to each child that comes after it."""
        self.word = word
        if self.child is not None and self.child.stdin is not None:
            with contextlib.suppress(OSError):  # the child is dead, or about to be: the next one gets the word
                os.write(self.child.stdin.fileno(), f"{word}\n".encode())

    async def run(self) -> None:
        backoff = FIRST_BACKOFF
        while not self.stop_requested.is_set():
            started_at = time.monotonic()
            try:
                exit_text = describe_exit(await self._run_once())
            except (OSError, RuntimeError) as error:  # no files, no processes, no threads
                exit_text = f"it can't be run: {error}"
            if self.stop_requested.is_set():
                break
            if time.monotonic() - started_at > HEALTHY_UPTIME:
                backoff = FIRST_BACKOFF
            self.child_died(exit_text, backoff)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff):
                    await self.stop_requested.wait()
            backoff = min(backoff * 2, LONGEST_BACKOFF)
        self.ended.set()

    async def _run_once(self) -> int:
        output = subprocess.PIPE if self.line_receivers else subprocess.DEVNULL
        child = self.child = subprocess.Popen(  # noqa: ASYNC220  # a thread waits for it, as for vLLM
            self.command, env=self.environ, stdin=subprocess.PIPE, stdout=output,
            stderr=subprocess.PIPE if self.line_receivers else None, pass_fds=self.descriptors,
            process_group=0,  # Ctrl-C is for the supervisor; in another session it would be an orphan (engine/child.py)
        )  # fmt: skip
        if self.word:
            self.say(self.word)
        loop, readers = asyncio.get_running_loop(), []
        try:
            for stream, receive in zip(filter(None, (child.stdout, child.stderr)), self.line_receivers, strict=True):
                readers.append(asyncio.ensure_future(Call(partial(_pump, stream, loop, receive))))
            await Call(partial(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT))
        finally:
            self.child = None
            try:
                code = await Call(partial(_reap_group, child))
            except RuntimeError:  # no thread can be had: it takes the loop's
                code = _reap_group(child)
            assert child.stdin is not None
            child.stdin.close()
            if readers:
                await asyncio.wait(readers, timeout=LAST_LINES_PATIENCE)
        return code


def _reap_group(child: subprocess.Popen[bytes]) -> int:
    """Returns the child's exit code. A process that the child forked would go on as if nothing had ended: it is killed
    while the group's number is sure to be the child's, and is then ours to reap."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    code, deadline = child.wait(), time.monotonic() + LAST_LINES_PATIENCE
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-child.pid, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
    return code


def _pump(stream: IO[bytes], loop: asyncio.AbstractEventLoop, receive: Callable[[str], object]) -> None:
    with stream, contextlib.suppress(RuntimeError):  # the loop is gone
        while line := stream.readline(LONGEST_LINE):
            loop.call_soon_threadsafe(receive, line.decode("utf-8", "replace").rstrip())
