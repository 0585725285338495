"""The table of the engine's life: what every cell says, the ignored ones too."""

from __future__ import annotations

import itertools

import pytest

from supervisor.engine.lifecycle import OVER, TABLE, Action, Event, State, step

S, E, A = State, Event, Action

# Events that a state does not listen to, each for a reason that is about the world and not about the table.
IGNORED = {
    S.STARTING: {E.RETRY, E.GIVE_UP, E.DRAINED},  # nobody judges or drains yet
    S.READY: {E.READY, E.RETRY, E.GIVE_UP, E.DRAINED},
    S.RESTARTING: {E.DRAINED},
    S.DRAINING: {E.READY, E.RETRY, E.GIVE_UP},  # a start that ends too late
    S.STOPPING: {E.READY, E.BROKEN, E.RETRY, E.GIVE_UP, E.DRAINED},  # its parts die because they are told to
    S.STOPPED: set(Event),
    S.FAILED: set(Event) - {E.STOP},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)), ids=lambda value: value.name)
def test_every_cell_is_there_or_ignored_on_purpose(state: State, event: Event) -> None:
    if event in IGNORED[state]:
        assert (state, event) not in TABLE
        assert step(state, event) == (state, ())
    else:
        assert step(state, event) == TABLE[state, event]


@pytest.mark.parametrize(
    ("path", "end", "actions"),
    [
        ([E.READY, E.STOP, E.DRAINED, E.EXITED], S.STOPPED, [A.DRAIN, A.TERMINATE, A.CLEAN_UP]),
        ([E.STOP, E.EXITED], S.STOPPED, [A.TERMINATE, A.CLEAN_UP]),
        ([E.READY, E.STOP, E.STOP, E.EXITED], S.STOPPED, [A.DRAIN, A.KILL, A.CLEAN_UP]),
        ([E.READY, E.STOP, E.DRAINED, E.STOP, E.EXITED], S.STOPPED, [A.DRAIN, A.TERMINATE, A.KILL, A.CLEAN_UP]),
        ([E.READY, E.STOP, E.EXITED, E.DRAINED], S.STOPPED, [A.DRAIN, A.CLEAN_UP]),
        ([E.EXITED, E.GIVE_UP], S.FAILED, [A.CLEAN_UP, A.JUDGE]),
        ([E.BROKEN, E.EXITED, E.GIVE_UP], S.FAILED, [A.KILL, A.CLEAN_UP, A.JUDGE]),
        ([E.EXITED, E.RETRY, E.READY], S.READY, [A.CLEAN_UP, A.JUDGE, A.SPAWN]),
        ([E.READY, E.EXITED, E.RETRY, E.READY], S.READY, [A.CLEAN_UP, A.JUDGE, A.SPAWN]),
        ([E.READY, E.BROKEN, E.EXITED, E.RETRY, E.EXITED, E.GIVE_UP], S.FAILED,
         [A.KILL, A.CLEAN_UP, A.JUDGE, A.SPAWN, A.CLEAN_UP, A.JUDGE]),
        ([E.READY, E.EXITED, E.STOP, E.EXITED], S.STOPPED, [A.CLEAN_UP, A.JUDGE, A.TERMINATE, A.CLEAN_UP]),
        ([E.READY, E.EXITED, E.STOP, E.EXITED, E.RETRY], S.STOPPED,
         [A.CLEAN_UP, A.JUDGE, A.TERMINATE, A.CLEAN_UP]),
        ([E.EXITED, E.GIVE_UP, E.STOP], S.STOPPED, [A.CLEAN_UP, A.JUDGE]),
        ([E.STOP, E.READY, E.BROKEN, E.EXITED], S.STOPPED, [A.TERMINATE, A.CLEAN_UP]),
    ],
    ids=["drain", "stop-loading", "stop-twice", "stop-twice-late", "dies-draining", "never-starts", "late",
         "starts-at-second", "crash", "hang-then-crash", "stop-between-runs", "retry-comes-too-late", "stop-failed",
         "parts-end-while-stopping"],
)  # fmt: skip
def test_lives(path: list[Event], end: State, actions: list[Action]) -> None:
    state, done = State.STARTING, []
    for event in path:
        state, more = step(state, event)
        done += more
    assert state is end
    assert done == actions


def test_an_exit_is_always_cleaned_up_after() -> None:
    for state in set(State) - {State.STOPPED, State.FAILED}:
        assert Action.CLEAN_UP in step(state, Event.EXITED)[1]


def test_an_engine_is_only_spawned_when_the_last_is_cleaned_up_and_judged() -> None:
    for (state, event), (_, actions) in TABLE.items():
        assert (Action.SPAWN in actions) == ((state, event) == (State.RESTARTING, Event.RETRY))


def test_no_request_is_taken_once_the_end_is_near() -> None:
    assert set(State) - OVER == {State.STARTING, State.READY, State.RESTARTING}
