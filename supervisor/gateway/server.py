"""The gateway as a whole: uvicorn, one `Door` for each kind of listener, and what the supervisor asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import resource
import socket
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import uvicorn

from supervisor.gateway.app import EngineView, OwnRoutes
from supervisor.gateway.client import ClientConnection, Clients
from supervisor.gateway.counts import Counts
from supervisor.gateway.delivery import Delivery
from supervisor.gateway.door import BaseDelivery, Door
from supervisor.gateway.endings import NO_PROGRESS, Events
from supervisor.gateway.errors import Refusal, refuse
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.gate import RETRY_AFTER, Admission, Gate
from supervisor.gateway.heads import Memo
from supervisor.gateway.policy import ENGINE_ROUTES, Policy
from supervisor.gateway.upstream import Upstream

if TYPE_CHECKING:
    from supervisor.gateway.record import Record

# Once in so many seconds we look for what takes too long. One look costs less than a timer for each request.
TICK = 1.0
# A client has so many seconds for its next bytes, or to take ours; and so many between its requests.
CLIENT_TIMEOUT, IDLE_TIMEOUT = 60.0, 75.0
log = logging.getLogger("supervisor.gateway")
One = TypeVar("One")


class Gateway:
    """Holds the gateway together. `run_on(sockets)` serves until `stop()` is called."""

    def __init__(
        self, engine: EngineView, upstream: Upstream, policy: Policy, admission: Admission, *,
        facts: Mapping[str, object], client_timeout: float = CLIENT_TIMEOUT, idle_timeout: float = IDLE_TIMEOUT,
        cache_memory: int = 0, comment_interval: float = 0.0, certificate: str | None = None, key: str | None = None,
        close_patience: int = 5,
    ) -> None:  # fmt: skip
        """`facts` never change and are shown at `/status`. `cache_memory` is in bytes, and 0 means no cache.
        `comment_interval`: seconds between two comments to a stream's client that waits, 0 for none. `certificate` and
        `key` are files, for HTTPS. `close_patience`: seconds for our own routes' last bytes at the end."""
        self.upstream = upstream
        self.loop = upstream.loop
        self.policy = policy
        self.counts = Counts()
        self.gate = Gate(engine, upstream, admission, self.counts)
        self.exchanges: set[Exchange] = set()
        # A request's id is this run's, and a number. To read as many random bytes for each would cost as much again.
        self.run_id = os.urandom(10).hex().encode()
        self.new_id = map((self.run_id + b"%012x").__mod__, itertools.count(1)).__next__
        deliver: Callable[[Exchange, bytes], BaseDelivery] = Delivery
        watchers: tuple[Callable[[Record], object], ...] = (self.counts.request_ended,)
        cache = None
        if cache_memory:
            from supervisor.gateway.cache import Cache  # noqa: PLC0415  # only for those who switch it on

            cache = Cache(self.new_id, cache_memory)
            deliver = cache.deliver
            watchers += (cache.request_ended,)
        common = (self.gate, self.counts, self.new_id, self.loop.time, deliver, self.exchanges)
        self.public_door = Door(
            policy, *common, Memo(), policy.max_body,
            tls=certificate is not None, watchers=watchers, comment_interval=comment_interval,
        )  # fmt: skip
        # Whoever comes by the private socket is the same user, on this machine. RunPod has asked for its own key; no
        # job is an administrator, though. The queue decides how large jobs may be, and how many run at once.
        trusting = Policy(routes=policy.routes, standing_refusal=policy.standing_refusal, timeout=policy.timeout)
        self.private_door = Door(trusting, *common, Memo(), trusting.max_body, private=True, watchers=watchers)
        self.routes = OwnRoutes(engine, policy, self.gate, self.counts, upstream, self.count_requests, facts, cache)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.clients = Clients(self.loop, self.routes.is_own, most, timeout=client_timeout, idle_timeout=idle_timeout)
        self.server = _Server(self, certificate, key, close_patience)
        self._tick()

    def watch(self, watcher: Callable[[Record], object], *, jobs: bool = True) -> None:
        """Has `watcher` called on the loop for each request that is over, RunPod's only if `jobs`; it must not wait."""
        self.public_door.watchers += (watcher,)
        if jobs:
            self.private_door.watchers += (watcher,)

    def set_keys(self, api_keys: Iterable[str], admin_keys: Iterable[str]) -> None:
        """Makes these keys valid from now on, and no others; requests that run are not stopped."""
        self.policy.api_keys, self.policy.admin_keys = tuple(api_keys), tuple(admin_keys)
        self.public_door.memo.known.clear()
        self.clients.forget_heads()

    # What the rest of the supervisor calls

    def count_requests(self) -> dict[str, int]:
        """Returns how many are `waiting` at the gate, and how many that are not over are `in_flight` beside those."""
        waiting = sum(one.delivery is not None and one.delivery.is_waiting for one in self.exchanges)
        return {"in_flight": len(self.exchanges) - waiting, "waiting": waiting}

    async def wait_until_drained(self) -> None:
        """Returns when each relayed request is over."""
        if self.exchanges:
            emptied = asyncio.Event()
            self.watch(lambda _: None if self.exchanges else emptied.set())
            await emptied.wait()

    def cut(self, explanation: str) -> None:
        """Ends all requests that are not over, because the drain timeout has passed; clients get the explanation."""
        refusal = Refusal(503, explanation, "shutting_down", RETRY_AFTER)
        for_each(self.exchanges, lambda exchange: exchange.end_now(refusal))

    def traffic(self) -> tuple[Sequence[object], object]:
        """Returns the requests that vLLM has in full, that need its engine, and that wait for its next byte; and signs
        of its work, which differ when there was some: answers given, and bytes sent of the answers under way."""
        waiting = [exchange for exchange in self.exchanges if _needs_the_engine(exchange)]
        answered = sum(
            sum(series.last_byte.buckets)
            for (route, status), series in self.counts.answers.items()
            if status < 300 and route in ENGINE_ROUTES
        )
        sent = sum(
            one.sent for one in waiting if not (isinstance(one.body, Events) and NO_PROGRESS.match(one.body.last_piece))
        )
        return waiting, (answered, sent)

    def _tick(self) -> None:
        """Ends whatever is over its time, sends the comments that are due, and sees to its own next call."""
        timeout = self.policy.timeout
        self.loop.call_later(min(TICK, timeout / 4, self.clients.timeout / 4), self._tick)
        oldest = self.loop.time() - timeout
        for_each([exchange for exchange in self.exchanges if exchange.began < oldest], self._end_late)
        if self.public_door.comment_interval:
            for_each(self.exchanges, lambda exchange: exchange.send_due_comment(self.loop.time()))
        self.clients.clock = now = self.loop.time()
        for_each(self.clients.connections, lambda connection: connection.check_time(now))

    def _end_late(self, exchange: Exchange) -> None:
        refusal = refuse("request_timeout", limit=self.policy.timeout)
        log.warning("%s", refusal.message, extra=exchange.log_extra)
        exchange.end_now(refusal)

    async def run_on(self, sockets: list[socket.socket]) -> None:
        await self.server.serve(sockets)

    def stop(self) -> None:
        self.server.should_exit = True


