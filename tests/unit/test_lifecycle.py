"""The table of the engine's life: what every cell says, the ignored ones too."""

from __future__ import annotations

import itertools

import pytest

from supervisor.engine.lifecycle import CLOSED_STATES, TRANSITIONS, Action, Event, State, step

S, E, A = State, Event, Action
# States in which an engine lives, or is being spawned.
ALIVE = frozenset({S.STARTING, S.READY, S.DRAINING, S.STOPPING})

# Events that a state does not listen to, each for a reason that is about the world and not about the table.
IGNORED = {
    S.STARTING: {E.RETRY, E.GIVE_UP, E.DRAINED},  # nobody judges or drains yet
    S.READY: {E.READY, E.RETRY, E.GIVE_UP, E.DRAINED},
    S.RESTARTING: {E.READY, E.BROKEN, E.EXITED, E.DRAINED},  # no engine lives
    S.DRAINING: {E.READY, E.RETRY, E.GIVE_UP},  # a start that ends too late
    S.STOPPING: {E.READY, E.BROKEN, E.RETRY, E.GIVE_UP, E.DRAINED},  # its parts die because they are told to
    S.STOPPED: set(Event),
    S.FAILED: set(Event) - {E.STOP},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)), ids=lambda value: value.name)
def test_every_cell_is_there_or_ignored_on_purpose(state: State, event: Event) -> None:
    if event in IGNORED[state]:
        assert (state, event) not in TRANSITIONS
        assert step(state, event) == (state, ())
    else:
        assert step(state, event) == TRANSITIONS[state, event]


@pytest.mark.parametrize(
    ("path", "end", "actions"),
    [
        ([E.READY, E.STOP, E.DRAINED, E.EXITED], S.STOPPED, [A.DRAIN, A.TERMINATE, A.REMOVE]),
        ([E.STOP, E.EXITED], S.STOPPED, [A.KILL, A.REMOVE]),
        ([E.READY, E.STOP, E.STOP, E.EXITED], S.STOPPED, [A.DRAIN, A.KILL, A.REMOVE]),
        ([E.READY, E.STOP, E.DRAINED, E.STOP, E.EXITED], S.STOPPED, [A.DRAIN, A.TERMINATE, A.KILL, A.REMOVE]),
        ([E.READY, E.STOP, E.EXITED, E.DRAINED], S.STOPPED, [A.DRAIN, A.REMOVE]),
        ([E.EXITED, E.GIVE_UP], S.FAILED, [A.REMOVE, A.JUDGE]),
        ([E.BROKEN, E.EXITED, E.GIVE_UP], S.FAILED, [A.REMOVE, A.JUDGE]),
        ([E.EXITED, E.READY, E.GIVE_UP], S.FAILED, [A.REMOVE, A.JUDGE]),
        ([E.EXITED, E.RETRY, E.READY], S.READY, [A.REMOVE, A.JUDGE, A.SPAWN]),
        ([E.READY, E.EXITED, E.RETRY, E.READY], S.READY, [A.REMOVE, A.JUDGE, A.SPAWN]),
        ([E.READY, E.BROKEN, E.RETRY, E.EXITED, E.GIVE_UP], S.FAILED,
         [A.REMOVE, A.JUDGE, A.SPAWN, A.REMOVE, A.JUDGE]),
        ([E.READY, E.EXITED, E.STOP], S.STOPPED, [A.REMOVE, A.JUDGE]),
        ([E.READY, E.EXITED, E.STOP, E.RETRY], S.STOPPED, [A.REMOVE, A.JUDGE]),
        ([E.EXITED, E.GIVE_UP, E.STOP], S.STOPPED, [A.REMOVE, A.JUDGE]),
        ([E.STOP, E.READY, E.BROKEN, E.EXITED], S.STOPPED, [A.KILL, A.REMOVE]),
        ([E.READY, E.STOP, E.BROKEN, E.EXITED], S.STOPPED, [A.DRAIN, A.KILL, A.REMOVE]),
    ],
    ids=["drain", "stop-loading", "stop-twice", "stop-twice-late", "dies-draining", "never-starts", "hangs-loading",
         "ready-too-late", "starts-at-second", "crash", "hang-then-crash", "stop-between-runs", "retry-comes-too-late",
         "stop-failed", "parts-end-while-stopping", "part-dies-draining"],
)  # fmt: skip
def test_lives(path: list[Event], end: State, actions: list[Action]) -> None:
    state = State.STARTING
    done: list[Action] = []
    for event in path:
        state, more = step(state, event)
        done += more
    assert state is end
    assert done == actions


def test_whoever_leaves_a_living_engine_removes_it() -> None:
    for (before, _), (after, actions) in TRANSITIONS.items():
        assert (Action.REMOVE in actions) == (before in ALIVE and after not in ALIVE)


def test_an_engine_is_only_spawned_when_the_last_is_removed_and_judged() -> None:
    for (before, event), (after, actions) in TRANSITIONS.items():
        spawned = Action.SPAWN in actions
        assert spawned == ((before, event) == (State.RESTARTING, Event.RETRY))
        assert spawned == (before not in ALIVE and after in ALIVE)


def test_only_what_starts_becomes_ready() -> None:
    assert [before for (before, _), (after, _) in TRANSITIONS.items() if after is State.READY] == [State.STARTING]


def test_no_request_is_taken_once_the_end_is_near() -> None:
    assert set(State) - CLOSED_STATES == {State.STARTING, State.READY, State.RESTARTING}
