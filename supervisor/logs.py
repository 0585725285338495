"""Our own log: one line for each event, made where it happens (lines.py), and written without waiting (output.py).

Every line goes through the mask, so that no secret can reach it, whoever logs. A line that comes again and again is
written a few times, then counted.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Sequence

from supervisor.lines import LineStyle
from supervisor.output import Output

# Lines may differ in numbers and ids alone: so many are written in so many seconds, then one that counts the others.
REPEAT_LIMIT, REPEAT_SECONDS = 10, 10.0
# This is a word with a digit in it. It begins where a run of such characters does: a word that may begin inside of it
# is read once for each of its beginnings, and `a-a-a-` has many.
VARYING_WORD = re.compile(r"(?<![\w.-])[\w.-]*\d[\w.-]*")
MAX_KINDS = 500  # so many kinds of lines are counted at a time


class Repeats:
    """Counts lines by kind. `allow`: whether one is to be written; `pop_due`: (kind's last line, how many were not)."""

    def __init__(self) -> None:
        self.kinds: dict[object, tuple[float, int, str]] = {}

    def allow(self, kind: object, line: str, now: float) -> bool:
        since, count, _ = self.kinds.get(kind, (now, 0, ""))
        if count or len(self.kinds) < MAX_KINDS:
            self.kinds[kind] = since, count + 1, line
        return count < REPEAT_LIMIT

    def pop_due(self, now: float) -> list[tuple[str, int]]:
        expired = [(kind, row) for kind, row in self.kinds.items() if row[0] <= now - REPEAT_SECONDS]
        for kind, _ in expired:
            del self.kinds[kind]
        return [(line, count - REPEAT_LIMIT) for _, (_, count, line) in expired if count > REPEAT_LIMIT]


class Log(logging.Handler):
    """The root logger's handler. A record's `request` is an id; its `fields` are more fields for JSON; with `each` the
    record is written however many are like it."""

    def __init__(self, style: LineStyle, output: Output) -> None:
        super().__init__()
        self.style = style
        self.output = output
        self.repeats = Repeats()
        self._timer: threading.Timer | None = None  # it runs while lines are held back

    def emit(self, record: logging.LogRecord) -> None:
        self.put(self._repeat_lines(time.monotonic()))  # these come before the new line
        try:
            self.put(self._make_lines(record))
        except Exception as error:  # noqa: BLE001  # a line that can't be made must not be the last one
            text = f"a line was lost ({type(error).__name__}: {error})"
            self.put([self.style.line("ERROR", __name__, text, time.time())])

    def put(self, lines: Sequence[str]) -> None:
        """Writes finished lines, which lack only their ends."""
        if lines:
            text = "".join(f"{line}\n" for line in lines)
            self.output.put(text.encode("utf-8", "backslashreplace"), len(lines))

    def flush(self) -> None:
        """Writes how many lines were held back, though their time is not over."""
        self._write_repeats(math.inf)

    def _write_repeats(self, now: float) -> None:
        self.acquire()
        try:
            self._timer = None
            self.put(self._repeat_lines(now))
            if self.repeats.kinds:
                self._schedule_repeats()
        finally:
            self.release()

    def _schedule_repeats(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(REPEAT_SECONDS, lambda: self._write_repeats(time.monotonic()))
            self._timer.daemon = True
            self._timer.start()

    def _repeat_lines(self, now: float) -> list[str]:
        """Returns lines that count what was held back, for each kind whose time is over."""
        return [
            self.style.line("WARNING", __name__, f"{count} more of these in {REPEAT_SECONDS:g} s: {line}", time.time())
            for line, count in self.repeats.pop_due(now)
        ]

    def _make_lines(self, record: logging.LogRecord) -> list[str]:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and not getattr(record, "each", False):
            kind = (record.name, record.levelno, VARYING_WORD.sub("#", message))
            if not self.repeats.allow(kind, message, time.monotonic()):
                self._schedule_repeats()
                return []
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        request, fields = getattr(record, "request", None), getattr(record, "fields", {})
        return [self.style.line(record.levelname, record.name, message, record.created, request, **fields)]


def start(style: LineStyle, level: str, output: Output) -> Log:
    """Takes the root logger over. At the end, whoever closes `output` writes the lines that still wait."""
    log = Log(style, output)
    root = logging.getLogger()
    root.handlers = [log]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel("WARNING")
    logging.raiseExceptions = False  # a closed stderr must not end in a traceback on it
    return log