def for_each(items: Iterable[One], act: Callable[[One], object]) -> None:
    """Acts on each. A fault ends that one only: it once kept everybody's timeouts from being looked at, each second."""
    for item in list(items):
        try:
            act(item)
        except Exception:  # whatever it is, the others have their turn
            log.exception("a connection or a request could not be ended")


def _needs_the_engine(exchange: Exchange) -> bool:
    """Tells whether it waits for the engine: not a WebSocket, where nobody need speak, nor an answer nobody reads."""
    request, delivery = exchange.request, exchange.delivery
    if delivery is None or not delivery.is_working or request.websocket:
        return False
    return request.method == b"POST" and exchange.verdict.route in ENGINE_ROUTES


class _Server(uvicorn.Server):
    """Is uvicorn's server with our protocol, our loop, our signals, and sockets that are bound already."""

    def __init__(self, gateway: Gateway, certificate: str | None, key: str | None, close_patience: int) -> None:
        self.gateway = gateway
        super().__init__(
            uvicorn.Config(
                cast(Any, gateway.routes), http=cast(Any, self.public_client), ws="none", loop="none", lifespan="off",
                interface="asgi3", log_config=None, access_log=False, proxy_headers=False, server_header=False,
                ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=close_patience,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # the supervisor handles the signals

    def public_client(self, **kwargs: Any) -> ClientConnection:
        kwargs.pop("_loop", None)
        return ClientConnection(self.gateway.clients, self.gateway.public_door, **kwargs)

    def private_client(self) -> ClientConnection:
        gateway, state = self.gateway, self.lifespan.state
        return ClientConnection(
            gateway.clients, gateway.private_door, config=self.config, server_state=self.server_state, app_state=state
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to serve all sockets; the private one has no TLS, whatever the ports have."""
        private = [listener for listener in sockets or [] if listener.family == socket.AF_UNIX]
        await super().startup([listener for listener in sockets or [] if listener not in private])
        for listener in private:
            self.servers.append(await asyncio.get_running_loop().create_unix_server(self.private_client, sock=listener))
