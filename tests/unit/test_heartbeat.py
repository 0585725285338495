"""Hang or not, with a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from supervisor.engine.heartbeat import MAX_MISSES, Pulse, read_progress
from supervisor.engine.run import Traffic

STALL = 120.0

METRICS = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:prompt_tokens_total{engine="0",model_name="demo"} 1.5e+03
vllm:generation_tokens_total{engine="0",model_name="demo"} 40.0
vllm:iteration_tokens_total_count{engine="0",model_name="demo"} 7.0
vllm:iteration_tokens_total_sum{engine="0",model_name="demo"} 9999.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="demo"} 6.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="demo"} 2.0
vllm:request_success_total{engine="1",finished_reason="stop",model_name="demo"} 1.0
vllm:request_success_created{engine="0",finished_reason="stop",model_name="demo"} 1.7e+09
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
"""


class Bench:
    """Feeds samples; `after(seconds, ...)` tells whether any of them found a hang, and `found_at` when."""

    def __init__(self, stall: float = STALL) -> None:
        self.now = 1000.0
        self.pulse = Pulse(stall, self.now)
        self.found_at = 0.0

    def beat(self, counters: float | None, *waiting: object, signs: object = 0, late: float = 0.0) -> bool:
        self.now += self.pulse.pause + late
        return self.pulse.is_hung(self.now, late, Traffic(waiting, signs), counters)

    def after(self, seconds: float, counters: float | None, *waiting: object, signs: object = 0) -> bool:
        until = self.now + seconds
        while self.now < until:
            if self.beat(counters, *waiting, signs=signs):
                self.found_at = self.now
                return True
        return False


def test_metrics_are_summed_over_engines() -> None:
    assert read_progress(METRICS) == 1500 + 40 + 7 + 3 + 0.25


@pytest.mark.parametrize("name", ["x} y", r"a \"quoted\" one", r"back\\slash", "l,e=t", "ünïcode", r"new\nline"])
def test_a_models_name_is_what_it_likes(name: str) -> None:
    assert read_progress(METRICS.replace(b"demo", name.encode())) == 1550.25


@pytest.mark.parametrize(
    "metrics",
    [b"", b"vllm:other 3", b"vllm:prompt_tokens_total{ 3", b"vllm:prompt_tokens_total x", b"\xff\xfe",
     b"vllm:generation_tokens_total{a=\xff} 1"],
)  # fmt: skip
def test_what_nobody_can_read_is_not_read(metrics: bytes) -> None:
    assert read_progress(metrics) is None


@pytest.mark.parametrize("stall", [2.0, 5.0, 15.0, 120.0, 600.0])
def test_work_without_progress_is_a_hang_after_the_timeout_and_little_later(stall: float) -> None:
    bench = Bench(stall)
    assert not bench.after(50, 40.0)  # idle, then frozen, then a request comes
    asked = bench.now
    assert bench.after(stall + 3, 40.0, "request")
    assert stall <= bench.found_at - asked <= stall + 3


def test_a_hang_under_a_stream_counts_from_the_last_progress() -> None:
    bench = Bench(10.0)
    for count in range(20):
        assert not bench.beat(float(count), "stream")
    frozen = bench.now
    assert bench.after(30, 19.0, "stream")
    assert 10 <= bench.found_at - frozen <= 13


CASES: dict[str, Callable[[Bench], bool]] = {
    "idle": lambda bench: bench.after(1000, 50.0),
    "saturated, but moving": lambda bench: any(bench.beat(float(n), *range(256)) for n in range(500)),
    "long prefills": lambda bench: bench.after(115, 50.0, 1) or bench.after(115, 51.0, 1),
    "missed scrapes at the end": lambda bench: (
        bench.after(118, 50.0, 1) or any(bench.beat(None, 1) for _ in range(MAX_MISSES - 1)) or bench.after(50, 51.0, 1)
    ),
    "restarted, counters anew": lambda bench: bench.after(115, 50.0, 1) or bench.after(115, 0.0, 1),
    "the client gave up": lambda bench: bench.after(115, 50.0, 1) or bench.after(1000, 50.0),
    "work that began since": lambda bench: bench.after(1000, 50.0) or bench.after(110, 50.0, 1),
    "one after the other, each refused at once": lambda bench: any(bench.beat(50.0, n) for n in range(500)),
    "one gave up, and a flood of refusals": lambda bench: (
        bench.after(115, 50.0, "left") or any(bench.beat(50.0, n) for n in range(500))
    ),
    "no answer, but nobody waits": lambda bench: bench.after(1000, None),
    "no counters, but signs": lambda bench: any(bench.beat(None, 1, signs=n) for n in range(500)),
    "unread, then idle, then a miss": lambda bench: (
        bench.after(500, None) or bench.beat(None, 1) or bench.after(115, 50.0, 1)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_hang(case: str) -> None:
    assert not CASES[case](Bench())


def test_signs_are_nothing_where_there_are_counters() -> None:
    """A frozen engine's API server goes on answering, and sends comments."""
    bench = Bench()
    assert any(bench.beat(50.0, "stream", signs=n) for n in range(100))


def test_clients_that_give_up_one_after_the_other_hide_nothing() -> None:
    bench = Bench(20.0)
    assert any(bench.beat(50.0, n // 3) for n in range(100))


def test_without_counters_or_signs_it_is_a_hang() -> None:
    assert Bench().after(130, None, "stream")


def test_an_api_server_that_answers_no_more_is_a_hang() -> None:
    bench = Bench()
    assert not bench.after(100, 50.0, 1)
    assert bench.after(30, None, 1)


def test_after_a_sleep_the_clock_starts_anew() -> None:
    bench = Bench()
    assert not bench.after(118, 50.0, 1)
    assert not bench.beat(50.0, 1, late=3600)
    assert not bench.after(110, 50.0, 1)
    assert bench.after(15, 50.0, 1)
