"""The owner of the engine: the only one that walks the lifecycle's table and carries its actions out.

Everyone else sends an event about a run (`run.broke`, `stop`) or reads the state (`ready`, `over`, `explanation`,
`status()`). What it needs is passed in: how to launch vLLM, how to ask it, who passes requests to it, who looks on.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from supervisor.bounded import Call
from supervisor.engine import gpu
from supervisor.engine.child import Child, how_it_ended
from supervisor.engine.heartbeat import Pulse, progress
from supervisor.engine.lifecycle import OVER, Action, Event, State, step
from supervisor.engine.restarts import EngineFailed, Restarts
from supervisor.engine.run import Ask, Front, Observer, Phases, Run
from supervisor.engine.watch import Watch

# A refused connection costs 0.1 ms, so asking every 50 ms is free and no time is lost when vLLM begins to answer.
# An engine that answers, but not 200, logs each question: those are asked less and less often.
FIRST_POLL, SLOWEST_POLL, POLL_GROWTH = 0.05, 1.0, 1.3
PROBE_PATIENCE = 10.0
# While it loads, an engine whose part died says more of the cause than we could: it has this long to leave by itself.
LAST_WORDS_PATIENCE = 4.0
# The look for the weights reads a volume. After so many seconds the log says what the start waits for.
SLOW_LOOK = 10.0
SHOWN_LINES = 20
FOLLOWED_LINES = 200  # of vLLM's log, over restarts, for those who follow it
KEPT_TRANSITIONS = 100  # for the post-mortem

EXIT_OK, EXIT_CANNOT_START, EXIT_LIMIT = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: until it must be ready; until it must be gone after SIGTERM; without progress (0: never hung). And the
    restarts. `warm_up`: a first request, a completion's body, before it is ready."""

    startup: float
    terminate: float
    stall: float
    restarts: int
    window: float
    stay_when_failed: bool
    warm_up: bytes = b""


class Happened(NamedTuple):
    """`run`: the one that it is about; None: whichever there is. `kind`: of what broke it."""

    event: Event
    reason: str
    run: Run | None
    kind: str = ""


