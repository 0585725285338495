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


def cut(buffer: bytearray, *, begun: bool, ended: bool = False) -> str:
    """Takes the next chunk off the buffer, as text: "" where no event is complete. `begun`: the first event is through;
    `ended`: what is left is a chunk although no event's end follows."""
    found = (begun and ALL.match(buffer, 0, CHUNK_LIMIT)) or FIRST.match(buffer)
    at = found.end() if found else 0
    if at > EVENT_LIMIT or (not at and (ended or len(buffer) > EVENT_LIMIT)):
        at = CHUNK_LIMIT
    # A character that would be torn stays. What is no UTF-8 has no place in JSON; vLLM's events are JSON themselves.
    text, at = codecs.utf_8_decode(buffer[:at], "replace", ended and at >= len(buffer))
    del buffer[:at]
    return text
