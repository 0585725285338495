"""Heads that come again are not read again.

A client's requests repeat their heads, and so do vLLM's answers, but for the Content-Length. What the strict parser
made of a head is kept under its own bytes, less the digits of the length; the next one that is the same, byte for
byte, is written from that, and half of a small request's price is saved (docs/performance.md). What is read for the
first time, and everything unusual, goes through the parser: chunked and large bodies, pipelining, `Expect`, upgrades.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from supervisor.gateway.policy import Verdict

# A larger head is no common one.
LARGEST = 4096
# Heads that are remembered. Clients that put something new into each (a trace's id) fill it, and it is emptied.
REMEMBERED = 256

_LENGTH = b"ength: "  # of Content-Length, in both spellings that clients have
_BEFORE = b"\r\ncontent-l"
MOST_DIGITS = 9

Head = TypeVar("Head")


class Latest(Generic[Head]):
    """The last head with a length on one connection, which is most likely the next one, too: found without `split`."""

    __slots__ = ("head", "prefix", "start", "suffix")

    def __init__(self, key: bytes, head: Head) -> None:
        self.start = key.find(_LENGTH) + len(_LENGTH)
        self.prefix = key[: self.start]
        self.suffix = key[self.start :]
        self.head = head

    def read(self, data: bytes) -> tuple[int, bytes] | None:
        """Where the head ends, and its length's digits, if this is the same head again."""
        if data.startswith(self.prefix):
            stop = data.find(b"\r", self.start)
            digits = data[self.start : stop]
            if data.startswith(self.suffix, stop) and digits.isdigit() and len(digits) <= MOST_DIGITS:
                return stop + len(self.suffix), digits
        return None


def split(data: bytes) -> tuple[int, bytes, bytes] | None:
    """The head at the beginning of `data`: where it ends, its bytes without the length's digits, and the digits."""
    end = data.find(b"\r\n\r\n", 0, LARGEST) + 4
    if end < 4:
        return None
    at = data.find(_LENGTH, 0, end)
    if at < 0:
        return end, data[:end], b""
    at += len(_LENGTH)
    stop = data.find(b"\r\n", at)
    digits = data[at:stop]
    if data[at - len(_LENGTH) - len(_BEFORE) : at - len(_LENGTH)].lower() != _BEFORE:
        return None
    if not digits.isdigit() or len(digits) > MOST_DIGITS:
        return None
    return end, data[:at] + data[stop:end], digits


class RequestHead:
    """What was made of a request's head. vLLM sees `before`, the length's digits, `after`, an id and an empty line."""

    __slots__ = ("after", "before", "method", "path", "target", "verdict")

    def __init__(self, method: bytes, target: bytes, path: bytes, written: bytes, verdict: Verdict) -> None:
        self.method = method
        self.target = target
        self.path = path
        self.before, self.after = halves(written)
        self.verdict = verdict


class WholeHead:
    """What was made of the head of an answer with a length. The client sees the same pieces, and the status first."""

    __slots__ = ("after", "before", "status")

    def __init__(self, status: int, written: bytes) -> None:
        self.status = status
        self.before, self.after = halves(written)


def halves(head: bytes) -> tuple[bytes, bytes]:
    """A head's lines before and after the length's digits; all of it where there is no length."""
    found = head.lower().find(b"\r\ncontent-length: ")
    if found < 0:
        return head, b""
    at = found + len(b"\r\ncontent-length: ")
    return head[:at], head[head.find(b"\r\n", at) :]


class Memo(Generic[Head]):
    """Heads by what `split` left of them."""

    def __init__(self) -> None:
        self.known: dict[bytes, Head] = {}
        self.get = self.known.get

    def learn(self, key: bytes, head: Head) -> None:
        if len(self.known) >= REMEMBERED:
            self.known.clear()
        self.known[key] = head

    def forget(self) -> None:
        """The policy changed."""
        self.known.clear()
