"""Whether a failed engine is started again, and when; with sleeps that are only noted."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest

from supervisor.engine.restarts import EngineFailed, Restarts


class Bench:
    """`fails()` once a second; `waited` has the seconds before each next start, `given_up` the reason of the last."""

    def __init__(self, limit: int, window: float = 600.0) -> None:
        self.now = 0.0
        self.waited: list[float] = []
        self.told: list[str] = []
        self.given_up = ""
        self.restarts = Restarts(limit, window, lambda: self.now, self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.waited.append(seconds)

    async def fails(
        self, *, permanent: bool = False, served: bool = True, after: float = 1.0, unknown: str = ""
    ) -> None:
        self.now += after
        failure = EngineFailed(permanent=permanent, was_ready=served, unknown_cause=unknown)
        try:
            await self.restarts.wait_for_retry(failure, lambda delay, which: self.told.append(which))
        except EngineFailed as error:
            assert error is failure
            self.given_up = self.restarts.verdict(failure)


def with_bench(limit: int, scenario: Callable[[Bench], object]) -> Bench:
    async def run() -> Bench:
        bench = Bench(limit)
        await scenario(bench)  # type: ignore[misc]
        return bench

    return asyncio.run(run())


def test_a_permanent_cause_before_it_was_ever_ready_is_final() -> None:
    bench = with_bench(5, lambda bench: bench.fails(permanent=True, served=False))
    assert (bench.waited, bench.told) == ([], [])
    assert bench.given_up == "another start would end the same way"


def test_one_that_never_served_is_tried_again_with_backoff() -> None:
    bench = with_bench(5, lambda bench: bench.fails(served=False))
    assert bench.told == ["restart 1 of 5"]
    assert 1 <= bench.waited[0] <= 2


DIED = "VLLM::Worker (pid {}) died."


class Repeat(NamedTuple):
    """Two failures: what is said of each where nobody knows why, seconds between them; whether there is a third."""

    first: str
    second: str
    after: float
    permanent: bool


@pytest.mark.parametrize(
    "row",
    [
        Repeat("Odd: x", "Odd: x", 59, True),
        Repeat("Odd: x", "Odd: x", 61, False),  # the first may have been an accident, a minute ago
        Repeat("Odd: x", "Odd: y", 5, False),
        Repeat(DIED.format(11), DIED.format(2022), 5, True),  # pids and addresses differ in the same end
        Repeat("Odd at 0x7f3a", "Odd at 0x55c1", 5, True),
        Repeat("", "", 5, False),  # known causes, each with a permanence of its own
        Repeat("Odd: x", "", 5, False),
        Repeat("", "Odd: x", 5, False),
    ],
)
def test_what_ends_twice_in_the_same_unknown_way_within_a_minute_would_again(row: Repeat) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.fails(served=False, unknown=row.first)
        await bench.fails(served=False, unknown=row.second, after=row.after)

    bench = with_bench(5, scenario)
    assert len(bench.waited) == (1 if row.permanent else 2)
    assert bench.given_up == ("it ended twice in the same way within a minute" if row.permanent else "")


def test_one_between_them_was_of_another_kind() -> None:
    async def scenario(bench: Bench) -> None:
        for unknown in ("Odd: x", "", "Odd: x"):
            await bench.fails(served=False, unknown=unknown)

    assert with_bench(5, scenario).given_up == ""


def test_at_once_then_with_backoff_then_no_more() -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(4):
            await bench.fails()

    bench = with_bench(3, scenario)
    assert bench.told == ["restart 1 of 3", "restart 2 of 3", "restart 3 of 3"]
    assert bench.waited[0] == 0
    assert 1 <= bench.waited[1] <= 2
    assert 2 <= bench.waited[2] <= 3
    assert "3 restarts in 600 s is the limit (SUPERVISOR_MAX_RESTARTS" in bench.given_up


def test_no_restarts_are_none() -> None:
    bench = with_bench(0, lambda bench: bench.fails())
    assert "SUPERVISOR_MAX_RESTARTS" in bench.given_up


def test_starts_that_fail_slowly_are_counted_however_long_they_take() -> None:
    """Five in ten minutes are never reached by starts of three minutes each: a GPU would be paid for without end."""

    async def scenario(bench: Bench) -> None:
        await bench.fails(served=True)
        for _ in range(5):
            assert bench.given_up == ""
            await bench.fails(served=False, after=1000.0)

    bench = with_bench(5, scenario)
    assert bench.told[-1] == "restart 5 of 5"
    assert "5 restarts" in bench.given_up


def test_failures_outside_the_window_are_forgotten() -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(10):
            await bench.fails(after=3600)
        await bench.fails(after=500)  # the second in this window

    bench = with_bench(2, scenario)
    assert bench.waited[:10] == [0.0] * 10
    assert bench.told[9:] == ["restart 1 of 2", "restart 2 of 2"]


@pytest.mark.parametrize("served", [False, True])
def test_backoff_grows_to_half_a_minute(served: bool) -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(12):
            await bench.fails(served=served)

    waited = with_bench(100, scenario).waited
    assert all(before <= after + 1 for before, after in itertools.pairwise(waited))
    assert 29 <= waited[-1] <= 31
