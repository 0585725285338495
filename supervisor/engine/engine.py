"""The owner of the engine: the only one that walks the lifecycle's table and carries its actions out.

Everyone else sends an event (`stop`) or reads the state (`ready`, `over`, `explanation`, `status()`). Its collaborators
are passed in: how to spawn, how to ask /health and /metrics, what to do when the state changes and when it must drain.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from supervisor.around.multinode import Ranks
from supervisor.around.phases import Waterfall
from supervisor.engine.heartbeat import Heartbeat, Scrape
from supervisor.engine.lifecycle import OVER, Action, Event, State, step
from supervisor.engine.process import EngineProcess, how_it_ended
from supervisor.engine.restarts import Restarts
from supervisor.engine.watch import Watch
from supervisor.settings.cluster import Cluster

# A refused connection costs 0.1 ms, so asking every 50 ms is free and no time is lost when vLLM begins to answer.
# An engine that answers, but not 200, logs each question: those are asked less and less often.
FIRST_POLL, SLOWEST_POLL, POLL_GROWTH = 0.05, 1.0, 1.3
# After the exit its last log lines are read, which name the cause; orphans may hold the pipe open for good.
LAST_LINES_PATIENCE = 0.05
# While it loads, an engine whose part died says more of the cause than we could: it has this long to leave by itself.
LAST_WORDS_PATIENCE = 4.0
HEARTBEATS_PER_STALL, LONGEST_HEARTBEAT = 8, 10.0
SHOWN_LINES = 20
FOLLOWED_LINES = 200  # of vLLM's log, over restarts, for those who follow it
KEPT_TRANSITIONS = 100  # for the post-mortem
# Seconds between two looks whether the other machines are there. A data-parallel rank connects soon after it is ready.
RANKS_INTERVAL, LOOKS_FOR_RANKS = 1.0, 60

EXIT_OK, EXIT_CANNOT_START, EXIT_LIMIT = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Collaborators:
    """What the owner needs of others.

    `spawn` starts the engine (OSError where it can't); `cleaned` is called when nothing of a run is left, before the
    next; `noted` when more is known of what would have to be removed; `health` gives the status of /health, None
    without an answer; `metrics` the text of /metrics; `traffic` the gateway's (reads so far, requests that wait for
    vLLM's next byte); `drain` is True when all in-flight work is done; `changed` is called after each transition;
    `failed` begins to write the post-mortem of a failure, and what it returns may be waited for.
    """

    spawn: Callable[[], EngineProcess]
    cleaned: Callable[[], Awaitable[None]]
    noted: Callable[[EngineProcess], None]
    health: Callable[[], Awaitable[int | None]]
    metrics: Callable[[], Awaitable[bytes | None]]
    traffic: Callable[[], tuple[int, int]]
    drain: Callable[[], Awaitable[bool]]
    changed: Callable[[], None]
    failed: Callable[[Mapping[str, object]], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: until it must be ready; until it must be gone after SIGTERM; without progress. And the restarts."""

    startup: float
    terminate: float
    stall: float
    restarts: int
    window: float
    stay_when_failed: bool
    cluster: Cluster | None = None  # of machines that serve the model together


class Engine:
    """`await Engine(process, collaborators, limits).run()` returns the supervisor's exit code."""

    def __init__(self, process: EngineProcess, collaborators: Collaborators, limits: Limits) -> None:
        self.log = logging.getLogger("supervisor.engine")
        self.collaborators = collaborators
        self.limits = limits
        self.state = State.STARTING
        self.since = time.time()
        self.reason = ""
        self.was_ready = False
        self.failed = False
        self.transitions: Counter[str] = Counter()  # how often each
        self.timeline: deque[dict[str, object]] = deque(maxlen=KEPT_TRANSITIONS)
        self.timeline.append({"at": self.since, "state": self.state.value, "reason": ""})
        self.restarts = 0
        self.restarts_by_cause: Counter[str] = Counter()
        self.last_failure: dict[str, object] | None = None
        self.lines: deque[str] = deque(maxlen=FOLLOWED_LINES)
        self.heard = 0  # lines, ever
        self.exit_signal: int | None = None  # of the signal that stopped us, where its drain failed
        self._policy = Restarts(limits.restarts, limits.window)
        self._signal = signal.SIGTERM
        self._events: asyncio.Queue[tuple[Event, str]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # of this run of the engine
        self._take(process)

    def _take(self, process: EngineProcess) -> None:
        """Another run begins."""
        self.process = process
        self.phases = Waterfall(process.spawned_at, fetches=process.command.fetches)
        self.served = False  # this run was ready once
        self.broken: str | None = None  # why we ended this run, where we did
        self.ended_by = "exit"
        self.exited = asyncio.Event()
        self.ranks = Ranks(self.limits.cluster) if self.limits.cluster is not None else None
        self.watch = Watch(process, lambda: self.served, self._part_died, lambda: self.collaborators.noted(process))

    # What others read

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def draining(self) -> bool:
        return self.state is State.DRAINING

    @property
    def explanation(self) -> str:
        elapsed = time.monotonic() - self.phases.start
        if self.state is State.STARTING:
            return f"The engine is starting: {self.phases.detail}, {elapsed:.0f} s so far."
        if self.state is State.RESTARTING:
            phase = f"{self.phases.detail}, {elapsed:.0f} s so far"
            return f"The engine is restarting: {phase}. It had stopped: {self.reason}"
        if self.state is State.FAILED:
            return f"The engine failed: {self.reason}"
        return "The engine is ready." if self.ready else "The server is shutting down."

    def status(self) -> dict[str, object]:
        return {
            "state": self.state.value,
            "since": self.since,
            "reason": self.reason,
            "phases": self.phases.as_rows(),
            "progress": self.phases.progress,
            "restarts": self.restarts,
            "restarts_by_cause": dict(self.restarts_by_cause),
            "transitions": dict(self.transitions),
            "last_failure": self.last_failure,
            "pid": self.process.pid,
        }

    def log_after(self, number: int) -> tuple[int, list[str]]:
        fresh = min(self.heard - number, len(self.lines))
        return self.heard, list(self.lines)[-fresh:] if fresh else []

    # What others ask

    def stop(self, number: int) -> None:
        """A signal arrived: drain and leave; a second one skips the wait."""
        if self.state in (State.DRAINING, State.STOPPING):
            self.exit_signal = number
        self._signal = signal.Signals(number)
        self._send(Event.STOP, self._signal.name)

    # The owner's loop

    async def run(self) -> int:
        """From the spawned process to its last trace. 0 clean stop, 3 never ready, 4 restart limit, 128+N by force."""
        try:
            async with asyncio.TaskGroup() as group:
                self._begin(group)
                while not self._over_and_out():
                    event, reason = await self._events.get()
                    for action in self._transition(event, reason):
                        await self._carry_out(action, group)
                self._end_tasks()
        finally:
            self.process.kill()  # also after a fault of our own, or the thread that waits for its exit would never end
        if self.failed:
            return EXIT_LIMIT if self.was_ready else EXIT_CANNOT_START
        return EXIT_OK if self.exit_signal is None else 128 + self.exit_signal

    def _over_and_out(self) -> bool:
        if self.state is State.FAILED:
            return not self.limits.stay_when_failed
        return self.state is State.STOPPED

    def _broke(self, kind: str, reason: str) -> None:
        """We end this run. `kind` is one of a few words, for metrics."""
        self.ended_by = kind
        self._send(Event.BROKEN, reason)

    def _send(self, event: Event, reason: str) -> None:
        self._events.put_nowait((event, reason))

    def _transition(self, event: Event, reason: str) -> tuple[Action, ...]:
        before = self.state
        self.state, actions = step(before, event)
        if self.state is not before:
            self.since = time.time()
            self.reason = reason
            self.transitions[f"{before.value} -> {self.state.value}"] += 1
            self.timeline.append({"at": self.since, "state": self.state.value, "reason": reason})
            self.failed = self.failed or self.state is State.FAILED
            if self.ready:
                self.was_ready = self.served = True
            if before is State.DRAINING and event in (Event.EXITED, Event.BROKEN):
                self.exit_signal = self._signal  # what was in flight is lost with it
            level = logging.ERROR if self.state is State.FAILED else logging.INFO
            self.log.log(level, "%s -> %s: %s", before.value, self.state.value, reason)
            self.collaborators.changed()
        if event is Event.BROKEN and Action.KILL in actions:
            self.broken = self.broken or reason  # what we kill for that is broken too, and tells nothing
        return actions

    async def _carry_out(self, action: Action, group: asyncio.TaskGroup) -> None:
        if action is Action.SPAWN:
            self._spawn(group)
        elif action is Action.JUDGE:
            self._tasks.add(group.create_task(self._judge()))
        elif action is Action.DRAIN:
            group.create_task(self._drain())
        elif action is Action.TERMINATE:
            group.create_task(self._terminate())
        elif action is Action.KILL:
            await asyncio.to_thread(self.process.kill)
        elif action is Action.CLEAN_UP:
            self._end_tasks()
            left = await asyncio.to_thread(self.process.clean_up)
            if left:
                self.log.error("processes %s of vLLM's session would not die", ", ".join(map(str, left)))
            await self.collaborators.cleaned()

    def _begin(self, group: asyncio.TaskGroup) -> None:
        """What happens beside each run of the engine, each ending in an event."""
        self.log.info("%s", self.phases.current)
        self.process.listen(lambda line: self._loop.call_soon_threadsafe(self._heard, line))
        for job in (self._await_readiness(), self.watch.run(), self._heartbeat()):
            self._tasks.add(group.create_task(job))
        if self.ranks is not None:
            self._tasks.add(group.create_task(self._watch_ranks(self.ranks)))
        group.create_task(self._await_exit())

    def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    def _spawn(self, group: asyncio.TaskGroup) -> None:
        try:
            process = self.collaborators.spawn()
        except OSError as error:
            self.broken = f"vLLM can't be started again ({error.strerror or error})"
            self._send(Event.EXITED, self.broken)
            return
        self.restarts += 1
        self.restarts_by_cause[self.ended_by] += 1
        self._take(process)
        self._begin(group)

    # What happens beside it

    async def _await_exit(self) -> None:
        """A thread waits for the kernel to tell: no polling, and no delay."""
        code = await asyncio.to_thread(self.process.child.wait)
        await asyncio.to_thread(self.process.finish_log, LAST_LINES_PATIENCE)
        self.exited.set()
        self._send(Event.EXITED, f"vLLM ended ({how_it_ended(code)})")

    async def _await_readiness(self) -> None:
        delay = FIRST_POLL
        try:
            async with asyncio.timeout(None) as patience:
                while (status := await self.collaborators.health()) != 200:
                    if patience.when() is None and not self.phases.fetching:  # a download watches itself
                        patience.reschedule(self._loop.time() + self.limits.startup)
                    await asyncio.sleep(delay)
                    if status is not None:
                        delay = min(delay * POLL_GROWTH, SLOWEST_POLL)
        except TimeoutError:
            limit = f"{self.limits.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
            self._broke("slow start", f"vLLM was not ready after {limit}, it was at: {self.phases.detail}")
            return
        await self.watch.look()  # some 20 ms: from the first request on, the death of any part is known at once
        if self.ranks is not None:
            await asyncio.to_thread(self.ranks.note, self.process.pid)
        self._send(Event.READY, f"vLLM answers after {self.phases.finish():.1f} s")

    async def _watch_ranks(self, ranks: Ranks) -> None:
        """vLLM itself does not notice when another machine is gone."""
        looks = 0
        while looks < LOOKS_FOR_RANKS:
            await asyncio.sleep(RANKS_INTERVAL)
            if not self.served:
                continue
            if not ranks.noted:
                looks += 1
                await asyncio.to_thread(ranks.note, self.process.pid)
            elif (address := await asyncio.to_thread(ranks.gone)) is not None:
                # Else it was us who closed it, for another reason; and a headless rank that drains waits for this.
                if self.ready or (self.draining and not ranks.cluster.headless):
                    self._broke("rank gone", f"the rank at {address} is gone: all of them have to start again")
                return
        self.log.warning("no connection to another rank is to be seen: the end of one will not be noticed")

    def _part_died(self, what: str) -> None:
        if self.served:
            self._broke("part died", what)
        elif not self.over:
            self._tasks.add(self._loop.create_task(self._last_words(what)))

    async def _last_words(self, what: str) -> None:
        try:
            async with asyncio.timeout(LAST_WORDS_PATIENCE):
                await self.exited.wait()
        except TimeoutError:
            self._broke("part died", what)

    async def _heartbeat(self) -> None:
        interval = min(self.limits.stall / HEARTBEATS_PER_STALL, LONGEST_HEARTBEAT)
        heartbeat = Heartbeat(self.limits.stall, interval)
        while True:
            await asyncio.sleep(interval)
            if not self.ready:
                continue
            text = await self.collaborators.metrics()
            relayed, awaited = self.collaborators.traffic()
            scrape = Scrape.parse(text) if text is not None else None
            if heartbeat.stalled(time.monotonic(), scrape, relayed, awaited):
                working = max(awaited, int(scrape.working) if scrape is not None else 0)
                await asyncio.to_thread(self._dump_stacks)
                limit = f"{self.limits.stall:g} s (SUPERVISOR_STALL_TIMEOUT)"
                self._broke("hang", f"vLLM hangs: no progress in {limit} with {working} requests in flight")
                return

    def _dump_stacks(self) -> None:
        """Where the engine stands, before it is killed; only where py-spy is installed."""
        program = shutil.which("py-spy")
        if program is None:
            return
        for pid, name in self.process.survey().items():
            try:
                done = subprocess.run(
                    [program, "dump", "--nonblocking", "--pid", str(pid)],
                    capture_output=True, text=True, timeout=10, check=False,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                self.log.warning("no stacks of %s: %s", name, error)
                continue
            self.log.warning("stacks of %s (pid %d):\n%s", name, pid, done.stdout or done.stderr)

    async def _judge(self) -> None:
        """Sends RETRY, when its time has come, or GIVE_UP."""
        from supervisor.engine.diagnosis import diagnose  # noqa: PLC0415  # 80 patterns to compile, for failures only

        code = self.process.child.poll()
        lines = list(self.process.lines)
        diagnosis = diagnose(code if code is not None else 0, lines, ended_by_us=self.broken)
        ended = how_it_ended(code) if code is not None else "still there"
        self.last_failure = {
            "at": time.time(),
            "exit_code": code if code is not None and code >= 0 else None,
            "signal": -code if code is not None and code < 0 else None,
            "cause": diagnosis.cause,
            "remedy": diagnosis.remedy,
            "log_tail": lines[-SHOWN_LINES:],
        }
        verdict = self._policy.judge(
            time.monotonic(), permanent=diagnosis.permanent and not self.was_ready, served=self.served
        )
        self.reason = diagnosis.text
        self.log.error("%s%s", "" if self.broken else f"vLLM ended ({ended}): ", diagnosis.text)
        if verdict.delay is None or self.served:
            known = {**self.last_failure, "argv": self.process.command.argv, "log": lines, "verdict": verdict.reason}
            known |= {"given_up": verdict.delay is None, "timeline": list(self.timeline)}
            written = self.collaborators.failed({**self.status(), **known})
        if verdict.delay is None:
            await written  # the next thing is our own end
            self._send(Event.GIVE_UP, f"{diagnosis.text} ({verdict.reason})")
            return
        self.log.info("%s%s", verdict.reason, f", in {verdict.delay:.1f} s" if verdict.delay else "")
        await asyncio.sleep(verdict.delay)
        self._send(Event.RETRY, verdict.reason)

    async def _drain(self) -> None:
        if not await self.collaborators.drain():
            self.exit_signal = self._signal
        self._send(Event.DRAINED, "in-flight requests are done" if self.exit_signal is None else "the drain timed out")

    async def _terminate(self) -> None:
        if self.exited.is_set():  # between two runs: there is nothing to end
            self._send(Event.EXITED, "no engine was running")
            return
        # While it loads vLLM is deaf to SIGTERM, or leaves in its own time; it has nothing to lose.
        if not self.served or not self.limits.terminate:
            await asyncio.to_thread(self.process.kill)
            return
        self.process.terminate()
        try:
            async with asyncio.timeout(self.limits.terminate):
                await self.exited.wait()
        except TimeoutError:
            self.log.warning("vLLM ignored SIGTERM for %g s: killed", self.limits.terminate)
            await asyncio.to_thread(self.process.kill)

    def _heard(self, line: str) -> None:
        self.heard += 1
        self.lines.append(line)
        if self.ranks is not None:
            self.ranks.hear(line)
        phase = self.phases.hear(line)
        if phase is not None:
            self.watch.look_soon()  # more processes and more shared memory than before
        if phase is not None and self.state in (State.STARTING, State.RESTARTING):
            self.log.info("%s (%.1f s so far)", phase, time.monotonic() - self.process.spawned_at)
