"""The engine's life, turn by turn: every order of what can happen to a run, with a scripted vLLM."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from supervisor.around.phases import Waterfall
from supervisor.engine.diagnosis import Diagnosis
from supervisor.engine.lifecycle import Event, State
from supervisor.engine.run import Change, Observer, Run
from tests.engine_core.world import LIMITS, ScriptedVllm, World

COUNTERS = b'vllm:iteration_tokens_total_count{engine="0"} %d\n'


def limits(**more: Any) -> Any:
    return LIMITS._replace(**more)


# Runs, and news of earlier ones


def test_a_run_is_known_by_more_than_its_number() -> None:
    with World() as world:
        first = world.serves()
        assert world.account.status()["pid"] == first.pid
        first.exits(1)
        world.settle()
        assert first.removed
        run, again = world.seen.runs
        assert run.child is not None
        assert again.child is not None
        assert (run.number, run.was_ready, run.child.pid) == (1, True, first.pid)
        assert (again.number, again.was_ready, again.child.pid) == (2, False, world.launched().pid)
        assert world.seen.states == [State.READY, State.RESTARTING, State.STARTING]


def test_between_two_runs_there_is_none() -> None:
    with World() as world:
        world.launched().exits(1)
        world.settle()
        assert world.engine.state is State.RESTARTING
        assert world.engine.living_run is None
        assert world.account.status()["pid"] is None


@pytest.mark.parametrize("late", [Event.READY, Event.EXITED, Event.BROKEN, Event.RETRY, Event.GIVE_UP, Event.DRAINED])
@pytest.mark.parametrize("served", [False, True])
def test_news_of_an_earlier_run_changes_nothing(late: Event, served: bool) -> None:
    with World() as world:
        first = world.serves() if served else world.launched()
        run = world.seen.runs[0]
        first.exits(1)
        world.settle()
        world.engine._send(run, late, "late", "late") if late is not Event.RETRY else None
        world.passes(5)
        second = world.launched()
        if world.engine.state is State.FAILED:  # given up on this very run: that is no earlier one
            assert late is Event.GIVE_UP
            return
        assert second is not first
        before = world.engine.state
        world.engine._send(run, late, "late", "late")
        world.settle()
        assert world.engine.state is before
        assert not second.removed
        world.check()
        second.answers()
        world.passes(1)
        assert world.account.ready


def test_it_is_not_ready_when_exit_and_readiness_come_in_one_turn() -> None:
    """Both in the queue, in this order: an engine that was dead stayed `ready` for good."""
    with World() as world:
        vllm = world.launched()
        run = world.seen.runs[0]
        vllm.exits(0)
        world.engine._send(run, Event.EXITED, "vLLM ended (exit code 0)")
        world.engine._send(run, Event.READY, "vLLM answers")
        world.settle()
        assert world.engine.state is State.RESTARTING
        world.check()
        world.passes(3)
        world.serves()


def test_what_the_watch_sees_of_a_dead_run_does_not_end_the_next() -> None:
    with World() as world:
        first = world.launched()
        run = world.seen.runs[0]
        world.engine._part_died(run, "VLLM::EngineCore (pid 7) died")
        first.exits(1)
        world.passes(3)
        second = world.serves()
        world.passes(30)  # the last words of the first would be over long since
        assert world.account.ready
        assert second.alive


def test_what_happens_beside_a_run_ends_with_it() -> None:
    with World() as world:
        world.serves()
        tasks = len(asyncio.all_tasks(world.loop))
        for _ in range(4):
            world.serves().exits(1)
            world.passes(40)
        world.serves()
        assert len(asyncio.all_tasks(world.loop)) == tasks


# Why it ended, and whether another start is worth trying


def test_an_unknown_end_that_comes_again_at_once_is_the_last() -> None:
    with World() as world:
        for _ in range(2):
            world.launched().exits(3)
            world.passes(5)
        assert world.engine.state is State.FAILED
        assert "it ended twice in the same way within a minute" in world.log[-1].getMessage()


def test_one_that_comes_again_much_later_is_not() -> None:
    with World(limits(startup=600.0)) as world:
        for _ in range(2):
            world.passes(45)
            world.launched().exits(3)
            world.passes(20)
        assert world.engine.state is State.STARTING


def test_an_engine_that_had_served_is_started_again_however_it_ends() -> None:
    with World() as world:
        for _ in range(3):
            world.serves().exits(3)
            world.passes(10)
        assert world.engine.state is State.STARTING


def test_the_kernels_kill_is_the_cause_where_it_was_noted() -> None:
    class Noted(Observer):
        def run_began(self, run: Run) -> None:
            run.oom_killed = True

    with World(LIMITS, Noted()) as world:
        world.launched().exits(1)
        world.settle()
        status: dict[str, Any] = world.account.status()
        assert "because the container's memory ran out" in status["last_failure"]["cause"]


def test_finding_the_cause_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 900 patterns are compiled first: half a second of the loop, in which /ping had no answer."""
    where: list[threading.Thread] = []

    def diagnose(*_: object, **__: object) -> Diagnosis:
        where.append(threading.current_thread())
        return Diagnosis("found", "", permanent=False)

    monkeypatch.setattr("supervisor.engine.diagnosis.diagnose", diagnose)
    with World() as world:
        world.launched().exits(1)
        world.settle()
        status: dict[str, Any] = world.account.status()
        assert status["last_failure"]["cause"] == "found"
        assert where
        assert threading.main_thread() not in where


