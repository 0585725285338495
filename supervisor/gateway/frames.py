"""Finds where the frames of a WebSocket end (RFC 6455, 5.2), so that its own end can be told by a frame."""

from __future__ import annotations

GOING_AWAY, INTERNAL_ERROR = 1001, 1011
_CLOSE = 8
_MORE_LENGTH = {126: 2, 127: 8}  # bytes of length that follow, by a head's own length field
_REASON_LIMIT = 123  # bytes: a control frame has 125 at most, and two are the code


class Frames:
    """Watches the frames that vLLM sends. `is_between_frames`: none is under way; `closed`: one was its close."""

    def __init__(self) -> None:
        self.remaining = 0  # bytes that are to come of the frame under way
        self.head = b""  # a frame's first bytes, until they tell its length
        self.closed = False

    @property
    def is_between_frames(self) -> bool:
        return not self.remaining and not self.head

    def feed(self, data: bytes) -> None:
        while len(data) > self.remaining:
            data = self.head + data[self.remaining :]
            self.remaining = 0
            self.head = data[:14]
            if len(data) < 2:
                return
            length, masked = data[1] & 127, data[1] >> 7
            length_size = _MORE_LENGTH.get(length, 0)
            size = 2 + length_size + 4 * masked
            if len(data) < size:
                return
            self.head = b""
            self.closed = self.closed or data[0] & 15 == _CLOSE
            self.remaining = size + (int.from_bytes(data[2 : 2 + length_size]) if length_size else length)
        self.remaining -= len(data)


def close_frame(code: int, reason: str) -> bytes:
    payload = code.to_bytes(2) + reason.encode()[:_REASON_LIMIT].decode(errors="ignore").encode()
    return bytes((0x80 | _CLOSE, len(payload))) + payload
