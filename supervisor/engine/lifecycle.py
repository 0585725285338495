"""The engine's life as a table: (state, event) -> (next state, actions). It is pure: no clock, process or I/O.

    starting ──ready──► ready ──stop──► draining ──drained──► stopping ──exited──► stopped
        ▲   │             │                                      ▲                    ▲
        │   │ exited,     │ exited,                 stop, from starting               │
        │   ▼ broken      ▼ broken                                                    │
     retry── restarting ◄─┘ ───────────────────────stop───────────────────────────────┘
                  └──give up──► failed

In `restarting` no engine lives: the last one was removed before the next event is looked at. So no event leads from
there to `ready`, only another start does. Events are about one run each; the owner (engine.py) drops earlier runs'.
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
    EXITED = "the process that was started has ended, or could not be started"
    RETRY = "another start is worth trying, and its time has come"
    GIVE_UP = "the cause is permanent, or the restart limit is reached"
    STOP = "a signal asks to stop"
    DRAINED = "nothing is in flight any more, or the drain timeout has passed"


class Action(Enum):
    SPAWN = "start an engine"
    REMOVE = "kill what there is of the engine, and remove what it left"
    JUDGE = "find the cause, and decide whether another start is worth trying, and when"
    DRAIN = "let in-flight requests finish, up to the drain timeout"
    TERMINATE = "SIGTERM to the API server; it has exited when it is gone, or when its time is over"
    KILL = "it need not leave by itself: it has exited"


S, E, A = State, Event, Action

# What is not listed here is ignored; `tests/unit/test_lifecycle.py` lists that too, so that nothing is by accident.
TRANSITIONS: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (S.STARTING, E.READY): (S.READY, ()),
    (S.STARTING, E.BROKEN): (S.RESTARTING, (A.REMOVE, A.JUDGE)),
    (S.STARTING, E.EXITED): (S.RESTARTING, (A.REMOVE, A.JUDGE)),
    # While it loads vLLM is deaf to SIGTERM, or leaves in its own time; it has nothing to lose.
    (S.STARTING, E.STOP): (S.STOPPING, (A.KILL,)),
    # Requests are held from the moment it is known to be broken, not only when its last process is gone.
    (S.READY, E.BROKEN): (S.RESTARTING, (A.REMOVE, A.JUDGE)),
    (S.READY, E.EXITED): (S.RESTARTING, (A.REMOVE, A.JUDGE)),
    (S.READY, E.STOP): (S.DRAINING, (A.DRAIN,)),
    (S.RESTARTING, E.RETRY): (S.STARTING, (A.SPAWN,)),
    (S.RESTARTING, E.GIVE_UP): (S.FAILED, ()),
    (S.RESTARTING, E.STOP): (S.STOPPED, ()),
    # Nobody waits for another engine now: what is in flight ends with this one.
    (S.DRAINING, E.BROKEN): (S.STOPPING, (A.KILL,)),
    (S.DRAINING, E.EXITED): (S.STOPPED, (A.REMOVE,)),
    (S.DRAINING, E.STOP): (S.STOPPING, (A.KILL,)),  # a second signal skips the wait
    (S.DRAINING, E.DRAINED): (S.STOPPING, (A.TERMINATE,)),
    (S.STOPPING, E.EXITED): (S.STOPPED, (A.REMOVE,)),
    (S.STOPPING, E.STOP): (S.STOPPING, (A.KILL,)),
    # Only where SUPERVISOR_ON_FAILURE=serve keeps the supervisor there, to tell the cause.
    (S.FAILED, E.STOP): (S.STOPPED, ()),
}

# In these states no request that arrives can be answered any more.
CLOSED_STATES = frozenset({S.DRAINING, S.STOPPING, S.STOPPED, S.FAILED})


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    return TRANSITIONS.get((state, event), (state, ()))
