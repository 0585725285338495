"""What became of one request, for those who count it, log it, trace it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.gateway.door import Client, Delivering, Door
    from supervisor.gateway.http1 import Request
    from supervisor.gateway.policy import Verdict

# What a request may have waited for, and how many seconds are worth a word.
WAITS, NOTED_WAIT = ("held", "waiting"), 0.1
# What nginx calls an answer that nobody waited for.
CLIENT_GONE = 499


class Record:
    """One request, for whoever is told of it when it is over. Times are the event loop's, in seconds."""

    client: Client
    door: Door
    request: Request
    request_id: bytes
    began: float  # when its head was there
    # The state of a new one. Kept in the class: what a small request never touches costs it nothing.
    delivering: Delivering | None = None
    status = 0  # of the answer, once there is one; CLIENT_GONE where none had begun
    first_at = 0.0  # when the answer's first byte went to the client, a stream's first event; 0: none did
    over_at = 0.0
    sent = 0  # bytes of the answer's body, its framing included
    held_for = ""  # the engine's state that it had to wait for
    ours = False  # the answer is ours alone
    cut = ""  # the code of what refused it, or broke it off
    cached = ""  # how the cache answered it, in a word
    gone = False  # its client is, before the answer's end

    @property
    def verdict(self) -> Verdict:
        assert self.request.verdict is not None
        return self.request.verdict

    @property
    def address(self) -> bytes:
        """Its client's."""
        return self.client.address

    @property
    def private(self) -> bool:
        """It came from the queue worker."""
        return self.door.private

    @property
    def tls(self) -> bool:
        return self.door.tls

    @property
    def went(self) -> bool:
        """vLLM had it."""
        return self.delivering is not None and self.delivering.went

    @property
    def replayed(self) -> bool:
        """It was sent again, for the engine died."""
        return self.delivering is not None and self.delivering.replayed

    @property
    def marks(self) -> tuple[tuple[str, float], ...]:
        """What kept it from going to vLLM at once, and when it went."""
        return self.delivering.marks if self.delivering is not None else ()

    @property
    def named(self) -> dict[str, str]:
        """For a line of log that is about it."""
        return {"request": self.request_id.decode("latin-1")}


def waits(record: Record) -> list[tuple[str, float]]:
    """(what, seconds), in order."""
    marks = record.marks
    ends = [*(at for _, at in marks[1:]), record.over_at]
    return [(what, end - at) for (what, at), end in zip(marks, ends, strict=False)]


def note(record: Record) -> str:
    """What was unusual about it, for the access log."""
    state = f" ({record.held_for})"
    found = [
        f"{seconds:.1f} s {what}{state if what == 'held' else ''}"
        for what, seconds in waits(record)
        if what in WAITS and seconds >= NOTED_WAIT
    ]
    if record.replayed:
        found.append("sent again")
    if record.cached:
        found.append(record.cached)
    if record.gone:
        found.append("client gone")
    return ", ".join([*found, record.cut] if record.cut else found)
