"""What became of one request, for those who count it, log it, trace it."""

from __future__ import annotations

from typing import Protocol

from supervisor.gateway.http1 import Request
from supervisor.gateway.policy import Verdict

# What a request may have waited for, and how many seconds are worth a word.
WAITS, NOTED_WAIT = ("held", "waiting"), 0.1
# What nginx calls an answer that nobody waited for.
CLIENT_GONE = 499


class Record(Protocol):
    """One request that is over. Times are the event loop's, in seconds."""

    request: Request
    request_id: bytes
    status: int  # of the answer; CLIENT_GONE where none had begun
    began: float  # when its head was there
    first_at: float  # when the answer's first byte went to the client, a stream's first event; 0: none did
    over_at: float
    sent: int  # bytes of the answer's body, its framing included
    ours: bool  # the answer was ours alone
    cut: str  # the code of what refused it, or broke it off
    cached: str  # how the cache answered it, in a word
    gone: bool  # its client was, before the answer's end

    @property
    def verdict(self) -> Verdict: ...

    @property
    def address(self) -> bytes:
        """Its client's."""

    @property
    def private(self) -> bool:
        """It came from the queue worker."""

    @property
    def tls(self) -> bool: ...

    @property
    def went(self) -> bool:
        """vLLM had it."""

    @property
    def replayed(self) -> bool:
        """It was sent again, for the engine died."""

    @property
    def marks(self) -> tuple[tuple[str, float], ...]:
        """What kept it from going to vLLM at once, and when it went."""


def waits(record: Record) -> list[tuple[str, float]]:
    """(what, seconds), in order."""
    marks = record.marks
    ends = [*(at for _, at in marks[1:]), record.over_at]
    return [(what, end - at) for (what, at), end in zip(marks, ends, strict=False)]


def note(record: Record) -> str:
    """What was unusual about it, for the access log."""
    found = [f"{seconds:.1f} s {what}" for what, seconds in waits(record) if what in WAITS and seconds >= NOTED_WAIT]
    if record.replayed:
        found.append("sent again")
    if record.cached:
        found.append(record.cached)
    if record.gone:
        found.append("client gone")
    return ", ".join([*found, record.cut] if record.cut else found)