class Lives(RuleBasedStateMachine):
    """Any order of anything, of this run or an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(limits(stall=0.0, stay_when_failed=True), slow_launch=True)
        self.world.__enter__()

    @property
    def vllm(self) -> Any:
        return self.world.vllms[-1]

    @initialize(serves=st.booleans())
    def first(self, serves: bool) -> None:
        vllm = self.world.launches[-1].succeeds()
        self.world.settle()
        if serves:
            vllm.answers()
            self.world.passes(1)

    @precondition(lambda self: not self.world.launches[-1].spawned.done())
    @rule(works=st.booleans())
    def launch_ends(self, works: bool) -> None:
        launching = self.world.launches[-1]
        if launching.discard is not None or works:
            launching.succeeds()
        else:
            launching.fails(FileNotFoundError(2, "No such file or directory"))
        self.world.settle()

    @rule(code=st.sampled_from([0, 1, -9]))
    def exits(self, code: int) -> None:
        self.vllm.exits(code)
        self.world.settle()

    @rule(status=st.sampled_from([200, 503]))
    def answers(self, status: int) -> None:
        if self.vllm.alive:
            self.vllm.answers(status)

    @rule()
    def exits_and_is_ready_at_once(self) -> None:
        self.vllm.exits(0)
        run = self.world.engine.latest_run
        if run.child is self.vllm:
            self.world.engine._send(run, Event.EXITED, "ended")
            self.world.engine._send(run, Event.READY, "answers")
        self.world.settle()

    @rule(event=st.sampled_from([Event.READY, Event.BROKEN, Event.EXITED, Event.RETRY, Event.GIVE_UP, Event.DRAINED]),
          data=st.data())  # fmt: skip
    def old_news(self, event: Event, data: st.DataObject) -> None:
        earlier = [run for run in self.world.seen.runs if run is not self.world.engine.latest_run]
        if earlier:
            before = self.world.engine.state
            self.world.engine._send(data.draw(st.sampled_from(earlier)), event, "old news", "old")
            self.world.settle()
            assert self.world.engine.state is before

    @rule()
    def breaks(self) -> None:
        if self.world.seen.runs:
            self.world.seen.runs[-1].mark_broken("hang", "it hangs")
        self.world.settle()

    @rule(seconds=st.sampled_from([0.1, 2.0, 40.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.passes(seconds)

    @rule(done=st.booleans())
    def drains(self, done: bool) -> None:
        drained = self.world.front.drained
        if drained is not None and not drained.done():
            drained.set_result(done)
        self.world.settle()

    @rule()
    def signal_comes(self) -> None:
        if not self.world.over:
            self.world.stop()

    @invariant()
    def nothing_is_out_of_order(self) -> None:
        self.world.check()
        if self.world.over:
            assert self.world.exit_code in (0, 3, 4, 128 + signal.SIGTERM)
        assert self.world.told("a fault of the supervisor's own") == 0

    def teardown(self) -> None:
        self.world.__exit__()


Lives.TestCase.settings = settings(
    max_examples=30, stateful_step_count=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_order_of_events_leaves_no_dead_engine_ready = Lives.TestCase


# Launching


def test_a_launch_that_hangs_says_what_it_waits_for_and_goes_on() -> None:
    with World(slow_launch=True) as world:
        assert "looking for the weights" in world.account.explanation
        world.passes(11)
        assert world.told("looking for the weights: their disk did not answer in 10 s") == 1
        world.launches[-1].succeeds()
        world.serves()


def test_a_signal_ends_a_launch_that_hangs_and_whatever_comes_of_it() -> None:
    with World(slow_launch=True) as world:
        world.stop()
        assert world.over
        assert world.exit_code == 0
        late = world.launches[-1].succeeds()
        assert late.removed


def test_a_launch_has_the_startup_timeout() -> None:
    with World(limits(startup=30.0), slow_launch=True) as world:
        world.passes(31)
        assert world.exit_code == 3
        assert "SUPERVISOR_STARTUP_TIMEOUT" in world.account.reason
        assert world.launches[0].succeeds().removed


def test_a_command_that_is_gone_is_tried_again() -> None:
    with World(slow_launch=True) as world:
        world.launches[-1].fails(FileNotFoundError(2, "No such file or directory"))
        world.settle()
        assert "vLLM can't be started (No such file or directory)" in world.account.reason
        world.passes(3)
        world.launches[-1].succeeds()
        world.serves()


def test_a_start_that_takes_too_long_is_ended() -> None:
    with World(limits(startup=30.0)) as world:
        vllm = world.launched()
        world.passes(31)
        assert vllm.removed
        assert "not ready after 30 s (SUPERVISOR_STARTUP_TIMEOUT), it was at: importing vLLM" in world.account.reason


def test_a_warm_up_comes_before_the_first_request() -> None:
    with World(limits(warm_up=b"{}")) as world:
        world.launched().answers()
        world.passes(1)
        assert world.asked_paths[-3:] == ["/health", "/v1/completions", "/health"]
        assert world.account.ready


# The end


def test_a_signal_drains_then_terminates() -> None:
    with World() as world:
        vllm = world.serves()
        world.stop()
        assert world.account.draining
        world.front.drained.set_result(True)  # type: ignore[union-attr]
        world.settle()
        assert vllm.terminated == 1
        assert world.exit_code == 0


def test_vllm_that_ignores_sigterm_is_killed() -> None:
    with World() as world:
        vllm = world.serves()
        vllm.deaf = True
        world.stop()
        world.front.drained.set_result(True)  # type: ignore[union-attr]
        world.passes(9)
        assert not world.over
        world.passes(2)
        assert vllm.removed
        assert world.exit_code == 0


def test_a_second_signal_waits_for_nothing() -> None:
    with World() as world:
        vllm = world.serves()
        vllm.deaf = True
        world.stop()
        world.stop(signal.SIGINT)
        assert vllm.removed
        assert world.exit_code == 128 + signal.SIGINT


def test_what_would_not_die_keeps_nobody() -> None:
    with World() as world:
        vllm = world.launched()
        vllm.undying = [7]
        world.stop()
        assert world.exit_code == 0
        assert world.told("processes 7 of vLLM's session would not die") == 1


def test_a_signal_between_two_runs_ends_it_at_once() -> None:
    with World() as world:
        world.launched().exits(1)
        world.settle()
        world.stop()
        assert world.exit_code == 0
        assert len(world.vllms) == 1


def test_failed_and_serving_it_waits_for_the_signal() -> None:
    with World(limits(restarts=0, stay_when_failed=True)) as world:
        world.launched().exits(1)
        world.passes(60)
        assert world.engine.state is State.FAILED
        assert not world.over
        world.stop()
        assert world.exit_code == 3


# Hanging


def test_a_frozen_engine_is_noticed_whatever_its_api_server_says() -> None:
    with World() as world:
        vllm = world.serves()
        vllm.metrics = COUNTERS % 7
        world.front.waiting = ["stream"]
        for second in range(24):
            world.front.signs = second
            world.passes(1)
            if not world.account.ready:
                break
        assert vllm.removed
        assert 20 <= second <= 23
        assert world.told("vLLM hangs: no progress in 20 s (SUPERVISOR_STALL_TIMEOUT) with 1 requests in flight")
        assert world.seen.hung_runs == 1


@pytest.mark.parametrize("what", ["idle", "moving", "off"])
def test_what_is_no_hang(what: str) -> None:
    with World(limits(stall=0.0 if what == "off" else 20.0)) as world:
        vllm = world.serves()
        world.front.waiting = [] if what == "idle" else ["stream"]
        for second in range(60):
            vllm.metrics = COUNTERS % (second if what == "moving" else 7)
            world.passes(1)
        assert world.account.ready
        if what in ("idle", "off"):
            assert "/metrics" not in world.asked_paths


# Faults of our own


class Faulty(Observer):
    """Whatever it is told, it raises."""

    def run_began(self, run: Run) -> None:
        raise ZeroDivisionError("run_began")

    def lines_logged(self, run: Run, lines: Sequence[str]) -> None:
        raise ZeroDivisionError("lines_logged")

    def state_changed(self, change: Change) -> None:
        raise ZeroDivisionError("state_changed")

    def run_removed(self) -> None:
        raise ZeroDivisionError("run_removed")

    async def run_answered(self, run: Run) -> None:
        raise ZeroDivisionError("run_answered")

    async def run_hung(self, run: Run) -> None:
        raise ZeroDivisionError("run_hung")

    async def wait_until_clear(self) -> None:
        raise ZeroDivisionError("wait_until_clear")

    def run_judged(self, run: Run, diagnosis: object) -> None:
        raise ZeroDivisionError("run_judged")

    async def run_failed(self, run: Run, verdict: str, given_up: bool) -> None:
        raise ZeroDivisionError("run_failed")


def test_an_observer_that_fails_ends_nothing_and_is_told_once() -> None:
    with World(LIMITS, Faulty()) as world:
        vllm = world.serves()
        for _ in range(3):
            vllm.says("a line")
            world.settle()
        vllm.metrics = COUNTERS % 7
        world.front.waiting = ["stream"]
        world.passes(25)
        assert vllm.removed
        world.serves()
        for what in (
            "run_began",
            "run_answered",
            "lines_logged",
            "state_changed",
            "run_removed",
            "run_hung",
            "wait_until_clear",
            "run_judged",
            "run_failed",
        ):
            assert world.told(f"Faulty.{what} failed") == 1
        world.stop()
        world.front.drained.set_result(True)  # type: ignore[union-attr]
        world.settle()
        assert world.exit_code == 0


@pytest.mark.parametrize("what", ["traffic", "ask", "metrics", "phases", "diagnosis", "drain", "survey"])
def test_a_fault_in_what_happens_beside_ends_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise ZeroDivisionError(what)

    with World() as world:
        if what == "survey":
            monkeypatch.setattr("tests.engine_core.world.ScriptedVllm.survey", broken)
        vllm = world.serves()
        world.front.waiting = ["stream"]
        vllm.metrics = b'vllm:prompt_tokens_total{model_name="x} y' if what == "metrics" else COUNTERS % 1
        if what == "traffic":
            monkeypatch.setattr(world.front, "traffic", broken)
        elif what == "ask":
            monkeypatch.setattr(world.engine, "ask", broken)
        elif what == "phases":
            monkeypatch.setattr(Waterfall, "hear", broken)
        elif what == "diagnosis":
            monkeypatch.setattr("supervisor.engine.diagnosis.diagnose", broken)
        elif what == "drain":
            monkeypatch.setattr(world.front, "drain", broken)
        for _ in range(3):
            vllm.says("a line")
            world.passes(3)
            if what == "metrics":
                world.front.signs += 1
        assert world.account.ready
        vllm.exits(1)
        world.passes(1)
        monkeypatch.undo()
        if what != "drain":
            world.serves()
            world.stop()
            world.front.drained.set_result(True)  # type: ignore[union-attr]
        else:
            world.serves()
            monkeypatch.setattr(world.front, "drain", broken)
            world.stop()
        world.settle()
        assert world.over
        assert world.told("a fault of the supervisor's own") == (0 if what == "metrics" else 1)


# What fails of our own, and a pause of everything


def fails_to_end(vllm: ScriptedVllm, times: int) -> None:
    ending, left = vllm.end, [OSError(24, "Too many open files")] * times

    async def end() -> list[int]:
        if left:
            raise left.pop()
        return await ending()

    vllm.end = end  # type: ignore[method-assign]


@pytest.mark.parametrize("times", [1, 9])
def test_what_an_engine_leaves_is_cleared_away_by_more_than_one_try(times: int) -> None:
    with World() as world:
        vllm = world.serves()
        fails_to_end(vllm, times)
        vllm.exits(1)
        world.passes(20)
        assert vllm.removed
        assert world.launched().alive


def test_where_it_can_not_be_cleared_away_we_end_and_the_guard_does_it() -> None:
    with pytest.raises(ExceptionGroup, match="unhandled errors"), World() as world:
        vllm = world.serves()
        fails_to_end(vllm, 10)
        vllm.exits(1)
        world.passes(20)
        assert world.over


def test_a_start_that_no_thread_can_be_had_for_is_tried_again() -> None:
    with World() as world:
        launch, left = world.engine.launch, [RuntimeError("can't start new thread")]

        def launch_later() -> Any:
            if left:
                raise left.pop()
            return launch()

        world.engine.launch = launch_later
        world.serves().exits(1)
        world.passes(30)
        assert world.launched().alive
        assert any("can't start new thread" in record.getMessage() for record in world.log)


@pytest.mark.parametrize("fault", ["finding the cause", "all of it"])
def test_an_end_that_can_not_be_judged_has_one_all_the_same(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    with World() as world:
        if fault == "all of it":
            monkeypatch.setattr(world.engine._restarts, "wait_for_retry", None)
        else:
            monkeypatch.setattr("supervisor.engine.diagnosis.diagnose", None)
        world.serves().exits(1)
        world.passes(30)
        assert (world.over, world.engine.state) == (
            (True, State.FAILED) if fault == "all of it" else (False, State.STARTING)
        )
        assert not world.over or world.exit_code == 4


class Frozen:
    """A vLLM and its supervisor are stopped for an hour while the supervisor waits for an answer, or for a moment."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
        ask = world.engine.ask
        self.done = False

        async def ask_and_freeze(asked: str, body: bytes, patience: float) -> tuple[int, bytes] | None:
            if asked == path and not self.done:
                self.done = True
                world.loop.clock.now += 3600
                return None
            return await ask(asked, body, patience)

        monkeypatch.setattr(world.engine, "ask", ask_and_freeze)


