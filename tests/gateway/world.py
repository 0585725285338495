"""The gateway in one process: a scripted client, a scripted engine, and a clock that is moved by hand.

    with World(client_timeout=2) as world:
        client = world.client()
        client.asks("/v1/completions")
        request = world.engine.request()
        request.streams(b"data: 1")
        client.leaves()
        assert request.gone
        assert world.ended[0].client_gone

Everything here happens at the connections: what the gateway is made of is known to `World.__enter__` and to the few
properties that look inside, and to no test. Each call runs the loop until nothing is left to do; `at_once` holds that
up, so that several things happen in one turn. Time, in seconds, moves in `passes` alone. No port is opened, and nothing
has to be closed by a test: leaving the block ends all.

At its end a world checks what no test should have to ask for: no exception reached the loop or the log, whatever was
written to either side is HTTP, and the watchers were told of each request once.
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

from uvicorn.lifespan.off import LifespanOff
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
# The states in which the gateway lets no new request in.
CLOSED_STATES = frozenset({"draining", "stopping", "stopped", "failed"})
# The loop's time when a world begins, in seconds. No clock that a process reads stands at zero.
BEGINNING = 1000.0
# The paths that the supervisor asks by itself: such a request is no client's.
PROBES = frozenset({b"/health", b"/metrics"})


def chunk(data: bytes) -> bytes:
    """Returns the data as a chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def header_lines(fields: Sequence[str]) -> str:
    return "".join(f"{field}\r\n" for field in fields)


