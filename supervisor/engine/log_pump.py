"""vLLM's log: masked, passed on, and its last lines kept.

vLLM logs where it works, and waits for its log to be read: nothing may hold up the thread that reads it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from typing import IO

from supervisor.lines import LineStyle, VllmLines
from supervisor.output import Output

KEPT_LINES = 2000  # eight ranks say 70 each of one error, and native stacks
LONGEST_LINE = 64 * 1024
KEPT_OF_A_LINE = 4000  # characters
# Lines that may wait for the event loop; where it falls behind, the oldest of them are for the log alone.
WAITING_LINES = 10_000
COLOUR = r"(?:\x1b\[[\d;]{0,8}m)?"
# What the API server says of each request that it had when its engine died: one exception for all of them, with a
# traceback that grows from one to the next. Of 48 streams it was 8,600 lines, and those that told the cause were gone.
OF_A_REQUEST = re.compile(
    rf"{COLOUR}(?:\(\w{{1,40}} pid=\d+\){COLOUR} )?{COLOUR}ERROR{COLOUR} \S+ \S+ {COLOUR}\[[\w/]*(?:serving|async_llm)"
    rf"\w*\.py:\d+\]{COLOUR} ?([\w.]*\bEngineDeadError: )?"
)


class Lines:
    """The last lines of both streams, `kept`; and those that the event loop has not taken yet."""

    def __init__(self) -> None:
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._fresh: deque[str] = deque(maxlen=WAITING_LINES)
        self._wake: Callable[[], object] = lambda: None
        self._woken = self._dead = False

    def add(self, lines: list[str]) -> None:
        """From a pump's thread. One wake-up stands for all until they are taken: one a line took the loop's time."""
        self.kept.extend(filter(self._is_news, lines))
        self._fresh.extend(lines)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._wake()

    def _is_news(self, line: str) -> bool:
        found = OF_A_REQUEST.match(line) if "ERROR" in line else None
        dead, self._dead = self._dead, self._dead or bool(found and found[1])
        return found is None or not dead

    def follow(self, wake: Callable[[], object]) -> None:
        """Calls `wake`, from any thread, when there are lines to take."""
        self._wake = wake
        wake()

    def take(self) -> list[str]:
        self._woken = False  # before they are taken: what comes meanwhile wakes again
        return [self._fresh.popleft() for _ in range(len(self._fresh))]


class LogPump:
    """Copies one of the child's streams to one of ours, line by line, in a thread of its own."""

    def __init__(self, source: IO[bytes], output: Output, lines: Lines, form: LineStyle) -> None:
        self.source = source
        self.output = output
        self.lines = lines
        self.mask = form.mask
        self.shown = VllmLines(form, is_terminal=os.isatty(output.descriptor))
        self.thread = threading.Thread(target=self._run, name="vllm-log", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        rest = b""
        with self.source:
            while data := os.read(self.source.fileno(), LONGEST_LINE):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                self._pass_on(lines)
        self._pass_on([rest] if rest else [])

    def _pass_on(self, raw: list[bytes]) -> None:
        out, texts = [], []
        for line in raw:
            # latin-1 maps each byte to one character and back: what is not masked stays as it was.
            shown = self.mask(line.decode("latin-1")).encode("latin-1", "replace")
            text = shown.decode("utf-8", "replace").rstrip()
            out.append(self.shown(shown, text))
            texts.append(text[:KEPT_OF_A_LINE])
        if out:
            self.lines.add(texts)
            self.output.put(b"".join(out), len(out))
