"""Alive, or only looking alive? vLLM's API server answers /health, lists models, refuses bad JSON, opens streams and
sends comments into them while its EngineCore is frozen. So only what the engine itself has made is progress: vLLM's
counters of steps and tokens.

The engine hangs when requests wait for it and its counters stand still for the stall timeout. What must never look like
a hang: an idle engine, a silent WebSocket, a long prefill within the timeout, a flood of requests that the API server
refuses by itself, a saturated API server that misses a scrape, counters that start anew, a machine that slept.
"""

from __future__ import annotations

from supervisor.engine.run import Traffic

SAMPLES_PER_STALL, LONGEST_INTERVAL = 8, 2.0  # seconds: a hang is noticed so much later, at most
# A sample that comes so many intervals late: we were not running. The machine slept, or was stopped.
SLEPT = 3.0
# So many scrapes in a row without counters, and others' signs are looked at; a saturated API server misses one or two.
MISSES = 3
# So many samples without anybody who waits are no end of the work: a client gave up, and asks again.
GAPS = 2
# Seconds that a scrape may take.
LONGEST_SCRAPE = 10.0
# Any of these moving is progress: steps made, tokens made, prompt tokens read, requests done; and in a long prompt that
# is read chunk by chunk, which none of them tells of, the part of the KV cache that is in use.
COUNTERS = frozenset({
    "vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:prompt_tokens_total",
    "vllm:request_success_total", "vllm:kv_cache_usage_perc",
})  # fmt: skip
_LINES = tuple(name.encode() for name in COUNTERS)


def progress(metrics: bytes) -> float | None:
    """The sum of what tells of vLLM's progress; None where there is none (--disable-log-stats), or it can't be read."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415  # 20 ms, once there is work

    # A few lines of some hundreds: the parser is thorough, and slow.
    wanted = b"\n".join(line for line in metrics.split(b"\n") if line.startswith(_LINES))
    try:
        families = text_string_to_metric_families(wanted.decode("utf-8", "replace") + "\n")
        values = [sample.value for family in families for sample in family.samples if sample.name in COUNTERS]
    except ValueError:
        return None
    return sum(values) if values else None


class Pulse:
    """`hangs(...)` after each pause of `pause` seconds; True when the engine does. Pure: the clock is handed in."""

    def __init__(self, stall_timeout: float, now: float) -> None:
        self.stall_timeout = stall_timeout
        self.interval = min(stall_timeout / SAMPLES_PER_STALL, LONGEST_INTERVAL)
        self.pause = self.interval
        self.scrape_patience = min(max(1.0, stall_timeout / 4), LONGEST_SCRAPE)
        self._moved_at = now
        self._waits: dict[object, float] = {}  # who waits -> since which sample
        self._working_since: float | None = None
        self._counters: float | None = None
        self._signs: object = None
        self._misses = self._gaps = 0

    def hangs(self, now: float, late: float, traffic: Traffic, counters: float | None) -> bool:
        """`late`: by how many seconds the pause before was longer than asked; `counters` None: not read."""
        slept = late > SLEPT * self.interval
        # A request counts when it is seen a second time: one that the API server refuses by itself is gone by then.
        before = {} if slept else self._waits
        self._waits = {who: before.get(who, now) for who in traffic.waiting}
        old = [since for who, since in self._waits.items() if who in before]
        self._gaps = 0 if old else self._gaps + 1
        if self._gaps > GAPS:
            self._working_since = None
        elif old and self._working_since is None:
            self._working_since = min(old)
        # Without counters the signs are all there is: bytes of answers that no API server makes alone.
        self._misses = self._misses + 1 if counters is None and traffic.waiting else 0
        moved = counters != self._counters if counters is not None else traffic.signs != self._signs
        self._signs = traffic.signs
        self._counters = self._counters if counters is None else counters
        if slept or moved:
            self._moved_at = now
        self.pause = self.interval
        if self._working_since is None or not old:
            return False
        left = max(self._moved_at, self._working_since) + self.stall_timeout - now
        if left > 0:
            self.pause = min(self.interval, left)
        return left <= 0 and (self._misses == 0 or self._misses >= MISSES)
