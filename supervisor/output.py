"""What is written to our stdout or stderr: by a thread, which may have to wait for a reader. Nobody else waits.

vLLM logs where it works: were its pipe not read while a terminal stands still (Ctrl-S) or a collector hangs, it would
stand still as well, and then be taken for hung. So what nobody takes is lost in the end, and how much it was is told.

On a terminal a few lines may stay below the log while it passes: the foot, where `up` shows how far a start is.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable, Sequence

# What may wait for a reader: lines (or batches of them), and bytes.
BACKLOG, BACKLOG_BYTES = 10_000, 8_000_000
# Seconds for a reader to take the last lines.
LAST_LINES = 1.0
USUAL_HEIGHT = 24  # where a terminal tells none
INTERVAL = 0.15  # seconds between two pictures of the foot

Make = Callable[[], bytes]
Picture = Callable[[], Sequence[str]]


class Output:
    """`put(lines)` from any thread, until `close()`. `show(picture)` until `hide()`: the foot, on a terminal."""

    def __init__(self, target: int, lost: Callable[[int], bytes]) -> None:
        """`target` is a file descriptor; `lost` makes the line that tells how many lines were."""
        self.target = target
        self.lost_line = lost
        self.lost = 0
        # Called when nothing was put for so many seconds (None: never), and, with True, at the end: more lines.
        self.pause: float | None = None
        self.idle: Callable[[bool], bytes] = lambda ended: b""
        self._waiting: queue.SimpleQueue[tuple[int, Make] | None] = queue.SimpleQueue()
        self._bytes = 0
        self._lock = threading.Lock()
        self._picture: Picture | None = None
        self._drawn = 0
        self._thread = threading.Thread(target=self._run, name=f"output-{target}", daemon=True)
        self._thread.start()

    def put(self, lines: bytes, count: int = 1) -> None:
        """Whole lines, the last line's end included; `count` of them."""
        self.later(lambda: lines, len(lines), count)

    def later(self, make: Make, size: int = 0, count: int = 1) -> None:
        """Lines that the thread is to make; `size` in bytes, where it is known."""
        with self._lock:
            if self._waiting.qsize() >= BACKLOG or self._bytes > BACKLOG_BYTES:
                self.lost += count
                return
            self._bytes += size
        self._waiting.put((size, make))

    def show(self, picture: Picture) -> None:
        """`picture` is called by the thread, and gives the foot's lines."""
        self._picture = picture
        self.later(bytes)

    def hide(self) -> None:
        self._picture = None

    def close(self) -> None:
        """Writes what waits, if somebody reads it."""
        self.hide()
        self._waiting.put(None)
        self._thread.join(LAST_LINES)

    # In the thread

    def _run(self) -> None:
        ended = False
        while not ended:
            data = self._lost()
            try:
                item = self._waiting.get(timeout=INTERVAL if self._drawn or self._picture else self.pause)
                if item is None:
                    data, ended = data + self.idle(True), True
                else:
                    data += item[1]()
                    with self._lock:
                        self._bytes -= item[0]
            except queue.Empty:
                data += self.idle(False)
            self._write(self._erased() + data + self._foot())

    def _lost(self) -> bytes:
        if not self.lost:
            return b""
        with self._lock:
            lost, self.lost = self.lost, 0
        return self.lost_line(lost)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self.target, data) :]
            except BlockingIOError:  # another process made the terminal so, which is one for all of them
                select.select([], [self.target], [])
            except OSError:
                return  # nobody reads it any more: vLLM's log must still be taken from it

    def _erased(self) -> bytes:
        drawn, self._drawn = self._drawn, 0
        return b"\x1b[%dF\x1b[J" % drawn if drawn else b""

    def _foot(self) -> bytes:
        picture = self._picture
        if picture is None:
            return b""
        try:
            height = os.get_terminal_size(self.target).lines or USUAL_HEIGHT
        except OSError:
            return b""
        lines = picture()[-(height // 2) :]
        self._drawn = len(lines)
        # Without wrapping, so that a line is a line.
        return ("\x1b[?7l" + "".join(f"{line}\n" for line in lines) + "\x1b[?7h").encode()
