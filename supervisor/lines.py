"""The look of log lines, as text for people or JSON for platforms: our own lines, and vLLM's, which keep their level.

On RunPod's queue each line of JSON has the job's `requestId`, as lines of RunPod's SDK do: its console sorts by that.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

RESET, DIM = "\x1b[0m", "\x1b[2m"
COLOURS = {"INFO": "\x1b[36m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}
# `(EngineCore pid=7) WARNING 11-26 03:16:45 [core.py:77] ...`, and uvicorn's `INFO:     Started ...`.
VLLM_LEVEL = re.compile(r"(?:\([^()]*\) )*(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
# These lines come with each start of vLLM's, and nobody reads them on a terminal: its banner, all its options, its
# routes, and uvicorn's own start.
BOILERPLATE = re.compile(
    r"INFO [^\[]*\[[\w.]+:\d+\] (?:$|.*[█▄▀]|Initializing a V1 LLM engine|Available routes are|Route: /)|"
    r"INFO: +(?:Started server process|Waiting for application startup|Application startup complete)"
)
COLOUR_CODE = re.compile(r"\x1b\[[\d;]*m")  # vLLM may be told to colour its lines
TRACEBACK = re.compile(r"(?:\([^()]*\) )*Traceback \(most recent call last\)")


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How lines look: JSON (`as_json`), which `queue_mode` gives RunPod's shape, or text. Terminals show `colour`, and
    stderr may be one (`is_terminal`). With `fold` vLLM's lines that nobody reads are only counted on a terminal."""

    mask: Callable[[str], str]
    as_json: bool = False
    queue_mode: bool = False
    colour: bool = True
    is_terminal: bool = False
    fold: bool = False

    def json(self, level: str, logger: str, message: str, at: float, request: str | None, **more: object) -> str:
        """Returns a line that is one object. `at` is a Unix time; `more` has no secrets, for it is not masked."""
        line: dict[str, object] = {"time": iso(at), "level": level, "logger": logger, "message": self.mask(message)}
        if request is not None or self.queue_mode:
            line["requestId"] = request if request is None else self.mask(request)
        return json.dumps(line | more)

    def line(self, level: str, logger: str, message: str, at: float, request: str | None = None, **more: object) -> str:
        if self.as_json:
            return self.json(level, logger, message, at, request, **more)
        return self.text(level, message, at, request)

    def lost_line(self, count: int) -> bytes:
        line = self.line("WARNING", "supervisor", f"{count} lines were lost here: nobody read the log", time.time())
        return f"{line}\n".encode()

    def text(self, level: str, message: str, at: float, request: str | None) -> str:
        head = f"{clock(int(at))} supervisor"
        head += ":" if level == "INFO" else f" {level}:"
        line = self.mask(message if request is None else f"{message} (request {escape(request)})")
        if self.is_terminal and self.colour:
            return f"{COLOURS.get(level, '')}{head}{RESET} {line}"
        return f"{head} {line}"


class VllmLines:
    """Shows the lines of one of vLLM's streams: it is called with each, masked, as bytes and as text."""

    def __init__(self, style: LineStyle, *, is_terminal: bool) -> None:
        self.as_json = style.as_json
        self.style = replace(style, mask=str)
        self.colour = is_terminal and style.colour
        self.fold = is_terminal and style.fold and not style.as_json
        self.folded_count = 0  # lines since the last one that was shown
        self.level = "INFO"

    def __call__(self, raw: bytes, text: str) -> bytes:
        text = COLOUR_CODE.sub("", text) if "\x1b" in text else text
        if self.fold and (not text.strip() or BOILERPLATE.search(f"{text} ")):
            self.folded_count += text.strip() != ""
            return b""
        if folded := self.folded_count:
            self.folded_count = 0
            lines = "line" if folded == 1 else "lines"
            note = f"... {folded} {lines} of vLLM's banner, options and routes (SUPERVISOR_LOG_LEVEL=debug shows all)"
            return self(note.encode(), note) + self(raw, text)
        if not self.as_json and not self.colour:
            return raw + b"\n"
        if match := VLLM_LEVEL.match(text):
            self.level = match[1]
        elif TRACEBACK.match(text):  # the lines of a traceback have no level of their own
            self.level = "ERROR"
        if self.as_json:  # a progress bar is shown in its last state alone
            line = self.style.json(self.level, "vllm", text.rpartition("\r")[2], time.time(), None)
            return line.encode() + b"\n"
        # vLLM's many lines are dimmer than ours, but for those that somebody should see.
        colour = DIM if self.level in ("INFO", "DEBUG") else COLOURS[self.level]
        return b"%b%b%b\n" % (colour.encode(), raw, RESET.encode())


def escape(text: str) -> str:
    """Returns text that a client chose in a form that can stand in a line."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


# These are kept: the lines of a busy second, and of a busy millisecond, share them.


def iso(at: float) -> str:
    """Returns a Unix time as ISO 8601 in UTC, with milliseconds."""
    return _iso(int(at * 1000))


@lru_cache(4)
def _iso(milliseconds: int) -> str:
    second, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"


@lru_cache(4)
def clock(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(second))
