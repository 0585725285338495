"""The vllm child: spawned in a session of its own, its log passed on line by line, and gone without a trace when told.

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
from supervisor.engine.adopted import Adopted
from supervisor.engine.log_pump import Lines, LogPump
from supervisor.engine.session import KILL_PATIENCE, Session
from supervisor.lines import LineStyle
from supervisor.output import Output
from supervisor.settings.command import Command

PR_SET_CHILD_SUBREAPER = 36
# vLLM names its processes `VLLM::EngineCore`; a compiler or `nvidia-smi` that it runs is none of the engine's parts.
NAME_PREFIX, NAME_VARIABLE = "VLLM", "VLLM_PROCESS_NAME_PREFIX"
# Seconds. After its exit the last log lines are read, which name the cause; orphans may hold the pipe open for good.
LAST_LINES, ALL_LINES = 0.05, 1.0
# Makes a start's process without running its command, with these files for its stdout and stderr; None: it can't.
Fork = Callable[[Command, int, int], int | None]
# Reading /proc of a process whose memory the kernel is busy with can hang.
SURVEY_PATIENCE = 10.0


class Child:
    """One `vllm serve`, from spawn to the last process of its session."""

    def __init__(
        self,
        command: Command,
        form: LineStyle,
        outputs: tuple[Output, Output],
        remember: Callable[[Session | None], object],
        fork: Fork = lambda *_: None,
    ) -> None:
        """Raises OSError where the command can't be executed. Its stdout and stderr go to `outputs`; `remember` is told
        what would have to be removed if we died now."""
        with contextlib.suppress(AttributeError, OSError):  # its orphans become our children, to be reaped (Linux)
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.spawned_at = time.monotonic()
        self.popen = _forked(command, fork) or _spawned(command)
        self.command, self.remember = command, remember
        self.pid = self.popen.pid  # of the API server; also the session's number
        self.session = Session.led_by(self.pid)
        remember(self.session)
        self.lines = Lines()
        self._code: int | None = None
        self._part_prefix = command.environ.get(NAME_VARIABLE, NAME_PREFIX) + "::"
        streams = zip(filter(None, (self.popen.stdout, self.popen.stderr)), outputs, strict=True)
        self._pumps = [LogPump(source, output, self.lines, form) for source, output in streams]

    @property
    def code(self) -> int | None:
        """Its exit code, -N for signal N; None while it lives."""
        return self._code if self._code is not None else self.popen.returncode

    async def ended(self) -> int:
        """Waits for the API server's exit and its last words; its exit code."""
        return await Call(self._wait)

    async def survey(self) -> dict[int, str]:
        """The engine's parts that live: pid -> name, such as `VLLM::EngineCore`. Notes their shared memory, and reaps
        orphans. Raises TimeoutError where /proc hangs."""
        return await run_bounded(SURVEY_PATIENCE, self._survey)

    def terminate(self) -> None:
        """SIGTERM to the API server alone."""
        if self.popen.returncode is None:  # not by Popen, which reaps what has ended
            os.kill(self.pid, signal.SIGTERM)

    async def end(self) -> list[int]:
        """Kills what is left of the session and removes what that left; returns what would not die."""
        try:
            return await run_bounded(KILL_PATIENCE + 2 * ALL_LINES, self.end_now)
        except TimeoutError:
            return [self.pid]

    def end_now(self) -> list[int]:
        """As `end`, without a loop. A second time it does nothing."""
        left = self.session.remove()
        if not left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(ALL_LINES)
            self.remember(None)
        self._reap_orphans()
        self._read_log(ALL_LINES)
        return left

    def _wait(self) -> int:
        with contextlib.suppress(ChildProcessError):  # it was reaped: `end` came first
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            self._code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        self._read_log(LAST_LINES)
        return self._code if self._code is not None else self.popen.wait()

    def _survey(self) -> dict[int, str]:
        import psutil  # noqa: PLC0415  # 20 ms that vLLM's start does not wait for

        members = self.session.look()
        if self.popen.returncode is None:  # else `end` was quicker, and another one's session may be noted by now
            self.remember(self.session)
        self._reap_orphans()
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
            if pid != self.pid and name.startswith(self._part_prefix) and found.get(parent, ("", 0))[0] != name
        }

    def _reap_orphans(self) -> None:
        """As process 1 of a container we inherit everybody's; those of our own session are awaited by somebody."""
        import psutil  # noqa: PLC0415

        with contextlib.suppress(ChildProcessError):
            if not os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return  # nobody has ended, and a walk through /proc costs 10 ms
        for orphan in psutil.Process().children():
            with contextlib.suppress(OSError, psutil.Error):
                awaited = orphan.pid == self.pid or os.getsid(orphan.pid) == os.getsid(0)
                if not awaited and orphan.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(orphan.pid, os.WNOHANG)

    def _read_log(self, patience: float) -> None:
        """Returns when the log's last line is read, or after `patience` s."""
        deadline = time.monotonic() + patience
        for pump in self._pumps:
            pump.thread.join(max(0.0, deadline - time.monotonic()))


def _spawned(command: Command) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command.argv, env=dict(command.environ), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _forked(command: Command, fork: Fork) -> Adopted | None:
    (output, its_output), (errors, its_errors) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    try:
        pid = fork(command, its_output, its_errors)
    finally:
        os.close(its_output)
        os.close(its_errors)
    if pid is not None:
        return Adopted(pid, open(output, "rb"), open(errors, "rb"))  # noqa: PTH123  # its pumps close them
    os.close(output)
    os.close(errors)
    return None


def how_it_ended(exit_code: int) -> str:
    """`exit code 1`, or `killed by SIGKILL`."""
    names = {number.value: number.name for number in signal.Signals}
    ended = f"killed by {names.get(-exit_code, f'signal {-exit_code}')}"
    return ended if exit_code < 0 else f"exit code {exit_code}"
