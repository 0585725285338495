"""What is told of the engine, where it can be told without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from supervisor.around.account import Account
from supervisor.engine.lifecycle import State
from supervisor.engine.run import Change


def test_how_long_a_restart_may_take() -> None:
    """By the last start that came to serve; before the first, nobody can tell."""
    now = 100.0
    run = SimpleNamespace(began_at=100.0, phase="loading weights", phases=None, end_kind="exit")
    engine: Any = SimpleNamespace(
        state=State.STARTING, latest_run=run, living_run=None, clock=lambda: now, was_ready=False
    )
    account = Account(engine)
    assert account.status()["expected_seconds"] is None
    assert account.explanation == "The engine is starting: loading weights, 0 s so far."

    now, engine.state = 112.0, State.READY
    account.state_changed(Change(State.STARTING, State.READY, ""))
    assert account.status()["expected_seconds"] is None
    engine.state = State.RESTARTING
    assert account.status()["expected_seconds"] == 12.0
    run.began_at, now, engine.state = 120.0, 125.0, State.STARTING
    account.failure_text = "It was killed."
    assert account.status()["expected_seconds"] == 7.0
    told = "loading weights, 5 s so far (the last start took 12 s). It had stopped: It was killed."
    assert account.explanation == f"The engine is restarting: {told}"
    assert account.state == "restarting"
    now = 150.0
    assert account.status()["expected_seconds"] == 0.0


def test_what_is_still_to_come_takes_as_long_as_the_last_time() -> None:
    """A fork has vLLM imported at once: of 30 s, 25 are over then."""
    rows = {"importing vLLM": 25.0, "loading weights": 3.0, "warming up": 2.0}
    phases = SimpleNamespace(progress="", as_rows=lambda: [{"name": name, "seconds": rows[name]} for name in rows])
    run = SimpleNamespace(began_at=0.0, phase="", phases=phases, end_kind="exit")
    engine: Any = SimpleNamespace(state=State.READY, latest_run=run, living_run=None, clock=lambda: 30.0)
    account = Account(engine)
    account.state_changed(Change(State.STARTING, State.READY, ""))
    engine.state = State.STARTING
    for rows, left in (
        ({"importing vLLM": 0.25}, 29.8),
        ({"importing vLLM": 0.25, "loading weights": 0.0}, 5.0),
        ({"importing vLLM": 0.25, "loading weights": 4.0}, 2.0),
        ({"importing vLLM": 0.25, "loading weights": 4.0, "warming up": 3.0}, 0.0),
        ({"asking the hub": 1.0}, 0.0),  # what the last one did not have: by the time so far
    ):
        assert account.status()["expected_seconds"] == left, rows
