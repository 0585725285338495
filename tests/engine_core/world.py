"""The engine's owner in one process: vLLM is a script, and the clock is moved by hand.

    with World() as world:
        vllm = world.launched()
        vllm.answers()
        world.passes(1)
        assert world.engine.state is State.READY
        vllm.exits(1)
        world.passes(30)
        assert world.seen.states[:3] == [State.READY, State.RESTARTING, State.STARTING]

The loop's time stands still until `passes` moves it: then every timer rings at its own time, and nothing is waited for.
Times are in seconds. No process is started, and leaving the block ends the engine and the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from supervisor.around.account import Account
from supervisor.around.phases import Waterfall
from supervisor.bounded import Call
from supervisor.engine.engine import Engine, Limits
from supervisor.engine.lifecycle import State
from supervisor.engine.run import Change, Observer, Run, Traffic
from tests.clock import Loop

LIMITS = Limits(startup=60.0, terminate=10.0, stall=20.0, restarts=5, window=600.0, stay_when_failed=False)


class ScriptedVllm:
    """Stands for `engine.child.Child`: it does what the test says, and keeps what the engine does to it.

    It also stands for its own log buffer (`follow`, `take`, `tail`).
    """

    def __init__(self, world: World, pid: int) -> None:
        self.world = world
        self.pid = pid
        self.command = SimpleNamespace(argv=("vllm", "serve"), fetches=False)
        self.spawned_at = time.monotonic()
        self.session = SimpleNamespace(sid=pid)
        self.code: int | None = None  # the exit code; None: it runs
        self.status: int | None = None  # what /health answers; None: no answer
        self.metrics: bytes | None = None  # what /metrics answers; None: no answer
        self.parts: dict[int, str] = {}
        self.undying: list[int] = []  # pids that are left of it at the end
        self.deaf = False  # it ignores SIGTERM
        self.removed = False  # the engine has ended it
        self.terminated = 0  # how often it got SIGTERM
        self.log_buffer = self
        self.tail: deque[str] = deque(maxlen=500)
        self._fresh: list[str] = []  # lines of its log that the engine has not taken
        self._wake: Callable[[], object] = lambda: None
        self._exited = asyncio.Event()
        world.vllms.append(self)

    # What the test does

    @property
    def alive(self) -> bool:
        return self.code is None and not self.removed

    def answers(self, status: int = 200) -> None:
        """Answers /health with this status from now on."""
        self.status = status

    def exits(self, code: int = 1) -> None:
        """Ends with this code; the first one counts."""
        if self.code is None:
            self.code = code
            self.status = self.metrics = None
            self._exited.set()

    def says(self, *lines: str) -> None:
        """Writes these lines to its log."""
        self.tail.extend(lines)
        self._fresh.extend(lines)
        self._wake()

    # What the engine does

    def follow(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        wake()

    def take(self) -> list[str]:
        taken, self._fresh = self._fresh, []
        return taken

    async def wait(self) -> int:
        await self._exited.wait()
        assert self.code is not None
        return self.code

    async def survey(self) -> Mapping[int, str]:
        return {}  # pidfds are for real processes

    def terminate(self) -> None:
        self.terminated += 1
        if not self.deaf:
            self.exits(0)

    async def end(self) -> list[int]:
        return self.end_sync()

    def end_sync(self) -> list[int]:
        self.exits(-9)
        self.removed = True
        return self.undying


class ScriptedLaunch:
    """Stands for the `bounded.Call` of a start that is under way: the test says how it ends.

    with World(slow_launch=True) as world:
        vllm = world.launches[-1].succeeds()
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.spawned: asyncio.Future[ScriptedVllm] = world.loop.create_future()
        self.discard: Callable[[ScriptedVllm], object] | None = None  # set where the engine waits no more

    def succeeds(self) -> ScriptedVllm:
        """Returns the vLLM that is now spawned; an abandoned start passes it to `discard`."""
        vllm = ScriptedVllm(self.world, self.world.new_pid())
        if self.discard is not None:
            self.discard(vllm)
        else:
            self.spawned.set_result(vllm)
        return vllm

    def fails(self, error: OSError) -> None:
        self.spawned.set_exception(error)

    def abandon(self, discard: Callable[[ScriptedVllm], object]) -> None:
        self.discard = discard

    def __await__(self) -> Generator[Any, None, ScriptedVllm]:
        return self.spawned.__await__()


class Front:
    """Stands for the gateway, which passes requests to the engine: the test sets what it knows of them."""

    def __init__(self) -> None:
        self.waiting: list[object] = []  # requests that wait for vLLM's next byte
        self.signs = 0  # a test counts it up when the engine has made something
        self.drained: asyncio.Future[bool] | None = None  # None: no drain has begun; the test sets its result

    def traffic(self) -> Traffic:
        return Traffic(tuple(self.waiting), self.signs)

    async def drain(self) -> bool:
        self.drained = asyncio.get_running_loop().create_future()
        return await self.drained


