"""The foot of a terminal: a few lines that stay below the log while it passes. There `up` shows how far a start is.

All that is written to the terminal goes through `Foot.write`, from whatever thread; the foot is taken away for it, and
drawn again. Its own thread draws it, for a terminal that stands still (Ctrl-S) must hold up nobody else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from supervisor.lines import COLOURS, DIM, PLAIN, write_all

USUAL_HEIGHT = 24  # where the terminal tells none
INTERVAL = 0.15  # seconds between two pictures
STDERR = 2
BAR, SPINNER, DONE = "━", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "✓"
NAME_WIDTH, BAR_WIDTH = 29, 32

Picture = Callable[[], Sequence[str]]


class Foot:
    """`show(picture)` until `hide()`; `picture()` is called by threads, and gives the lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._drawn = 0
        self._picture: Picture | None = None
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, target: int, data: bytes) -> None:
        """Whole lines. Raises OSError where nobody reads any more."""
        with self._lock:
            self._erase()
            write_all(target, data)
            self._draw()

    def show(self, picture: Picture) -> None:
        self._picture = picture
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="foot", daemon=True)
            self._thread.start()
        self._wake.set()

    def hide(self) -> None:
        self._picture = None

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone
            while self._wake.wait():
                with self._lock:
                    self._erase()
                    self._draw()
                    if self._picture is None:
                        self._wake.clear()
                time.sleep(INTERVAL)

    def _erase(self) -> None:
        if self._drawn:
            write_all(STDERR, b"\x1b[%dF\x1b[J" % self._drawn)
            self._drawn = 0

    def _draw(self) -> None:
        picture = self._picture
        if picture is None:
            return
        lines = picture()[-(os.get_terminal_size(STDERR).lines or USUAL_HEIGHT) // 2 :]
        # Without wrapping, so that a line is a line.
        write_all(STDERR, ("\x1b[?7l" + "".join(f"{line}\n" for line in lines) + "\x1b[?7h").encode())
        self._drawn = len(lines)


def waterfall(phases: Sequence[Mapping[str, object]], note: str = "", *, running: bool, colour: bool) -> list[str]:
    """A line for each phase (`name`, `seconds`), its bar where its time was. `note` is how far the last one is."""
    dim, mark, plain = (DIM, COLOURS["INFO"], PLAIN) if colour else ("", "", "")
    times = [float(str(row["seconds"])) for row in phases]
    total = max(sum(times), 0.001)
    lines, before = [], 0.0
    for number, (row, seconds) in enumerate(zip(phases, times, strict=True)):
        last = number == len(times) - 1
        sign = SPINNER[int(time.monotonic() / INTERVAL) % len(SPINNER)] if last and running else DONE
        start, end = round(BAR_WIDTH * before / total), round(BAR_WIDTH * (before + seconds) / total)
        bar = " " * start + BAR * max(1, end - start)
        about = f"  {note}" if last and note else ""
        name = f"{row['name']!s:<{NAME_WIDTH}}"
        lines.append(f"{mark}{sign}{plain} {name}{dim}{seconds:6.1f} s{plain}  {bar}{about}")
        before += seconds
    return lines
