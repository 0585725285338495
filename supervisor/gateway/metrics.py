"""Writes for Prometheus what the gateway counts and the engine says of itself; metrics.toml has the series."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from supervisor.gateway.counts import Counts, Histogram

if TYPE_CHECKING:
    from supervisor.gateway.cache import Cache

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
TABLE: dict[str, list[str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}
STATES = ("starting", "ready", "restarting", "draining", "stopping", "stopped", "failed")
# Each cause is there from the beginning, or its first restart would be no increase.
CAUSES = ("exit", "part died", "hang", "rank gone", "slow start")


@dataclass
class _Families(Collector):
    values: Mapping[str, Any]  # by the name of the series; where it has labels, a mapping by their values

    def collect(self) -> Iterator[Any]:
        for name, value in self.values.items():
            kind, meaning, *labels = TABLE[name]
            family: Any = FAMILIES[kind](f"supervisor_{name}", meaning, labels=labels)
            for label, number in value.items() if isinstance(value, Mapping) else [((), value)]:
                one = label if isinstance(label, tuple) else (label,)
                family.add_metric(one, *(_cumulate(number) if isinstance(number, Histogram) else (number,)))
            yield family


def exposition(counts: Counts, now: Mapping[str, Any], cache: Cache | None) -> bytes:
    """Returns the text of /metrics. `now` is what /status tells; `cache` is None where answers are not kept."""
    answers = {(route, str(status)): series for (route, status), series in sorted(counts.answers.items())}
    values: dict[str, Any] = {
        "info": {tuple(str(now.get(name, "")) for name in TABLE["info"][2:]): 1},
        "engine_state": {state: state == now["state"] for state in STATES},
        "engine_transitions": {tuple(row.split(" -> ")): count for row, count in now["transitions"].items()},
        "engine_restarts": dict.fromkeys(CAUSES, 0) | now["restarts_by_cause"],
        "start_phase_seconds": {row["name"]: row["seconds"] for row in now["phases"]},
        "requests_in_flight": now["in_flight"],
        "requests_waiting": now["waiting"],
        "requests": {labels: series.first_byte.count for labels, series in answers.items()},
        "first_byte_seconds": {labels: series.first_byte for labels, series in answers.items()},
        "request_seconds": {labels: series.last_byte for labels, series in answers.items()},
        "event_gap_seconds": counts.gaps,
        "requests_held": counts.held,
        "requests_replayed": counts.replayed,
        "requests_aborted": counts.aborted,
        "received_bytes": counts.received,
        "sent_bytes": counts.sent,
    }
    if cache is not None:
        values |= {"cache_requests": cache.results, "cache_bytes": cache.size, "cache_answers": len(cache.kept)}
    if (jobs := counts.jobs) is not None:
        values["jobs_running"] = len(jobs.began_at)
        values["jobs"] = {outcome: histogram.count for outcome, histogram in jobs.ended.items()}
        values["job_seconds"] = jobs.ended
        values["job_posts"] = {tuple(name.split()): count for name, count in jobs.posts.items()}
        values["queue_worker_deaths"] = jobs.deaths
    return generate_latest(_Families(values))


def _cumulate(histogram: Histogram) -> tuple[list[tuple[str, int]], float]:
    bounds = (*map(str, histogram.bounds), "+Inf")
    return list(zip(bounds, accumulate(histogram.buckets), strict=True)), histogram.seconds
