"""Our own log: one line for each event, written by a thread (lines.py has their looks).

A thread, because a terminal or collector that stops reading must not stop the event loop. Every line goes through the
mask, so that no secret can reach it, whoever logs. What comes again and again is told a few times, then counted.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence

from supervisor.lines import Form, Write, write_all

# Lines that may wait for a reader that has stopped; further ones are lost, which is better than standing still.
BACKLOG = 10_000
# Lines that differ in nothing but numbers and ids: so many in so many seconds, then one that counts the others.
ALIKE, ALIKE_SECONDS = 10, 10.0
VARYING = re.compile(r"\b(?=[\w.-]*\d)[\w.-]+")
# Kinds of lines that are counted at a time.
KINDS = 500
STDERR = 2
# Seconds for a reader to take the last lines.
LAST_LINES = 1.0


class Repeats:
    """`passes(kind, line, now)`: whether it is to be told; `due(now)`: (kind's last line, how many were not)."""

    def __init__(self) -> None:
        self.kinds: dict[object, tuple[float, int, str]] = {}

    def passes(self, kind: object, line: str, now: float) -> bool:
        since, count, _ = self.kinds.get(kind, (now, 0, ""))
        if count or len(self.kinds) < KINDS:
            self.kinds[kind] = since, count + 1, line
        return count < ALIKE

    def due(self, now: float) -> list[tuple[str, int]]:
        over = [(kind, row) for kind, row in self.kinds.items() if row[0] <= now - ALIKE_SECONDS]
        for kind, _ in over:
            del self.kinds[kind]
        return [(line, count - ALIKE) for _, (_, count, line) in over if count > ALIKE]


class Log(logging.Handler):
    """The root's handler. `close()` writes what waits, and ends the thread.

    A record's `request` is an id, its `fields` are more for JSON; with `each` it is told however many are like it.
    """

    def __init__(self, form: Form, write: Write = write_all) -> None:
        super().__init__()
        self.form = form
        self.write = write
        self.waiting: queue.SimpleQueue[Callable[[], Sequence[str]] | None] = queue.SimpleQueue()
        self.lost = 0
        self.repeats = Repeats()
        self.thread = threading.Thread(target=self._run, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self.later(lambda: self._lines(record))

    def later(self, lines: Callable[[], Sequence[str]]) -> None:
        """Has the thread make lines, and write them."""
        if self.waiting.qsize() < BACKLOG:
            self.waiting.put(lines)
        else:
            self.lost += 1

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join(LAST_LINES)
        super().close()

    # In the thread

    def _run(self) -> None:
        make: Callable[[], Sequence[str]] | None = lambda: ()  # noqa: E731
        while make is not None:
            lines = self._told_again()
            try:
                # Also when nothing comes, what was held back is to be told.
                make = self.waiting.get(timeout=ALIKE_SECONDS if self.repeats.kinds else None)
                lines += make() if make is not None else self._told_again(at_once=True)
            except queue.Empty:
                pass
            except Exception as error:  # noqa: BLE001  # a line that can't be made must not be the last one
                lines.append(self._line("ERROR", __name__, f"a line was lost ({type(error).__name__}: {error})"))
            if lines:
                with contextlib.suppress(OSError):  # nobody reads any more
                    self.write(STDERR, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))

    def _told_again(self, *, at_once: bool = False) -> list[str]:
        found = [
            self._line("WARNING", __name__, f"{count} more of these in {ALIKE_SECONDS:g} s: {line}")
            for line, count in self.repeats.due(float("inf") if at_once else time.monotonic())
        ]
        if self.lost:
            lost, self.lost = self.lost, 0
            found.append(self._line("WARNING", __name__, f"{lost} lines were lost here: nobody read the log"))
        return found

    def _lines(self, record: logging.LogRecord) -> list[str]:
        message = record.getMessage()
        kind = (record.name, record.levelno, VARYING.sub("#", message))
        repeats = record.levelno >= logging.WARNING and not getattr(record, "each", False)
        if repeats and not self.repeats.passes(kind, message, time.monotonic()):
            return []
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        request = getattr(record, "request", None)
        fields = getattr(record, "fields", {})
        return [self._line(record.levelname, record.name, message, record.created, request, **fields)]

    def _line(
        self, level: str, logger: str, message: str, at: float | None = None, request: str | None = None, **more: object
    ) -> str:
        at = time.time() if at is None else at
        if self.form.as_json:
            return self.form.json(level, logger, message, at, request, **more)
        return self.form.text(level, message, at, request)


def start(form: Form, level: str, write: Write = write_all) -> Log:
    """Takes the root logger over; call `close()` on what it returns before leaving."""
    log = Log(form, write)
    root = logging.getLogger()
    root.handlers = [log]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel("WARNING")
    logging.raiseExceptions = False  # a closed stderr must not end in a traceback on it
    return log
