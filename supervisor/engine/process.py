"""The vllm child: spawned in a session of its own, its log passed on line by line, and gone without a trace when told.

vLLM is several processes (API server, EngineCore, a worker for each rank). Only the API server gets SIGTERM: it takes
the others down in order, and a signal to the whole group would cut EngineCore's own clean-up short. Whatever is left
of the session after that is killed. The session id is what finds it: vLLM renames its processes, which overwrites their
command lines and environments, and orphans lose their parent.

No asyncio here: the child is spawned before the event loop and its imports are paid for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO

from supervisor.engine import remains
from supervisor.lines import Form, VllmLines
from supervisor.output import Output
from supervisor.settings.command import Command

KEPT_LINES = 500
LONGEST_LINE = 64 * 1024
PR_SET_CHILD_SUBREAPER = 36
# How vLLM names its processes; a compiler or `nvidia-smi` that it runs for a moment is none of the engine's parts.
PART_PREFIX = "VLLM::"


class LogPump:
    """Copies one of the child's streams to one of ours, line by line, in a thread of its own.

    vLLM waits for its log to be read, so nothing may hold this thread up.
    """

    def __init__(self, source: IO[bytes], output: Output, lines: deque[str], form: Form) -> None:
        self.source = source
        self.output = output
        self.lines = lines
        self.mask = form.mask
        self.shown = VllmLines(form, terminal=os.isatty(output.target))
        self.listener: Callable[[str], object] | None = None
        self.thread = threading.Thread(target=self._run, name="vllm-log", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        rest = b""
        while data := os.read(self.source.fileno(), LONGEST_LINE):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            self._pass_on(lines)
        if rest:
            self._pass_on([rest])

    def _pass_on(self, raw: list[bytes]) -> None:
        out = []
        for line in raw:
            # latin-1 maps each byte to one character and back: what is not masked stays as it was.
            shown = self.mask(line.decode("latin-1")).encode("latin-1", "replace")
            text = shown.decode("utf-8", "replace").rstrip()
            out.append(self.shown(shown, text))
            self.lines.append(text)
            if self.listener is not None:
                self.listener(text)
        if out:
            self.output.put(b"".join(out))


class EngineProcess:
    """One run of `vllm serve`, from spawn to the last process of its session."""

    def __init__(self, command: Command, form: Form, outputs: tuple[Output, Output]) -> None:
        """Spawns it. Raises OSError where the command can't be executed. Its stdout and stderr go to `outputs`."""
        _adopt_orphans()
        self.command = command
        self.child = subprocess.Popen(
            command.argv,
            env=dict(command.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.spawned_at = time.monotonic()
        self.segments: set[str] = set()
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        assert self.child.stdout is not None
        assert self.child.stderr is not None
        self.pumps = [
            LogPump(source, output, self.lines, form)
            for source, output in zip((self.child.stdout, self.child.stderr), outputs, strict=True)
        ]

    @property
    def pid(self) -> int:
        """Of the API server; also the session's id."""
        return self.child.pid

    def listen(self, listener: Callable[[str], object]) -> None:
        """Calls `listener` with each log line, from the pumps' threads; first with those that came already."""
        for pump in self.pumps:
            pump.listener = listener
        for line in list(self.lines):  # one may come twice, none is missed
            listener(line)

    def terminate(self) -> None:
        """SIGTERM to the API server alone."""
        if self.child.poll() is None:
            self.child.terminate()

    def kill(self) -> None:
        """SIGKILL to every process of the session, once."""
        for pid in remains.session(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def survey(self) -> dict[int, str]:
        """The engine's parts that live: pid -> name, such as `VLLM::EngineCore`. Notes their shared memory, and reaps
        orphans. Reads /proc: some 10 ms, so not for the event loop."""
        import psutil  # noqa: PLC0415  # 20 ms that vLLM's start does not wait for

        members = remains.session(self.pid)
        self.segments |= remains.segments(members)
        _reap_orphans(self.pid)
        found = {}
        for pid in members:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                found[pid] = process.name(), process.ppid()
        return {
            pid: name
            for pid, (name, parent) in found.items()
            # A worker that starts a compiler is there twice for a moment, under one name: the compiler's end was taken
            # for the worker's, and a healthy engine was killed.
            if pid != self.pid and name.startswith(PART_PREFIX) and found.get(parent, ("", 0))[0] != name
        }

    def clean_up(self) -> list[int]:
        """Kills what is left of the session, reaps it, removes its shared memory; returns what would not die."""
        self.segments |= remains.segments(remains.session(self.pid))
        left = remains.kill_session(self.pid)
        self.child.poll()
        _reap_orphans(self.pid)
        if not left:
            remains.unlink(self.segments)
        self.finish_log(1.0)
        return left

    def finish_log(self, patience: float) -> None:
        """Returns when the log's last line is read, or after `patience` s."""
        deadline = time.monotonic() + patience
        for pump in self.pumps:
            pump.thread.join(max(0.0, deadline - time.monotonic()))


def how_it_ended(exit_code: int) -> str:
    """`exit code 1`, or `killed by SIGKILL`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def _adopt_orphans() -> None:
    """Makes the orphans of our descendants our children, so that they can be reaped (Linux; elsewhere init does it)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans(spared: int) -> None:
    """Reaps what ended and is not awaited: all but `spared` and the children of our own session.

    As process 1 of a container we inherit everybody's orphans, and nobody else will reap them.
    """
    ours = os.getsid(0)
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid == spared or os.getsid(found.si_pid) == ours:
                return  # the next survey comes by again
            os.waitpid(found.si_pid, os.WNOHANG)
