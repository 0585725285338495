"""The gateway in one process: a scripted client, a scripted engine, and a clock that is moved by hand.

    with World(client_timeout=2) as world:
        client = world.client()
        client.asks("/v1/completions")
        request = world.engine.request()
        request.streams(b"data: 1")
        client.leaves()
        assert request.gone

Everything here happens at the connections: what the gateway is made of is known to `World.__enter__` and to the few
properties that look inside, and to no test. Each call runs the loop until nothing is left to do; `at_once` holds that
up, so that several things happen in one turn.

At its end a world looks at what no test should have to ask for: no exception reached the loop or the log, whatever was
written to either side is HTTP, and each request was told to the watchers once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import select
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from supervisor.gateway import client as clients
from supervisor.gateway.exchange import Exchange
from supervisor.gateway.gate import Admission
from supervisor.gateway.policy import Policy, Rate
from supervisor.gateway.record import Record
from supervisor.gateway.server import Gateway
from supervisor.gateway.upstream import Upstream
from tests.clock import Loop
from tests.gateway.messages import Answer, AnswerReader, Malformed, RequestReader
from tests.gateway.transport import FarEnd, ScriptedTransport

CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
CLOSED_STATES = frozenset({"draining", "stopping", "stopped", "failed"})
# No clock that a process reads stands at zero.
BEGINNING = 1000.0
# What the supervisor asks by itself, which no client's request is.
PROBES = frozenset({b"/health", b"/metrics"})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def header_lines(fields: Sequence[str]) -> str:
    return "".join(f"{field}\r\n" for field in fields)


def post(path: str = CHAT, body: bytes = b"{}", *fields: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{header_lines(fields)}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str, *fields: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{header_lines(fields)}\r\n".encode()


class Ended(NamedTuple):
    """What the watchers are told of one request."""

    id: bytes
    path: bytes
    status: int
    client_gone: bool


class ScriptedClient(FarEnd):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self._settle = world.settle  # type: ignore[method-assign]
        self.received = bytearray()
        self.own_requests = RequestReader()
        self.garbage = False  # it has sent something that is no request
        self.reader = AnswerReader(self._method)
        self.malformed: Malformed | None = None

    def asks(self, path: str = CHAT, body: bytes = b"{}", *fields: str) -> None:
        self.sends(post(path, body, *fields))

    def gets(self, path: str, *fields: str) -> None:
        self.sends(get(path, *fields))

    def sends(self, *pieces: bytes) -> None:
        if not self.garbage:
            try:
                for piece in pieces:
                    self.own_requests.feed(piece)
            except Malformed:  # what it sends may be anything
                self.garbage = True
        super().sends(*pieces)

    @property
    def targets(self) -> list[bytes]:
        """What it has asked for."""
        return [request.target for request in self.own_requests.messages]

    def answers(self) -> list[Answer]:
        if self.malformed is not None:
            raise self.malformed
        return self.reader.messages

    def answer(self) -> Answer:
        """The only one, all of it."""
        answers = self.answers()
        assert len(answers) == 1, answers
        assert answers[0].whole, answers
        return answers[0]

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers()]

    @property
    def tunnelled(self) -> bytes:
        assert self.reader.tunnel is not None, "no WebSocket"
        return bytes(self.reader.tunnel)

    @property
    def read_by_gateway(self) -> int:
        return self.transport.bytes_read

    def bytes_arrived(self, data: bytes) -> None:
        self.received += data
        self._read(lambda: self.reader.feed(data))

    def end_arrived(self, *, reset: bool) -> None:
        if not self.closed:
            self._read(lambda: self.reader.end(reset=reset))
        super().end_arrived(reset=reset)

    def _read(self, reading: Callable[[], None]) -> None:
        if self.malformed is None:
            try:
                reading()
            except Malformed as error:
                self.malformed = error

    def _method(self, number: int) -> bytes:
        return self.own_requests.messages[number].method if number < len(self.own_requests.messages) else b"GET"


class ScriptedRequest:
    """What vLLM got, as far as it has come."""

    def __init__(self, connection: EngineConnection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.message = connection.reader.messages[number]
        self.claimed = False  # by `ScriptedEngine.request`

    @property
    def method(self) -> bytes:
        return self.message.method

    @property
    def target(self) -> bytes:
        return self.message.target

    @property
    def body(self) -> bytes:
        return self.message.body

    @property
    def whole(self) -> bool:
        return self.message.whole

    @property
    def id(self) -> bytes:
        return self.message.header(b"x-request-id") or b""

    def header(self, name: str) -> bytes | None:
        return self.message.header(name.encode())

    @property
    def gone(self) -> bool:
        """The gateway has closed the connection: vLLM stops working on it."""
        return self.connection.closed

    @property
    def tunnelled(self) -> bytes:
        assert self.connection.tunnel is not None, "no WebSocket"
        return bytes(self.connection.tunnel)

    def answers(self, status: int = 200, body: bytes = b'{"ok": true}', *fields: str) -> None:
        head = f"HTTP/1.1 {status} Reason\r\ncontent-type: application/json\r\n{header_lines(fields)}"
        head += f"content-length: {len(body)}\r\n\r\n"
        self.sends(head.encode() + body)

    def streams(self, *events: bytes) -> None:
        """Begins a stream; each event comes in a chunk of its own."""
        self.sends(STREAM_HEAD)
        for event in events:
            self.event(event)

    def event(self, event: bytes) -> None:
        self.sends(chunk(event + b"\n\n"))

    def finishes(self) -> None:
        self.sends(chunk(DONE), b"0\r\n\r\n")

    def switches(self) -> None:
        """Opens the WebSocket that was asked for."""
        self.connection.tunnel = bytearray()
        self.sends(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")

    def sends(self, *pieces: bytes) -> None:
        if not self.gone:
            self.connection.sends(*pieces)

    def closes(self) -> None:
        self.connection.leaves()

    def breaks(self) -> None:
        self.connection.breaks()

    def stops_reading(self) -> None:
        self.connection.stops_reading()

    def reads(self) -> None:
        self.connection.reads()


class EngineConnection(FarEnd):
    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__()
        self.engine = engine
        self._settle = engine.world.settle  # type: ignore[method-assign]
        self.reader = RequestReader()
        self.tunnel: bytearray | None = None
        self.known_requests = 0  # requests that the engine knows of

    def bytes_arrived(self, data: bytes) -> None:
        if self.tunnel is not None:
            self.tunnel += data
            return
        try:
            self.reader.feed(data)
        except Malformed as error:
            self.engine.malformed.append(error)
            return
        while self.known_requests < len(self.reader.messages):
            self.engine.request_arrived(ScriptedRequest(self, self.known_requests))
            self.known_requests += 1


class ScriptedEngine:
    """vLLM, at its end of the socket."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.health: int | None = 200  # what /health answers; None: nothing
        self.alive = True
        self.refusal: Exception | None = None  # what becomes of a connection to it
        self.connections: list[EngineConnection] = []
        self.requests: list[ScriptedRequest] = []
        self.probes: list[ScriptedRequest] = []
        self.malformed: list[Malformed] = []

    def request(self) -> ScriptedRequest:
        """The first that was not asked for yet."""
        for request in self.requests:
            if not request.claimed:
                request.claimed = True
                return request
        raise AssertionError("vLLM got no request" if not self.requests else "vLLM got no further request")

    @property
    def waits(self) -> bool:
        """It has a request that nobody asked for yet."""
        return any(not request.claimed for request in self.requests)

    @property
    def targets(self) -> list[bytes]:
        return [request.target for request in self.requests]

    def dies(self, *, reset: bool = False) -> None:
        """Its connections close, and nobody listens. That the supervisor knows is another matter: `engine_is`."""
        self.alive = False
        with self.world.at_once():
            for connection in self.connections:
                if not connection.left and not connection.closed:
                    connection.breaks() if reset else connection.leaves()
        self.connections.clear()

    def lives(self) -> None:
        self.alive = True

    def request_arrived(self, request: ScriptedRequest) -> None:
        if request.target in PROBES:
            self.probes.append(request)
            if (status := self.health if request.target == b"/health" else 200) is not None:
                self.world.loop.call_soon(request.connection.transport.deliver, _plain(status))
        else:
            self.requests.append(request)

    def accepts(self) -> EngineConnection:
        if not self.alive:
            raise ConnectionRefusedError(111, "Connection refused")
        if self.refusal is not None:
            raise self.refusal
        connection = EngineConnection(self)
        self.connections.append(connection)
        return connection


