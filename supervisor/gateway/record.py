"""What became of one request, for those who count it, log it, trace it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.gateway.door import BaseDelivery, Client, Door
    from supervisor.gateway.http1 import Request
    from supervisor.gateway.policy import Verdict

# What a request may have waited for, and how many seconds are worth a word.
WAITS, LEAST_WAIT = ("held", "waiting"), 0.1
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
    delivery: BaseDelivery | None = None
    status = 0  # of the answer, once there is one; CLIENT_GONE where none had begun
    first_at = 0.0  # when the answer's first byte went to the client, a stream's first event; 0: none did
    over_at = 0.0
    sent = 0  # bytes of the answer's body, its framing included
    held_state = ""  # the engine's state that it had to wait for
    is_ours = False  # the answer is ours alone
    code = ""  # the code of what refused it, or broke it off
    cache_word = ""  # how the cache answered it, in a word
    client_left = False  # its client is, before the answer's end

    def request_held(self, state: str) -> None:
        self.held_state = state

    @property
    def verdict(self) -> Verdict:
        assert self.request.verdict is not None
        return self.request.verdict

    @property
    def address(self) -> bytes:
        """Its client's."""
        return self.client.address

    @property
    def replayed(self) -> bool:
        """It was sent again, for the engine died."""
        return self.delivery is not None and self.delivery.replayed

    @property
    def marks(self) -> tuple[tuple[str, float], ...]:
        """What kept it from going to vLLM at once, and when it went."""
        return self.delivery.marks if self.delivery is not None else ()

    @property
    def log_extra(self) -> dict[str, str]:
        """For a line of log that is about it."""
        return {"request": self.request_id.decode("latin-1")}


def describe(record: Record) -> str:
    """What was unusual about it, for the access log."""
    found = []
    for (what, since), (_, until) in pairwise((*record.marks, ("over", record.over_at))):
        if what in WAITS and until - since >= LEAST_WAIT:
            found.append(f"{until - since:.1f} s {what}" + (f" ({record.held_state})" if what == "held" else ""))
    again, gone = "sent again" if record.replayed else "", "client gone" if record.client_left else ""
    return ", ".join(filter(None, [*found, again, record.cache_word, gone, record.code]))
