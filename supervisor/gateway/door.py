"""What the requests of one listener share (`Door`), and what an exchange asks of either side."""

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
    """Says what becomes of the client's connection after an answer."""

    KEEP = "the next request may come"
    CLOSE = "the answer was the last"
    LINGER = "what still comes of the request is read and thrown away, so that its client reads the answer"
    RESET = "the answer's end is only told by the close, and this one is not whole"


KEEP = AfterAnswer.KEEP  # a module's name is found faster than an enum's


class Client:
    """What an exchange may ask of the connection to its client, which client.py has."""

    write: Callable[[bytes], object]  # sends bytes of the answer, without waiting for the client to take them
    address = b""  # the client's IP address as text; empty where it has none, as on the private socket

    def pause(self) -> None:
        """Stops reading from the client: the exchange can't pass on more of its request for now."""
        raise NotImplementedError

    def resume(self) -> None:  # reads on, where it was paused: the exchange can pass on more of the request
        raise NotImplementedError

    def become_tunnel(self, exchange: Exchange) -> None:
        """Passes what the client sends from now on, which are frames, to `exchange.pass_frames`: vLLM answered 101."""
        raise NotImplementedError

    def linger(self) -> None:
        """Reads what still comes, and throws it away, for a while: a body grew too large after its answer was over."""
        raise NotImplementedError

    def answer_done(self, exchange: Exchange, after: AfterAnswer) -> None:
        raise NotImplementedError  # called once, when the answer is over: `after` says what becomes of the connection


class BaseDelivery:
    """A request on its way to its answer, as its exchange calls it: a `Delivery`, or one of the cache's."""

    marks: tuple[tuple[str, float], ...] = ()  # what kept it from vLLM, and when it went: each with the loop's time
    was_sent = False  # set when the request is first sent to vLLM
    replayed = False  # set when the request is sent again because the engine that had it died
    is_working = False  # whether vLLM has all of the request, and is to make the next byte of the answer
    is_waiting = False  # whether the request waits for the engine, or for its turn
    request_bytes = b""  # head and body of the request, while it waits

    def begin(self, complete: bool) -> None:
        """The exchange calls this once, when its turn has come. `complete`: all of the request's body is there."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Takes a piece of the body, framed for vLLM, also before `begin`; or a WebSocket's frames, once it is open."""
        raise NotImplementedError

    def end(self) -> None:
        """The exchange calls this when all of the body was written, unless `begin` was told so."""
        raise NotImplementedError

    def release(self) -> None:
        """Lets vLLM's connection go: the answer is complete, and the connection may carry another request by now."""

    def abort(self) -> None:
        """The exchange is over: vLLM is told, where it is still at work. To abort twice is to abort."""

    def pause(self) -> None:
        """Keeps back what follows of the answer until `resume`: the client takes no more for now."""

    def resume(self) -> None:
        """Goes on with the answer: the client takes more of it again."""


@dataclass(slots=True)
class Door:
    """Holds what one listener's requests have in common: there is one for the ports, one for the private socket."""

    policy: Policy
    gate: Gate
    counts: Counts
    new_id: Callable[[], bytes]  # makes the id of a request that has none
    time: Callable[[], float]  # the event loop's clock, in seconds
    deliver: Callable[[Exchange, bytes], BaseDelivery]  # called with the request's head as vLLM is to receive it
    exchanges: set[Exchange]  # those of all doors that have begun and are not over
    memo: Memo[Request]  # the heads of requests that may come again
    max_body: int  # bytes that a request's body may have
    private: bool = False  # whether it is the private socket's
    tls: bool = False  # whether clients come by TLS
    comment_interval: float = 0.0  # seconds between comments to a client that waits for its stream; 0: none are sent
    crowd_refusal: Refusal | None = None  # set where too many connections are open: why no request is taken
    watchers: tuple[Callable[[Record], object], ...] = ()  # called with each request that is over

    def find_refusal(self, exchange: Exchange) -> Refusal | None:
        """Returns what refuses the request (keys, routes, sizes, rates, or that nobody will answer), or None."""
        verdict: Verdict = exchange.request.verdict  # type: ignore[assignment]  # its head was judged
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
