"""Who may go to the engine now, who waits, and who is next.

Requests that arrive while the engine loads are held, in order, up to the hold timeout; those above the limit wait their
turn. The gate sees the engine only through `Engine`, and a request only through `PendingRequest`.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, Protocol

from supervisor.gateway.ask import ask
from supervisor.gateway.counts import Counts
from supervisor.gateway.errors import Refusal
from supervisor.gateway.upstream import Upstream

# The death of the engine is known within 0.1 s; whoever lost an answer waits this long, in seconds, to learn of it.
FATE_KNOWN_AFTER = 0.25
# How often an engine that is not well, and does not die, is asked; then it is believed.
QUESTIONS = 20
# Seconds for it to answer.
PATIENCE = 5.0
# What a client is told to wait, in seconds, before it asks again: it is held again then, and so misses nothing.
RETRY_AFTER = 5


class Engine(Protocol):
    """What the gate may know of the engine."""

    @property
    def ready(self) -> bool: ...

    @property
    def over(self) -> bool:
        """Draining, stopped or failed: no request that arrives now can be answered."""

    @property
    def draining(self) -> bool:
        """The engine still answers what was there before the signal came."""

    @property
    def state(self) -> str:
        """In a word, for a client: `starting`, `restarting`, `ready`, ..."""

    @property
    def explanation(self) -> str:
        """Why it is not ready, in a sentence for a client: the phase while it loads, the cause when it failed."""


class PendingRequest(Protocol):
    """A request that has no answer yet."""

    admitted: bool  # the gate's own note: it counts among those that run
    generation: int  # of the engine that had it last

    @property
    def is_limited(self) -> bool:
        """It counts among those that may run at once; jobs do not."""

    def go(self) -> None:
        """The engine may have it."""

    def refuse(self, refusal: Refusal) -> None: ...

    def mark(self, what: str) -> None:
        """`held` for the engine, or `waiting` for its turn, from now on."""

    def engine_judged(self, *, alive: bool) -> None:
        """Of the engine that had it: the answer to `ask`."""


class Admission(NamedTuple):
    """How many requests may run at once (None: as many as come), and how many more may wait. `hold`: how long, in
    seconds, for their turn or for the engine."""

    limit: int | None
    queue_limit: int
    hold: float


class Gate:
    """`admit`, then `leave`, for each; `changed` when the engine did."""

    def __init__(self, engine: Engine, upstream: Upstream, admission: Admission, counts: Counts) -> None:
        self.engine = engine
        self.upstream = upstream
        self.loop = upstream.loop
        self.admission = admission
        self.counts = counts
        self.active = 0  # admitted, and not over
        self.open = False  # requests go to vLLM as they come
        self.closing = False  # every answer closes its connection
        self.generation = 0  # of the engine: one more each time it stops being ready
        self.held: dict[PendingRequest, asyncio.TimerHandle] = {}
        self.queued: dict[PendingRequest, asyncio.TimerHandle] = {}  # first come, first served
        self.questions: dict[PendingRequest, asyncio.Task[None]] = {}  # whether the engine lives

    def __contains__(self, request: PendingRequest) -> bool:
        """Whether it waits here."""
        return request in self.held or request in self.queued

    @property
    def backlog(self) -> int:
        return len(self.held) + len(self.queued)

    def find_refusal(self, *, limited: bool = True) -> Refusal | None:
        """Why no request can be taken at all. A job that RunPod has given us is done even while we drain."""
        if self.open or not self.engine.over or (self.engine.draining and not limited):
            return None
        return self.unavailable_refusal()

    def unavailable_refusal(self) -> Refusal:
        return Refusal(503, self.engine.explanation, "engine_unavailable", RETRY_AFTER)

    def admit(self, request: PendingRequest) -> None:
        """It goes on, or waits its turn behind those that came before."""
        limit = self.admission.limit
        if limit is None or self.active < limit or not request.is_limited:
            self.active += 1
            request.admitted = True
            if self.open or self.engine.draining:
                request.go()
            else:
                self.hold(request)
        elif len(self.queued) < self.admission.queue_limit:
            self.queued[request] = self.loop.call_later(self.admission.hold, self._refuse_queued, request)
            request.mark("waiting")
        else:
            request.refuse(self._busy_refusal("the server is busy.", 429))

    def hold(self, request: PendingRequest) -> None:
        """Keeps it until the engine is ready."""
        self.counts.held += 1
        request.mark("held")
        self.held[request] = self.loop.call_later(self.admission.hold, self._refuse_held, request)

    def resume(self, request: PendingRequest) -> None:
        """Its engine is gone: it is for the next one, when that is ready."""
        if self.engine.over:
            request.refuse(self.unavailable_refusal())
        elif self.open:
            request.go()
        else:
            self.hold(request)

    def leave(self, request: PendingRequest) -> None:
        """It is over, or waits for nothing any more. To leave twice is to leave."""
        if self.held or self.queued or self.questions:
            self.forget(request)
        if not request.admitted:
            return
        request.admitted = False
        self.active -= 1
        while self.queued and self.active < (self.admission.limit or 0):
            following = next(iter(self.queued))
            self.queued.pop(following).cancel()
            self.admit(following)

    def forget(self, request: PendingRequest) -> None:
        """It no longer waits here."""
        timer = self.held.pop(request, None) or self.queued.pop(request, None) or self.questions.pop(request, None)
        if timer is not None:
            timer.cancel()
        if (task := self.questions.pop(request, None)) is not None:  # who is held may ask as well
            task.cancel()

    def _refuse_held(self, request: PendingRequest) -> None:
        text = f"{self.engine.explanation} The request waited {self.admission.hold:g} s (SUPERVISOR_HOLD_TIMEOUT)."
        request.refuse(Refusal(503, text, "engine_unavailable", RETRY_AFTER))

    def _refuse_queued(self, request: PendingRequest) -> None:
        settings = "SUPERVISOR_MAX_CONCURRENCY, SUPERVISOR_HOLD_TIMEOUT"
        request.refuse(self._busy_refusal(f"its turn did not come in {self.admission.hold:g} s ({settings}).", 503))

    def _busy_refusal(self, text: str, status: int) -> Refusal:
        text = f"{self.active} requests are running and {len(self.queued)} are waiting: {text}"
        return Refusal(status, text, "too_many_requests" if status == 429 else "server_busy", RETRY_AFTER)

    # The engine's fate

    def engine_changed(self) -> None:
        """Called after each transition of the engine."""
        if self.open and not self.engine.ready:
            self.generation += 1
        self.open = self.engine.ready
        if self.open:
            for request in list(self.held):
                if request in self.held:
                    self.forget(request)
                    request.go()
        elif self.engine.over:
            self.closing = True
            queued, self.queued = self.queued, {}  # first, or each that leaves would let the next one in
            for timer in queued.values():
                timer.cancel()
            for request in [*self.held, *queued]:
                if request.is_limited or not self.engine.draining:
                    request.refuse(self.unavailable_refusal())
        if not self.open:
            for request in list(self.questions):
                if request.generation != self.generation and (task := self.questions.pop(request, None)) is not None:
                    task.cancel()
                    request.engine_judged(alive=False)

    def ask(self, request: PendingRequest) -> None:
        """Calls its `fate`: of an engine that dies it is known in a moment, on a busy machine in some moments more. So
        it is asked, and one that does not answer is asked again."""
        if request not in self.questions:
            self.questions[request] = self.loop.create_task(self._ask_engine(request))

    async def _ask_engine(self, request: PendingRequest) -> None:
        for _ in range(QUESTIONS):
            await asyncio.sleep(FATE_KNOWN_AFTER)
            if request.generation != self.generation:
                break
            answer = await ask(self.upstream, "/health", patience=PATIENCE)
            if answer is not None and answer[0] == 200:
                break
        self.questions.pop(request, None)
        request.engine_judged(alive=request.generation == self.generation)
