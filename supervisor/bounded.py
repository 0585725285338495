"""Calls that may hang, on a driver, a disk or a hub. Each has a daemon thread of its own, so that neither the loop nor
the end of the program waits for it. asyncio's own executor is no place for them: it is joined at the end, and is full
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

Result = TypeVar("Result")
# A file that the user named may take this many seconds, and have this many bytes. A shell's `<(...)` may ask somebody.
FILE_PATIENCE, LARGEST_FILE = 10.0, 2**20


class Call(Generic[Result]):
    """A call that begins at once, in a thread. One may `wait` for it, or await it; only the latter needs asyncio."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._results: list[Result] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="bounded", daemon=True).start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # noqa: BLE001  # it is raised where the result is asked for
            self._error = error
        with self._lock:
            self._done.set()
        for callback in self._callbacks:
            callback()

    def wait(self, seconds: float) -> bool:
        """Waits so many seconds at most, and returns whether the call is over."""
        return self._done.wait(seconds)

    @property
    def is_running(self) -> bool:
        """True until the call is over, however long it hangs."""
        return not self._done.is_set()

    def result(self) -> Result:
        """Returns the result of a call that is over, or raises what the call raised."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    def add_callback(self, function: Callable[[], object]) -> None:
        """Calls `function` when the call is over: from the call's thread, or at once."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(function)
                return
        function()

    def abandon(self, discard: Callable[[Result], object]) -> None:
        """Passes the result to `discard` if the call still has one: nobody waits for it any more."""
        self.add_callback(lambda: discard(self._results[0]) if self._results else None)

    def __await__(self) -> Generator[Any, None, Result]:
        import asyncio  # noqa: PLC0415  # it takes 40 ms, for which vLLM's start does not wait

        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(_settle, future)

        self.add_callback(settle)
        yield from future
        return self.result()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def run_bounded(seconds: float | None, function: Callable[[], Result]) -> Result:
    """Returns what the function returns. Raises TimeoutError after so many seconds (with None there is no limit); what
    the function returns later is lost."""
    import asyncio  # noqa: PLC0415

    async with asyncio.timeout(seconds):
        return await Call(function)


def try_bounded(seconds: float, function: Callable[[], Result]) -> Result | None:
    """Returns what the function returns, for those without a loop; None where it takes longer, or raises."""
    call = Call(function)
    if call.wait(seconds):
        with contextlib.suppress(Exception):
            return call.result()
    return None


def read_file(path: Path, *, regular_only: bool = False) -> bytes:
    """Returns a file's content. Raises OSError, also where it never ends or never comes. `regular_only` refuses all but
    plain files: others will read the file once more, which a pipe does not allow."""

    def read() -> bytes:
        if regular_only and not stat.S_ISREG(path.stat().st_mode):
            raise OSError(0, "no plain file")
        with path.open("rb") as file:
            return file.read(LARGEST_FILE + 1)

    call = Call(read)
    if not call.wait(FILE_PATIENCE):
        raise OSError(0, f"nothing came of it in {FILE_PATIENCE:g} s: a pipe that nobody fills, or a disk that hangs")
    if len(content := call.result()) > LARGEST_FILE:
        raise OSError(0, f"it has more than {LARGEST_FILE >> 20} MiB")
    return content