def post(path: str = CHAT, body: bytes = b"{}", *fields: str) -> bytes:
    """Returns a POST request; `fields` are lines of its head, such as "Connection: close"."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{header_lines(fields)}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def get(path: str, *fields: str) -> bytes:
    """Returns a GET request; `fields` are lines of its head."""
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{header_lines(fields)}\r\n".encode()


class Ended(NamedTuple):
    """What the watchers were told of one request that is over."""

    id: bytes  # its X-Request-Id
    path: bytes
    status: int
    client_gone: bool  # the client left before its answer was whole


class ScriptedClient(FarEnd):
    """A client on one connection, made by `World.client`. What it receives is read strictly, as answers.

        client.asks("/v1/completions", b'{"prompt": "x"}', "X-A: 1")
        assert client.answer().status == 200

    `asks`, `gets` and `sends` write; `answers`, `answer` and `statuses` say what has come; `leaves`, `breaks`,
    `half_closes`, `stops_reading` and `reads` are those of each `FarEnd`.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self._settle = world.settle  # type: ignore[method-assign]
        self.received = bytearray()  # all that came
        self.own_requests = RequestReader()  # what it has sent, of which an answer's framing depends on the method
        self.garbage = False  # it has sent something that is no request
        self.reader = AnswerReader(self._method)
        self.malformed: Malformed | None = None  # why what came is no HTTP, which `answers` raises

    def asks(self, path: str = CHAT, body: bytes = b"{}", *fields: str) -> None:
        """Sends a POST request."""
        self.sends(post(path, body, *fields))

    def gets(self, path: str, *fields: str) -> None:
        """Sends a GET request."""
        self.sends(get(path, *fields))

    def sends(self, *pieces: bytes) -> None:
        """Sends any bytes; each piece is a read of its own for the gateway, if it reads."""
        if not self.garbage:
            try:
                for piece in pieces:
                    self.own_requests.feed(piece)
            except Malformed:  # what it sends may be anything
                self.garbage = True
        super().sends(*pieces)

    @property
    def targets(self) -> list[bytes]:
        """The targets of the requests that it has sent."""
        return [request.target for request in self.own_requests.messages]

    def answers(self) -> list[Answer]:
        """Returns the answers until now; the last one may not be whole. Raises Malformed for what is none."""
        if self.malformed is not None:
            raise self.malformed
        return self.reader.messages

    def answer(self) -> Answer:
        """Returns the only answer, which must be whole."""
        answers = self.answers()
        assert len(answers) == 1, answers
        assert answers[0].whole, answers
        return answers[0]

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers()]

    @property
    def tunnelled(self) -> bytes:
        """All that came on the WebSocket."""
        assert self.reader.tunnel is not None, "no WebSocket"
        return bytes(self.reader.tunnel)

    @property
    def read_by_gateway(self) -> int:
        """Bytes of its own that the gateway has read."""
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
    """A request as vLLM has received it until now, and vLLM's side of what becomes of it.

        request = world.engine.request()
        request.answers(200, b'{"text": "y"}')  # or `streams`, `event` ..., `finishes`

    What it sends once the gateway has closed the connection is dropped.
    """

    def __init__(self, connection: EngineConnection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.message = connection.reader.messages[number]
        self.claimed = False  # `ScriptedEngine.request` has returned it

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
        """True when the gateway has closed the connection, by which vLLM knows that it may stop working on it."""
        return self.connection.closed

    @property
    def tunnelled(self) -> bytes:
        """All that came on the WebSocket, since `switches`."""
        assert self.connection.tunnel is not None, "no WebSocket"
        return bytes(self.connection.tunnel)

    def answers(self, status: int = 200, body: bytes = b'{"ok": true}', *fields: str) -> None:
        """Sends a whole answer in one piece; `fields` are lines of its head."""
        head = f"HTTP/1.1 {status} Reason\r\ncontent-type: application/json\r\n{header_lines(fields)}"
        head += f"content-length: {len(body)}\r\n\r\n"
        self.sends(head.encode() + body)

    def streams(self, *events: bytes) -> None:
        """Begins an event stream, which `finishes` ends; each event is sent in a chunk of its own."""
        self.sends(STREAM_HEAD)
        for event in events:
            self.event(event)

    def event(self, event: bytes) -> None:
        """Sends one more event, such as b"data: 1"; the blank line behind it is added."""
        self.sends(chunk(event + b"\n\n"))

    def finishes(self) -> None:
        """Ends the stream as vLLM does, by `data: [DONE]` and the last chunk."""
        self.sends(chunk(DONE), b"0\r\n\r\n")

    def switches(self) -> None:
        """Opens the WebSocket that was asked for."""
        self.connection.tunnel = bytearray()
        self.sends(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")

    def sends(self, *pieces: bytes) -> None:
        if not self.gone:
            self.connection.sends(*pieces)

    def closes(self) -> None:
        """Closes the connection in order."""
        self.connection.leaves()

    def breaks(self) -> None:
        """Resets the connection."""
        self.connection.breaks()

    def stops_reading(self) -> None:
        self.connection.stops_reading()

    def reads(self) -> None:
        self.connection.reads()


class EngineConnection(FarEnd):
    """vLLM's end of one connection of the gateway's, on which requests come one after the other."""

    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__()
        self.engine = engine
        self._settle = engine.world.settle  # type: ignore[method-assign]
        self.reader = RequestReader()
        self.tunnel: bytearray | None = None  # what came since a WebSocket was opened
        self.known_requests = 0  # how many of its requests the engine was told of

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
    """vLLM, as the gateway sees it at the other end of its unix socket.

    It answers `/health` and `/metrics` by itself. All other requests wait in `requests` for the test, which takes them
    in order with `request()` and answers each: nothing is answered otherwise.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.health: int | None = 200  # the status that /health answers; None: it does not answer
        self.alive = True  # it accepts connections
        self.refusal: Exception | None = None  # what is raised where the gateway opens a connection to it
        self.connections: list[EngineConnection] = []
        self.requests: list[ScriptedRequest] = []  # those of clients, from the first one on
        self.probes: list[ScriptedRequest] = []  # those of the supervisor's own
        self.malformed: list[Malformed] = []  # what came and was no request, which `World.check` raises

    def request(self) -> ScriptedRequest:
        """Returns the first request that it has not returned yet; fails where there is none."""
        for request in self.requests:
            if not request.claimed:
                request.claimed = True
                return request
        raise AssertionError("vLLM got no request" if not self.requests else "vLLM got no further request")

    @property
    def waits(self) -> bool:
        """True where it has a request that `request` has not returned yet."""
        return any(not request.claimed for request in self.requests)

    @property
    def targets(self) -> list[bytes]:
        return [request.target for request in self.requests]

    def dies(self, *, reset: bool = False) -> None:
        """Closes its connections, and accepts no other. The supervisor does not know it until `World.engine_is`."""
        self.alive = False
        with self.world.at_once():
            for connection in self.connections:
                if not connection.left and not connection.closed:
                    connection.breaks() if reset else connection.leaves()
        self.connections.clear()

    def lives(self) -> None:
        """Accepts connections again."""
        self.alive = True

    def request_arrived(self, request: ScriptedRequest) -> None:
        """Takes a request whose head is whole."""
        if request.target in PROBES:
            self.probes.append(request)
            if (status := self.health if request.target == b"/health" else 200) is not None:
                self.world.loop.call_soon(request.connection.transport.deliver, _plain(status))
        else:
            self.requests.append(request)

    def accepts(self) -> EngineConnection:
        """Returns its end of a new connection, or raises what becomes of one."""
        if not self.alive:
            raise ConnectionRefusedError(111, "Connection refused")
        if self.refusal is not None:
            raise self.refusal
        connection = EngineConnection(self)
        self.connections.append(connection)
        return connection


class _Loop(Loop):
    """A loop with a scripted clock, on which whoever connects to a unix socket reaches the scripted engine."""

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
    """Stands for the account of the engine, by which the gateway knows it: the state that the test gave it."""

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
    """The gateway, its clients, its engine and its clock, for one test: `with World(...) as world`."""

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
        """Sets the gateway up, which is made when the block is entered.

        `engine` is the engine's first state. Times are in seconds, `max_body` and `cache` in bytes; `rate` is the
        number of requests per minute of each client. `limit` requests run at once, and `waiting` more may wait. With
        `faults_expected`, exceptions and errors in the log are left to the test, which finds them in `faults`.
        """
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
        self.faults: list[str] = []  # exceptions that reached the loop, and errors in the log
        self.log: list[str] = []  # the messages of all records
        self.ended: list[Ended] = []  # the requests that are over, in order
        self.stopping: asyncio.Task[None] | None = None
        self._held_up = False
        self.patience = 0.0

    # All that is known here of the product's own classes

    def _make(self) -> None:
        self.upstream = Upstream("vllm.socket", self.loop)
        policy = Policy(**self.policy)  # type: ignore[arg-type]
        admission = Admission(*self.admission)
        self.gateway = Gateway(self.view, self.upstream, policy, admission, facts={}, **self.options)  # type: ignore[arg-type]
        self.gateway.watch(self._note_end)
        self.server = self.gateway.server
        self.server.config.load()
        self.server.lifespan = LifespanOff(self.server.config)  # uvicorn makes it where it begins to serve

    def _protocol(self, *, private: bool) -> asyncio.Protocol:
        """Returns the gateway's protocol for one new connection of a client's."""
        if private:
            return self.server.private_client()
        return self.server.public_client(config=self.server.config, server_state=self.server.server_state, app_state={})

    def watched_by(self, watcher: Callable[[object], None]) -> None:
        """Adds a watcher, which is called with the record of each request that is over, before all others."""
        for door in (self.gateway.public_door, self.gateway.private_door):
            door.watchers = (watcher, *door.watchers)

    def _note_end(self, record: Record) -> None:
        self.ended.append(Ended(record.request_id, record.request.path, record.status, record.client_left))

    def _report_state(self) -> None:
        self.gateway.gate.engine_changed()
        if not self.engine.alive:
            self.upstream.close()

    async def _stop(self, patience: float) -> None:
        """Does what `serve.py` does after a signal, and uvicorn after that."""
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
        """The number of requests that were let in, and are not over."""
        return self.gateway.gate.active

    @property
    def waiting(self) -> int:
        """The number of requests that are held for the engine, or wait for their turn."""
        return self.gateway.count_requests()["waiting"]

    @property
    def in_flight(self) -> int:
        return len(self.gateway.exchanges)

    @property
    def sent_bytes(self) -> int:
        """Bytes of answers' bodies, sent to all clients."""
        return self.gateway.counts.sent

    @property
    def awaited(self) -> int:
        """The number of requests whose next byte vLLM owes, by which a hang is recognized."""
        return len(self.gateway.traffic()[0])

    @property
    def connections(self) -> int:
        """The number of clients' open connections."""
        return len(self.gateway.clients.connections)

    @property
    def requests_in_memory(self) -> int:
        """The number of request objects that somebody keeps a reference to, after a garbage collection."""
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
        """Ends all tasks and the loop, without a check."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        with contextlib.suppress(AssertionError):
            self.loop.settle()
        clients._poll = self._poll
        logging.getLogger().removeHandler(self._handler)
        self.loop.close()

    def check(self) -> None:
        """Asserts what holds in every world at every moment."""
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
        """Runs a coroutine on the loop, and returns its result."""
        return self.loop.run_until_complete(what)

    def settle(self) -> None:
        """Runs the loop until nothing is left to do at this moment; does nothing within `at_once`."""
        if not self._held_up and not self.loop.is_running():
            self.loop.settle()

    @property
    def now(self) -> float:
        """Seconds since this world began."""
        return self.loop.time() - BEGINNING

    def passes(self, seconds: float) -> None:
        """Moves the clock so far; every timer on the way rings at its own time."""
        self.loop.passes(seconds)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Holds the loop up: all that is done in the block happens before the gateway has a turn."""
        before, self._held_up = self._held_up, True
        try:
            yield
        finally:
            self._held_up = before
            self.settle()

    # What happens

    def client(self, *, private: bool = False, file: int = 3) -> ScriptedClient:
        """Returns a client on a new connection.

        A `private` one comes over the socket that only the queue worker can open. `file` is the number of the socket's
        file on the gateway's side.
        """
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
        """Tells the gateway the engine's state, as the supervisor does when it has learnt of it.

        It is starting, ready, restarting, draining, stopping, stopped or failed. With `ready`, the engine lives.
        """
        self.view.state = state
        if state == "ready":
            self.engine.lives()
        self._report_state()
        self.settle()

    def terminates(self, patience: float = 60.0) -> None:
        """Does what SIGTERM does: what is in flight has `patience` seconds, and is cut then. Only the first counts."""
        if self.stopping is None:
            self.engine_is("draining")
            self.stopping = self.loop.create_task(self._stop(patience))
            self.settle()

    @property
    def over(self) -> bool:
        """True when the end that `terminates` began is complete."""
        return self.stopping is not None and self.stopping.done()

    def told(self, text: str) -> int:
        """Returns how many records of the log contain the text."""
        return sum(text in line for line in self.log)


def _poll(transport: asyncio.Transport) -> int:
    """Stands for `client._poll`: returns what the system would say of a scripted socket."""
    return select.POLLRDHUP if isinstance(transport, ScriptedTransport) and transport.far_ended else 0


def _plain(status: int) -> bytes:
    return b"HTTP/1.1 %d Reason\r\ncontent-length: 0\r\n\r\n" % status