def test_a_start_that_stood_still_for_an_hour_has_its_time_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with World(limits(startup=60.0)) as world:
        vllm = world.launched()
        world.passes(20)
        frozen = Frozen(world, monkeypatch, "/health")
        world.passes(3600 + 20)
        assert frozen.done
        assert vllm.alive
        vllm.answers()
        world.passes(2)
        assert world.engine.state is State.READY


def test_an_engine_that_stood_still_while_it_was_scraped_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with World(limits(stall=20.0)) as world:
        vllm = world.serves()
        vllm.metrics = COUNTERS % 1
        world.front.waiting = [object()]
        world.passes(9)
        frozen = Frozen(world, monkeypatch, "/metrics")
        world.passes(3600 + 9)
        assert frozen.done
        assert vllm.alive
        world.passes(30)  # then it hangs
        assert not vllm.alive


def test_a_start_that_never_answers_has_no_more_than_its_time() -> None:
    for asks in (0, 503):
        with World(limits(startup=60.0)) as world:
            vllm = world.launched()
            if asks:
                vllm.answers(asks)
            world.passes(58)
            assert vllm.alive
            world.passes(5)
            assert not vllm.alive


def test_only_a_second_signal_forces() -> None:
    """What died in a drain has the code of a signal, too, but jobs that were lost with it are still to be reported."""
    with World() as world:
        vllm = world.serves()
        world.stop()
        vllm.exits(1)
        world.passes(5)
        assert (world.exit_code, world.engine.was_forced) == (143, False)
    with World() as world:
        world.serves()
        world.stop()
        world.stop()
        world.passes(30)
        assert (world.exit_code, world.engine.was_forced) == (143, True)
