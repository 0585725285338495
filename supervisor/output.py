"""Output to our stdout or stderr. It is written at once where a pipe has room for it, else by a thread, which may have
to wait for a reader. Nobody else waits.

vLLM logs where it works: were its pipe not read while a terminal stands still (Ctrl-S) or a collector hangs, it would
stand still as well, and then be taken for hung. So lines that nobody reads are lost in the end, and then counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import threading
from collections.abc import Callable

BACKLOG_BYTES = 8_000_000  # so many bytes may wait for a reader
# A pipe holds so many bytes: a busy reader is some ms late, in which 64 kB, the usual size, would be full.
PIPE_BYTES = 1 << 18
LAST_LINES_PATIENCE = 1.0  # a reader has so many seconds to take the last lines


class Output:
    """Takes lines by `put`, from any thread, until `close`."""

    def __init__(self, descriptor: int, lost_line: Callable[[int], bytes]) -> None:
        """`descriptor` is that of a file; `lost_line` makes the line that tells how many lines were lost."""
        self.descriptor = descriptor
        self.lost_line = lost_line
        self.lost_count = 0
        self._pipe = _reopen_pipe(descriptor)
        self._buffer = bytearray()
        self._unwritten_bytes = 0  # those that wait, and those that the thread is writing
        self._closed = False
        # It is reentrant, for the garbage collector may run meanwhile, and what it comes across may be logged.
        self._condition = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name=f"output-{descriptor}", daemon=True)
        self._thread.start()

    def put(self, lines: bytes, count: int = 1) -> None:
        """Takes `count` whole lines, with the last line's end. Once lines are lost, so are all that follow until the
        buffer is written: one line in their place then tells how many were lost."""
        with self._condition:
            if self.lost_count or self._unwritten_bytes + len(lines) > BACKLOG_BYTES:
                self.lost_count += count
            else:
                if not self._unwritten_bytes and self._pipe is not None:
                    lines = lines[_try_write(self._pipe, lines) :]
                self._buffer += lines
                self._unwritten_bytes += len(lines)
                if not lines:
                    return
            self._condition.notify()

    def close(self) -> None:
        """Writes the lines that wait, if somebody reads them."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join(LAST_LINES_PATIENCE)
        with self._condition:
            if self._pipe is not None:
                os.close(self._pipe)
                self._pipe = None

    # The thread calls these.

    def _run(self) -> None:
        ended = False
        while not ended:
            with self._condition:
                if not self._buffer and not self.lost_count and not self._closed:
                    self._condition.wait(self._wait_timeout())
                if self.lost_count and not self._buffer:
                    self._buffer += self.lost_line(self.lost_count)
                    self._unwritten_bytes += len(self._buffer)
                    self.lost_count = 0
                data, self._buffer = self._buffer, bytearray()
                ended = self._closed and not data
            self._write(data)
            with self._condition:
                self._unwritten_bytes -= len(data)

    def _wait_timeout(self) -> float | None:
        """Returns after how many seconds something is to be written though nobody has put anything; None is never."""
        return None

    def _write(self, data: bytes | bytearray) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.descriptor, rest) :]
            except BlockingIOError:  # another process made the terminal non-blocking, which they all share
                select.select([], [self.descriptor], [])
            except OSError:
                return  # nobody reads it any more: vLLM's log must still be taken from it


def _reopen_pipe(descriptor: int) -> int | None:
    """Returns a second descriptor of a pipe, one that does not block; None where that can't be had.

    O_NONBLOCK belongs to the open file, which the shell and our children share with us: set on stderr itself it would
    be set for them. Asking first whether a pipe has room is not enough, since one of them may fill it meanwhile.
    A file or a disk may take long whatever the flag says, and a terminal is not opened twice: the thread serves these.
    """
    try:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            pipe = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
            with contextlib.suppress(OSError):  # this user may have no more large pipes
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, max(PIPE_BYTES, fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)))
            return pipe
    except OSError:  # it is another user's, or there is no /proc, or no reader
        pass
    return None


def _try_write(pipe: int, data: bytes) -> int:
    """Writes without waiting, and returns how many bytes the pipe took."""
    try:
        return os.write(pipe, data)
    except BlockingIOError:
        return 0
    except OSError:  # nobody reads it any more
        return len(data)
