"""One run of vLLM, from its start to its last trace, and what others may see and do of it.

What hangs on the engine from outside (`supervisor/around/`) is an `Observer`: the engine calls it, and knows no more
of it. It ends a run by the run itself (`run.broke`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from supervisor.engine.child import Child
from supervisor.engine.lifecycle import Event, State


class Phases(Protocol):
    """What a start is doing, by its log. Times in seconds."""

    start: float  # monotonic
    progress: str

    @property
    def current(self) -> str: ...

    @property
    def detail(self) -> str:
        """The phase, and how far it is."""

    @property
    def fetching(self) -> bool:
        """Whether the weights still come, which has a time limit of its own."""

    def hear(self, line: str) -> str | None:
        """The phase that this line begins, if any."""

    def warm_up(self) -> None: ...

    def finish(self) -> float:
        """It is ready; returns the seconds since the start."""

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

    @property
    def pid(self) -> int | None:
        return self.child.pid if self.child is not None else None

    @property
    def doing(self) -> str:
        return self.phases.detail if self.phases is not None else "looking for the weights"

    def broke(self, kind: str, reason: str) -> None:
        """It has to be ended. `kind` is one of a few words, for metrics."""
        self.send(self, Event.BROKEN, reason, kind)


class Observer:
    """All of it may be left out. What one raises is logged once and changes nothing."""

    def began(self, run: Run) -> None:
        """It is spawned."""

    def heard(self, run: Run, lines: Sequence[str]) -> None:
        """Of its log, on the event loop."""

    async def answers(self, run: Run) -> None:
        """It does, and is ready when this is done; bounded by the observer."""

    def changed(self, state: State) -> None:
        """After each transition."""

    def removed(self) -> None:
        """Nothing of the last run is left."""

    async def hung(self, run: Run) -> None:
        """Before a run that hangs is ended; bounded by the observer."""

    async def failed(self, failure: Mapping[str, Any]) -> None:
        """What is known of it. Where it is the last one, the end waits; bounded by the observer."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of the requests that vLLM has whole and that need its engine: those that wait for its next byte, each by
    itself; and `signs`, which differs when the engine has made something."""

    waiting: Collection[object]
    signs: object


class Front(Protocol):
    """Who passes requests to the engine."""

    def traffic(self) -> Traffic: ...

    async def drain(self) -> bool:
        """Returns when all in-flight work is done; False where it was cut instead."""


# Asks vLLM (path, JSON body or nothing, seconds of patience): status and body, None without an answer.
Ask = Callable[[str, bytes, float], Awaitable[tuple[int, bytes] | None]]
