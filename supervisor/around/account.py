"""Tells of the engine: in /status, on the page, in the metrics, and to those who wait for it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from supervisor.engine.engine import Engine
from supervisor.engine.lifecycle import CLOSED_STATES, State
from supervisor.engine.run import Change, Observer, Run

if TYPE_CHECKING:
    from supervisor.engine.diagnosis import Diagnosis

LOG_TAIL_LINES = 20
MAX_LOG_LINES = 200  # they are of vLLM's log, over restarts, for those who follow it
MAX_TIMELINE_ROWS = 100  # the post-mortem has them


class Account(Observer):
    """The engine tells the account first, so that the other observers find it true. To the gateway it is the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.changed_at = time.time()
        self.reason = ""
        self.failure_text = ""  # the last failure, in words; empty: there was none
        self.transitions: Counter[str] = Counter()  # how often each happened
        self.timeline: deque[dict[str, object]] = deque(maxlen=MAX_TIMELINE_ROWS)
        self.timeline.append({"at": self.changed_at, "state": engine.state.value, "reason": ""})
        self.restarts: Counter[str] = Counter()  # how many, by what ended the run before
        self.last_failure: dict[str, object] | None = None
        self.last_start_s: float | None = None  # the latest start that came to serve took so long
        self.last_phases: dict[str, float] = {}  # the phases of that start with their seconds, in order
        self.log_lines: deque[str] = deque(maxlen=MAX_LOG_LINES)
        self.line_count = 0  # so many lines there were, ever

    # What the engine tells

    def state_changed(self, change: Change) -> None:
        previous, state, reason = change
        self.changed_at = time.time()
        self.reason = reason
        self.transitions[f"{previous.value} -> {state.value}"] += 1
        self.timeline.append({"at": self.changed_at, "state": state.value, "reason": reason})
        if state is State.READY:
            self.last_start_s = self.engine.clock() - self.engine.latest_run.began_at
            self.last_phases = self._phase_seconds()
        if state is State.STARTING:
            self.restarts[self.engine.latest_run.end_kind] += 1

    def lines_logged(self, run: Run, lines: Sequence[str]) -> None:
        self.line_count += len(lines)
        self.log_lines.extend(lines)

    def run_judged(self, run: Run, diagnosis: Diagnosis) -> None:
        self.reason = self.failure_text = diagnosis.text
        code = run.code
        self.last_failure = {
            "at": time.time(),
            "exit_code": code if code is not None and code >= 0 else None,
            "signal": -code if code is not None and code < 0 else None,
            "cause": diagnosis.cause,
            "remedy": diagnosis.remedy,
            "log_tail": run.log[-LOG_TAIL_LINES:],
        }

    # What others ask

    @property
    def ready(self) -> bool:
        return self.engine.state is State.READY

    @property
    def is_closed(self) -> bool:
        return self.engine.state in CLOSED_STATES

    @property
    def draining(self) -> bool:
        return self.engine.state is State.DRAINING

    @property
    def state(self) -> str:
        state = self.engine.state
        return (State.RESTARTING if self.failure_text and state is State.STARTING else state).value

    @property
    def explanation(self) -> str:
        state, run = self.engine.state, self.engine.latest_run
        if state is State.STARTING:
            comparison = f" (the last start took {self.last_start_s:.0f} s)" if self.last_start_s else ""
            activity = f"{run.phase}, {self.engine.clock() - run.began_at:.0f} s so far{comparison}."
            if self.failure_text:
                return f"The engine is restarting: {activity} It had stopped: {self.failure_text}"
            return f"The engine is starting: {activity}"
        if state is State.RESTARTING:
            return f"The engine is restarting. It had stopped: {self.reason}"
        if state is State.FAILED:
            return f"The engine failed: {self.reason}"
        return "The engine is ready." if self.ready else "The server is shutting down."

    def status(self) -> dict[str, object]:
        run, phases, live_run = self.engine.latest_run, self.engine.latest_run.phases, self.engine.living_run
        launch_row = {"name": run.phase, "seconds": round(self.engine.clock() - run.began_at, 3)}  # before vLLM logs
        return {
            "state": self.engine.state.value,
            "since": self.changed_at,
            "reason": self.reason,
            "phases": phases.as_rows() if phases is not None else [launch_row],
            "expected_seconds": self._expected_seconds(),
            "progress": phases.progress if phases is not None else "",
            "restarts": self.restarts.total(),
            "restarts_by_cause": dict(self.restarts),
            "transitions": dict(self.transitions),
            "last_failure": self.last_failure,
            "pid": live_run.child.pid if live_run is not None and live_run.child is not None else None,
        }

    def _expected_seconds(self) -> float | None:
        """Returns the seconds until it serves; None if nobody can tell. What is to come takes as long as last time.
        A forked start does in seconds what takes the first one half a minute, so the time so far says little."""
        state, current_phases = self.engine.state, self._phase_seconds()
        if self.last_start_s is None or state not in (State.STARTING, State.RESTARTING):
            return None
        phase = next(reversed(current_phases), "")
        if state is State.RESTARTING or phase not in self.last_phases:
            elapsed = self.engine.clock() - self.engine.latest_run.began_at if state is State.STARTING else 0.0
            return round(max(self.last_start_s - elapsed, 0.0), 1)
        names = list(self.last_phases)
        rest = sum(self.last_phases[name] for name in names[names.index(phase) + 1 :])
        return round(max(self.last_phases[phase] - current_phases[phase], 0.0) + rest, 1)

    def _phase_seconds(self) -> dict[str, float]:
        """Returns the phases of the latest run with their seconds."""
        phases = self.engine.latest_run.phases
        rows = phases.as_rows() if phases is not None else []
        return {str(row["name"]): float(str(row["seconds"])) for row in rows}

    def log_after(self, number: int) -> tuple[int, list[str]]:
        """Returns how many lines there were, ever, and those of them behind the first `number` that are kept."""
        new_count = max(0, min(self.line_count - number, len(self.log_lines)))  # `number` may be another run's count
        return self.line_count, list(self.log_lines)[-new_count:] if new_count else []
