"""What the gateway counts, and what the engine says of itself, as Prometheus reads it; metrics.toml has the series."""

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
# Each is there from the beginning, or the first restart would be no increase.
CAUSES = ("exit", "part died", "hang", "rank gone", "slow start")


@dataclass
class Exposition(Collector):
    """`now`: what /status tells."""

    counts: Counts
    facts: Mapping[str, object]
    now: Mapping[str, Any]
    cache: Cache | None

    def text(self) -> bytes:
        return generate_latest(self)

    def collect(self) -> Iterator[Any]:
        for name, value in self._values().items():
            kind, meaning, *labels = TABLE[name]
            family: Any = FAMILIES[kind](f"supervisor_{name}", meaning, labels=labels)
            for one, number in value.items() if isinstance(value, Mapping) else [((), value)]:
                family.add_metric(one, *(_cumulated(number) if isinstance(number, Histogram) else (number,)))
            yield family

    def _values(self) -> dict[str, Any]:
        """By the name of the series; where it has labels, by these."""
        counts, now, jobs = self.counts, self.now, self.counts.jobs
        answers = {(route, str(status)): series for (route, status), series in sorted(counts.answers.items())}
        values: dict[str, Any] = {
            "info": {tuple(str(self.facts.get(name, "")) for name in TABLE["info"][2:]): 1},
            "engine_state": {(state,): state == now["state"] for state in STATES},
            "engine_transitions": {tuple(row.split(" -> ")): count for row, count in now["transitions"].items()},
            "engine_restarts": _by_one(dict.fromkeys(CAUSES, 0) | now["restarts_by_cause"]),
            "start_phase_seconds": {(row["name"],): row["seconds"] for row in now["phases"]},
            "requests_in_flight": now["in_flight"],
            "requests_waiting": now["waiting"],
            "requests": {labels: series.first.count for labels, series in answers.items()},
            "first_byte_seconds": {labels: series.first for labels, series in answers.items()},
            "request_seconds": {labels: series.whole for labels, series in answers.items()},
            "event_gap_seconds": counts.gaps,
            "requests_held": counts.held,
            "requests_replayed": counts.replayed,
            "requests_aborted": counts.aborted,
            "received_bytes": counts.received,
            "sent_bytes": counts.sent,
        }
        if self.cache is not None:
            values["cache_requests"] = _by_one(self.cache.results)
            values |= {"cache_bytes": self.cache.size, "cache_answers": len(self.cache.kept)}
        if jobs is not None:
            values["jobs_running"] = len(jobs.began)
            values["jobs"] = _by_one({outcome: histogram.count for outcome, histogram in jobs.ended.items()})
            values["job_seconds"] = _by_one(jobs.ended)
            values["job_posts"] = {tuple(name.split()): count for name, count in jobs.posts.items()}
            values["queue_worker_deaths"] = jobs.deaths
        return values


def _by_one(values: Mapping[str, Any]) -> dict[tuple[str], Any]:
    """By the value of the only label."""
    return {(label,): value for label, value in values.items()}


def _cumulated(histogram: Histogram) -> tuple[list[tuple[str, int]], float]:
    bounds = (*map(str, histogram.bounds), "+Inf")
    return list(zip(bounds, accumulate(histogram.buckets), strict=True)), histogram.seconds
