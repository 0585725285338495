"""Who goes to the engine, who waits and who is next; and whether an engine lives. The clock is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.gateway import gate
from supervisor.gateway.counts import Counts
from supervisor.gateway.errors import Refusal
from supervisor.gateway.gate import FATE_KNOWN_AFTER, PATIENCE, QUESTIONS, RETRY_AFTER, Admission, Gate
from tests.clock import Loop
from tests.gateway.world import CLOSED_STATES, EngineView

HOLD = 30.0
# States in which nobody new can be answered.
STATES = ("starting", "ready", "restarting", "draining", "stopping", "stopped", "failed")


class One:
    """A request that notes what it is told. One that is refused leaves, as a delivery does."""

    def __init__(self, place: Place, name: str, *, limited: bool = True) -> None:
        self.place = place
        self.name = name
        self.is_limited = limited
        self.admitted = False
        self.generation = place.gate.generation
        self.told: list[str] = []
        self.refusal: Refusal | None = None

    def go(self) -> None:
        self.told.append("go")
        self.place.went.append(self.name)
        self.generation = self.place.gate.generation

    def refuse(self, refusal: Refusal) -> None:
        self.told.append("refused")
        self.refusal = refusal
        self.place.gate.leave(self)

    def mark(self, what: str) -> None:
        self.told.append(what)

    def engine_judged(self, *, alive: bool) -> None:
        self.told.append("alive" if alive else "dead")

    @property
    def last(self) -> str:
        return self.told[-1]


class Place:
    def __init__(self) -> None:
        self.loop = Loop()
        self.engine = EngineView()
        self.counts = Counts()
        self.went: list[str] = []  # in order
        self.questions = 0
        self.health: int | None = 200  # None: no answer
        self.upstream = SimpleNamespace(loop=self.loop)
        self.make(limit=None)

    def make(self, *, limit: int | None, waiting: int = 100) -> None:
        self.gate = Gate(self.engine, self.upstream, Admission(limit, waiting, HOLD), self.counts)  # type: ignore[arg-type]

    async def ask(self, upstream: object, path: str, *, patience: float) -> tuple[int, bytes] | None:
        assert path == "/health"
        self.questions += 1
        if self.health is None:
            await asyncio.sleep(patience)
            return None
        return self.health, b""

    def engine_is(self, state: str) -> None:
        self.engine.state = state
        self.gate.engine_changed()
        self.loop.settle()

    def comes(self, name: str = "one", *, limited: bool = True) -> One:
        one = One(self, name, limited=limited)
        self.gate.admit(one)
        return one

    def passes(self, seconds: float) -> None:
        self.loop.passes(seconds)

    @property
    def load(self) -> tuple[int, int]:
        """Those that were let in, and those that wait."""
        return self.gate.active, len(self.gate.held) + len(self.gate.queued)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place()
    monkeypatch.setattr(gate, "ask", place.ask)
    faults: list[Any] = []
    place.loop.set_exception_handler(lambda _, context: faults.append(context))
    yield place
    for task in asyncio.all_tasks(place.loop):
        task.cancel()
    place.loop.settle()
    place.loop.close()
    assert not faults


# Admission


def test_without_a_limit_all_go(place: Place) -> None:
    place.engine_is("ready")
    everybody = [place.comes(str(number)) for number in range(50)]
    assert all(one.told == ["go"] for one in everybody)
    assert place.load == (50, 0)


def test_those_above_the_limit_go_in_the_order_in_which_they_came(place: Place) -> None:
    place.make(limit=2)
    place.engine_is("ready")
    everybody = [place.comes(name) for name in "abcde"]
    assert place.went == ["a", "b"]
    assert [one.told for one in everybody[2:]] == [["waiting"]] * 3
    assert place.load == (2, 3)
    place.gate.leave(everybody[1])
    place.gate.leave(everybody[0])
    assert place.went == ["a", "b", "c", "d"]
    place.gate.leave(everybody[3])
    assert place.went == ["a", "b", "c", "d", "e"]
    assert place.load == (2, 0)


def test_those_above_both_limits_are_told_at_once(place: Place) -> None:
    place.make(limit=1, waiting=1)
    place.engine_is("ready")
    _, _, third = place.comes("a"), place.comes("b"), place.comes("c")
    assert third.told == ["refused"]
    assert third.refusal is not None
    assert (third.refusal.status, third.refusal.code) == (429, "too_many_requests")
    assert third.refusal.retry_after == RETRY_AFTER
    assert "1 requests are running and 1 are waiting" in third.refusal.message
    assert place.load == (1, 1)


def test_a_job_passes_those_that_wait_and_takes_a_place_all_the_same(place: Place) -> None:
    place.make(limit=1)
    place.engine_is("ready")
    first, second, job = place.comes("a"), place.comes("b"), place.comes("job", limited=False)
    assert job.told == ["go"]
    assert place.load == (2, 1)
    place.gate.leave(first)
    assert second.told == ["waiting"]
    place.gate.leave(job)
    assert second.told == ["waiting", "go"]


def test_one_that_gives_up_while_it_waits_keeps_nobody_back(place: Place) -> None:
    place.make(limit=1)
    place.engine_is("ready")
    first, second, third = (place.comes(name) for name in "abc")
    place.gate.leave(second)
    place.gate.leave(first)
    assert (second.told, third.told) == (["waiting"], ["waiting", "go"])
    assert place.load == (1, 0)


def test_whose_turn_does_not_come_is_told(place: Place) -> None:
    place.make(limit=1)
    place.engine_is("ready")
    first, second = place.comes("a"), place.comes("b")
    place.passes(HOLD - 1)
    assert second.told == ["waiting"]
    place.passes(1.1)
    assert second.refusal is not None
    assert (second.refusal.status, second.refusal.code) == (503, "server_busy")
    assert second.refusal.retry_after == RETRY_AFTER
    place.gate.leave(first)
    assert second.told == ["waiting", "refused"]
    assert place.load == (0, 0)


# The hold


def test_what_comes_while_the_engine_loads_goes_when_it_is_ready_in_order(place: Place) -> None:
    everybody = [place.comes(name) for name in "abc"]
    assert [one.told for one in everybody] == [["held"]] * 3
    assert place.counts.held == 3
    assert place.load == (3, 3)
    place.engine_is("ready")
    assert place.went == ["a", "b", "c"]
    assert place.load == (3, 0)


def test_what_is_held_too_long_is_told_why(place: Place) -> None:
    one = place.comes()
    place.passes(HOLD + 0.1)
    assert one.refusal is not None
    assert (one.refusal.status, one.refusal.code) == (503, "engine_unavailable")
    assert one.refusal.message.startswith("The engine is starting. The request waited 30 s")
    place.engine_is("ready")
    assert one.told == ["held", "refused"]


def test_each_wait_has_a_time_limit_of_its_own(place: Place) -> None:
    """First for its turn, then for the engine."""
    place.make(limit=1)
    first, second = place.comes("a"), place.comes("b")
    place.passes(HOLD - 1)
    place.gate.leave(first)
    assert second.told == ["waiting", "held"]
    place.passes(HOLD - 1)
    assert second.told == ["waiting", "held"]
    place.passes(1.1)
    assert second.last == "refused"


def test_who_waits_no_more_is_told_nothing(place: Place) -> None:
    place.make(limit=1)
    held, queued = place.comes("a"), place.comes("b")
    assert held in place.gate
    assert queued in place.gate
    place.gate.leave(queued)
    place.gate.leave(held)
    assert held not in place.gate
    assert queued not in place.gate
    place.passes(3 * HOLD)
    place.engine_is("ready")
    assert (held.told, queued.told) == (["held"], ["waiting"])


@pytest.mark.parametrize("state", ["starting", "ready"])
def test_to_leave_twice_is_to_leave(place: Place, state: str) -> None:
    place.make(limit=1)
    place.engine_is(state)
    first, second, third = (place.comes(name) for name in "abc")
    place.gate.leave(first)
    place.gate.leave(first)
    assert place.gate.active == 1
    assert third.told == ["waiting"]
    for one in (second, third, third):
        place.gate.leave(one)
    assert place.load == (0, 0)


def test_what_lost_its_engine_waits_for_the_next_one_and_counts_once(place: Place) -> None:
    place.engine_is("ready")
    one = place.comes()
    place.gate.resume(one)
    assert one.told == ["go", "go"]  # the next one is there already
    place.engine_is("restarting")
    place.gate.resume(one)
    assert one.told == ["go", "go", "held"]
    place.engine_is("ready")
    assert one.last == "go"
    assert place.load == (1, 0)
    place.engine_is("failed")
    place.gate.resume(one)
    assert one.last == "refused"
    assert place.load == (0, 0)


# The engine's states. What becomes of one that is held, one that waits for its turn, a job that is held, one that comes
# then, a job that comes then; and the generation.

AT_EACH_STATE = {
    "starting": ("held", "waiting", "held", "held", "held"),
    "ready": ("go", "waiting", "go", "go", "go"),
    "restarting": ("held", "waiting", "held", "held", "held"),
    "draining": ("refused", "refused", "held", "refusal", "go"),
    "stopping": ("refused", "refused", "refused", "refusal", "refusal"),
    "stopped": ("refused", "refused", "refused", "refusal", "refusal"),
    "failed": ("refused", "refused", "refused", "refusal", "refusal"),
}


@pytest.mark.parametrize("state", STATES)
def test_what_a_state_of_the_engine_means_for_whom(place: Place, state: str) -> None:
    place.make(limit=1)
    held, job, queued = place.comes("a"), place.comes("job", limited=False), place.comes("b")
    place.engine_is(state)
    assert (held.last, queued.last, job.last) == AT_EACH_STATE[state][:3]
    place.make(limit=None)
    place.engine_is(state)
    for limited, expected in ((True, AT_EACH_STATE[state][3]), (False, AT_EACH_STATE[state][4])):
        refusal = place.gate.find_refusal(limited=limited)
        assert (refusal is not None) == (expected == "refusal")
        if refusal is None:
            assert place.comes(limited=limited).last == expected
        else:
            assert (refusal.status, refusal.code, refusal.retry_after) == (503, "engine_unavailable", RETRY_AFTER)
    assert place.gate.closing == (state in CLOSED_STATES)


@pytest.mark.parametrize("state", ["draining", "stopping"])
def test_of_many_that_are_refused_each_is_told_once_and_none_is_let_in_by_the_one_before(
    place: Place, state: str
) -> None:
    place.make(limit=1)
    everybody = [place.comes(str(number)) for number in range(20)]
    place.engine_is(state)
    place.passes(2 * HOLD)
    assert [one.told for one in everybody] == [["held", "refused"], *[["waiting", "refused"]] * 19]
    assert place.went == []
    assert place.load == (0, 0)


def test_what_runs_goes_on_while_the_engine_drains(place: Place) -> None:
    place.engine_is("ready")
    one, job = place.comes("a"), place.comes("job", limited=False)
    place.engine_is("draining")
    assert (one.told, job.told) == (["go"], ["go"])
    assert place.load == (2, 0)


def test_each_engine_has_a_generation_of_its_own(place: Place) -> None:
    seen = []
    for state in ("starting", "ready", "ready", "restarting", "starting", "ready", "draining", "stopping", "stopped"):
        place.engine_is(state)
        seen.append(place.gate.generation)
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2, 2]  # what drains is the same engine


# Whether an engine lives


def test_an_engine_that_answers_lives(place: Place) -> None:
    place.engine_is("ready")
    one = place.comes()
    place.gate.ask(one)
    place.gate.ask(one)
    place.passes(FATE_KNOWN_AFTER - 0.05)
    assert (place.questions, one.told) == (0, ["go"])  # first its death has time to be noticed
    place.passes(0.1)
    assert (place.questions, one.told) == (1, ["go", "alive"])
    assert not place.gate.questions


def test_a_death_that_is_noticed_is_told_at_once(place: Place) -> None:
    place.engine_is("ready")
    one = place.comes()
    place.gate.ask(one)
    place.engine_is("restarting")
    assert one.told == ["go", "dead"]
    place.passes(60)
    assert (place.questions, one.told) == (0, ["go", "dead"])


def test_a_death_that_is_noticed_while_it_is_asked_counts(place: Place) -> None:
    place.engine_is("ready")
    place.health = None
    one = place.comes()
    place.gate.ask(one)
    place.passes(FATE_KNOWN_AFTER + 1)
    assert place.questions == 1
    place.engine_is("restarting")
    assert one.told == ["go", "dead"]


@pytest.mark.parametrize("health", [None, 500, 503])
def test_an_engine_that_is_not_well_and_does_not_die_is_believed_in_the_end(place: Place, health: int | None) -> None:
    place.engine_is("ready")
    place.health = health
    one = place.comes()
    place.gate.ask(one)
    each = FATE_KNOWN_AFTER + (PATIENCE if health is None else 0)
    place.passes(QUESTIONS * each - 0.1)
    assert one.told == ["go"]
    place.passes(0.2)
    assert (place.questions, one.told) == (QUESTIONS, ["go", "alive"])


def test_an_engine_that_becomes_well_is_asked_no_further(place: Place) -> None:
    place.engine_is("ready")
    place.health = 503
    one = place.comes()
    place.gate.ask(one)
    place.passes(3 * FATE_KNOWN_AFTER + 0.01)
    place.health = 200
    place.passes(FATE_KNOWN_AFTER)
    assert (place.questions, one.told) == (4, ["go", "alive"])


def test_of_an_engine_that_drains_and_lives_nobody_says_that_it_is_dead(place: Place) -> None:
    place.engine_is("ready")
    place.engine_is("draining")
    job = place.comes("job", limited=False)
    place.gate.ask(job)
    place.engine_is("draining")
    assert job.told == ["go"]
    place.passes(FATE_KNOWN_AFTER + 0.1)
    assert job.told == ["go", "alive"]


def test_who_leaves_asks_no_more(place: Place) -> None:
    place.engine_is("ready")
    one = place.comes()
    place.gate.ask(one)
    place.gate.leave(one)
    place.passes(60)
    assert (place.questions, one.told) == (0, ["go"])


def test_an_engine_that_dies_and_is_ready_again_between_two_questions_was_another(place: Place) -> None:
    """One is held while it asks, and the next engine has it by then."""
    place.engine_is("ready")
    held, doubtful = place.comes("held"), place.comes("doubtful")
    place.gate.hold(held)
    for one in (held, doubtful):
        place.gate.ask(one)
    place.engine.state = "restarting"
    place.gate.engine_changed()
    place.engine.state = "ready"
    place.gate.engine_changed()
    place.passes(60)
    assert held.told == ["go", "held", "dead", "go"]
    assert doubtful.told == ["go", "dead"]
    assert place.questions == 0