class Engine:
    """`await Engine(launch, ask, limits, phases).run(front, observers)` returns the supervisor's exit code."""

    def __init__(
        self,
        launch: Callable[[], Call[Child]],
        ask: Ask,
        limits: Limits,
        phases: Callable[[Child], Phases],
    ) -> None:
        """`launch` begins a start, which may fail with OSError; `phases` follows a start by its log."""
        self.log = logging.getLogger("supervisor.engine")
        self.launch = launch
        self.ask = ask
        self.limits = limits
        self.new_phases = phases
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
        self.alive: Run | None = None  # none between two runs
        self.observers: Sequence[Observer] = ()
        self._signal = signal.SIGTERM
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._events: asyncio.Queue[Happened] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()  # they end with the engine
        self._company: asyncio.Task[None] | None = None  # what happens beside this run, and ends with it
        self._faults: set[str] = set()  # of ours, that were told
        self._stopped_for = ""
        self._policy = Restarts(limits.restarts, limits.window, self._clock, self._wait_to_start)
        self._memory: list[int] | None = None  # of the GPUs, in use before the first start
        self.latest = Run(1, self._clock(), self._send)

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
        if self.state is State.STARTING:
            doing = f"{self.latest.doing}, {self._clock() - self.latest.began:.0f} s so far."
            if self._stopped_for:
                return f"The engine is restarting: {doing} It had stopped: {self._stopped_for}"
            return f"The engine is starting: {doing}"
        if self.state is State.RESTARTING:
            return f"The engine is restarting. It had stopped: {self.reason}"
        if self.state is State.FAILED:
            return f"The engine failed: {self.reason}"
        return "The engine is ready." if self.ready else "The server is shutting down."

    def status(self) -> dict[str, object]:
        phases = self.latest.phases
        return {
            "state": self.state.value,
            "since": self.since,
            "reason": self.reason,
            "phases": phases.as_rows() if phases is not None else [self._look],
            "progress": phases.progress if phases is not None else "",
            "restarts": self.restarts,
            "restarts_by_cause": dict(self.restarts_by_cause),
            "transitions": dict(self.transitions),
            "last_failure": self.last_failure,
            "pid": self.alive.pid if self.alive is not None else None,
        }

    @property
    def _look(self) -> dict[str, object]:
        """What comes before the phases of vLLM's log."""
        return {"name": self.latest.doing, "seconds": round(self._clock() - self.latest.began, 3)}

    def log_after(self, number: int) -> tuple[int, list[str]]:
        fresh = min(self.heard - number, len(self.lines))
        return self.heard, list(self.lines)[-fresh:] if fresh else []

    # What others ask

    def stop(self, number: int) -> None:
        """A signal arrived: drain and leave; a second one skips the wait."""
        if self.state in (State.DRAINING, State.STOPPING):
            self.exit_signal = number
        self._signal = signal.Signals(number)
        self._events.put_nowait(Happened(Event.STOP, self._signal.name, None))

    # The owner's loop

    async def run(self, front: Front, observers: Sequence[Observer], first: Call[Child] | None = None) -> int:
        """From the first launch, which may have begun, to the engine's last trace. 0 clean stop, 3 never ready, 4
        restart limit, 128+N by force."""
        self.front, self.observers = front, observers
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._begin("looking at the GPU's memory", self._measure)
                self._start(first or self.launch())
                while not self._done():
                    happened = await self._events.get()
                    for action in self._transition(happened):
                        await self._carry_out(action, happened.run or self.latest)
                for task in (*self._tasks, *filter(None, [self._company])):
                    task.cancel()
        finally:  # also after a fault of our own
            if self.alive is not None and self.alive.child is not None:
                self.alive.child.end_now()
        if self.failed:
            return EXIT_LIMIT if self.was_ready else EXIT_CANNOT_START
        return EXIT_OK if self.exit_signal is None else 128 + self.exit_signal

    def _done(self) -> bool:
        if self.state is State.FAILED:
            return not self.limits.stay_when_failed
        return self.state is State.STOPPED

    def _send(self, run: Run, event: Event, reason: str, kind: str = "") -> None:
        self._events.put_nowait(Happened(event, reason, run, kind))

    def _transition(self, happened: Happened) -> tuple[Action, ...]:
        event, reason, run, kind = happened
        if run is not None and run is not self.latest:
            return ()  # news of an earlier run
        before = self.state
        self.state, actions = step(before, event)
        if event is Event.BROKEN and actions:
            self.latest.broken, self.latest.ended_by = reason, kind
        if self.state is before:
            return actions
        self.since = time.time()
        self.reason = reason
        self.transitions[f"{before.value} -> {self.state.value}"] += 1
        self.timeline.append({"at": self.since, "state": self.state.value, "reason": reason})
        self.failed = self.failed or self.state is State.FAILED
        if self.ready:
            self.was_ready = self.latest.served = True
        if before is State.DRAINING and event in (Event.EXITED, Event.BROKEN):
            self.exit_signal = self._signal  # what was in flight is lost with it
        level = logging.ERROR if self.state is State.FAILED else logging.INFO
        self.log.log(level, "%s -> %s: %s", before.value, self.state.value, reason)
        self._tell("changed", self.state)
        return actions

    async def _carry_out(self, action: Action, run: Run) -> None:
        if action is Action.SPAWN:
            self.restarts += 1
            self.restarts_by_cause[run.ended_by] += 1
            self.latest = Run(run.number + 1, self._clock(), self._send)
            self._start(self.launch())
        elif action is Action.REMOVE:
            await self._remove()
        elif action is Action.JUDGE:
            self._begin("judging a failure", self._judge, run)
        elif action is Action.DRAIN:
            self._begin("draining", self._drain, run)
        elif action is Action.TERMINATE:
            self._begin("stopping vLLM", self._terminate, run)
        elif action is Action.KILL:
            self._send(run, Event.EXITED, "killed")

    def _start(self, launching: Call[Child]) -> None:
        self.alive = self.latest
        self._company = self._group.create_task(self._accompany(self.latest, launching))

    async def _remove(self) -> None:
        """After this nothing of the run is left, and its number means nothing to anybody."""
        run, self.alive = self.alive, None
        if self._company is not None:
            self._company.cancel()
        if run is None or run.child is None:
            return
        if left := await run.child.end():
            self.log.error("processes %s of vLLM's session would not die", ", ".join(map(str, left)))
        self._tell("removed")

    # What must not end what serves

    def _begin(self, what: str, job: Callable[..., Awaitable[Any]], *args: object) -> None:
        task = self._group.create_task(self._guarded(what, job, *args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, what: str, job: Callable[..., Awaitable[Any]], *args: object) -> Any:
        """What the job gives; None, and a line of log, where it fails."""
        try:
            return await job(*args)
        except Exception:  # noqa: BLE001  # whatever it is: a fault in what happens beside must not end what serves
            self._fault(what)
            return None

    def _tell(self, what: str, *about: object) -> None:
        for observer in self.observers:
            try:
                getattr(observer, what)(*about)
            except Exception:  # noqa: BLE001  # as above
                self._fault(f"{type(observer).__name__}.{what}")

    async def _ask_all(self, what: str, about: object) -> None:
        for observer in self.observers:
            await self._guarded(f"{type(observer).__name__}.{what}", getattr(observer, what), about)

    def _fault(self, what: str) -> None:
        if what not in self._faults:
            self._faults.add(what)
            self.log.exception("%s failed: a fault of the supervisor's own; what serves goes on", what)

    async def _asked(self, path: str, body: bytes = b"", patience: float = PROBE_PATIENCE) -> tuple[int, bytes]:
        """Status 0 without an answer."""
        return await self._guarded("asking vLLM", self.ask, path, body, patience) or (0, b"")

    # What happens beside a run

    async def _accompany(self, run: Run, launching: Call[Child]) -> None:
        """From its launch to its removal, which cancels this. Whatever it sees becomes an event."""
        run.child = child = await self._launched(run, launching)
        if child is None:
            return
        run.phases = phases = self.new_phases(child)
        self.log.info("%s", phases.current)
        watch = Watch(child.survey, lambda: run.served, partial(self._part_died, run))
        hear = partial(self._hear, run, child, phases, watch)
        child.lines.follow(lambda: self._loop.call_soon_threadsafe(hear))
        self._tell("began", run)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._await_exit(run, child))
            group.create_task(self._guarded("looking for vLLM's processes", watch.run))
            if await self._guarded("waiting for vLLM", self._is_ready, run, phases, watch):
                self._send(run, Event.READY, f"vLLM answers after {phases.finish():.1f} s")
                await self._beat(run)
            else:
                limit = f"{self.limits.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
                run.broke("slow start", f"vLLM was not ready after {limit}, it was at: {phases.detail}")

    async def _launched(self, run: Run, launching: Call[Child]) -> Child | None:
        waits = "looking for the weights: their disk did not answer in %g s; the start waits for it"
        notice = self._loop.call_later(SLOW_LOOK, self.log.warning, waits, SLOW_LOOK)
        try:
            async with asyncio.timeout(self.limits.startup):
                child: Child = await launching
                return child
        except OSError as error:  # TimeoutError is one
            launching.abandon(_end)
            slow = f"the weights were not found in {self.limits.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
            run.broken = f"vLLM can't be started ({error.strerror or str(error) or slow})"
            self._send(run, Event.EXITED, run.broken)
            return None
        except asyncio.CancelledError:
            launching.abandon(_end)
            raise
        finally:
            notice.cancel()

    async def _await_exit(self, run: Run, child: Child) -> None:
        code = await self._guarded("waiting for vLLM's exit", child.ended)
        self._send(run, Event.EXITED, f"vLLM ended ({how_it_ended(code or 0)})")

    async def _is_ready(self, run: Run, phases: Phases, watch: Watch) -> bool:
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
                        patience.reschedule(self._clock() + self.limits.startup)
                    await asyncio.sleep(delay)
                    if status:
                        delay = min(delay * POLL_GROWTH, SLOWEST_POLL)
        except TimeoutError:
            return False
        # Some 20 ms: from the first request on, the death of any part is known at once.
        await self._guarded("looking for vLLM's processes", watch.look)
        await self._ask_all("answers", run)
        return True

    def _hear(self, run: Run, child: Child, phases: Phases, watch: Watch) -> None:
        lines = child.lines.take()
        self.heard += len(lines)
        self.lines.extend(lines)
        try:
            begun = [phase for line in lines if (phase := phases.hear(line)) is not None]
        except Exception:  # noqa: BLE001  # a line that nobody foresaw
            self._fault("reading a phase off vLLM's log")
            begun = []
        for phase in begun:
            watch.look_soon()  # more processes and more shared memory than before
            if self.state is State.STARTING:
                self.log.info("%s (%.1f s so far)", phase, time.monotonic() - child.spawned_at)
        if lines:
            self._tell("heard", run, lines)

    def _part_died(self, run: Run, what: str) -> None:
        if run.served:
            run.broke("part died", what)
        elif run is self.alive:  # its exit, if it comes sooner, tells more
            self._loop.call_later(LAST_WORDS_PATIENCE, run.broke, "part died", what)

    async def _beat(self, run: Run) -> None:
        """The heartbeat, for as long as it serves."""
        if not self.limits.stall:
            return
        pulse = Pulse(self.limits.stall, self._clock())
        while True:
            due = self._clock() + pulse.pause
            await asyncio.sleep(pulse.pause)
            if self.ready and await self._guarded("the heartbeat", self._hangs, pulse, self._clock() - due):
                await self._ask_all("hung", run)
                limit = f"{self.limits.stall:g} s (SUPERVISOR_STALL_TIMEOUT)"
                count = len(self.front.traffic().waiting)
                run.broke("hang", f"vLLM hangs: no progress in {limit} with {count} requests in flight")
                return

    async def _hangs(self, pulse: Pulse, late: float) -> bool:
        traffic = self.front.traffic()
        if not traffic.waiting:  # nobody would know, and the scrape costs vLLM some milliseconds
            return pulse.hangs(self._clock(), late, traffic, None)
        status, metrics = await self._asked("/metrics", patience=pulse.scrape_patience)
        return pulse.hangs(self._clock(), late, traffic, progress(metrics) if status == 200 else None)

    # What happens between two runs, and at the end

    async def _measure(self) -> None:
        self._memory = await gpu.ask()

    async def _judge(self, run: Run) -> None:
        """Sends RETRY, when its time has come, or GIVE_UP."""
        from supervisor.engine.diagnosis import Diagnosis, diagnose  # noqa: PLC0415  # 80 patterns, for failures only

        child = run.child
        code = child.code if child is not None else None
        lines = list(child.lines.kept) if child is not None else []
        try:
            diagnosis = diagnose(code if code is not None else 0, lines, ended_by_us=run.broken)
        except Exception:  # noqa: BLE001  # of a log that nobody foresaw; the engine is started again all the same
            self._fault("finding the cause")
            diagnosis = Diagnosis("Its log can't be understood.", "", permanent=False)
        self.reason = self._stopped_for = diagnosis.text
        self.last_failure = {
            "at": time.time(),
            "exit_code": code if code is not None and code >= 0 else None,
            "signal": -code if code is not None and code < 0 else None,
            "cause": diagnosis.cause,
            "remedy": diagnosis.remedy,
            "log_tail": lines[-SHOWN_LINES:],
        }
        ended = f"vLLM ended ({how_it_ended(code)}): " if code is not None and not run.broken else ""
        self.log.error("%s%s", ended, diagnosis.text)
        known = {**self.status(), **self.last_failure, "argv": child.command.argv if child else (), "log": lines}

        async def report(verdict: str, *, given_up: bool) -> None:
            failure = {**known, "timeline": list(self.timeline), "verdict": verdict, "given_up": given_up}
            await self._ask_all("failed", failure)

        def tell(delay: float, which: str) -> None:
            self.log.info("%s%s", which, f", in {delay:.1f} s" if delay else "")
            if run.served:
                self._begin("reporting a failure", partial(report, which, given_up=False))

        failure = EngineFailed(permanent=diagnosis.permanent and not self.was_ready, served=run.served)
        try:
            await self._policy.again(failure, tell)
            self._send(run, Event.RETRY, "another start")
        except EngineFailed:
            verdict = self._policy.verdict(failure)
            await report(verdict, given_up=True)  # the next thing is our own end
            self._send(run, Event.GIVE_UP, f"{diagnosis.text} ({verdict})")

    async def _wait_to_start(self, delay: float) -> None:
        """A new engine beside the memory of a dying one would be short of it."""
        freed = self._guarded("looking at the GPU's memory", gpu.freed, self._memory)
        await asyncio.gather(asyncio.sleep(delay), freed)

    async def _drain(self, run: Run) -> None:
        if not await self._guarded("draining", self.front.drain):
            self.exit_signal = self._signal
        told = "in-flight requests are done" if self.exit_signal is None else "the drain timed out"
        self._send(run, Event.DRAINED, told)

    async def _terminate(self, run: Run) -> None:
        if run.child is not None and self.limits.terminate:
            run.child.terminate()
            await asyncio.sleep(self.limits.terminate)  # its exit ends this
            self.log.warning("vLLM ignored SIGTERM for %g s: killed", self.limits.terminate)
        self._send(run, Event.EXITED, "killed")


def _end(child: Child) -> None:
    """Of a launch that came too late."""
    child.end_now()
