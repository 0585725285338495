"""Recognises the phases of a start in vLLM's log and times them: what it is doing while nobody can use it."""

from __future__ import annotations

import re
import time

# A line that matches means that the phase begins. No phase comes back: several ranks log the same lines.
# The wordings are those of vLLM 0.24 to 0.32; the fake engine logs the same.
PHASE_PATTERNS = {
    # These are ours (weights/download.py), where the weights come from the hub.
    "asking the hub": "(?!)",
    "fetching weights": r"^weights: Downloading",
    # The next are vLLM's. This lasts from the spawn, or from the end of the download: 8 s and more of silence.
    "importing vLLM": r"^weights: vLLM is started",
    "reading the model's config": r"non-default args",
    # The config is read; EngineCore is spawned, imports vLLM anew (8 s), and only then has a line of its own.
    "starting the engine core": (
        r"Using max model len|Initializing a V1 LLM engine|Waiting for \d+ local, \d+ remote core"
    ),
    # This is for several machines; on one, ranks meet by a file, or at its loopback address.
    "waiting for the other ranks": (
        r"world_size=(?!1 )\d+ .{0,200}?distributed_init_method=tcp://(?!127\.0\.0\.1:)|"
        r"Launching \d+ data parallel engine|Launching vLLM .{0,200}? headless"
    ),
    "downloading weights": r"^(?!weights: ).*Downloading weights|Fetching \d+ files|Downloading shards",
    "loading weights": (
        r"Starting to load (the )?model|Loading model from scratch|Loading model weights|Loading safetensors checkpoint"
    ),
    # It begins where the weights end: Dynamo's own lines come when it is done.
    "compiling": r"Model loading took|Using cache directory.{0,300}?compile|Dynamo bytecode transform|Start compiling",
    "profiling memory": r"torch\.compile (takes|took)|Initial profiling|CPU KV cache size|Available KV cache",
    "warming up kernels": r"GPU KV cache size|Warming up model",
    # Its line comes at its end, as a progress bar's does. What is captured before the KV cache is only measured (0.32).
    "capturing graphs": r"Graph capturing finished in (\d+) sec",
    "last warm-ups": r"Graph capturing finished",  # in 0.24 they are those of the kernels
    "starting the API server": r"init engine|Started server process|Supported tasks|Starting vLLM (API )?server",
    "waiting for the other engines": r"Waiting for READY message from DP Coordinator",
    "warming up": "(?!)",  # ours: a first request, where one is asked for
}
PHASES = tuple((name, re.compile(pattern)) for name, pattern in PHASE_PATTERNS.items())
IMPORTING, COMPILING, CAPTURING = map([*PHASE_PATTERNS].index, ("importing vLLM", "compiling", "capturing graphs"))
# With ENFORCE_EAGER nothing is compiled: the line that would begin that phase begins the next one.
EAGER_LINE = re.compile(r"'enforce_eager': True|Enforce eager set")
# No pattern matches a line that has none of these. All patterns take 75 us for a line of 900 characters, these 11: at
# some thousand lines a second of a start the event loop had time for nothing else.
MARKERS = (
    "weights: ", "non-default args", "Using max model len", "Initializing a V1 LLM engine", "Waiting for ",
    "world_size=", "Launching ", "Downloading ", "Fetching ", "Starting to load ", "Loading ", "Model loading took",
    "Using cache directory", "Dynamo bytecode transform", "Start compiling", "torch.compile t", "Initial profiling",
    "KV cache", "Warming up model", "Graph capturing finished", "init engine", "Started server process",
    "Supported tasks", "Starting vLLM ", "enforce_eager", "Enforce eager",
)  # fmt: skip
PROGRESS_LINE = re.compile(r"^weights: Downloading weights: (\S+ \S+ of .*)")  # this line says how far a download is


class Waterfall:
    """`hear` takes each log line; `current_phase` and `as_rows` answer at any time. Times are in monotonic seconds."""

    def __init__(self, started_at: float, *, fetches: bool = False) -> None:
        """`started_at` is when the times begin; `fetches` says that vLLM comes after a download."""
        self.started_at = started_at
        self.phase_starts: list[tuple[int, float]] = [(0 if fetches else IMPORTING, started_at)]
        self.progress = ""
        self.is_eager = False
        self.finished_at: float | None = None

    @property
    def current_phase(self) -> str:
        return PHASES[self.phase_starts[-1][0]][0]

    @property
    def fetching(self) -> bool:
        """Tells whether the weights still come."""
        return self.phase_starts[-1][0] < IMPORTING

    @property
    def detail(self) -> str:
        """Returns the phase, and how far it is, where that is known."""
        return f"{self.current_phase} ({self.progress})" if self.progress else self.current_phase

    def hear(self, line: str) -> str | None:
        """Returns the phase that this line begins, if any."""
        if self.finished_at is not None or not any(marker in line for marker in MARKERS):
            return None
        if self.fetching and (match := PROGRESS_LINE.search(line)):
            self.progress = match[1]
        self.is_eager = self.is_eager or EAGER_LINE.search(line) is not None
        position, now = self.phase_starts[-1][0], time.monotonic()
        if capture := PHASES[CAPTURING][1].search(line):
            if position != CAPTURING - 1:
                return None
            self.phase_starts.append((CAPTURING, max(self.phase_starts[-1][1], now - int(capture[1]))))
        candidates = [n for n in range(position + 1, len(PHASES)) if PHASES[n][1].search(line)]
        if not candidates:
            return None
        index = candidates[-1] + (self.is_eager and candidates[-1] == COMPILING)
        self.phase_starts.append((index, now))
        self.progress = self.progress if index < IMPORTING else ""
        return self.current_phase

    def warm_up(self) -> None:
        self.phase_starts.append((len(PHASES) - 1, time.monotonic()))

    def finish(self) -> float:
        """Notes that the engine is ready, and returns the seconds since the spawn."""
        self.finished_at = time.monotonic()
        return self.finished_at - self.started_at

    def as_rows(self) -> list[dict[str, object]]:
        starts = list(self.phase_starts)  # a terminal's thread may ask meanwhile
        ends = [start for _, start in starts[1:]] + [self.finished_at or time.monotonic()]
        return [
            {"name": PHASES[index][0], "seconds": round(end - start, 3)}
            for (index, start), end in zip(starts, ends, strict=True)
        ]
