"""The owner of the engine: the only one that walks the lifecycle's table and carries its actions out.

Everyone else sends an event about a run (`run.broke`, `stop`), reads `state`, or is told. What it needs is passed in:
how to launch vLLM, how to ask it, who passes requests to it, who looks on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from supervisor.bounded import Call, run_bounded
from supervisor.engine import heartbeat
from supervisor.engine.child import Child, how_it_ended
from supervisor.engine.lifecycle import Action, Event, State, step
from supervisor.engine.restarts import EngineFailed, Restarts
from supervisor.engine.run import Ask, Change, Front, Observer, Observers, Phases, Run
from supervisor.engine.watch import Watch

if TYPE_CHECKING:
    from supervisor.engine.diagnosis import Diagnosis

# A refused connection costs 0.1 ms, so asking every 25 ms is free and no time is lost when vLLM begins to answer.
# An engine that answers, but not 200, logs each question: those are asked less and less often.
FIRST_POLL, SLOWEST_POLL, POLL_GROWTH = 0.025, 1.0, 1.3
PROBE_PATIENCE = 10.0
# While it loads, an engine whose part died says more of the cause than we could: it has this long to leave by itself.
LAST_WORDS_PATIENCE = 4.0
# The look for the weights reads a volume. After so many seconds the log says what the start waits for.
SLOW_LOOK = 10.0
EXIT_CANNOT_START, EXIT_LIMIT = 3, 4


class Limits(NamedTuple):
    """Seconds: until it must be ready; until it must be gone after SIGTERM; without progress (0: never hung). And the
    restarts. `warm_up`: a first request, a completion's body, before it is ready."""

    startup: float
    terminate: float
    stall: float
    restarts: int
    window: float
    stay_when_failed: bool
    warm_up: bytes = b""


