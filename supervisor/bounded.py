"""Calls that may hang: a driver, a disk, a hub. Each has a daemon thread of its own, so that neither the loop nor the
end of the program waits for it. asyncio's own executor is no place for them: it is joined at the end, and it is full
when a few of its threads hang.
"""

from __future__ import annotations

import contextlib
import stat
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio

Found = TypeVar("Found")
# Of a file that the user named: seconds for it, and how many bytes it may have. A shell's `<(...)` may ask somebody.
FILE_PATIENCE, LARGEST_FILE = 10.0, 2**20


class Call(Generic[Found]):
    """`Call(function)` begins at once. `wait` for it, or await it; asyncio is needed for the latter only."""

    def __init__(self, function: Callable[[], Found]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._then: list[Callable[[], object]] = []
        self._found: list[Found] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="bounded", daemon=True).start()

    def _run(self) -> None:
        try:
            self._found.append(self._function())
        except BaseException as error:  # noqa: BLE001  # it is raised where the result is asked for
            self._error = error
        with self._lock:
            self._over.set()
        for then in self._then:
            then()

    def wait(self, seconds: float) -> bool:
        """Whether it is over within so many seconds."""
        return self._over.wait(seconds)

    @property
    def hangs(self) -> bool:
        """Whether it is not over yet."""
        return not self._over.is_set()

    def result(self) -> Found:
        """Of a call that is over; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._found[0]

    def then(self, function: Callable[[], object]) -> None:
        """Calls `function` when it is over: from its thread, or at once."""
        with self._lock:
            if not self._over.is_set():
                self._then.append(function)
                return
        function()

    def abandon(self, discard: Callable[[Found], object]) -> None:
        """Nobody waits any more: `discard` gets what it may still find."""
        self.then(lambda: discard(self._found[0]) if self._found else None)

    def __await__(self) -> Generator[Any, None, Found]:
        import asyncio  # noqa: PLC0415  # 40 ms that vLLM's start does not wait for

        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(_settle, over)

        self.then(tell)
        yield from over
        return self.result()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def bounded(seconds: float | None, call: Callable[[], Found]) -> Found:
    """What the call returns. Raises TimeoutError after so many seconds (None: it may take as long as it likes); what
    it finds later is lost."""
    import asyncio  # noqa: PLC0415

    async with asyncio.timeout(seconds):
        return await Call(call)


def within(seconds: float, ask: Callable[[], Found]) -> Found | None:
    """For those without a loop: what it returns; None where it takes longer, or raises."""
    call = Call(ask)
    if call.wait(seconds):
        with contextlib.suppress(Exception):
            return call.result()
    return None


def read_file(path: Path, *, again: bool = False) -> bytes:
    """What is in it. Raises OSError, as for what never ends or never comes. `again`: others read it once more, which a
    pipe does not allow."""

    def read() -> bytes:
        if again and not stat.S_ISREG(path.stat().st_mode):
            raise OSError(0, "no plain file")
        with path.open("rb") as file:
            return file.read(LARGEST_FILE + 1)

    call = Call(read)
    if not call.wait(FILE_PATIENCE):
        raise OSError(0, f"nothing came of it in {FILE_PATIENCE:g} s: a pipe that nobody fills, or a disk that hangs")
    if len(found := call.result()) > LARGEST_FILE:
        raise OSError(0, f"it has more than {LARGEST_FILE >> 20} MiB")
    return found
