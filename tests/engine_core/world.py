"""The engine's owner in one process: vLLM is a script, and the clock is moved by hand.

    with World() as world:
        run = world.launched()
        run.answers()
        world.settle()
        assert world.engine.ready
        world.passes(120)

The loop's time stands still until `passes` moves it: then every timer rings in its turn, and nothing is waited for.
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
    """Stands for `engine.child.Child`: it does what the test says, and notes what is done to it."""

    def __init__(self, world: World, pid: int) -> None:
        self.world = world
        self.pid = pid
        self.command = SimpleNamespace(argv=("vllm", "serve"), fetches=False)
        self.spawned_at = time.monotonic()
        self.session = SimpleNamespace(sid=pid)
        self.code: int | None = None
        self.status: int | None = None  # of /health; None: no answer
        self.metrics: bytes | None = None
        self.parts: dict[int, str] = {}
        self.undying: list[int] = []
        self.deaf = False
        self.removed = False
        self.terminated = 0
        self.log_buffer = self
        self.tail: deque[str] = deque(maxlen=500)
        self._fresh: list[str] = []
        self._wake: Callable[[], object] = lambda: None
        self._exited = asyncio.Event()
        world.vllms.append(self)

    # What the test does

    @property
    def alive(self) -> bool:
        return self.code is None and not self.removed

    def answers(self, status: int = 200) -> None:
        self.status = status

    def exits(self, code: int = 1) -> None:
        if self.code is None:
            self.code = code
            self.status = self.metrics = None
            self._exited.set()

    def says(self, *lines: str) -> None:
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
    """Stands for `bounded.Call`: a start under way, which the test may hold up."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.spawned: asyncio.Future[ScriptedVllm] = world.loop.create_future()
        self.discard: Callable[[ScriptedVllm], object] | None = None

    def succeeds(self) -> ScriptedVllm:
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
    """Stands for the gateway."""

    def __init__(self) -> None:
        self.waiting: list[object] = []
        self.signs = 0
        self.drained: asyncio.Future[bool] | None = None

    def traffic(self) -> Traffic:
        return Traffic(tuple(self.waiting), self.signs)

    async def drain(self) -> bool:
        self.drained = asyncio.get_running_loop().create_future()
        return await self.drained


class RecordingObserver(Observer):
    """What an observer is told, in order."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.runs: list[Run] = []
        self.failures: list[str] = []
        self.lines: list[str] = []
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
    """`bounded.bounded` where the time stands still: in a thread, which takes none of it."""
    bounded_call = Call(call)
    bounded_call.wait(30)
    return bounded_call.result()


class World:
    """An engine, its front, and whatever is launched. With `slow_launch` each start waits for the test."""

    def __init__(self, limits: Limits = LIMITS, *observers: Observer, slow_launch: bool = False) -> None:
        self.loop = Loop()
        self.limits = limits
        self.slow_launch = slow_launch
        self.front = Front()
        self.seen = RecordingObserver()
        self.observers = observers
        self.vllms: list[ScriptedVllm] = []
        self.launches: list[ScriptedLaunch] = []
        self.asked_paths: list[str] = []
        self.latest_pid = 1000
        self.log: list[logging.LogRecord] = []
        self.engine: Engine = None  # type: ignore[assignment]  # made on the loop
        self.account: Account = None  # type: ignore[assignment]  # what others ask of it
        self.running: asyncio.Task[int] = None  # type: ignore[assignment]

    def __enter__(self) -> World:
        self._bounded_patch = patch("supervisor.engine.engine.run_bounded", run_in_stopped_time)
        self._bounded_patch.start()
        self._handler = logging.Handler()
        self._handler.emit = self.log.append  # type: ignore[method-assign]
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
        return self.loop.run_until_complete(what)

    def settle(self) -> None:
        """Until nothing is left to do at this moment."""

        async def turns() -> None:
            for _ in range(60):
                await asyncio.sleep(0)

        self.do(turns())

    def passes(self, seconds: float) -> None:
        self.settle()
        self.loop.clock.limit = self.loop.clock.now + seconds
        self.do(asyncio.sleep(seconds))
        self.settle()

    # What is launched, asked and told

    def launch(self) -> ScriptedLaunch:
        launching = ScriptedLaunch(self)
        self.launches.append(launching)
        if not self.slow_launch:
            launching.succeeds()
        return launching

    def new_pid(self) -> int:
        self.latest_pid += 1
        return self.latest_pid

    def launched(self) -> ScriptedVllm:
        """The latest."""
        self.settle()
        return self.vllms[-1]

    def serves(self) -> ScriptedVllm:
        vllm = self.launched()
        vllm.answers()
        self.passes(1)
        assert self.engine.state is State.READY
        return vllm

    async def ask(self, path: str, body: bytes, patience: float) -> tuple[int, bytes] | None:
        self.asked_paths.append(path)
        vllm = self.vllms[-1] if self.vllms else None
        if vllm is None or not vllm.alive:
            return None
        if path == "/metrics":
            return (200, vllm.metrics) if vllm.metrics is not None else None
        return (vllm.status, b"") if vllm.status is not None else None

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.engine.stop(number)
        self.settle()

    @property
    def over(self) -> bool:
        return self.running.done()

    @property
    def exit_code(self) -> int:
        return self.running.result()

    def told(self, text: str) -> int:
        """How many lines of our log have it."""
        return sum(text in record.getMessage() for record in self.log)

    def check(self) -> None:
        """What must hold whenever nothing is left to do at this moment."""
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
