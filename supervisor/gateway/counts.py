"""What the gateway counts, for each request, and so in plain numbers; metrics.py makes text of them."""

from __future__ import annotations

from bisect import bisect_left

# Seconds: from a cached first token to a request that waits for a cold start.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# What nginx calls an answer that nobody waited for.
CLIENT_GONE = 499


class Counts:
    """Answers by status, and the time until their first byte."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def answered(self, status: int, seconds: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds
