"""What the gateway counts, for each request and each event, and so in plain numbers; metrics.py makes text of them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervisor.gateway.record import Record

# Seconds: from a cached first token to a request that waits for a cold start, or an answer of an hour.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0, 3600.0)
# Seconds between two reads of a stream: a token of a fast engine, and what a person calls stuck.
GAP_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
# The route of what is no route, or was refused before anybody looked. Routes are the prefixes of routes.toml, and so
# are few.
OTHER = "other"


class Histogram:
    """Observations by upper bound, and their sum."""

    __slots__ = ("buckets", "seconds")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.buckets = [0] * (len(bounds) + 1)
        self.seconds = 0.0

    def add(self, other: Histogram) -> None:
        self.buckets = [mine + theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True)]
        self.seconds += other.seconds


class Series:
    """Answers of one route with one status: until their first byte, and until their last."""

    __slots__ = ("first", "whole")

    def __init__(self) -> None:
        self.first = Histogram(BOUNDS)
        self.whole = Histogram(BOUNDS)


# How a job ends. `lost`: with its worker, which died; `undelivered`: RunPod did not take the result.
OUTCOMES = ("completed", "failed", "cancelled", "undelivered", "lost")


class Jobs:
    """RunPod's, as the queue worker reports them."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}  # by id: those that are not over
        self.ended = {outcome: Histogram(BOUNDS) for outcome in OUTCOMES}
        # (what, what became of it): each try to give RunPod a chunk or a result.
        self.posts = {(what, end): 0 for what in ("chunk", "result") for end in ("taken", "refused", "failed")}
        self.deaths = 0

    def report(self, job: Mapping[str, Any]) -> None:
        """`{"id", "outcome": "taken"}`, then `{"id", "outcome", "seconds", "posts": {"chunk taken": n}}`."""
        if job["outcome"] == "taken":
            self.began[job["id"]] = time.monotonic()
            return
        self.began.pop(job["id"], None)
        self._end(job["outcome"], job["seconds"])
        for name, count in job["posts"].items():
            what, end = name.split()
            self.posts[what, end] += count

    def worker_died(self) -> None:
        self.deaths += 1
        for began in self.began.values():
            self._end("lost", time.monotonic() - began)
        self.began.clear()

    def _end(self, outcome: str, seconds: float) -> None:
        ended = self.ended[outcome]
        ended.buckets[bisect_left(BOUNDS, seconds)] += 1
        ended.seconds += seconds


class Counts:
    """Of all requests that are over; of a stream, the time between its reads as well."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], Series] = {}
        self.gaps = Histogram(GAP_BOUNDS)
        self.received = 0  # bytes of requests' bodies
        self.sent = 0  # bytes of answers' bodies
        self.aborted = 0  # by clients, in the midst of their answers
        self.held = 0
        self.replayed = 0
        self.jobs: Jobs | None = None  # where the queue is served

    def ended(self, record: Record) -> None:
        """One request is over. A watcher of the gateway's doors."""
        key = record.request.verdict.route, record.status  # type: ignore[union-attr]  # it was judged
        series = self.answers.get(key)
        if series is None:
            series = self.answers[key] = Series()
        whole = first = record.over_at - record.began
        at = since = bisect_left(BOUNDS, whole)
        if 0 < record.first_at != record.over_at:
            first = record.first_at - record.began
            since = bisect_left(BOUNDS, first)
        series.first.buckets[since] += 1
        series.first.seconds += first
        series.whole.buckets[at] += 1
        series.whole.seconds += whole
        self.aborted += record.gone and record.first_at > 0

    def gap(self, seconds: float) -> None:
        """Between two reads of a stream; several events may have come with one."""
        gaps = self.gaps
        gaps.buckets[bisect_left(GAP_BOUNDS, seconds)] += 1
        gaps.seconds += seconds

    # In all, for the status page

    @property
    def statuses(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for (_, status), series in self.answers.items():
            found[status] = found.get(status, 0) + sum(series.first.buckets)
        return found

    @property
    def buckets(self) -> list[int]:
        """Until the first byte, by BOUNDS."""
        total = Histogram(BOUNDS)
        for series in self.answers.values():
            total.add(series.first)
        return total.buckets
