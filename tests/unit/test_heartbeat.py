"""Hang or not: the heartbeat and the restart policy, with a clock that the test turns."""

from __future__ import annotations

import pytest

from supervisor.engine.heartbeat import Heartbeat, Scrape
from supervisor.engine.restarts import Restarts, backoff

STALL, STEP = 120.0, 10.0

METRICS = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:num_requests_running{engine="1",model_name="demo"} 1.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 2.0
vllm:prompt_tokens_total{engine="0",model_name="demo"} 1.5e+03
vllm:generation_tokens_total{engine="0",model_name="demo"} 40.0
vllm:iteration_tokens_total_count{engine="0",model_name="demo"} 7.0
vllm:iteration_tokens_total_sum{engine="0",model_name="demo"} 9999.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="demo"} 2.0
"""


class Bench:
    """Feeds samples `STEP` seconds apart; `after(n, ...)` tells whether any of n samples found a hang."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat(STALL, STEP)
        self.now = 1000.0

    def after(self, samples: int, scrape: Scrape | None, relayed: int = 0, awaited: int = 0, gap: float = STEP) -> bool:
        hung = False
        for _ in range(samples):
            self.now += gap
            hung |= self.heartbeat.stalled(self.now, scrape, relayed, awaited)
        return hung


def test_metrics_are_summed_over_engines() -> None:
    assert Scrape.parse(METRICS) == Scrape(progress=1500 + 40 + 7 + 2, working=6)
    assert Scrape.parse(b"") == Scrape(0, 0)


def test_work_without_progress_is_a_hang_after_the_timeout_and_not_before() -> None:
    bench = Bench()
    assert not bench.after(12, Scrape(50, 1))  # the first sample starts the clock: 110 s
    assert bench.after(1, Scrape(50, 1))


def test_a_request_that_vllm_does_not_count_is_a_hang_too() -> None:
    """Frozen while idle: its gauges say 0 for ever, and our request waits."""
    assert Bench().after(14, Scrape(50, 0), awaited=1)


@pytest.mark.parametrize(
    "case",
    [
        lambda bench: bench.after(100, Scrape(50, 0)),  # idle
        lambda bench: any(bench.after(1, Scrape(50 + n, 256)) for n in range(100)),  # saturated, but moving
        lambda bench: bench.after(11, Scrape(50, 1)) or bench.after(11, Scrape(51, 1)),  # long prefills
        lambda bench: any(bench.after(1, Scrape(50, 1), relayed=n) for n in range(100)),  # seen on our side alone
        lambda bench: bench.after(12, Scrape(50, 1)) or bench.after(1, None, awaited=1),  # a missed scrape at the end
        lambda bench: bench.after(12, Scrape(50, 1)) or bench.after(11, Scrape(0, 1)),  # restarted: counters anew
        lambda bench: bench.after(12, Scrape(50, 1)) or bench.after(1, Scrape(50, 1), gap=3600),  # the machine slept
        lambda bench: bench.after(12, Scrape(50, 1)) or bench.after(100, Scrape(50, 0)),  # the client gave up
        lambda bench: bench.after(9, Scrape(50, 0)) or bench.after(12, Scrape(50, 1)),  # work that began since
        lambda bench: bench.after(100, None),  # no answer, but nobody waits
    ],
    ids=[
        "idle",
        "saturated",
        "prefill",
        "relayed",
        "missed",
        "restarted",
        "slept",
        "given-up",
        "just-begun",
        "unanswered-idle",
    ],
)
def test_what_is_no_hang(case: object) -> None:
    assert callable(case)
    assert not case(Bench())


def test_an_api_server_that_answers_no_more_is_a_hang() -> None:
    bench = Bench()
    assert not bench.after(2, Scrape(50, 1))
    assert bench.after(13, None, awaited=1)


def test_after_a_sleep_the_clock_starts_anew() -> None:
    bench = Bench()
    assert not bench.after(12, Scrape(50, 1))
    assert not bench.after(1, Scrape(50, 1), gap=3600)
    assert not bench.after(11, Scrape(50, 1))
    assert bench.after(1, Scrape(50, 1))


# Restarts


def test_a_permanent_cause_before_it_was_ever_ready_is_final() -> None:
    assert Restarts(5, 600).judge(0, permanent=True, served=False).delay is None
    assert Restarts(5, 600).judge(0, permanent=False, served=False).delay is not None


def test_at_once_then_with_backoff_then_no_more() -> None:
    restarts = Restarts(3, 600)
    delays = [restarts.judge(now, permanent=False, served=True).delay for now in range(4)]
    assert delays[0] == 0
    assert delays[1] is not None
    assert 1 <= delays[1] <= 2
    assert delays[2] is not None
    assert 2 <= delays[2] <= 3
    assert delays[3] is None
    assert "SUPERVISOR_MAX_RESTARTS" in Restarts(0, 600).judge(0, permanent=False, served=True).reason


def test_failures_outside_the_window_are_forgotten() -> None:
    restarts = Restarts(2, 600)
    assert all(restarts.judge(hour * 3600, permanent=False, served=True).delay == 0 for hour in range(10))


def test_backoff_grows_to_half_a_minute() -> None:
    assert 1 <= backoff(1) <= 2
    assert 29 <= backoff(20) <= 31
