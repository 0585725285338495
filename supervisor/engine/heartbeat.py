"""Alive, or only looking alive? vLLM's /health stays 200 while its EngineCore is frozen, so progress is what counts.

Pure: samples are handed in, with the clock's reading. The engine hangs when work is in flight and nothing moves for the
stall timeout. What must never look like a hang: an idle engine, a long prefill within the timeout, a saturated API
server that misses a scrape, counters that start anew after a restart, and a machine that slept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Samples further apart than this many intervals mean that we were not running: the machine slept, or was stopped.
SLEPT = 3.0
# So many scrapes in a row without an answer count as standing still; a saturated API server misses one or two.
MISSES = 3

# Any of these moving is progress: tokens made, prompt tokens read, requests done.
PROGRESS = re.compile(
    rb"^vllm:(?:iteration_tokens_total_count|generation_tokens_total|prompt_tokens_total|request_success_total)"
    rb"(?:\{[^}\n]*\})? (\S+)",
    re.M,
)
WORKING = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}\n]*\})? (\S+)", re.M)


@dataclass(frozen=True, slots=True)
class Scrape:
    """What vLLM's /metrics says: the sum of its progress counters, and the requests that it works on."""

    progress: float
    working: float

    @classmethod
    def parse(cls, metrics: bytes) -> Scrape:
        return cls(
            sum(float(value) for value in PROGRESS.findall(metrics)),
            sum(float(value) for value in WORKING.findall(metrics)),
        )


class Heartbeat:
    """`stalled(...)` once every `interval` seconds; True when the engine hangs."""

    def __init__(self, stall_timeout: float, interval: float) -> None:
        self.stall_timeout = stall_timeout
        self.interval = interval
        self._last_sample: float | None = None
        self._moved_at = 0.0
        self._progress: tuple[float, int] | None = None
        self._vllm_progress = 0.0
        self._misses = 0
        self._working = False

    def stalled(self, now: float, scrape: Scrape | None, relayed: int, awaited: int) -> bool:
        """One sample. `scrape` is None where vLLM did not answer; `relayed` counts the reads of vLLM's answers by the
        gateway, ever; `awaited` the requests whose next byte must come from vLLM."""
        slept = self._last_sample is None or now - self._last_sample > SLEPT * self.interval
        self._last_sample = now
        if scrape is None:
            self._misses += 1
            working = awaited > 0
        else:
            self._misses = 0
            self._vllm_progress = scrape.progress
            working = scrape.working > 0 or awaited > 0
        progress = (self._vllm_progress, relayed)
        begun = working and not self._working
        self._working = working
        if slept or not working or begun or progress != self._progress:
            self._moved_at = now
            self._progress = progress
            return False
        certain = self._misses == 0 or self._misses >= MISSES
        return certain and now - self._moved_at >= self.stall_timeout
