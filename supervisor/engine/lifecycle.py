"""The engine's life as a table: (state, event) -> (next state, actions). Pure: no clock, no process, no I/O.

    starting ──ready──► ready ──stop──► draining ──drained──► stopping ──exited──► stopped
        │                 │                │                     ▲
        └─exited, late────┴─exited────► failed                   └── stop: from starting, nothing is in flight

`engine/engine.py` is the one owner that walks this table and carries the actions out; everyone else asks or waits.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Event(Enum):
    READY = "the engine answers"
    EXITED = "the engine's process ended"
    LATE = "the start-up timeout has passed"
    STOP = "a signal asks to stop"
    DRAINED = "nothing is in flight any more, or the drain timeout has passed"


class Action(Enum):
    DRAIN = "let in-flight requests finish, up to the drain timeout"
    TERMINATE = "SIGTERM to the API server, SIGKILL to what is left"
    KILL = "SIGKILL to the whole session, at once"
    CLEAN_UP = "kill what the engine left behind, and remove its files"


S, E, A = State, Event, Action
IGNORED: tuple[Action, ...] = ()

TABLE: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (S.STARTING, E.READY): (S.READY, ()),
    (S.STARTING, E.EXITED): (S.FAILED, (A.CLEAN_UP,)),
    (S.STARTING, E.LATE): (S.FAILED, (A.KILL,)),
    (S.STARTING, E.STOP): (S.STOPPING, (A.TERMINATE,)),
    (S.STARTING, E.DRAINED): (S.STARTING, IGNORED),
    (S.READY, E.READY): (S.READY, IGNORED),
    (S.READY, E.EXITED): (S.FAILED, (A.CLEAN_UP,)),
    (S.READY, E.LATE): (S.READY, IGNORED),
    (S.READY, E.STOP): (S.DRAINING, (A.DRAIN,)),
    (S.READY, E.DRAINED): (S.READY, IGNORED),
    (S.DRAINING, E.READY): (S.DRAINING, IGNORED),
    (S.DRAINING, E.EXITED): (S.STOPPED, (A.CLEAN_UP,)),
    (S.DRAINING, E.LATE): (S.DRAINING, IGNORED),
    (S.DRAINING, E.STOP): (S.STOPPING, (A.KILL,)),  # a second signal skips the wait
    (S.DRAINING, E.DRAINED): (S.STOPPING, (A.TERMINATE,)),
    (S.STOPPING, E.READY): (S.STOPPING, IGNORED),
    (S.STOPPING, E.EXITED): (S.STOPPED, (A.CLEAN_UP,)),
    (S.STOPPING, E.LATE): (S.STOPPING, IGNORED),
    (S.STOPPING, E.STOP): (S.STOPPING, (A.KILL,)),
    (S.STOPPING, E.DRAINED): (S.STOPPING, IGNORED),
    (S.STOPPED, E.READY): (S.STOPPED, IGNORED),
    (S.STOPPED, E.EXITED): (S.STOPPED, IGNORED),
    (S.STOPPED, E.LATE): (S.STOPPED, IGNORED),
    (S.STOPPED, E.STOP): (S.STOPPED, IGNORED),
    (S.STOPPED, E.DRAINED): (S.STOPPED, IGNORED),
    (S.FAILED, E.READY): (S.FAILED, IGNORED),
    (S.FAILED, E.EXITED): (S.FAILED, (A.CLEAN_UP,)),  # killed because it was late
    (S.FAILED, E.LATE): (S.FAILED, IGNORED),
    (S.FAILED, E.STOP): (S.FAILED, IGNORED),
    (S.FAILED, E.DRAINED): (S.FAILED, IGNORED),
}

# States in which no request that arrives can be answered any more.
OVER = frozenset({S.DRAINING, S.STOPPING, S.STOPPED, S.FAILED})


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    return TABLE[state, event]
