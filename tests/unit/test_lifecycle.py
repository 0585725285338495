"""The table of the engine's life: every cell is there, and the ones that matter say what they should."""

from __future__ import annotations

import itertools

import pytest

from supervisor.engine.lifecycle import OVER, TABLE, Action, Event, State, step


def test_every_state_knows_every_event() -> None:
    assert set(TABLE) == set(itertools.product(State, Event))


@pytest.mark.parametrize(
    ("path", "end", "actions"),
    [
        ([Event.READY, Event.STOP, Event.DRAINED, Event.EXITED], State.STOPPED,
         [Action.DRAIN, Action.TERMINATE, Action.CLEAN_UP]),
        ([Event.STOP, Event.EXITED], State.STOPPED, [Action.TERMINATE, Action.CLEAN_UP]),
        ([Event.READY, Event.STOP, Event.STOP, Event.EXITED], State.STOPPED,
         [Action.DRAIN, Action.KILL, Action.CLEAN_UP]),
        ([Event.READY, Event.STOP, Event.DRAINED, Event.STOP, Event.EXITED], State.STOPPED,
         [Action.DRAIN, Action.TERMINATE, Action.KILL, Action.CLEAN_UP]),
        ([Event.EXITED], State.FAILED, [Action.CLEAN_UP]),
        ([Event.LATE, Event.EXITED], State.FAILED, [Action.KILL, Action.CLEAN_UP]),
        ([Event.READY, Event.EXITED], State.FAILED, [Action.CLEAN_UP]),
        ([Event.STOP, Event.READY, Event.EXITED], State.STOPPED, [Action.TERMINATE, Action.CLEAN_UP]),
        ([Event.READY, Event.STOP, Event.EXITED, Event.DRAINED], State.STOPPED, [Action.DRAIN, Action.CLEAN_UP]),
    ],
    ids=["drain", "stop-loading", "stop-twice", "stop-twice-late", "dies-loading", "late", "dies", "ready-too-late",
         "dies-draining"],
)  # fmt: skip
def test_lives(path: list[Event], end: State, actions: list[Action]) -> None:
    state, done = State.STARTING, []
    for event in path:
        state, more = step(state, event)
        done += more
    assert state is end
    assert done == actions


def test_nothing_leaves_an_end() -> None:
    for state, event in itertools.product((State.STOPPED, State.FAILED), Event):
        assert step(state, event)[0] is state


def test_an_exit_is_always_cleaned_up_after() -> None:
    for state in set(State) - {State.STOPPED}:
        assert Action.CLEAN_UP in step(state, Event.EXITED)[1]


def test_no_request_is_taken_once_the_end_is_near() -> None:
    assert set(State) - OVER == {State.STARTING, State.READY}