class _Loop(Loop):
    """Whoever connects to a unix socket reaches the scripted engine."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.clock.now = self.clock.limit = BEGINNING

    async def create_unix_connection(self, protocol_factory: Any, path: Any = None, **_: Any) -> Any:
        await asyncio.sleep(0)
        connection = self.world.engine.accepts()
        transport = ScriptedTransport(self, protocol_factory(), connection, socket.AF_UNIX)
        transport.connect()
        await asyncio.sleep(0)  # a turn in which that connection may be lost
        return transport, transport.protocol


class EngineView:
    """What the gateway may know of the engine: the state that the test gave it."""

    timeline: Sequence[Mapping[str, object]] = ()
    state = "starting"

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def is_closed(self) -> bool:
        return self.state in CLOSED_STATES

    @property
    def draining(self) -> bool:
        return self.state == "draining"

    @property
    def explanation(self) -> str:
        return f"The engine is {self.state}."

    def status(self) -> dict[str, object]:
        return {"state": self.state}

    def log_after(self, number: int) -> tuple[int, list[str]]:
        return number, []


class World:
    def __init__(
        self,
        *,
        engine: str = "ready",
        client_timeout: float = 60.0,
        keep_alive: float = 75.0,
        hold_timeout: float = 300.0,
        request_timeout: float = math.inf,
        max_body: int = sys.maxsize,
        keys: Sequence[str] = (),
        rate: int | None = None,
        limit: int | None = None,
        waiting: int = 100,
        cache: int = 0,
        event_keep_alive: float = 0.0,
        faults_expected: bool = False,
    ) -> None:
        """Times in seconds; `limit` requests run at once, and `waiting` more may wait; `cache` in bytes."""
        self.options = {"client_timeout": client_timeout, "idle_timeout": keep_alive, "cache_memory": cache}
        self.options["comment_interval"] = event_keep_alive
        self.policy = {
            "api_keys": keys,
            "rate": Rate(rate) if rate else None,
            "max_body": max_body,
            "timeout": request_timeout,
        }
        self.admission = (limit, waiting, hold_timeout)
        self.faults_expected = faults_expected
        self.first_state = engine
        self.loop = _Loop(self)
        self.engine = ScriptedEngine(self)
        self.view = EngineView()
        self.clients: list[ScriptedClient] = []
        self.faults: list[str] = []
        self.log: list[str] = []
        self.ended: list[Ended] = []
        self.stopping: asyncio.Task[None] | None = None
        self._held_up = False
        self.patience = 0.0

    # What is made of the product's classes, and all that is known of them

    def _make(self) -> None:
        self.upstream = Upstream("vllm.socket", self.loop)
        policy = Policy(**self.policy)  # type: ignore[arg-type]
        admission = Admission(*self.admission)
        self.gateway = Gateway(self.view, self.upstream, policy, admission, facts={}, **self.options)  # type: ignore[arg-type]
        self.gateway.watch(self._note_end)
        self.server = self.gateway.server
        self.server.config.load()

    def _protocol(self, *, private: bool) -> asyncio.Protocol:
        """For one connection of a client's."""
        if private:
            return self.server.private_client()
        return self.server.public_client(config=self.server.config, server_state=self.server.server_state, app_state={})

    def watched_by(self, watcher: Callable[[object], None]) -> None:
        for door in (self.gateway.public_door, self.gateway.private_door):
            door.watchers = (watcher, *door.watchers)

    def _note_end(self, record: Record) -> None:
        self.ended.append(Ended(record.request_id, record.request.path, record.status, record.client_left))

    def _report_state(self) -> None:
        self.gateway.gate.engine_changed()
        if not self.engine.alive:
            self.upstream.close()

    async def _stop(self, patience: float) -> None:
        """What `serve.py` does after a signal, and uvicorn after that."""
        try:
            async with asyncio.timeout(patience):
                await self.gateway.wait_until_drained()
        except TimeoutError:
            self.gateway.cut("The server shut down before this request was done.")
        self.engine_is("stopping")
        self.engine.dies()
        self.engine_is("stopped")
        for connection in list(self.server.server_state.connections):
            connection.shutdown()

    @property
    def active(self) -> int:
        """Requests that were let in, and are not over."""
        return self.gateway.gate.active

    @property
    def waiting(self) -> int:
        """Requests that are held for the engine, or wait for their turn."""
        return self.gateway.gate.backlog

    @property
    def in_flight(self) -> int:
        return len(self.gateway.exchanges)

    @property
    def sent_bytes(self) -> int:
        """Of answers' bodies, to all clients."""
        return self.gateway.counts.sent

    @property
    def awaited(self) -> int:
        """Requests whose next byte vLLM owes, by which a hang is told."""
        return len(self.gateway.traffic()[0])

    @property
    def connections(self) -> int:
        """Clients' that are open."""
        return len(self.gateway.clients.connections)

    @property
    def requests_in_memory(self) -> int:
        """Those that were made of bytes, and that somebody keeps."""
        gc.collect()
        return sum(isinstance(thing, (Exchange, RequestResponseCycle)) for thing in gc.get_objects())

    # The world

    def __enter__(self) -> World:
        self._poll, clients._poll = clients._poll, _poll
        self._handler = logging.Handler()
        self._handler.emit = self._note_log  # type: ignore[method-assign]
        logging.getLogger().addHandler(self._handler)
        self.loop.set_exception_handler(self._note_fault)

        async def make() -> None:
            self._make()

        self.do(make())
        self.engine_is(self.first_state)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
                self.check()
        finally:
            self.close()

    def close(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        with contextlib.suppress(AssertionError):
            self.loop.settle()
        clients._poll = self._poll
        logging.getLogger().removeHandler(self._handler)
        self.loop.close()

    def check(self) -> None:
        """What holds in every world at every moment."""
        for client in self.clients:
            client.answers()
        for malformed in self.engine.malformed:
            raise malformed
        again = [request for request, times in Counter(ended.id for ended in self.ended).items() if times > 1]
        assert not again, f"{len(again)} requests were told to their watchers more than once"
        assert self.active >= 0
        assert self.faults_expected or not self.faults, "\n\n".join(self.faults)

    def _note_log(self, record: logging.LogRecord) -> None:
        self.log.append(record.getMessage())
        if record.levelno >= logging.ERROR or record.exc_info:
            self.faults.append(logging.Formatter().format(record))

    def _note_fault(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        trace = logging.Formatter().formatException((type(error), error, error.__traceback__)) if error else ""
        self.faults.append(f"{context['message']}\n{trace}".strip())

    # The clock

    def do(self, what: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(what)

    def settle(self) -> None:
        if not self._held_up and not self.loop.is_running():
            self.loop.settle()

    @property
    def now(self) -> float:
        """Seconds since this world began."""
        return self.loop.time() - BEGINNING

    def passes(self, seconds: float) -> None:
        self.loop.passes(seconds)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is done within happens before the gateway has a turn."""
        before, self._held_up = self._held_up, True
        try:
            yield
        finally:
            self._held_up = before
            self.settle()

    # What happens

    def client(self, *, private: bool = False, file: int = 3) -> ScriptedClient:
        """A new connection; `private`: over the socket that only the queue worker can open; `file`: its number."""
        client = ScriptedClient(self)
        self.clients.append(client)
        family = socket.AF_UNIX if private else socket.AF_INET

        async def connect() -> None:
            transport = ScriptedTransport(self.loop, self._protocol(private=private), client, family)
            transport.socket.number = file
            transport.connect()

        self.do(connect())
        self.settle()
        return client

    def engine_is(self, state: str) -> None:
        """The supervisor has learnt it: starting, ready, restarting, draining, stopping, stopped or failed."""
        self.view.state = state
        if state == "ready":
            self.engine.lives()
        self._report_state()
        self.settle()

    def terminates(self, patience: float = 60.0) -> None:
        """SIGTERM: what is in flight has `patience` seconds, and is cut then."""
        if self.stopping is None:
            self.engine_is("draining")
            self.stopping = self.loop.create_task(self._stop(patience))
            self.settle()

    @property
    def over(self) -> bool:
        return self.stopping is not None and self.stopping.done()

    def told(self, text: str) -> int:
        """How many lines of our log have it."""
        return sum(text in line for line in self.log)


def _poll(transport: asyncio.Transport) -> int:
    """What the system would say of a scripted socket."""
    return select.POLLRDHUP if isinstance(transport, ScriptedTransport) and transport.far_ended else 0


def _plain(status: int) -> bytes:
    return b"HTTP/1.1 %d Reason\r\ncontent-length: 0\r\n\r\n" % status
