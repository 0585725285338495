"""Tells an engine that lives from one that only looks alive. vLLM's API server answers /health, lists models,
refuses bad JSON, opens streams and sends comments into them while its EngineCore is frozen. So only what the engine
itself has made is progress: vLLM's counters of steps and tokens.

The engine hangs when requests wait for it and its counters stand still for the stall timeout. What must never look like
a hang: an idle engine, a silent WebSocket, a long prefill within the timeout, a flood of requests that the API server
refuses by itself, a saturated API server that misses a scrape, counters that start anew, a machine that slept.
"""

from __future__ import annotations

from supervisor.engine.run import Traffic

SAMPLES_PER_STALL, LONGEST_INTERVAL = 8, 2.0  # seconds: a hang is noticed this much later, at most
# A sample that comes this many intervals late shows that we were not running: the machine slept, or was stopped.
SLEEP_INTERVALS = 3.0
# After this many scrapes in a row without counters the output decides; a saturated API server misses one or two.
MAX_MISSES = 3
MAX_GAPS = 2  # this many samples in which nobody waits do not end the work: a client gave up, and asks again
LONGEST_SCRAPE = 10.0  # a scrape may take this many seconds
# Any of these moving is progress: steps made, tokens made, prompt tokens read, requests done. While a long prompt
# is read chunk by chunk, none of these moves, but the part of the KV cache that is in use does.
COUNTERS = frozenset({
    "vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:prompt_tokens_total",
    "vllm:request_success_total", "vllm:kv_cache_usage_perc",
})  # fmt: skip
_COUNTER_PREFIXES = tuple(name.encode() for name in COUNTERS)


def read_progress(metrics: bytes) -> float | None:
    """Returns the sum of vLLM's counters; None where there are none (--disable-log-stats), or they can't be read."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415  # 20 ms, once there is work

    # Only a few lines of some hundreds are parsed: the parser is thorough, and slow.
    counter_lines = b"\n".join(line for line in metrics.split(b"\n") if line.startswith(_COUNTER_PREFIXES))
    try:
        families = text_string_to_metric_families(counter_lines.decode("utf-8", "replace") + "\n")
        values = [sample.value for family in families for sample in family.samples if sample.name in COUNTERS]
    except ValueError:
        return None
    return sum(values) if values else None


class Pulse:
    """Call `is_hung(...)` after each pause of `pause` seconds. It is pure: the clock is handed in."""

    def __init__(self, stall_timeout: float, now: float) -> None:
        self.stall_timeout = stall_timeout
        self.interval = min(stall_timeout / SAMPLES_PER_STALL, LONGEST_INTERVAL)
        self.pause = self.interval
        self.scrape_patience = min(max(1.0, stall_timeout / 4), LONGEST_SCRAPE)
        self._progress_at = now
        self._waiting_since: dict[object, float] = {}  # request -> when it was first seen to wait
        self._working_since: float | None = None
        self._counters: float | None = None
        self._output: object = None
        self._misses = self._gaps = 0

    def is_hung(self, now: float, overrun: float, traffic: Traffic, counters: float | None) -> bool:
        """Tells whether the engine hangs. `overrun`: seconds that the pause was too long; `counters` None: not read."""
        has_slept = overrun > SLEEP_INTERVALS * self.interval
        # A request counts when it is seen a second time: one that the API server refuses by itself is gone by then.
        known = {} if has_slept else self._waiting_since
        self._waiting_since = {request: known.get(request, now) for request in traffic.waiting}
        known_since = [since for request, since in self._waiting_since.items() if request in known]
        self._gaps = 0 if known_since else self._gaps + 1
        if self._gaps > MAX_GAPS:
            self._working_since = None
        elif known_since and self._working_since is None:
            self._working_since = min(known_since)
        # Without counters the output is all there is: bytes of answers that no API server makes alone.
        self._misses = self._misses + 1 if counters is None and traffic.waiting else 0
        has_progressed = counters != self._counters if counters is not None else traffic.output != self._output
        self._output = traffic.output
        self._counters = self._counters if counters is None else counters
        if has_slept or has_progressed:
            self._progress_at = now
        self.pause = self.interval
        if self._working_since is None or not known_since:
            return False
        remaining = max(self._progress_at, self._working_since) + self.stall_timeout - now
        if remaining > 0:
            self.pause = min(self.interval, remaining)
        return remaining <= 0 and (self._misses == 0 or self._misses >= MAX_MISSES)
