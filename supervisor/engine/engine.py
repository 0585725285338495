"""The owner of the engine: the only one that walks the lifecycle's table and carries its actions out.

Everyone else sends an event (`stop`) or reads the state (`ready`, `over`, `explanation`, `status()`). Its collaborators
are passed in: the process, a probe that asks `/health`, and what to do when the state changes and when it must drain.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from supervisor.engine import phases
from supervisor.engine.diagnosis import how_it_ended, last_error
from supervisor.engine.lifecycle import OVER, Action, Event, State, step
from supervisor.engine.process import EngineProcess

# vLLM answers 30 s to minutes after its spawn: ask often at first (it may be the fake), then less.
FIRST_POLL, SLOWEST_POLL, POLL_GROWTH = 0.05, 1.0, 1.3
# vLLM leaves 0.6 s after SIGTERM when nothing is in flight; one that ignores it is killed after this long.
TERMINATE_PATIENCE = 10.0

EXIT_OK, EXIT_CANNOT_START, EXIT_DIED = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Collaborators:
    """`probe` is True when the engine answers 200; `drain` is True when all in-flight requests could finish."""

    probe: Callable[[], Awaitable[bool]]
    drain: Callable[[], Awaitable[bool]]
    changed: Callable[[], None]


class Engine:
    """`await Engine(process, collaborators, startup_timeout=1200).run()` returns the supervisor's exit code."""

    def __init__(self, process: EngineProcess, collaborators: Collaborators, startup_timeout: float) -> None:
        self.log = logging.getLogger("supervisor.engine")
        self.process = process
        self.collaborators = collaborators
        self.startup_timeout = startup_timeout
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
        self.process.listen(lambda line: self._loop.call_soon_threadsafe(self._heard, line))
        watch = self._watch_exit()
        try:
            async with asyncio.TaskGroup() as group:
                readiness = group.create_task(self._await_readiness())
                while self.state not in (State.STOPPED, State.FAILED) or not self.exited.is_set():
                    event, reason = await self._events.get()
                    for action in self._transition(event, reason):
                        await self._carry_out(action, group)
                readiness.cancel()
        finally:
            watch()
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

    def _watch_exit(self) -> Callable[[], None]:
        """Sends EXITED as soon as the kernel tells; returns what ends the watch."""
        descriptor = os.pidfd_open(self.process.pid)

        def exited() -> None:
            code = self.process.exit_code
            if code is None:
                return
            self._loop.remove_reader(descriptor)
            self.exited.set()
            cause = last_error(self.process.lines)
            self._send(Event.EXITED, f"vLLM ended ({how_it_ended(code)})" + (f": {cause}" if cause else ""))

        self._loop.add_reader(descriptor, exited)

        def end() -> None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

        return end

    async def _await_readiness(self) -> None:
        delay = FIRST_POLL
        try:
            async with asyncio.timeout(self.startup_timeout):
                while not await self.collaborators.probe():
                    await asyncio.sleep(delay)
                    delay = min(delay * POLL_GROWTH, SLOWEST_POLL)
        except TimeoutError:
            limit = f"{self.startup_timeout:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
            self._send(Event.LATE, f"vLLM was not ready after {limit}, it was at: {self.phases.current}")
            return
        elapsed = self.phases.finish()
        self._send(Event.READY, f"vLLM answers after {elapsed:.1f} s")

    async def _drain(self) -> None:
        if not await self.collaborators.drain():
            self.exit_signal = self._signal
        self._send(Event.DRAINED, "in-flight requests are done" if self.exit_signal is None else "the drain timed out")

    async def _terminate(self) -> None:
        self.process.terminate()
        try:
            async with asyncio.timeout(TERMINATE_PATIENCE):
                await self.exited.wait()
        except TimeoutError:
            self.log.warning("vLLM ignored SIGTERM for %g s: killed", TERMINATE_PATIENCE)
            self.process.kill()

    def _heard(self, line: str) -> None:
        phase = self.phases.hear(line)
        if phase is not None and self.state is State.STARTING:
            self.log.info("%s (%.1f s so far)", phase, time.monotonic() - self.process.spawned_at)
