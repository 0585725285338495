"""Cuts a stream into chunks for RunPod: whole events, whole code points, the first event by itself."""

from __future__ import annotations

# RunPod takes 1 MB per chunk; more than this at a time only delays what comes behind.
CHUNK_LIMIT = 256 * 1024
# A single event that is longer than this is cut, between two characters: quotes and backslashes double in JSON.
EVENT_LIMIT = 450_000


class Events:
    """`feed(bytes)` as they come, `cut()` gives the next chunk as text, "" where no event is complete."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.begun = False

    def feed(self, data: bytes) -> None:
        self.buffer += data

    def cut(self, *, ended: bool = False) -> str:
        """With `ended`, what is left is given although no event's end follows."""
        at = self._first_end() if not self.begun else self._last_end()
        if at > EVENT_LIMIT or (at < 0 and (ended or len(self.buffer) > EVENT_LIMIT)):
            at = self._whole_characters(CHUNK_LIMIT)
        if at <= 0:
            return ""
        self.begun = True
        # What is no UTF-8 has no place in JSON; vLLM's events are JSON themselves.
        text = self.buffer[:at].decode("utf-8", "replace")
        del self.buffer[:at]
        return text

    def _first_end(self, start: int = 0) -> int:
        ends = [found + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (found := self.buffer.find(mark, start)) >= 0]
        return min(ends, default=-1)

    def _last_end(self) -> int:
        ends = [
            found + len(mark)
            for mark in (b"\n\n", b"\r\n\r\n")
            if (found := self.buffer.rfind(mark, 0, CHUNK_LIMIT)) >= 0
        ]
        return max(ends, default=-1) if ends else self._first_end()

    def _whole_characters(self, limit: int) -> int:
        """The length of what may be cut off at `limit` without tearing a code point."""
        if len(self.buffer) <= limit:
            return len(self.buffer)
        # The byte behind the cut begins a character, or is one of the three at most that continue it.
        return next((at for at in range(limit, limit - 4, -1) if self.buffer[at] & 0xC0 != 0x80), limit)
