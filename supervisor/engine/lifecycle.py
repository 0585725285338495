"""The engine's life as a table: (state, event) -> (next state, actions). Pure: no clock, no process, no I/O.

    starting ──ready──► ready ──stop──► draining ──drained──► stopping ──exited──► stopped
        │                 │                                      ▲
        │ exited          │ exited, broken                       └── stop, from starting and restarting
        ▼                 ▼
        └──────────► restarting ──retry──► (spawned again) ──ready──► ready
                          └──give up──► failed

`engine/engine.py` is the one owner that walks this table and carries the actions out; everyone else asks or waits.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Event(Enum):
    READY = "the engine answers"
    BROKEN = "a process of the engine died, or it hangs, or its start takes too long: it must go"
    EXITED = "the process that was started has ended"
    RETRY = "another start is worth trying, and its time has come"
    GIVE_UP = "the cause is permanent, or the restart limit is reached"
    STOP = "a signal asks to stop"
    DRAINED = "nothing is in flight any more, or the drain timeout has passed"


class Action(Enum):
    SPAWN = "start the engine again"
    JUDGE = "find the cause, and decide whether another start is worth trying, and when"
    DRAIN = "let in-flight requests finish, up to the drain timeout"
    TERMINATE = "SIGTERM to the API server, SIGKILL to what is left; SIGKILL at once to one that never served"
    KILL = "SIGKILL to the whole session, at once"
    CLEAN_UP = "kill what the engine left behind, and remove its files"


S, E, A = State, Event, Action

# What is not listed here is ignored; `tests/unit/test_lifecycle.py` lists that too, so that nothing is by accident.
TABLE: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (S.STARTING, E.READY): (S.READY, ()),
    (S.STARTING, E.BROKEN): (S.STARTING, (A.KILL,)),
    (S.STARTING, E.EXITED): (S.RESTARTING, (A.CLEAN_UP, A.JUDGE)),
    (S.STARTING, E.STOP): (S.STOPPING, (A.TERMINATE,)),
    # Requests are held from the moment it is known to be broken, not only when its last process is gone.
    (S.READY, E.BROKEN): (S.RESTARTING, (A.KILL,)),
    (S.READY, E.EXITED): (S.RESTARTING, (A.CLEAN_UP, A.JUDGE)),
    (S.READY, E.STOP): (S.DRAINING, (A.DRAIN,)),
    (S.RESTARTING, E.READY): (S.READY, ()),
    (S.RESTARTING, E.BROKEN): (S.RESTARTING, (A.KILL,)),
    (S.RESTARTING, E.EXITED): (S.RESTARTING, (A.CLEAN_UP, A.JUDGE)),
    (S.RESTARTING, E.RETRY): (S.RESTARTING, (A.SPAWN,)),
    (S.RESTARTING, E.GIVE_UP): (S.FAILED, ()),
    (S.RESTARTING, E.STOP): (S.STOPPING, (A.TERMINATE,)),
    # Nobody waits for another engine now: what is in flight ends with this one.
    (S.DRAINING, E.BROKEN): (S.STOPPING, (A.KILL,)),
    (S.DRAINING, E.EXITED): (S.STOPPED, (A.CLEAN_UP,)),
    (S.DRAINING, E.STOP): (S.STOPPING, (A.KILL,)),  # a second signal skips the wait
    (S.DRAINING, E.DRAINED): (S.STOPPING, (A.TERMINATE,)),
    (S.STOPPING, E.EXITED): (S.STOPPED, (A.CLEAN_UP,)),
    (S.STOPPING, E.STOP): (S.STOPPING, (A.KILL,)),
    # Only where SUPERVISOR_ON_FAILURE=serve keeps the supervisor there, to tell the cause.
    (S.FAILED, E.STOP): (S.STOPPED, ()),
}

# States in which no request that arrives can be answered any more.
OVER = frozenset({S.DRAINING, S.STOPPING, S.STOPPED, S.FAILED})


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    return TABLE.get((state, event), (state, ()))
