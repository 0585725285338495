"""Cuts a stream into chunks for RunPod: whole events, whole code points, the first event by itself."""

from __future__ import annotations

import codecs
import re

# RunPod takes 1 MB per chunk; more than this at a time only delays what comes behind.
CHUNK_LIMIT = 256 * 1024
# A single event that is longer than this is cut, between two characters: quotes and backslashes double in JSON.
EVENT_LIMIT = 450_000
# An empty line ends an event.
FIRST, ALL = re.compile(rb".*?\n\r?\n", re.S), re.compile(rb".*\n\r?\n", re.S)


class Events:
    """`feed(bytes)` as they come, `cut()` gives the next chunk as text, "" where no event is complete."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.begun = False

    def feed(self, data: bytes) -> None:
        self.buffer += data

    def cut(self, *, ended: bool = False) -> str:
        """With `ended`, what is left is given although no event's end follows."""
        found = (self.begun and ALL.match(self.buffer, 0, CHUNK_LIMIT)) or FIRST.match(self.buffer)
        at = found.end() if found else 0
        if at > EVENT_LIMIT or (not at and (ended or len(self.buffer) > EVENT_LIMIT)):
            at = CHUNK_LIMIT
        self.begun |= at > 0
        # A character that would be torn stays. What is no UTF-8 has no place in JSON; vLLM's events are JSON.
        text, at = codecs.utf_8_decode(self.buffer[:at], "replace", ended and at >= len(self.buffer))
        del self.buffer[:at]
        return text
