"""The phases of a start, recognised in vLLM's log and timed: what it is doing while nobody can use it."""

from __future__ import annotations

import re
import time

# A line that matches means that the phase begins. Only forwards: several ranks log the same lines.
# Wordings of vLLM 0.24 to 0.32; the fake engine logs the same.
ROWS = {
    # Ours (weights/download.py), where the weights come from the hub.
    "asking the hub": "(?!)",
    "fetching weights": r"^weights: Downloading",
    # vLLM's. From the spawn on, or from the end of the download: 8 s and more of silence.
    "importing vLLM": r"^weights: vLLM is started",
    "reading the model's config": r"non-default args",
    # The config is read; EngineCore is spawned, imports vLLM anew (8 s), and only then has a line of its own.
    "starting the engine core": (
        r"Using max model len|Initializing a V1 LLM engine|Waiting for \d+ local, \d+ remote core"
    ),
    # Of several machines; on one, ranks meet by a file, or at its loopback address.
    "waiting for the other ranks": (
        r"world_size=(?!1 )\d+ .{0,200}?distributed_init_method=tcp://(?!127\.0\.0\.1:)|"
        r"Launching \d+ data parallel engine|Launching vLLM .{0,200}? headless"
    ),
    "downloading weights": r"^(?!weights: ).*Downloading weights|Fetching \d+ files|Downloading shards",
    "loading weights": (
        r"Starting to load (the )?model|Loading model from scratch|Loading model weights|Loading safetensors checkpoint"
    ),
    # From the weights' end on: Dynamo's own lines come when it is done.
    "compiling": r"Model loading took|Using cache directory.{0,300}?compile|Dynamo bytecode transform|Start compiling",
    "profiling memory": r"torch\.compile (takes|took)|Initial profiling|CPU KV cache size|Available KV cache",
    "warming up kernels": r"GPU KV cache size|Warming up model",
    # Told when it is over, as a progress bar's line is. What is captured before the KV cache is only measured (0.32).
    "capturing graphs": r"Graph capturing finished in (\d+) sec",
    "last warm-ups": r"Graph capturing finished",  # in 0.24 those of the kernels
    "starting the API server": r"init engine|Started server process|Supported tasks|Starting vLLM (API )?server",
    "waiting for the other engines": r"Waiting for READY message from DP Coordinator",
    "warming up": "(?!)",  # ours: a first request, where one is asked for
}
PHASES = tuple((name, re.compile(pattern)) for name, pattern in ROWS.items())
IMPORTING, COMPILING, CAPTURING = map([*ROWS].index, ("importing vLLM", "compiling", "capturing graphs"))
# With ENFORCE_EAGER nothing is compiled: what would begin it begins the next.
EAGER = re.compile(r"'enforce_eager': True|Enforce eager set")
# No pattern matches a line that has none of these. All patterns take 75 us for a line of 900 characters, these 11: at
# some thousand lines a second of a start the event loop had time for nothing else.
SIGNS = (
    "weights: ", "non-default args", "Using max model len", "Initializing a V1 LLM engine", "Waiting for ",
    "world_size=", "Launching ", "Downloading ", "Fetching ", "Starting to load ", "Loading ", "Model loading took",
    "Using cache directory", "Dynamo bytecode transform", "Start compiling", "torch.compile t", "Initial profiling",
    "KV cache", "Warming up model", "Graph capturing finished", "init engine", "Started server process",
    "Supported tasks", "Starting vLLM ", "enforce_eager", "Enforce eager",
)  # fmt: skip
# How far a download is.
PROGRESS = re.compile(r"^weights: Downloading weights: (\S+ \S+ of .*)")


class Waterfall:
    """`hear(line)` for each log line; `current` and `as_rows()` at any time. Times from `start`, monotonic seconds."""

    def __init__(self, start: float, *, fetches: bool = False) -> None:
        """`fetches`: vLLM comes after a download."""
        self.start = start
        self.begun: list[tuple[int, float]] = [(0 if fetches else IMPORTING, start)]
        self.progress = ""
        self.eager = False
        self.finished: float | None = None

    @property
    def current(self) -> str:
        return PHASES[self.begun[-1][0]][0]

    @property
    def fetching(self) -> bool:
        """Whether the weights still come."""
        return self.begun[-1][0] < IMPORTING

    @property
    def detail(self) -> str:
        """The phase, and how far it is, where that is known."""
        return f"{self.current} ({self.progress})" if self.progress else self.current

    def hear(self, line: str) -> str | None:
        """The phase that this line begins, if any."""
        if self.finished is not None or not any(sign in line for sign in SIGNS):
            return None
        if self.fetching and (told := PROGRESS.search(line)):
            self.progress = told[1]
        self.eager = self.eager or EAGER.search(line) is not None
        at, now = self.begun[-1][0], time.monotonic()
        if captured := PHASES[CAPTURING][1].search(line):
            if at != CAPTURING - 1:
                return None
            self.begun.append((CAPTURING, max(self.begun[-1][1], now - int(captured[1]))))
        following = [n for n in range(at + 1, len(PHASES)) if PHASES[n][1].search(line)]
        if not following:
            return None
        begins = following[-1] + (self.eager and following[-1] == COMPILING)
        self.begun.append((begins, now))
        self.progress = self.progress if begins < IMPORTING else ""
        return self.current

    def warm_up(self) -> None:
        self.begun.append((len(PHASES) - 1, time.monotonic()))

    def finish(self) -> float:
        """The engine is ready; returns the seconds since the spawn."""
        self.finished = time.monotonic()
        return self.finished - self.start

    def as_rows(self) -> list[dict[str, object]]:
        begun = list(self.begun)  # a terminal's thread may ask
        ends = [at for _, at in begun[1:]] + [self.finished or time.monotonic()]
        return [
            {"name": PHASES[number][0], "seconds": round(end - at, 3)}
            for (number, at), end in zip(begun, ends, strict=True)
        ]
