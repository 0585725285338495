"""One run of vLLM; and those whom the engine tells of it, or asks: the seam to all that is not the engine's own.

What hangs on the engine from outside (`supervisor/around/`, the gateway) is an `Observer`. The engine calls it, and
knows no more of it; an observer ends a run by the run itself (`run.broke`).
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
    """What a start is doing, by its log (around/phases.py)."""

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
    """`child` and `phases` are None until it is spawned."""

    number: int
    began: float  # the loop's time
    send: Callable[[Run, Event, str, str], object] = field(repr=False)
    child: Child | None = None
    phases: Phases | None = None
    served: bool = False  # it was ready
    broken: str | None = None  # why we ended it, where we did
    ended_by: str = "exit"  # what another start is for: a word, for metrics
    doubted: bool = False  # how it was started may be why it failed, so the next one is started in another way
    oom_killed: bool = False  # meanwhile the kernel killed something in this container because memory ran out

    @property
    def code(self) -> int | None:
        return self.child.code if self.child is not None else None

    @property
    def log(self) -> list[str]:
        return list(self.child.lines.kept) if self.child is not None else []

    @property
    def doing(self) -> str:
        return self.phases.detail if self.phases is not None else "looking for the weights"

    def broke(self, kind: str, reason: str) -> None:
        """It has to be ended. `kind` is one of a few words, for metrics."""
        self.send(self, Event.BROKEN, reason, kind)


class Change(NamedTuple):
    before: State
    state: State
    reason: str


class Observer:
    """All of it may be left out. What is awaited is bounded by the observer."""

    def began(self, run: Run) -> None: ...  # it is spawned
    def heard(self, run: Run, lines: Sequence[str]) -> None: ...  # of its log, on the event loop
    async def answers(self, run: Run) -> None: ...  # it does, and is ready when this is done
    def changed(self, change: Change) -> None: ...  # after each transition
    async def hung(self, run: Run) -> None: ...  # before a run that hangs is ended
    def removed(self) -> None: ...  # nothing of the last run is left
    def judged(self, run: Run, diagnosis: Diagnosis) -> None: ...  # the cause of each end that nobody asked for
    # Where it had served, or is the last one; then the end waits for this.
    async def failed(self, run: Run, verdict: str, given_up: bool) -> None: ...
    async def clears(self) -> None: ...  # before another start: when nothing of the last one is in its way


class Observers:
    """Calls them all. A fault in one, or in what else happens beside what serves, is logged once, and is all."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.all: Sequence[Observer] = ()
        self._faults: set[str] = set()

    def tell(self, what: str, *about: object) -> None:
        for observer in self.all:
            try:
                getattr(observer, what)(*about)
            except Exception:  # noqa: BLE001  # whatever it is, it must not end what serves
                self.fault(f"{type(observer).__name__}.{what}")

    async def ask(self, what: str, *about: object) -> None:
        for observer in self.all:
            await self.guarded(f"{type(observer).__name__}.{what}", getattr(observer, what), *about)

    async def guarded(self, what: str, job: Callable[..., Awaitable[Any]], *args: object) -> Any:
        """What the job gives; None where it fails."""
        try:
            return await job(*args)
        except Exception:  # noqa: BLE001  # as above
            self.fault(what)
            return None

    def fault(self, what: str) -> None:
        """Of the exception that is being handled."""
        if what not in self._faults:
            self._faults.add(what)
            self.log.exception("%s failed: a fault of the supervisor's own; what serves goes on", what)


class Traffic(NamedTuple):
    waiting: Collection[object]  # requests that vLLM has whole, that need its engine, and that wait for its next byte
    signs: object  # differ when the engine has made something


class Front(Protocol):
    """Who passes requests to the engine. `drain` returns when all in-flight work is done; False where it was cut."""

    def traffic(self) -> Traffic: ...
    async def drain(self) -> bool: ...


# Asks vLLM (path, JSON body or nothing, seconds of patience): status and body, None without an answer.
Ask = Callable[[str, bytes, float], Awaitable[tuple[int, bytes] | None]]
