"""The owner of the engine: the only one that walks the lifecycle's table and carries its actions out.

Everyone else sends an event (`stop`) or reads the state (`ready`, `over`, `explanation`, `status()`). Its collaborators
are passed in: the process, a probe that asks `/health`, and what to do when the state changes and when it must drain.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from supervisor.engine import phases
from supervisor.engine.diagnosis import how_it_ended, last_error
from supervisor.engine.lifecycle import OVER, Action, Event, State, step
from supervisor.engine.process import EngineProcess

# A refused connection costs 0.1 ms, so asking every 50 ms is free and no time is lost when vLLM begins to answer.
# An engine that answers, but not 200, logs each question: those are asked less and less often.
FIRST_POLL, SLOWEST_POLL, POLL_GROWTH = 0.05, 1.0, 1.3
# After the exit its last log lines are read, which name the cause; orphans may hold the pipe open for good.
LAST_LINES_PATIENCE = 0.1

EXIT_OK, EXIT_CANNOT_START, EXIT_DIED = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Collaborators:
    """`probe` gives the status of /health, None without an answer; `drain` is True when all in-flight work is done."""

    probe: Callable[[], Awaitable[int | None]]
    drain: Callable[[], Awaitable[bool]]
    changed: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: until it must be ready; until it must be gone after SIGTERM."""

    startup: float
    terminate: float


class Engine:
    """`await Engine(process, collaborators, timeouts).run()` returns the supervisor's exit code."""

    def __init__(self, process: EngineProcess, collaborators: Collaborators, timeouts: Timeouts) -> None:
        self.log = logging.getLogger("supervisor.engine")
        self.process = process
        self.collaborators = collaborators
        self.timeouts = timeouts
        self.state = State.STARTING
        self.since = time.time()
        self.phases = phases.Waterfall(process.spawned_at)
        self.reason = ""
        self.was_ready = False
        self.exited = asyncio.Event()
        self.exit_signal: int | None = None  # of the signal that stopped us, where its drain failed
        self._signal = signal.SIGTERM
        self._events: asyncio.Queue[tuple[Event, str]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    # What others read

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def explanation(self) -> str:
        if self.state is State.STARTING:
            elapsed = time.monotonic() - self.process.spawned_at
            return f"The engine is starting: {self.phases.current}, {elapsed:.0f} s so far."
        if self.state is State.FAILED:
            return f"The engine failed: {self.reason}"
        return "The engine is ready." if self.ready else "The server is shutting down."

    def status(self) -> dict[str, object]:
        return {
            "state": self.state.value,
            "since": self.since,
            "reason": self.reason,
            "phases": self.phases.as_rows(),
            "pid": self.process.pid,
        }

    # What others ask

    def stop(self, number: int) -> None:
        """A signal arrived: drain and leave; a second one skips the wait."""
        name = signal.Signals(number).name
        if self.state in (State.DRAINING, State.STOPPING):
            self.exit_signal = number
        self._signal = signal.Signals(number)
        self._send(Event.STOP, name)

    # The owner's loop

    async def run(self) -> int:
        """From the spawned process to its last trace. 0 clean stop, 3 never ready, 4 died, 128+N stopped by force."""
        self.log.info("%s", self.phases.current)
        self.process.listen(lambda line: self._loop.call_soon_threadsafe(self._heard, line))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._await_exit())
                readiness = group.create_task(self._await_readiness())
                while self.state not in (State.STOPPED, State.FAILED) or not self.exited.is_set():
                    event, reason = await self._events.get()
                    for action in self._transition(event, reason):
                        await self._carry_out(action, group)
                readiness.cancel()
        finally:
            self.process.kill()  # also after a fault of our own, or the thread that waits for its exit would never end
        if self.state is State.FAILED:
            return EXIT_DIED if self.was_ready else EXIT_CANNOT_START
        return EXIT_OK if self.exit_signal is None else 128 + self.exit_signal

    def _send(self, event: Event, reason: str) -> None:
        self._events.put_nowait((event, reason))

    def _transition(self, event: Event, reason: str) -> tuple[Action, ...]:
        before = self.state
        self.state, actions = step(before, event)
        if self.state is not before:
            self.since = time.time()
            self.reason = reason
            self.was_ready = self.was_ready or self.ready
            if before is State.DRAINING and event is Event.EXITED:
                self.exit_signal = self._signal  # what was in flight is lost with it
            level = logging.ERROR if self.state is State.FAILED else logging.INFO
            self.log.log(level, "%s -> %s: %s", before.value, self.state.value, reason)
            self.collaborators.changed()
        return actions

    async def _carry_out(self, action: Action, group: asyncio.TaskGroup) -> None:
        if action is Action.DRAIN:
            group.create_task(self._drain())
        elif action is Action.TERMINATE:
            group.create_task(self._terminate())
        elif action is Action.KILL:
            self.process.kill()
        else:
            left = await asyncio.to_thread(self.process.clean_up)
            if left:
                self.log.error("processes %s of vLLM's session would not die", ", ".join(map(str, left)))

    # What happens beside it, each ending in an event

    async def _await_exit(self) -> None:
        """A thread waits for the kernel to tell: no polling, and no delay."""
        code = await asyncio.to_thread(self.process.child.wait)
        await asyncio.to_thread(self.process.finish_log, LAST_LINES_PATIENCE)
        self.exited.set()
        cause = None if self.over else last_error(self.process.lines)
        self._send(Event.EXITED, f"vLLM ended ({how_it_ended(code)})" + (f": {cause}" if cause else ""))

    async def _await_readiness(self) -> None:
        delay = FIRST_POLL
        try:
            async with asyncio.timeout(self.timeouts.startup):
                while (status := await self.collaborators.probe()) != 200:
                    await asyncio.sleep(delay)
                    if status is not None:
                        delay = min(delay * POLL_GROWTH, SLOWEST_POLL)
        except TimeoutError:
            limit = f"{self.timeouts.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
            self._send(Event.LATE, f"vLLM was not ready after {limit}, it was at: {self.phases.current}")
            return
        self._send(Event.READY, f"vLLM answers after {self.phases.finish():.1f} s")

    async def _drain(self) -> None:
        if not await self.collaborators.drain():
            self.exit_signal = self._signal
        self._send(Event.DRAINED, "in-flight requests are done" if self.exit_signal is None else "the drain timed out")

    async def _terminate(self) -> None:
        self.process.terminate()
        try:
            async with asyncio.timeout(self.timeouts.terminate):
                await self.exited.wait()
        except TimeoutError:
            self.log.warning("vLLM ignored SIGTERM for %g s: killed", self.timeouts.terminate)
            self.process.kill()

    def _heard(self, line: str) -> None:
        phase = self.phases.hear(line)
        if phase is not None and self.state is State.STARTING:
            self.log.info("%s (%.1f s so far)", phase, time.monotonic() - self.process.spawned_at)