class Engine:
    """`await Engine(launch, ask, limits, phases).run(front, observers)` returns the supervisor's exit code."""

    def __init__(
        self, launch: Callable[[], Call[Child]], ask: Ask, limits: Limits, phases: Callable[[Child], Phases]
    ) -> None:
        self.log = logging.getLogger("supervisor.engine")
        self.launch = launch
        self.ask = ask
        self.limits = limits
        self.new_phases = phases
        self.observers = Observers(self.log)
        self.state = State.STARTING
        self.was_ready = False
        self.exit_code = 0
        self._signal = signal.SIGTERM
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        # Event, reason, the run that it is about (None: whichever there is), and the kind of what broke it.
        self._events: asyncio.Queue[tuple[Event, str, Run | None, str]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()  # they end with the engine
        self._company: asyncio.Task[None] | None = None  # what happens beside a run, and ends with it
        self._policy = Restarts(limits.restarts, limits.window, self.clock, self._wait_to_start)
        self.latest = Run(0, self.clock(), self._send)
        self.alive: Run | None = None  # none between two runs

    def stop(self, number: int) -> None:
        """A signal arrived: drain and leave; a second one skips the wait."""
        self._signal = signal.Signals(number)
        if self.state in (State.DRAINING, State.STOPPING):
            self.exit_code = 128 + number
        self._events.put_nowait((Event.STOP, self._signal.name, None, ""))

    # The owner's loop

    async def run(self, front: Front, observers: Sequence[Observer]) -> int:
        """From the first launch to the last trace. 0 clean stop, 3 never ready, 4 restart limit, 128+N by force."""
        self.front, self.observers.all = front, observers
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._carry_out(Action.SPAWN, self.latest)
                ends = {State.STOPPED} if self.limits.stay_when_failed else {State.STOPPED, State.FAILED}
                while self.state not in ends:
                    event, reason, run, kind = await self._events.get()
                    if run is None or run is self.latest:  # else it is news of an earlier one
                        for action in self._transition(event, reason, kind):
                            await self._carry_out(action, self.latest)
                for task in self._tasks:
                    task.cancel()
        finally:  # also after a fault of our own
            if self.alive is not None and self.alive.child is not None:
                self.alive.child.end_now()
        return self.exit_code

    def _send(self, run: Run, event: Event, reason: str, kind: str = "") -> None:
        self._events.put_nowait((event, reason, run, kind))

    def _transition(self, event: Event, reason: str, kind: str) -> tuple[Action, ...]:
        before = self.state
        self.state, actions = step(before, event)
        if event is Event.BROKEN and actions:
            self.latest.broken, self.latest.ended_by = reason, kind
        if self.state is before:
            return actions
        if self.state is State.READY:
            self.was_ready = self.latest.served = True
        if self.state is State.FAILED:
            self.exit_code = EXIT_LIMIT if self.was_ready else EXIT_CANNOT_START
        if before is State.DRAINING and event in (Event.EXITED, Event.BROKEN):
            self.exit_code = 128 + self._signal  # what was in flight is lost with it
        level = logging.ERROR if self.state is State.FAILED else logging.INFO
        self.log.log(level, "%s -> %s: %s", before.value, self.state.value, reason)
        self.observers.tell("changed", Change(before, self.state, reason))
        return actions

    async def _carry_out(self, action: Action, run: Run) -> None:
        if action is Action.SPAWN:
            self.alive = self.latest = Run(run.number + 1, self.clock(), self._send)
            self._company = self._begin("attending to vLLM", self._accompany, self.latest, self.launch())
        elif action is Action.REMOVE:
            await self._remove()
        elif action is Action.KILL:
            self._send(run, Event.EXITED, "killed")
        else:
            job = {Action.JUDGE: self._judge, Action.DRAIN: self._drain, Action.TERMINATE: self._terminate}[action]
            self._begin(f"to {action.value}", job, run)

    def _begin(self, what: str, job: Callable[..., Awaitable[Any]], *args: object) -> asyncio.Task[None]:
        task = self._group.create_task(self.observers.guarded(what, job, *args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _remove(self) -> None:
        """After this nothing of the run is left, and its number means nothing to anybody."""
        run, self.alive = self.alive, None
        if self._company is not None:
            self._company.cancel()
        if run is None or run.child is None:
            return
        if left := await run.child.end():
            self.log.error("processes %s of vLLM's session would not die", ", ".join(map(str, left)))
        self.observers.tell("removed")

    # What happens beside a run

    async def _accompany(self, run: Run, launching: Call[Child]) -> None:
        """From its launch to its removal, which cancels this. Whatever it sees becomes an event."""
        try:
            await self._attend(run, launching)
        except Exception:  # noqa: BLE001  # a run that nobody attends to can't be kept
            self.observers.fault("attending to vLLM")
            run.broke("fault", "A fault of the supervisor's own (see above) ended this run")

    async def _attend(self, run: Run, launching: Call[Child]) -> None:
        run.child = child = await self._launched(run, launching)
        if child is None:
            return
        run.phases = phases = self.new_phases(child)
        self.log.info("%s", phases.detail)
        watch = Watch(child.survey, lambda: run.served, partial(self._part_died, run))
        hear = partial(self._hear, run, child, phases)
        child.lines.follow(lambda: self._loop.call_soon_threadsafe(hear))
        self.observers.tell("began", run)
        gc.collect()  # what attended to the last run is a ring (TaskGroup's traceback), and has its log
        guarded = self.observers.guarded
        async with asyncio.TaskGroup() as group:
            group.create_task(self._await_exit(run, child))
            group.create_task(guarded("looking for vLLM's processes", watch.run))
            if await guarded("waiting for vLLM", self._is_ready, phases):
                # Some 20 ms: from the first request on, the death of any part is known at once.
                await guarded("looking for vLLM's processes", watch.look)
                await self.observers.ask("answers", run)
                self._send(run, Event.READY, f"vLLM answers after {phases.finish():.1f} s")
                await self._beat(run)
            else:
                limit = f"{self.limits.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
                run.broke("slow start", f"vLLM was not ready after {limit}, it was at: {phases.detail}")

    async def _launched(self, run: Run, launching: Call[Child]) -> Child | None:
        waits = "looking for the weights: their disk did not answer in %g s; the start waits for it"
        notice = self._loop.call_later(SLOW_LOOK, self.log.warning, waits, SLOW_LOOK)
        child = None
        try:
            async with asyncio.timeout(self.limits.startup):
                child = await launching
        except OSError as error:  # TimeoutError is one
            slow = f"the weights were not found in {self.limits.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
            run.broken = f"vLLM can't be started ({error.strerror or str(error) or slow})"
            self._send(run, Event.EXITED, run.broken)
        finally:
            notice.cancel()
            if child is None:
                launching.abandon(lambda late: late.end_now())
        return child

    async def _await_exit(self, run: Run, child: Child) -> None:
        code = await self.observers.guarded("waiting for vLLM's exit", child.ended)
        self._send(run, Event.EXITED, f"vLLM ended ({how_it_ended(code or 0)})")

    async def _asked(self, path: str, body: bytes = b"", patience: float = PROBE_PATIENCE) -> tuple[int, bytes]:
        """Status 0 without an answer."""
        return await self.observers.guarded("asking vLLM", self.ask, path, body, patience) or (0, b"")

    async def _is_ready(self, phases: Phases) -> bool:
        """True when it answers, False when its time is over."""
        delay, cold = FIRST_POLL, bool(self.limits.warm_up)
        try:
            async with asyncio.timeout(None) as patience:
                while (status := (await self._asked("/health"))[0]) != 200 or cold:
                    if status == 200:
                        cold = False
                        phases.warm_up()
                        await self._asked("/v1/completions", self.limits.warm_up, self.limits.startup)
                        continue  # it may not have lived through it
                    if patience.when() is None and not phases.fetching:  # a download watches itself
                        patience.reschedule(self.clock() + self.limits.startup)
                    await asyncio.sleep(delay)
                    if status:
                        delay = min(delay * POLL_GROWTH, SLOWEST_POLL)
        except TimeoutError:
            return False
        return True

    def _hear(self, run: Run, child: Child, phases: Phases) -> None:
        lines = child.lines.take()
        try:
            begun = [phase for line in lines if (phase := phases.hear(line)) is not None]
        except Exception:  # noqa: BLE001  # a line that nobody foresaw
            self.observers.fault("reading a phase off vLLM's log")
            begun = []
        for phase in begun if self.state is State.STARTING else ():
            self.log.info("%s (%.1f s so far)", phase, time.monotonic() - child.spawned_at)
        if lines:
            self.observers.tell("heard", run, lines)

    def _part_died(self, run: Run, what: str) -> None:
        if run.served:
            run.broke("part died", what)
        elif run is self.alive:  # its exit, if it comes sooner, tells more
            self._loop.call_later(LAST_WORDS_PATIENCE, run.broke, "part died", what)

    async def _beat(self, run: Run) -> None:
        if not self.limits.stall:
            return
        pulse = heartbeat.Pulse(self.limits.stall, self.clock())
        while not await self.observers.guarded("the heartbeat", self._hangs, pulse):
            pass
        await self.observers.ask("hung", run)
        limit = f"{self.limits.stall:g} s (SUPERVISOR_STALL_TIMEOUT)"
        count = len(self.front.traffic().waiting)
        run.broke("hang", f"vLLM hangs: no progress in {limit} with {count} requests in flight")

    async def _hangs(self, pulse: heartbeat.Pulse) -> bool:
        due = self.clock() + pulse.pause
        await asyncio.sleep(pulse.pause)
        late, traffic, counters = self.clock() - due, self.front.traffic(), None
        if self.state is not State.READY:
            return False
        if traffic.waiting:  # else nobody would know, and the scrape costs vLLM some milliseconds
            status, metrics = await self._asked("/metrics", patience=pulse.scrape_patience)
            counters = heartbeat.progress(metrics) if status == 200 else None
        return pulse.hangs(self.clock(), late, traffic, counters)

    # What happens between two runs, and at the end

    async def _judge(self, run: Run) -> None:
        """Sends RETRY, when its time has come, or GIVE_UP."""
        code, lines = run.code, list(run.log)

        def diagnosed() -> Diagnosis:
            from supervisor.engine import diagnosis as table  # noqa: PLC0415  # 900 patterns, for failures only

            try:
                return table.diagnose(code or 0, lines, ended_by_us=run.broken, oom_killed=run.oom_killed)
            except Exception:  # noqa: BLE001  # of a log that nobody foresaw; the engine is started again all the same
                self.observers.fault("finding the cause")
                return table.Diagnosis("Its log can't be understood.", "", permanent=False, known=False)

        diagnosis = await run_bounded(None, diagnosed)  # to compile the patterns takes half a second of the loop's time
        self.observers.tell("judged", run, diagnosis)
        ended = f"vLLM ended ({how_it_ended(code)}): " if code is not None and not run.broken else ""
        self.log.error("%s%s", ended, diagnosis.text)

        def tell(delay: float, which: str) -> None:
            self.log.info("%s%s", which, f", in {delay:.1f} s" if delay else "")
            if run.served:
                self._begin("reporting a failure", self.observers.ask, "failed", run, which, False)

        if run.doubted and not run.served:  # that start's failure was ours: it does not count
            await self.observers.ask("clears")
            self._send(run, Event.RETRY, "another start, in another way")
            return
        unknown = "" if diagnosis.known or self.was_ready else diagnosis.cause
        failed = EngineFailed(diagnosis.permanent and not self.was_ready, run.served, unknown)
        try:
            await self._policy.again(failed, tell)
            self._send(run, Event.RETRY, "another start")
        except EngineFailed:
            verdict = self._policy.verdict(failed)  # the next thing is our own end, which waits for the report
            await self.observers.ask("failed", run, verdict, True)
            self._send(run, Event.GIVE_UP, f"{diagnosis.text} ({verdict})")

    async def _wait_to_start(self, delay: float) -> None:
        await asyncio.gather(asyncio.sleep(delay), self.observers.ask("clears"))

    async def _drain(self, run: Run) -> None:
        done = await self.observers.guarded("draining", self.front.drain)
        self.exit_code = self.exit_code if done else 128 + self._signal
        self._send(run, Event.DRAINED, "in-flight requests are done" if done else "the drain timed out")

    async def _terminate(self, run: Run) -> None:
        if run.child is not None and self.limits.terminate:
            run.child.terminate()
            await asyncio.sleep(self.limits.terminate)  # its exit ends this
            self.log.warning("vLLM ignored SIGTERM for %g s: killed", self.limits.terminate)
        self._send(run, Event.EXITED, "killed")
