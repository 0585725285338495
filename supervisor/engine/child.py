"""The vLLM child runs in a session of its own, its log is passed on line by line, and its end leaves no trace.

vLLM is several processes (API server, EngineCore, a worker for each rank). Only the API server gets SIGTERM: it takes
the others down in order, and a signal to the whole group would cut EngineCore's own clean-up short. What is left of the
session is killed. The API server is reaped last: until then the session's number is nobody else's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable

from supervisor.bounded import Call, run_bounded
from supervisor.engine.adopted import AdoptedProcess
from supervisor.engine.log_pump import LogBuffer, LogPump
from supervisor.engine.session import KILL_PATIENCE, Session
from supervisor.lines import LineStyle
from supervisor.output import Output
from supervisor.settings.command import Command

PR_SET_CHILD_SUBREAPER = 36
# vLLM names its processes `VLLM::EngineCore`; a compiler or `nvidia-smi` that it runs is no part of the engine.
NAME_PREFIX, NAME_VARIABLE = "VLLM", "VLLM_PROCESS_NAME_PREFIX"
# Seconds. The last log lines, read after the exit, name the cause; orphans may hold the pipe open for good.
EXIT_LOG_PATIENCE, END_LOG_PATIENCE = 0.05, 1.0
# Makes a start's process without running its command, with these files as stdout and stderr; returns None if it can't.
Fork = Callable[[Command, int, int], int | None]
SURVEY_PATIENCE = 10.0  # seconds: reading /proc of a process whose memory the kernel is busy with can hang


class Child:
    """One `vllm serve`, from its spawn to the end of the last process of its session."""

    def __init__(
        self,
        command: Command,
        form: LineStyle,
        outputs: tuple[Output, Output],
        remember: Callable[[Session | None], object],
        fork: Fork = lambda *_: None,
    ) -> None:
        """Raises OSError where the command can't be executed. The child's stdout and stderr go to `outputs`; `remember`
        is called with what would have to be removed if we died now."""
        with contextlib.suppress(AttributeError, OSError):  # its orphans become our children, and we reap them (Linux)
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.spawned_at = time.monotonic()
        self.popen = _spawn_by_fork(command, fork) or _spawn(command)
        self.command, self.remember = command, remember
        self.pid = self.popen.pid  # the API server's, and also the session's number
        self.session = Session.from_leader(self.pid)
        remember(self.session)
        self.log_buffer = LogBuffer()
        self._code: int | None = None
        self._part_prefix = command.environ.get(NAME_VARIABLE, NAME_PREFIX) + "::"
        streams = zip(filter(None, (self.popen.stdout, self.popen.stderr)), outputs, strict=True)
        self._pumps = [LogPump(source, output, self.log_buffer, form) for source, output in streams]

    @property
    def code(self) -> int | None:
        """The API server's exit code, -N for signal N, and None while it lives."""
        return self._code if self._code is not None else self.popen.returncode

    async def wait(self) -> int:
        """Waits for the API server's exit and its last log lines, and returns its exit code."""
        return await Call(self._wait)

    async def survey(self) -> dict[int, str]:
        """Returns the engine's parts that live: pid -> name, such as `VLLM::EngineCore`. It also notes their shared
        memory, and reaps orphans. Raises TimeoutError where /proc hangs."""
        return await run_bounded(SURVEY_PATIENCE, self._survey)

    def terminate(self) -> None:
        """Sends SIGTERM to the API server alone."""
        if self.popen.returncode is None:  # Popen is not used for this: it would reap a process that has ended
            os.kill(self.pid, signal.SIGTERM)

    async def end(self) -> list[int]:
        """Kills what is left of the session and removes what that left; returns the pids of what would not die."""
        try:
            return await run_bounded(KILL_PATIENCE + 2 * END_LOG_PATIENCE, self.end_sync)
        except TimeoutError:
            return [self.pid]

    def end_sync(self) -> list[int]:
        """Does the same as `end`, without an event loop. A second call does nothing."""
        survivors = self.session.remove()
        if not survivors:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(END_LOG_PATIENCE)
            self.remember(None)
        self._reap_orphans()
        self._wait_for_log(END_LOG_PATIENCE)
        return survivors

    def _wait(self) -> int:
        with contextlib.suppress(ChildProcessError):  # `end` came first, and reaped it
            info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            assert info is not None
            self._code = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        self._wait_for_log(EXIT_LOG_PATIENCE)
        return self._code if self._code is not None else self.popen.wait()

    def _survey(self) -> dict[int, str]:
        import psutil  # noqa: PLC0415  # 20 ms that vLLM's start does not wait for

        members = self.session.inspect()
        if self.popen.returncode is None:  # else `end` was quicker, and a later child's session may be noted by now
            self.remember(self.session)
        self._reap_orphans()
        processes = {}
        for pid in members:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                processes[pid] = process.name(), process.ppid()
        return {
            pid: name
            for pid, (name, parent) in processes.items()
            # A worker that starts a compiler is there twice for a moment, under one name: the compiler's end was taken
            # for the worker's, and a healthy engine was killed.
            if pid != self.pid and name.startswith(self._part_prefix) and processes.get(parent, ("", 0))[0] != name
        }

    def _reap_orphans(self) -> None:
        """Reaps orphans: as process 1 of a container we inherit everybody's. Somebody awaits those of our session."""
        import psutil  # noqa: PLC0415

        with contextlib.suppress(ChildProcessError):
            if not os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return  # nobody has ended, and a walk through /proc costs 10 ms
        for orphan in psutil.Process().children():
            with contextlib.suppress(OSError, psutil.Error):
                awaited = orphan.pid == self.pid or os.getsid(orphan.pid) == os.getsid(0)
                if not awaited and orphan.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(orphan.pid, os.WNOHANG)

    def _wait_for_log(self, patience: float) -> None:
        """Returns when the log's last line is read, or after `patience` seconds."""
        deadline = time.monotonic() + patience
        for pump in self._pumps:
            pump.thread.join(max(0.0, deadline - time.monotonic()))


def _spawn(command: Command) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command.argv, env=dict(command.environ), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _spawn_by_fork(command: Command, fork: Fork) -> AdoptedProcess | None:
    (output, output_writer), (errors, errors_writer) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    pid = None
    try:
        pid = fork(command, output_writer, errors_writer)
    finally:
        for descriptor in (output_writer, errors_writer, *((output, errors) if pid is None else ())):
            os.close(descriptor)
    return AdoptedProcess(pid, open(output, "rb"), open(errors, "rb")) if pid else None  # noqa: PTH123  # its pumps close them


def describe_exit(code: int) -> str:
    """Returns a text such as `exit code 1`, or `killed by SIGKILL`."""
    names = {number.value: number.name for number in signal.Signals}
    text = f"killed by {names.get(-code, f'signal {-code}')}"
    return text if code < 0 else f"exit code {code}"
