"""Our own log: one line for each event, as text for people or JSON for platforms, written by a thread.

A thread, because a terminal or collector that stops reading must not stop the event loop. Every line goes through the
mask, so that no secret can reach it, whoever logs.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
from collections.abc import Callable
from logging.handlers import QueueHandler, QueueListener

# Lines that may wait for a reader that has stopped; further ones are lost, which is better than standing still.
BACKLOG = 10_000


COLOURS = {"INFO": "\x1b[36m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}
PLAIN = "\x1b[0m"


class _Text(logging.Formatter):
    def __init__(self, mask: Callable[[str], str], colour: bool) -> None:
        super().__init__("%(asctime)s supervisor%(level)s: %(message)s", "%H:%M:%S")
        self.mask = mask
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        record.level = "" if record.levelno == logging.INFO else f" {record.levelname}"
        line = self.mask(super().format(record))
        head, separator, message = line.partition(": ")
        if not self.colour:
            return line
        return f"{COLOURS.get(record.levelname, '')}{head}{separator}{PLAIN}{message}"


class _Json(logging.Formatter):
    def __init__(self, mask: Callable[[str], str]) -> None:
        super().__init__()
        self.mask = mask

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self.mask(json.dumps(line))


class _DroppingHandler(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


def start(form: str, level: str, mask: Callable[[str], str], colour: bool = True) -> QueueListener:
    """Sends the log to stderr from a thread of its own; call `stop()` on what it returns before leaving.

    `colour` is for terminals only.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(mask) if form == "json" else _Text(mask, colour and sys.stderr.isatty()))
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(BACKLOG)
    root = logging.getLogger()
    root.handlers = [_DroppingHandler(waiting)]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel("WARNING")
    logging.raiseExceptions = False  # a closed stderr must not end in a traceback on it
    listener = QueueListener(waiting, handler)
    listener.start()
    return listener
