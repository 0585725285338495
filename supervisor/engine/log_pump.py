"""vLLM's log is masked and passed on, and its last lines are kept.

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

TAIL_LINES = 2000  # eight ranks write 70 each about one error, and native stacks
LONGEST_LINE = 64 * 1024
BETWEEN_WORDS = re.compile(rb".*\s", re.S)
TAIL_LINE_LENGTH = 4000  # characters
# This many lines may wait for the event loop; where it falls behind, the oldest of them are for the log alone.
QUEUED_LINES = 10_000
COLOUR = r"(?:\x1b\[[\d;]{0,8}m)?"
# The API server writes this for each request that it had when its engine died: one exception for all of them, with a
# traceback that grows from one to the next. For 48 streams it was 8,600 lines, and those that told the cause were gone.
REQUEST_ERROR = re.compile(
    rf"{COLOUR}(?:\(\w{{1,40}} pid=\d+\){COLOUR} )?{COLOUR}ERROR{COLOUR} \S+ \S+ {COLOUR}\[[\w/]*(?:serving|async_llm)"
    rf"\w*\.py:\d+\]{COLOUR} ?([\w.]*\bEngineDeadError: )?"
)


class LogBuffer:
    """Holds the last lines of both streams, `tail`, and those that the event loop has not taken yet."""

    def __init__(self) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._queue: deque[str] = deque(maxlen=QUEUED_LINES)
        self._wake: Callable[[], object] = lambda: None
        self._is_woken = self._engine_died = False

    def add(self, lines: list[str]) -> None:
        """Runs in a pump's thread. One wake-up stands for all until they are taken: one a line took the loop's time."""
        self.tail.extend(filter(self._is_kept, lines))
        self._queue.extend(lines)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._wake()

    def _is_kept(self, line: str) -> bool:
        found = REQUEST_ERROR.match(line) if "ERROR" in line else None
        engine_died, self._engine_died = self._engine_died, self._engine_died or bool(found and found[1])
        return found is None or not engine_died

    def follow(self, wake: Callable[[], object]) -> None:
        """Calls `wake`, from any thread, when there are lines to take."""
        self._wake = wake
        wake()

    def take(self) -> list[str]:
        self._is_woken = False  # before they are taken: what comes meanwhile wakes again
        return [self._queue.popleft() for _ in range(len(self._queue))]


class LogPump:
    """Copies one of the child's streams to one of ours, line by line, in a thread of its own."""

    def __init__(self, source: IO[bytes], output: Output, buffer: LogBuffer, form: LineStyle) -> None:
        self.source = source
        self.output = output
        self.buffer = buffer
        self.mask = form.mask
        self.format_line = VllmLines(form, is_terminal=os.isatty(output.descriptor))
        self.thread = threading.Thread(target=self._run, name="vllm-log", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        remainder = b""
        with self.source:
            while data := os.read(self.source.fileno(), LONGEST_LINE):
                *lines, remainder = (remainder + data).split(b"\n")
                if len(remainder) > LONGEST_LINE:  # a secret is masked as a whole: it is cut beside a word
                    cut = BETWEEN_WORDS.match(remainder)
                    end = cut.end() if cut is not None else len(remainder)
                    lines, remainder = [*lines, remainder[:end]], remainder[end:]
                self._forward(lines)
        self._forward([remainder] if remainder else [])

    def _forward(self, raw_lines: list[bytes]) -> None:
        output_lines, texts = [], []
        for line in raw_lines:
            # latin-1 maps each byte to one character and back: what is not masked stays as it was.
            masked = self.mask(line.decode("latin-1")).encode("latin-1", "replace")
            text = masked.decode("utf-8", "replace").rstrip()
            output_lines.append(self.format_line(masked, text))
            texts.append(text[:TAIL_LINE_LENGTH])
        if output_lines:
            self.buffer.add(texts)
            self.output.put(b"".join(output_lines), len(output_lines))
