"""What the gateway counts, and what the engine says of itself, as Prometheus reads it.

vLLM's own series are appended as they are. Ours begin with `supervisor_`; each label has few values: routes are the
prefixes of the route lists, states and phases those of the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

from supervisor.gateway.counts import BOUNDS, GAP_BOUNDS, Counts, Histogram, Jobs

if TYPE_CHECKING:
    from supervisor.gateway.cache import Cache

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
STATES = ("starting", "ready", "restarting", "draining", "stopping", "stopped", "failed")
# Each is there from the beginning, or the first restart would be no increase.
CAUSES = ("exit", "part died", "hang", "rank gone", "slow start")
ANSWER = ["route", "status"]


class Exposition:
    """A collector of prometheus_client. `look` gives what /status tells now."""

    def __init__(
        self,
        counts: Counts,
        facts: Mapping[str, object],
        look: Callable[[], Mapping[str, Any]],
        cache: Cache | None = None,
    ) -> None:
        self.counts = counts
        self.facts = facts
        self.look = look
        self.cache = cache
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        yield from self._engine(self.look())
        yield from self._answers()
        counts = self.counts
        gaps = HistogramMetricFamily("supervisor_event_gap_seconds", "Between two reads of a stream from vLLM")
        gaps.add_metric([], _cumulated(GAP_BOUNDS, counts.gaps), counts.gaps.seconds)
        yield gaps
        for name, meaning, value in (
            ("requests_held", "Requests that waited for an engine that was not ready", counts.held),
            ("requests_replayed", "Requests that were sent again because the engine died", counts.replayed),
            ("requests_aborted", "Answers whose client was gone before their end", counts.aborted),
            ("received_bytes", "Of requests' bodies", counts.received),
            ("sent_bytes", "Of answers' bodies, their framing included", counts.sent),
        ):
            yield CounterMetricFamily(f"supervisor_{name}", meaning, value=value)

        if self.cache is not None:
            yield from _cache(self.cache)
        if counts.jobs is not None:
            yield from _jobs(counts.jobs)

    def _engine(self, now: Mapping[str, Any]) -> Iterator[Any]:
        info = InfoMetricFamily("supervisor", "What is served")
        info.add_metric([], {name: str(self.facts.get(name, "")) for name in ("model", "mode", "vllm_version")})
        yield info
        state = GaugeMetricFamily("supervisor_engine_state", "1 for the state that the engine is in", labels=["state"])
        for name in STATES:
            state.add_metric([name], name == now["state"])
        yield state
        transitions = CounterMetricFamily(
            "supervisor_engine_transitions", "Changes of the engine's state", labels=["from", "to"]
        )
        for row, count in now["transitions"].items():
            transitions.add_metric(row.split(" -> "), count)
        yield transitions
        restarts = CounterMetricFamily(
            "supervisor_engine_restarts", "Starts of the engine after the first, by what ended the one before",
            labels=["cause"],
        )  # fmt: skip
        for cause, count in (dict.fromkeys(CAUSES, 0) | now["restarts_by_cause"]).items():
            restarts.add_metric([cause], count)
        yield restarts
        phases = GaugeMetricFamily(
            "supervisor_start_phase_seconds", "Of the engine's latest start, so far", labels=["phase"]
        )
        for row in now["phases"]:
            phases.add_metric([row["name"]], row["seconds"])
        yield phases
        for name, meaning in (
            ("requests_in_flight", "Requests that vLLM works on"),
            ("requests_waiting", "Requests that wait for their turn, or for the engine"),
        ):
            yield GaugeMetricFamily(f"supervisor_{name}", meaning, value=now[name])

    def _answers(self) -> Iterator[Any]:
        requests = CounterMetricFamily(
            "supervisor_requests", "Answers; status 499: the client did not wait for it", labels=ANSWER
        )
        first = HistogramMetricFamily(
            "supervisor_first_byte_seconds", "Until an answer's first byte, or a stream's first event", labels=ANSWER
        )
        whole = HistogramMetricFamily("supervisor_request_seconds", "Until the last byte of an answer", labels=ANSWER)
        for (route, status), series in sorted(self.counts.answers.items()):
            labels = [route, str(status)]
            requests.add_metric(labels, sum(series.first.buckets))
            first.add_metric(labels, _cumulated(BOUNDS, series.first), series.first.seconds)
            whole.add_metric(labels, _cumulated(BOUNDS, series.whole), series.whole.seconds)
        yield from (requests, first, whole)


def _cache(cache: Cache) -> Iterator[Any]:
    results = CounterMetricFamily(
        "supervisor_cache_requests", "By what became of them; shared: one generation for several", labels=["result"]
    )
    for result, count in cache.results.items():
        results.add_metric([result], count)
    yield results
    yield GaugeMetricFamily("supervisor_cache_bytes", "Of answers that are kept", cache.size)
    yield GaugeMetricFamily("supervisor_cache_answers", "That are kept", len(cache.kept))


def _jobs(jobs: Jobs) -> Iterator[Any]:
    yield GaugeMetricFamily("supervisor_jobs_running", "RunPod's jobs that are taken and not over", len(jobs.began))
    ended = CounterMetricFamily("supervisor_jobs", "RunPod's jobs that are over", labels=["outcome"])
    seconds = HistogramMetricFamily(
        "supervisor_job_seconds", "From taking a job until RunPod has its result", labels=["outcome"]
    )
    for outcome, histogram in jobs.ended.items():
        ended.add_metric([outcome], sum(histogram.buckets))
        seconds.add_metric([outcome], _cumulated(BOUNDS, histogram), histogram.seconds)
    posts = CounterMetricFamily(
        "supervisor_job_posts", "POSTs to RunPod; refused ones would be again, failed ones may be tried again",
        labels=["kind", "result"],
    )  # fmt: skip
    for labels, count in jobs.posts.items():
        posts.add_metric(labels, count)
    deaths = CounterMetricFamily("supervisor_queue_worker_deaths", "Of the process that takes RunPod's jobs")
    deaths.add_metric([], jobs.deaths)
    yield from (ended, seconds, posts, deaths)


def _cumulated(bounds: tuple[float, ...], histogram: Histogram) -> list[tuple[str, int]]:
    total, found = 0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), histogram.buckets, strict=True):
        total += count
        found.append((bound, total))
    return found
