"""The gateway counts here, for each request and each event, and so in plain numbers; metrics.py makes text of them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervisor.gateway.record import Record

# These bounds are seconds, from a cached first token to a request that waits for a cold start, or an answer of an hour.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0, 3600.0)
# These are seconds between two reads of a stream, from a token of a fast engine to what a person calls stuck.
GAP_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
# A request has this route if its path is no route, or if it was refused before anybody looked. Routes are the prefixes
# of routes.toml, and so are few.
OTHER = "other"
# A job ends in one of these ways. `lost`: its worker died; `undelivered`: RunPod did not take the result.
OUTCOMES = ("completed", "failed", "cancelled", "undelivered", "lost")


class Histogram:
    """Counts observations by their upper bound, and sums them."""

    __slots__ = ("bounds", "buckets", "seconds")

    def __init__(self, bounds: tuple[float, ...] = BOUNDS) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        self.buckets[bisect_left(self.bounds, seconds)] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        return sum(self.buckets)


@dataclass(slots=True)
class Series:
    """Measures answers of one route with one status: the seconds until their first byte, and until their last."""

    first_byte: Histogram = field(default_factory=Histogram)
    last_byte: Histogram = field(default_factory=Histogram)


class Jobs:
    """Counts RunPod's jobs, as the queue worker reports them."""

    def __init__(self) -> None:
        self.began_at: dict[str, float] = {}  # monotonic times by job id: when those that are not over were taken
        self.ended = {outcome: Histogram() for outcome in OUTCOMES}
        # Each try to give RunPod a chunk or a result is counted by what it was, and by what became of it.
        self.posts = Counter(
            {f"{what} {end}": 0 for what in ("chunk", "result") for end in ("taken", "refused", "failed")}
        )
        self.deaths = 0  # how often the worker died

    def report(self, job: Mapping[str, Any]) -> None:
        """Takes `{"id", "outcome": "taken"}`, then `{"id", "outcome", "seconds", "posts": {"chunk taken": n}}`."""
        if job["outcome"] == "taken":
            self.began_at[job["id"]] = time.monotonic()
            return
        self.began_at.pop(job["id"], None)
        self.ended[job["outcome"]].observe(job["seconds"])
        self.posts.update(job["posts"])

    def worker_died(self) -> None:
        self.deaths += 1
        for began in self.began_at.values():
            self.ended["lost"].observe(time.monotonic() - began)
        self.began_at.clear()


class Counts:
    """Counts all requests that are over, and measures the time between two reads of a stream."""

    def __init__(self) -> None:
        self.answers: defaultdict[tuple[str, int], Series] = defaultdict(Series)  # by route and status
        self.gaps = Histogram(GAP_BOUNDS)
        self.observe_gap = self.gaps.observe  # gets the seconds between reads of a stream; one may have several events
        self.received = 0  # bytes of requests' bodies
        self.sent = 0  # bytes of answers' bodies
        self.aborted = 0  # answers whose client left in the midst of them
        self.held = 0  # how often a request began to wait for the engine
        self.replayed = 0  # requests that were sent again because the engine died
        self.jobs: Jobs | None = None  # there are some where the queue is served

    def request_ended(self, record: Record) -> None:
        """Counts a request that is over: both doors call it with each one, as their first watcher."""
        series = self.answers[record.request.verdict.route, record.status]  # type: ignore[union-attr]  # it was judged
        began, first_at = record.began, record.first_at
        seconds = record.over_at - began
        at = bisect_left(BOUNDS, seconds)
        whole, first = series.last_byte, series.first_byte
        whole.buckets[at] += 1
        whole.seconds += seconds
        if 0 < first_at != record.over_at:
            first.observe(first_at - began)
        else:  # both are the same, or there was none: one place for both
            first.buckets[at] += 1
            first.seconds += seconds
        self.aborted += record.client_left and first_at > 0

    # What the status page shows, over all routes

    @property
    def statuses(self) -> Mapping[int, int]:
        found: Counter[int] = Counter()
        for (_, status), series in self.answers.items():
            found[status] += series.first_byte.count
        return found

    @property
    def buckets(self) -> list[int]:
        """Returns the number of answers by the time until their first byte, in the buckets of BOUNDS."""
        every = [[0] * (len(BOUNDS) + 1), *(series.first_byte.buckets for series in self.answers.values())]
        return list(map(sum, zip(*every, strict=True)))
