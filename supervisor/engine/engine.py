"""The owner of the engine is the only one that walks the lifecycle's table and carries its actions out.

Everyone else sends an event about a run (`run.mark_broken`, `stop`), reads `state`, or is told. What the owner needs is
passed in: how to launch vLLM, how to ask it, who passes requests to it, who observes it.
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
from supervisor.engine.child import Child, describe_exit
from supervisor.engine.lifecycle import Action, Event, State, step
from supervisor.engine.restarts import EngineFailed, Restarts
from supervisor.engine.run import Ask, Change, Front, Observer, Observers, Phases, Run
from supervisor.engine.watch import Watch

if TYPE_CHECKING:
    from supervisor.engine.diagnosis import Diagnosis

# A refused connection costs 0.1 ms, so asking every 25 ms is free and no time is lost when vLLM begins to answer.
# An engine that answers, but not 200, logs each question: it is asked less and less often.
FIRST_POLL, SLOWEST_POLL, POLL_GROWTH = 0.025, 1.0, 1.3
PROBE_PATIENCE = 10.0
# An engine that loads when a part of it dies says more of the cause than we could: it has this long to leave by itself.
LAST_WORDS_PATIENCE = 4.0
# The search for the weights reads a volume. After this many seconds the log says what the start waits for.
SLOW_SEARCH = 10.0
# What is left of an engine is in the way of the next one. Clearing it away is tried so often, so many seconds apart.
CLEARING_TRIES, CLEARING_PAUSE = 10, 1.0
EXIT_CANNOT_START, EXIT_LIMIT = 3, 4


class Limits(NamedTuple):
    """Seconds until the engine must be ready (`startup`), must be gone after SIGTERM (`terminate`), and hangs without
    progress (`stall`; 0: never). And the restarts. `warm_up`: the body of a first completion, before it is ready."""

    startup: float
    terminate: float
    stall: float
    restarts: int
    window: float
    stay_when_failed: bool
    warm_up: bytes = b""


class Engine:
    """`await Engine(launch, ask, limits, make_phases).run(front, observers)` returns the supervisor's exit code."""

    def __init__(
        self, launch: Callable[[], Call[Child]], ask: Ask, limits: Limits, make_phases: Callable[[Child], Phases]
    ) -> None:
        self.log = logging.getLogger("supervisor.engine")
        self.launch = launch
        self.ask = ask
        self.limits = limits
        self.make_phases = make_phases
        self.observers = Observers(self.log)
        self.state = State.STARTING
        self.was_ready = False
        self.was_forced = False  # a second signal has come, which waits for nobody
        self.exit_code = 0
        self._signal = signal.SIGTERM
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        # They are: event, reason, the run that it is about (None: whichever there is), and the kind of what broke it.
        self._events: asyncio.Queue[tuple[Event, str, Run | None, str]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()  # they end with the engine
        self._attendant: asyncio.Task[None] | None = None  # what happens beside a run, and ends with it
        self._restarts = Restarts(limits.restarts, limits.window, self.clock, self._wait_before_start)
        self.latest_run = Run(0, self.clock(), self._send)
        self.living_run: Run | None = None  # none between two runs

    def stop(self, signal_number: int) -> None:
        """Drains and leaves, because a signal arrived; a second one skips the wait."""
        self._signal = signal.Signals(signal_number)
        if self.state in (State.DRAINING, State.STOPPING):
            self.was_forced, self.exit_code = True, 128 + signal_number
        self._events.put_nowait((Event.STOP, self._signal.name, None, ""))

    # The owner's loop

    async def run(self, front: Front, observers: Sequence[Observer]) -> int:
        """Returns when no trace is left: 0 after a clean stop, 3 never ready, 4 restart limit, 128+N by force."""
        self.front, self.observers.members = front, observers
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._carry_out(Action.SPAWN, self.latest_run)
                end_states = {State.STOPPED} if self.limits.stay_when_failed else {State.STOPPED, State.FAILED}
                while self.state not in end_states:
                    event, reason, run, kind = await self._events.get()
                    if run is None or run is self.latest_run:  # else the event is about an earlier run
                        for action in self._transition(event, reason, kind):
                            await self._carry_out(action, self.latest_run)
                for task in self._tasks:
                    task.cancel()
        finally:  # also after a fault of our own
            if self.living_run is not None and self.living_run.child is not None:
                self.living_run.child.end_sync()
        return self.exit_code

    def _send(self, run: Run, event: Event, reason: str, kind: str = "") -> None:
        self._events.put_nowait((event, reason, run, kind))

    def _transition(self, event: Event, reason: str, kind: str) -> tuple[Action, ...]:
        previous = self.state
        self.state, actions = step(previous, event)
        if event is Event.BROKEN and actions:
            self.latest_run.end_reason, self.latest_run.end_kind = reason, kind
        if self.state is previous:
            return actions
        if self.state is State.READY:
            self.was_ready = self.latest_run.was_ready = True
        if self.state is State.FAILED:
            self.exit_code = EXIT_LIMIT if self.was_ready else EXIT_CANNOT_START
        if previous is State.DRAINING and event in (Event.EXITED, Event.BROKEN):
            self.exit_code = 128 + self._signal  # what was in flight is lost with the engine
        level = logging.ERROR if self.state is State.FAILED else logging.INFO
        self.log.log(level, "%s -> %s: %s", previous.value, self.state.value, reason)
        self.observers.notify(Observer.state_changed, Change(previous, self.state, reason))
        return actions

    async def _carry_out(self, action: Action, run: Run) -> None:
        if action is Action.SPAWN:
            self.living_run = self.latest_run = Run(run.number + 1, self.clock(), self._send)
            self._attendant = self._start_task("attending to vLLM", self._run_attendant, self.latest_run)
        elif action is Action.REMOVE:
            await self._remove()
        elif action is Action.KILL:
            self._send(run, Event.EXITED, "killed")
        else:
            job = {Action.JUDGE: self._judge, Action.DRAIN: self._drain, Action.TERMINATE: self._terminate}[action]
            self._start_task(f"to {action.value}", job, run)

    def _start_task(self, label: str, job: Callable[..., Awaitable[Any]], *args: object) -> asyncio.Task[None]:
        task = self._group.create_task(self.observers.attempt(label, job, *args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _remove(self) -> None:
        """Removes the run: after this nothing of it is left, and its number means nothing to anybody."""
        run, self.living_run = self.living_run, None
        if self._attendant is not None:
            self._attendant.cancel()
        if run is None or run.child is None:
            return
        for _ in range(CLEARING_TRIES):  # without threads or files it fails, maybe for a moment
            survivors = await self.observers.attempt("clearing vLLM away", run.child.end)
            if survivors is not None:
                break
            await asyncio.sleep(CLEARING_PAUSE)
        else:
            raise RuntimeError("vLLM can't be cleared away")  # so we end, and our guard does it (guard.py)
        if survivors:
            self.log.error("processes %s of vLLM's session would not die", ", ".join(map(str, survivors)))
        self.observers.notify(Observer.run_removed)

    # What happens beside a run

    async def _run_attendant(self, run: Run) -> None:
        """Attends to a run from its launch to its removal, which cancels this. Whatever it sees becomes an event."""
        try:
            await self._attend(run)
        except Exception:  # noqa: BLE001  # a run that nobody attends to can't be kept
            self.observers.log_fault("attending to vLLM")
            run.mark_broken("fault", "A fault of the supervisor's own (see above) ended this run")

    async def _attend(self, run: Run) -> None:
        run.child = child = await self._launch_child(run)
        if child is None:
            return
        run.phases = phases = self.make_phases(child)
        self.log.info("%s", phases.detail)
        watch = Watch(child.survey, lambda: run.was_ready, partial(self._part_died, run))
        take_lines = partial(self._take_lines, run, child, phases)
        child.log_buffer.follow(lambda: self._loop.call_soon_threadsafe(take_lines))
        self.observers.notify(Observer.run_began, run)
        gc.collect()  # what attended to the last run is a reference cycle (TaskGroup's traceback), and has its log
        attempt = self.observers.attempt
        async with asyncio.TaskGroup() as group:
            group.create_task(self._await_exit(run, child))
            group.create_task(attempt("looking for vLLM's processes", watch.run))
            if await attempt("waiting for vLLM", self._wait_until_ready, phases):
                # It takes some 20 ms: from the first request on, the death of any part is known at once.
                await attempt("looking for vLLM's processes", watch.find_parts)
                await self.observers.wait_for(Observer.run_answered, run)
                self._send(run, Event.READY, f"vLLM answers after {phases.finish():.1f} s")
                await self._watch_heartbeat(run)
            else:
                limit = f"{self.limits.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
                run.mark_broken("slow start", f"vLLM was not ready after {limit}, it was at: {phases.detail}")

    async def _launch_child(self, run: Run) -> Child | None:
        notice_text = "looking for the weights: their disk did not answer in %g s; the start waits for it"
        notice = self._loop.call_later(SLOW_SEARCH, self.log.warning, notice_text, SLOW_SEARCH)
        launching = child = None
        try:
            async with asyncio.timeout(self.limits.startup):
                launching = self.launch()
                child = await launching
        except (OSError, RuntimeError) as error:  # TimeoutError is one; RuntimeError: no thread can be had
            timeout_text = f"the weights were not found in {self.limits.startup:g} s (SUPERVISOR_STARTUP_TIMEOUT)"
            reason = getattr(error, "strerror", None) or str(error) or timeout_text
            run.end_reason = f"vLLM can't be started ({reason})"
            self._send(run, Event.EXITED, run.end_reason)
        finally:
            notice.cancel()
            if launching is not None and child is None:
                launching.abandon(lambda late: late.end_sync())
        return child

    async def _await_exit(self, run: Run, child: Child) -> None:
        code = await self.observers.attempt("waiting for vLLM's exit", child.wait)
        self._send(run, Event.EXITED, f"vLLM ended ({describe_exit(code or 0)})")

    async def _ask_engine(self, path: str, body: bytes = b"", patience: float = PROBE_PATIENCE) -> tuple[int, bytes]:
        """Returns status and body; the status is 0 without an answer."""
        return await self.observers.attempt("asking vLLM", self.ask, path, body, patience) or (0, b"")

    async def _wait_until_ready(self, phases: Phases) -> bool:
        """Returns True when it answers, False when its time is over. Time in which we stood still, as all in a paused
        container, does not count."""
        delay, needs_warm_up, remaining = FIRST_POLL, bool(self.limits.warm_up), self.limits.startup
        while remaining > 0:
            began, patience = self.clock(), min(PROBE_PATIENCE, remaining)
            status, _ = await self._ask_engine("/health", patience=patience)
            if status == 200 and not needs_warm_up:
                return True
            if status == 200:
                needs_warm_up, patience = False, remaining
                phases.warm_up()
                await self._ask_engine("/v1/completions", self.limits.warm_up, remaining)
                # The engine may not have lived through it: so it is asked again.
            else:
                await asyncio.sleep(delay)
            if not phases.fetching:  # a download watches itself
                remaining -= min(self.clock() - began, patience + delay)
            if status:
                delay = min(delay * POLL_GROWTH, SLOWEST_POLL)
        return False

    def _take_lines(self, run: Run, child: Child, phases: Phases) -> None:
        lines = child.log_buffer.take()
        try:
            phase_names = [phase for line in lines if (phase := phases.hear(line)) is not None]
        except Exception:  # noqa: BLE001  # a line that nobody foresaw
            self.observers.log_fault("reading a phase off vLLM's log")
            phase_names = []
        for phase in phase_names if self.state is State.STARTING else ():
            self.log.info("%s (%.1f s so far)", phase, time.monotonic() - child.spawned_at)
        if lines:
            self.observers.notify(Observer.lines_logged, run, lines)

    def _part_died(self, run: Run, reason: str) -> None:
        if run.was_ready:
            run.mark_broken("part died", reason)
        elif run is self.living_run:  # its exit, if it comes sooner, tells more
            self._loop.call_later(LAST_WORDS_PATIENCE, run.mark_broken, "part died", reason)

    async def _watch_heartbeat(self, run: Run) -> None:
        if not self.limits.stall:
            return
        pulse = heartbeat.Pulse(self.limits.stall, self.clock())
        while not await self.observers.attempt("the heartbeat", self._is_hung, pulse):
            pass
        await self.observers.wait_for(Observer.run_hung, run)
        limit = f"{self.limits.stall:g} s (SUPERVISOR_STALL_TIMEOUT)"
        count = len(self.front.traffic().waiting)
        run.mark_broken("hang", f"vLLM hangs: no progress in {limit} with {count} requests in flight")

    async def _is_hung(self, pulse: heartbeat.Pulse) -> bool:
        due = self.clock() + pulse.pause
        await asyncio.sleep(pulse.pause)
        overrun, traffic, counters = self.clock() - due, self.front.traffic(), None
        if self.state is not State.READY:
            return False
        if traffic.waiting:  # else nobody would notice a hang, and the scrape costs vLLM some milliseconds
            due = self.clock() + pulse.scrape_patience
            status, metrics = await self._ask_engine("/metrics", patience=pulse.scrape_patience)
            overrun = max(overrun, self.clock() - due)
            counters = heartbeat.read_progress(metrics) if status == 200 else None
        return pulse.is_hung(self.clock(), overrun, traffic, counters)

    # What happens between two runs, and at the end

    async def _judge(self, run: Run) -> None:
        """Sends RETRY, when its time has come, or GIVE_UP."""
        if not await self.observers.attempt("judging vLLM's end", self._judge_end, run):
            self._send(run, Event.GIVE_UP, "a fault of the supervisor's own (see above)")

    async def _judge_end(self, run: Run) -> bool:
        diagnosis = await self._diagnose(run)
        self.observers.notify(Observer.run_judged, run, diagnosis)
        exit_text = f"vLLM ended ({describe_exit(run.code)}): " if run.code is not None and not run.end_reason else ""
        self.log.error("%s%s", exit_text, diagnosis.text)

        def announce(delay: float, restart: str) -> None:
            self.log.info("%s%s", restart, f", in {delay:.1f} s" if delay else "")
            if run.was_ready:
                self._start_task("the report", self.observers.wait_for, Observer.run_failed, run, restart, False)

        if run.has_suspect_start and not run.was_ready:  # that start's failure was ours: it does not count
            await self.observers.wait_for(Observer.wait_until_clear)
            self._send(run, Event.RETRY, "another start, in another way")
            return True
        unknown_cause = "" if diagnosis.known or self.was_ready else diagnosis.cause
        failure = EngineFailed(diagnosis.permanent and not self.was_ready, run.was_ready, unknown_cause)
        try:
            await self._restarts.wait_for_retry(failure, announce)
            self._send(run, Event.RETRY, "another start")
        except EngineFailed:
            verdict = self._restarts.verdict(failure)  # the next thing is our own end, which waits for the report
            await self.observers.wait_for(Observer.run_failed, run, verdict, True)
            self._send(run, Event.GIVE_UP, f"{diagnosis.text} ({verdict})")
        return True

    async def _diagnose(self, run: Run) -> Diagnosis:
        code, lines = run.code, list(run.log)

        def diagnose() -> Diagnosis:
            from supervisor.engine import diagnosis as table  # noqa: PLC0415  # 900 patterns, which only failures need

            return table.diagnose(code or 0, lines, end_reason=run.end_reason, oom_killed=run.oom_killed)

        try:
            return await run_bounded(None, diagnose)  # compiling the patterns would take the loop half a second
        except Exception:  # noqa: BLE001  # a log that nobody foresaw; the engine is started again all the same
            self.observers.log_fault("finding the cause")
            from supervisor.engine.diagnosis import Diagnosis  # noqa: PLC0415  # as above

            return Diagnosis("Its log can't be understood.", "", permanent=False, known=False)

    async def _wait_before_start(self, delay: float) -> None:
        await asyncio.gather(asyncio.sleep(delay), self.observers.wait_for(Observer.wait_until_clear))

    async def _drain(self, run: Run) -> None:
        is_drained = await self.observers.attempt("draining", self.front.drain)
        self.exit_code = self.exit_code if is_drained else 128 + self._signal
        self._send(run, Event.DRAINED, "in-flight requests are done" if is_drained else "the drain timed out")

    async def _terminate(self, run: Run) -> None:
        if run.child is not None and self.limits.terminate:
            run.child.terminate()
            await asyncio.sleep(self.limits.terminate)  # vLLM's exit ends this wait
            self.log.warning("vLLM ignored SIGTERM for %g s: killed", self.limits.terminate)
        self._send(run, Event.EXITED, "killed")
