"""A record tells what became of one request, to those who count it, log it, trace it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.gateway.door import BaseDelivery, Client, Door
    from supervisor.gateway.http1 import Request
    from supervisor.gateway.policy import Verdict

# A request that waited has one of these marks; a wait of so many seconds is worth a word.
WAITS, LEAST_WAIT = ("held", "waiting"), 0.1
CLIENT_GONE = 499  # this is nginx's status for an answer that nobody waited for


class Record:
    """Tells of one request, and goes to the watchers when that is over. Times are the event loop's, in seconds."""

    client: Client
    door: Door
    request: Request
    request_id: bytes
    began: float  # when its head was there
    # A new request has these values. They are kept in the class: what a small one never touches costs it nothing.
    delivery: BaseDelivery | None = None
    status = 0  # the answer's, once there is one; CLIENT_GONE if the client left before
    first_at = 0.0  # when the answer's first byte went to the client, a stream's first event; 0: none did
    over_at = 0.0  # when the request was over; 0: it is not
    sent = 0  # bytes of the answer's body, its framing included
    held_state = ""  # the state in which the engine was when the request had to wait for it, if it had to
    is_ours = False  # the answer is the gateway's own, and nothing of it is vLLM's
    code = ""  # the error code of what refused the request, or broke its answer off, if anything did
    cache_word = ""  # how the cache answered it, in a word; empty: vLLM answered it, or we did
    client_left = False  # its client left before the answer's end

    def request_held(self, state: str) -> None:
        self.held_state = state

    @property
    def verdict(self) -> Verdict:
        assert self.request.verdict is not None
        return self.request.verdict

    @property
    def address(self) -> bytes:
        """Returns its client's address, empty where there is none."""
        return self.client.address

    @property
    def replayed(self) -> bool:
        """Tells whether it was sent again because the engine died."""
        return self.delivery is not None and self.delivery.replayed

    @property
    def marks(self) -> tuple[tuple[str, float], ...]:
        """Returns what kept it from going to vLLM at once, and when it went."""
        return self.delivery.marks if self.delivery is not None else ()

    @property
    def log_extra(self) -> dict[str, str]:
        """Returns the `extra` of a line of log that is about it."""
        return {"request": self.request_id.decode("latin-1")}


def describe(record: Record) -> str:
    """Returns what was unusual about it, for the access log; empty where nothing was."""
    found = []
    for (what, since), (_, until) in pairwise((*record.marks, ("over", record.over_at))):
        if what in WAITS and until - since >= LEAST_WAIT:
            found.append(f"{until - since:.1f} s {what}" + (f" ({record.held_state})" if what == "held" else ""))
    again, gone = "sent again" if record.replayed else "", "client gone" if record.client_left else ""
    return ", ".join(filter(None, [*found, again, record.cache_word, gone, record.code]))