class RecordingObserver(Observer):
    """An observer that keeps what it is told, in order."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.runs: list[Run] = []
        self.failures: list[str] = []  # the verdicts
        self.lines: list[str] = []  # vLLM's log, of all runs
        self.hung_runs = 0
        self.removals = 0

    def run_began(self, run: Run) -> None:
        self.runs.append(run)

    def lines_logged(self, run: Run, lines: Sequence[str]) -> None:
        self.lines += lines

    def state_changed(self, change: Change) -> None:
        self.states.append(change.state)

    def run_removed(self) -> None:
        self.removals += 1

    async def run_hung(self, run: Run) -> None:
        self.hung_runs += 1

    async def run_failed(self, run: Run, verdict: str, given_up: bool) -> None:
        self.failures.append(verdict)


async def run_in_stopped_time(_seconds: float | None, call: Callable[[], Any]) -> Any:
    """Stands for `bounded.run_bounded` where the time stands still: the call's thread takes none of it."""
    bounded_call = Call(call)
    bounded_call.wait(30)
    return bounded_call.result()


class World:
    """The engine, its front, its observers, and whatever is launched, for one test: `with World() as world`.

    A start succeeds at once; with `slow_launch` it waits for the test (`ScriptedLaunch`).
    """

    def __init__(self, limits: Limits = LIMITS, *observers: Observer, slow_launch: bool = False) -> None:
        self.loop = Loop()
        self.limits = limits
        self.slow_launch = slow_launch
        self.front = Front()
        self.seen = RecordingObserver()
        self.observers = observers
        self.vllms: list[ScriptedVllm] = []  # all that were spawned, in order
        self.launches: list[ScriptedLaunch] = []  # all starts, in order
        self.asked_paths: list[str] = []  # what the engine asked vLLM, in order
        self.latest_pid = 1000
        self.log: list[logging.LogRecord] = []
        self.engine: Engine = None  # type: ignore[assignment]  # made on the loop
        self.account: Account = None  # type: ignore[assignment]  # an observer, made on the loop
        self.running: asyncio.Task[int] = None  # type: ignore[assignment]

    def __enter__(self) -> World:
        self._bounded_patch = patch("supervisor.engine.engine.run_bounded", run_in_stopped_time)
        self._bounded_patch.start()
        self._handler = logging.Handler()
        self._handler.emit = self.log.append  # type: ignore[method-assign,assignment]
        logger = logging.getLogger("supervisor")
        logger.addHandler(self._handler)
        logger.setLevel(logging.DEBUG)

        async def begin() -> None:
            self.engine = Engine(self.launch, self.ask, self.limits, lambda vllm: Waterfall(vllm.spawned_at))  # type: ignore[arg-type]
            self.account = Account(self.engine)
            running = self.engine.run(self.front, [self.account, self.seen, *self.observers])
            self.running = self.loop.create_task(running)

        self.do(begin())
        self.settle()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.loop.run_until_complete(self.running)
        finally:
            self._bounded_patch.stop()
            logging.getLogger("supervisor").removeHandler(self._handler)
            self.loop.close()

    # The clock

    def do(self, what: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the loop, and returns its result."""
        return self.loop.run_until_complete(what)

    def settle(self) -> None:
        """Gives the loop 60 turns: enough that nothing is left to do at this moment."""

        async def turns() -> None:
            for _ in range(60):
                await asyncio.sleep(0)

        self.do(turns())

    def passes(self, seconds: float) -> None:
        """Moves the clock so far; every timer on the way rings at its own time."""
        self.settle()
        self.loop.clock.limit = self.loop.clock.now + seconds
        self.do(asyncio.sleep(seconds))
        self.settle()

    # What is launched, asked and logged

    def launch(self) -> ScriptedLaunch:
        """Starts a vLLM, for the engine."""
        launching = ScriptedLaunch(self)
        self.launches.append(launching)
        if not self.slow_launch:
            launching.succeeds()
        return launching

    def new_pid(self) -> int:
        self.latest_pid += 1
        return self.latest_pid

    def launched(self) -> ScriptedVllm:
        """Returns the latest vLLM."""
        self.settle()
        return self.vllms[-1]

    def serves(self) -> ScriptedVllm:
        """Lets the latest vLLM answer, until the engine is ready, and returns it; a second passes."""
        vllm = self.launched()
        vllm.answers()
        self.passes(1)
        assert self.engine.state is State.READY
        return vllm

    async def ask(self, path: str, body: bytes, patience: float) -> tuple[int, bytes] | None:
        """Asks the latest vLLM, for the engine (`engine.run.Ask`); returns None without an answer."""
        self.asked_paths.append(path)
        vllm = self.vllms[-1] if self.vllms else None
        if vllm is None or not vllm.alive:
            return None
        if path == "/metrics":
            return (200, vllm.metrics) if vllm.metrics is not None else None
        return (vllm.status, b"") if vllm.status is not None else None

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Does what a signal of this number does."""
        self.engine.stop(number)
        self.settle()

    @property
    def over(self) -> bool:
        """True when the engine's task is done."""
        return self.running.done()

    @property
    def exit_code(self) -> int:
        """What the supervisor would exit with, once the engine is `over`."""
        return self.running.result()

    def told(self, text: str) -> int:
        """Returns how many records of our log contain the text."""
        return sum(text in record.getMessage() for record in self.log)

    def check(self) -> None:
        """Asserts what holds whenever nothing is left to do at this moment."""
        living = [vllm for vllm in self.vllms if not vllm.removed]
        assert len(living) <= 1, "two engines at once"
        if self.engine.state is State.READY:
            assert living
            assert living[0].code is None, "ready, and no engine alive"
        if self.engine.state in (State.RESTARTING, State.STOPPED, State.FAILED):
            assert not living, f"{self.engine.state}, and one is left"
            assert self.engine.living_run is None
        if self.over:
            assert not living
