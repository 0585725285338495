"""Where requests come in: what those of one listener have in common, and what an exchange asks of either side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.gateway.counts import Counts
    from supervisor.gateway.errors import Refusal
    from supervisor.gateway.exchange import Exchange
    from supervisor.gateway.gate import Gate
    from supervisor.gateway.heads import Memo
    from supervisor.gateway.http1 import Request
    from supervisor.gateway.policy import Policy, Verdict
    from supervisor.gateway.record import Record


class AfterAnswer(Enum):
    """What becomes of the client's connection behind an answer."""

    KEEP = "the next request may come"
    CLOSE = "the answer was the last"
    LINGER = "what still comes of the request is read and thrown away, so that its client reads the answer"
    RESET = "the answer's end is only told by the close, and this one is not whole"


KEEP = AfterAnswer.KEEP  # found faster


class Client:
    """What an exchange may ask of the connection to its client."""

    write: Callable[[bytes], object]
    address = b""

    def pause(self) -> None:
        """The reading of its request."""
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    def become_tunnel(self, exchange: Exchange) -> None:
        """What it sends from now on are frames, and go to `exchange.tunnel`."""
        raise NotImplementedError

    def linger(self) -> None:
        """Reads what still comes, and throws it away, for a while."""
        raise NotImplementedError

    def answer_done(self, exchange: Exchange, after: AfterAnswer) -> None:
        raise NotImplementedError


class BaseDelivery:
    """A request on its way to its answer: a `Delivery`, or one of the cache's."""

    marks: tuple[tuple[str, float], ...] = ()  # what kept it from going to vLLM at once, and when it went
    was_sent = False  # vLLM had it
    replayed = False  # because the engine died
    is_working = False  # vLLM is to make the next byte
    is_waiting = False  # for the engine, or for its turn
    request_bytes = b""  # of one that waits: the request, its head and its body

    def begin(self, complete: bool) -> None:
        """`complete`: all of the request is there."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """The request's body, framed."""
        raise NotImplementedError

    def end(self) -> None:
        """The whole request is there."""
        raise NotImplementedError

    def release(self) -> None:
        """vLLM is done with it, and its connection may have another's by now."""

    def abort(self) -> None:
        """Nothing more is wanted of it: vLLM is told, where it is still at work. To abort twice is to abort."""

    def pause(self) -> None:
        """Its client takes no more of the answer for now."""

    def resume(self) -> None:
        """It takes it again."""


@dataclass(slots=True)
class Door:
    """What the requests of one listener have in common: one for the ports, one for the private socket."""

    policy: Policy
    gate: Gate
    counts: Counts
    new_id: Callable[[], bytes]
    time: Callable[[], float]
    deliver: Callable[[Exchange, bytes], BaseDelivery]  # head, as vLLM gets it
    exchanges: set[Exchange]  # those of all doors
    memo: Memo[Request]
    max_body: int  # bytes
    private: bool = False
    tls: bool = False
    comment_interval: float = 0.0  # seconds between two comments to a stream's client that waits; 0: it gets none
    crowd_refusal: Refusal | None = None  # there are too many connections for any request
    watchers: tuple[Callable[[Record], object], ...] = ()  # called with each that is over

    def find_refusal(self, exchange: Exchange) -> Refusal | None:
        """Whether this request may go on: keys, routes, sizes, rates, and whether anybody will answer."""
        verdict: Verdict = exchange.request.verdict  # type: ignore[assignment]  # it was judged
        if self.crowd_refusal is not None:
            return self.crowd_refusal
        if verdict.refusal is not None:
            return self.policy.refusal_for(verdict, exchange.client.address, exchange.began)
        if exchange.body_budget < 0 or exchange.discards_request:
            exchange.discards_request = True
            return self.policy.size_refusal()
        if self.policy.rate is not None:
            client = verdict.client or exchange.client.address
            if (refusal := self.policy.rate.take(client, exchange.began)) is not None:
                return refusal
        return None if self.gate.open else self.gate.find_refusal(limited=not self.private)
