"""What became of one request, in plain numbers: for those who count it, log it, trace it."""

from __future__ import annotations

from typing import NamedTuple

from supervisor.gateway.http1 import Request
from supervisor.gateway.policy import Verdict

# What a request may have waited for, and how many seconds are worth a word.
WAITS, NOTED_WAIT = ("held", "waiting"), 0.1
# What nginx calls an answer that nobody waited for.
CLIENT_GONE = 499


class Record(NamedTuple):
    """Times are the event loop's, in seconds."""

    request: Request
    verdict: Verdict
    request_id: bytes
    client: bytes  # its address
    private: bool  # from the queue worker
    tls: bool
    status: int  # of the answer; CLIENT_GONE where none had begun
    began: float  # when its head was there
    first_at: float  # when the answer's first byte went to the client, a stream's first event; 0: none did
    ended: float
    sent: int  # bytes of the answer's body, its framing included
    ours: bool  # the answer was ours alone
    went: bool  # vLLM had it
    marks: tuple[tuple[str, float], ...]  # what kept it from going to vLLM at once, and when it went
    cut: str  # the code of what refused it, or broke it off
    cached: str  # how the cache answered it, in a word
    gone: bool  # its client was, before the answer's end
    replayed: bool  # because the engine died

    def waits(self) -> list[tuple[str, float]]:
        """(what, seconds), in order."""
        ends = [*(at for _, at in self.marks[1:]), self.ended]
        return [(what, end - at) for (what, at), end in zip(self.marks, ends, strict=False)]

    @property
    def note(self) -> str:
        """What was unusual about it, for the access log."""
        found = [f"{seconds:.1f} s {what}" for what, seconds in self.waits() if what in WAITS and seconds >= NOTED_WAIT]
        if self.replayed:
            found.append("sent again")
        if self.cached:
            found.append(self.cached)
        if self.gone:
            found.append("client gone")
        return ", ".join([*found, self.cut] if self.cut else found)
