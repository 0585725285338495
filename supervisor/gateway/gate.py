"""The gate decides which requests may go to the engine now, which ones wait, and which one is next.

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

# The death of the engine is known within 0.1 s; a request that lost its answer waits so many seconds to learn of it.
FATE_KNOWN_AFTER = 0.25
QUESTIONS = 20  # an engine that neither answers well nor dies is asked so many times; then it is taken for alive
PATIENCE = 5.0  # the engine has so many seconds for each answer
# A client is told to wait so many seconds before it asks again: it is held again then, and so misses nothing.
RETRY_AFTER = 5


class Engine(Protocol):
    """The gate and its requests read this of the engine, on the loop, at any moment. It tells what is so just then."""

    @property
    def ready(self) -> bool: ...  # whether vLLM answers, so that requests may go to it

    @property
    def is_closed(self) -> bool:
        """Tells whether it drains, stops, has stopped or failed: no request that arrives now can be answered."""

    @property
    def draining(self) -> bool:
        """Tells whether it still answers what was there before the signal came; `over` is true meanwhile."""

    @property
    def state(self) -> str:
        """Returns its state in a word, which clients are told: `starting`, `restarting`, `ready`, ..."""

    @property
    def explanation(self) -> str:
        """Returns why it is not ready, as a sentence for clients: the phase while it loads, the cause if it failed."""


class PendingRequest(Protocol):
    """A request that has no answer yet, as the gate knows it. Its methods are called on the loop."""

    admitted: bool  # the gate's own note, False at first: the request counts among those that run
    generation: int  # the request copies the gate's when it is sent: it says which engine had it last

    @property
    def is_limited(self) -> bool:
        """Tells the gate whether the limit holds for it, and whether a drain refuses it; neither is so for jobs."""

    def go(self) -> None:
        """Sends the request: the gate calls this when the engine may have it, at once or after a wait."""

    def refuse(self, refusal: Refusal) -> None: ...  # called when it can't go: it tells its client, and leaves the gate

    def mark(self, what: str) -> None:
        """Notes that a wait begins: the gate calls it with `held` (for the engine) or `waiting` (for its turn)."""

    def engine_judged(self, *, alive: bool) -> None:
        """Decides what becomes of it. The gate calls this after its `ask`: whether the engine that had it lives."""


class Admission(NamedTuple):
    """Says how many requests may run at once (None: as many as come), and how many more may wait. `hold` is how many
    seconds they may wait, for their turn or for the engine."""

    limit: int | None
    queue_limit: int
    hold: float


class Gate:
    """Each request calls `admit`, and `leave` in the end; the supervisor calls `engine_changed` when the engine did."""

    def __init__(self, engine: Engine, upstream: Upstream, admission: Admission, counts: Counts) -> None:
        self.engine = engine
        self.upstream = upstream
        self.loop = upstream.loop
        self.admission = admission
        self.counts = counts
        self.active = 0  # how many requests are admitted, and not over
        self.open = False  # whether requests go to vLLM as they come
        self.closing = False  # whether every answer closes its client's connection, because the engine is over
        self.lives = False  # whether the engine is ready, or was and drains
        self.generation = 0  # the engine's: one more each time that it stops living
        self.held: dict[PendingRequest, asyncio.TimerHandle] = {}  # requests that wait for the engine
        self.queued: dict[PendingRequest, asyncio.TimerHandle] = {}  # requests in a queue: first come, first served
        self.questions: dict[PendingRequest, asyncio.Task[None]] = {}  # requests that ask whether their engine lives

    def __contains__(self, request: PendingRequest) -> bool:
        """Tells whether the request waits here, for the engine or for its turn."""
        return request in self.held or request in self.queued

    def find_refusal(self, *, limited: bool = True) -> Refusal | None:
        """Returns why no request can be taken at all, or None. A job that RunPod gave us is done even in a drain."""
        if self.open or not self.engine.is_closed or (self.engine.draining and not limited):
            return None
        return self.unavailable_refusal()

    def unavailable_refusal(self) -> Refusal:
        return Refusal(503, self.engine.explanation, "engine_unavailable", RETRY_AFTER)

    def admit(self, request: PendingRequest) -> None:
        """Lets the request go on, or has it wait behind those that came before; refuses it if too many wait."""
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
        """Keeps the request until the engine is ready, or its time is over."""
        self.counts.held += 1
        request.mark("held")
        self.held[request] = self.loop.call_later(self.admission.hold, self._refuse_held, request)

    def resume(self, request: PendingRequest) -> None:
        """Gives a request whose engine is gone to the next engine, when that is ready; refuses it if none will come."""
        if self.engine.is_closed:
            request.refuse(self.unavailable_refusal())
        elif self.open:
            request.go()
        else:
            self.hold(request)

    def leave(self, request: PendingRequest) -> None:
        """Forgets a request that is over or waits no more, and lets the next ones in. A second call changes nothing."""
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
        """Ends the request's waiting here, and its question; it stays admitted."""
        timer = self.held.pop(request, None) or self.queued.pop(request, None) or self.questions.pop(request, None)
        if timer is not None:
            timer.cancel()
        if (task := self.questions.pop(request, None)) is not None:  # a request that is held may ask as well
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
        """The supervisor calls this after each transition of the engine: who waits is let go, refused or judged."""
        lived, self.lives = self.lives, self.engine.ready or self.engine.draining
        self.generation += lived and not self.lives
        self.open = self.engine.ready
        if self.open:
            for request in list(self.held):
                if request in self.held:
                    self.forget(request)
                    request.go()
        elif self.engine.is_closed:
            self.closing = True
            queued, self.queued = self.queued, {}  # emptied first, or each that leaves would let the next in
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
        """Calls the request's `engine_judged` once it is known whether its engine lives. A death is known in a moment,
        on a busy machine in some moments more: so the engine is asked, and asked again while it does not answer."""
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
