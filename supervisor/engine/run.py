"""One run of vLLM, and whom the engine tells of it or asks: the seam to all that is not the engine's own.

What hangs on the engine from outside (`supervisor/around/`, the gateway) is an `Observer`. The engine calls it, and
knows no more of it; an observer ends a run by the run itself (`run.mark_broken`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from supervisor.engine.child import Child
from supervisor.engine.lifecycle import Event, State

if TYPE_CHECKING:
    from supervisor.engine.diagnosis import Diagnosis


class Phases(Protocol):
    """Tells what a start is doing, by its log (around/phases.py)."""

    progress: str

    @property
    def detail(self) -> str: ...
    @property
    def fetching(self) -> bool: ...  # the weights still come, which has a time limit of its own
    def hear(self, line: str) -> str | None: ...  # the phase that the line begins, if any
    def warm_up(self) -> None: ...
    def finish(self) -> float: ...  # seconds since the start
    def as_rows(self) -> list[dict[str, object]]: ...


@dataclass(eq=False, slots=True)
class Run:
    """One start of vLLM. `child` and `phases` are None until vLLM is spawned."""

    number: int
    began_at: float  # the loop's time
    send: Callable[[Run, Event, str, str], object] = field(repr=False)
    child: Child | None = None
    phases: Phases | None = None
    was_ready: bool = False
    end_reason: str | None = None  # why we ended it, where we did
    end_kind: str = "exit"  # why another start is needed: one of a few words, for metrics
    has_suspect_start: bool = False  # its way of starting may be why it failed: the next one starts in another way
    oom_killed: bool = False  # the kernel meanwhile killed something in this container because memory ran out

    @property
    def code(self) -> int | None:
        return self.child.code if self.child is not None else None

    @property
    def log(self) -> list[str]:
        return list(self.child.log_buffer.tail) if self.child is not None else []

    @property
    def phase(self) -> str:
        return self.phases.detail if self.phases is not None else "looking for the weights"

    def mark_broken(self, kind: str, reason: str) -> None:
        """Tells the owner that the run has to be ended. `kind` is one of a few words, for metrics."""
        self.send(self, Event.BROKEN, reason, kind)


class Change(NamedTuple):
    previous: State
    state: State
    reason: str


class Observer:
    """Each method may be left out. The observer bounds the time of what is awaited."""

    def run_began(self, run: Run) -> None: ...  # vLLM is spawned
    def lines_logged(self, run: Run, lines: Sequence[str]) -> None: ...  # its log has them; called on the event loop
    async def run_answered(self, run: Run) -> None: ...  # vLLM answers, and is ready when this is done
    def state_changed(self, change: Change) -> None: ...  # after each transition
    async def run_hung(self, run: Run) -> None: ...  # before a run that hangs is ended
    def run_removed(self) -> None: ...  # nothing of the last run is left
    def run_judged(self, run: Run, diagnosis: Diagnosis) -> None: ...  # the cause of each end that nobody asked for
    # The run had been ready, or is the last one: then the supervisor's end waits for this.
    async def run_failed(self, run: Run, verdict: str, given_up: bool) -> None: ...
    async def wait_until_clear(self) -> None: ...  # before another start: until nothing of the last one is in its way


class Observers:
    """Calls all observers. A fault in one, or in what else happens beside what serves, is only logged, once."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.members: Sequence[Observer] = ()
        self._faults: set[str] = set()

    def notify(self, hook: Callable[..., object], *args: object) -> None:
        for observer in self.members:
            try:
                getattr(observer, hook.__name__)(*args)
            except Exception:  # noqa: BLE001  # whatever it is, it must not end what serves
                self.log_fault(f"{type(observer).__name__}.{hook.__name__}")

    async def wait_for(self, hook: Callable[..., object], *args: object) -> None:
        for observer in self.members:
            await self.attempt(f"{type(observer).__name__}.{hook.__name__}", getattr(observer, hook.__name__), *args)

    async def attempt(self, label: str, job: Callable[..., Awaitable[Any]], *args: object) -> Any:
        """Returns what the job returns; None where it fails."""
        try:
            return await job(*args)
        except Exception:  # noqa: BLE001  # as above
            self.log_fault(label)
            return None

    def log_fault(self, label: str) -> None:
        """Logs the exception that is being handled, once for each label."""
        if label not in self._faults:
            self._faults.add(label)
            self.log.exception("%s failed: a fault of the supervisor's own; what serves goes on", label)


class Traffic(NamedTuple):
    waiting: Collection[object]  # requests that vLLM has in full, that need its engine, and that wait for its next byte
    output: object  # differs when the engine has made something


class Front(Protocol):
    """Passes requests to the engine. `drain` returns when all in-flight work is done; False where it was cut."""

    def traffic(self) -> Traffic: ...
    async def drain(self) -> bool: ...


# Asks vLLM (path, JSON body or nothing, seconds of patience), and returns status and body; None without an answer.
Ask = Callable[[str, bytes, float], Awaitable[tuple[int, bytes] | None]]
