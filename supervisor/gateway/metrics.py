"""What the gateway counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

from supervisor.gateway.counts import BOUNDS, Counts

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """A collector of prometheus_client. `look` gives what is true now: state, restarts, in flight, waiting."""

    def __init__(self, counts: Counts, facts: Mapping[str, object], look: Any) -> None:
        self.counts = counts
        self.facts = facts
        self.look = look
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        now = self.look()
        info = InfoMetricFamily("supervisor", "What is served")
        info.add_metric([], {name: str(self.facts.get(name, "")) for name in ("model", "mode", "vllm_version")})
        yield info
        state = GaugeMetricFamily("supervisor_engine_state", "1 for the state that the engine is in", labels=["state"])
        state.add_metric([str(now["state"])], 1)
        yield state
        for name, meaning in (
            ("requests_in_flight", "Requests that vLLM works on"),
            ("requests_waiting", "Requests that wait for their turn, or for the engine"),
        ):
            yield GaugeMetricFamily(f"supervisor_{name}", meaning, value=now[name])
        yield CounterMetricFamily(
            "supervisor_engine_restarts", "Starts of the engine after the first", value=now["restarts"]
        )
        requests = CounterMetricFamily(
            "supervisor_requests", "Answers by status; 499: the client did not wait for it", labels=["status"]
        )
        for status, count in sorted(self.counts.statuses.items()):
            requests.add_metric([str(status)], count)
        yield requests
        total, buckets = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts.buckets, strict=True):
            total += count
            buckets.append((bound, total))
        first = HistogramMetricFamily("supervisor_first_byte_seconds", "Until the first byte of an answer")
        first.add_metric([], buckets, self.counts.seconds)
        yield first
