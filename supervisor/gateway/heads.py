"""Heads that come again are not read again.

A client's requests repeat their heads, and so do vLLM's answers, but for the Content-Length. What the strict parser
made of a head is kept under its own bytes, less the digits of the length; the next one that is the same, byte for byte,
is written from that, and half of a small request's price is saved (docs/development/performance.md). What is read for
the first time, and everything unusual, goes through the parser: chunked and large bodies, pipelining, `Expect`,
upgrades.
"""

from __future__ import annotations

from typing import Generic, TypeVar

LARGEST = 4096  # a head of more bytes than this is no common one
# So many heads are remembered. Clients that put something new into each (a trace's id) fill the memo: it is emptied.
REMEMBERED = 256

_LENGTH = b"ength: "  # the end of Content-Length, in both spellings that clients have
_BEFORE = b"\r\ncontent-l"

Head = TypeVar("Head")


class Memo(Generic[Head]):
    """Remembers heads, by what `split_message` leaves of their bytes."""

    def __init__(self) -> None:
        self.known: dict[bytes, Head] = {}
        self.get = self.known.get

    def learn(self, key: bytes, head: Head) -> None:
        if len(self.known) >= REMEMBERED:
            self.known.clear()
        self.known[key] = head


class RepeatedHeads(Generic[Head]):
    """Finds the heads of one connection that came before, on it or on another one."""

    __slots__ = ("digits_at", "key", "last_head", "memo", "prefix", "suffix")

    def __init__(self, memo: Memo[Head]) -> None:
        self.memo = memo
        self.key: bytes | None = None  # by which `learn` will remember what `find` last did not know; None: not at all
        self.forget()

    def forget(self) -> None:
        self.last_head: Head | None = None  # most likely the next message's, too: it is found without `split_message`
        self.prefix, self.digits_at, self.suffix = b"", 0, b""  # that head's bytes around the digits, and their offset

    def find(self, data: bytes) -> tuple[Head, bytes, bytes] | None:
        """Returns the known head, its length's digits and the body; None if `data` is not one whole message, or new."""
        if self.last_head is not None and data.startswith(self.prefix):
            stop = data.find(b"\r", self.digits_at)
            if data.startswith(self.suffix, stop):
                end = stop + len(self.suffix)
                digits = data[self.digits_at : stop]
                if digits == b"%d" % (len(data) - end):
                    return self.last_head, digits, data[end:]
        self.key = None
        if (found := split_message(data)) is None:
            return None
        key, digits, body = found
        if (known := self.memo.get(key)) is None:
            self.key = key
            return None
        if digits:
            self.last_head, self.digits_at = known, key.find(_LENGTH) + len(_LENGTH)
            self.prefix, self.suffix = key[: self.digits_at], key[self.digits_at :]
        return known, digits, body

    def learn(self, head: Head) -> None:
        """Remembers the head of the message that `find` last did not know."""
        if self.key is not None:
            self.memo.learn(self.key, head)


def split_message(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Returns the head less its length's digits, the digits, and the body; None if `data` is not one whole message."""
    end = data.find(b"\r\n\r\n", 0, LARGEST) + 4
    if end < 4:
        return None
    at = data.find(_LENGTH, 0, end)
    if at < 0:
        return (data, b"", b"") if end == len(data) else None
    at += len(_LENGTH)
    stop = data.find(b"\r\n", at)
    digits = data[at:stop]
    if data[at - len(_LENGTH) - len(_BEFORE) : at - len(_LENGTH)].lower() != _BEFORE:
        return None
    if digits != b"%d" % (len(data) - end):
        return None
    return data[:at] + data[stop:end], digits, data[end:]


def split_at_length(head: bytes) -> tuple[bytes, bytes]:
    """Returns a head's lines before and after the length's digits; all of it and b"" where there is no length."""
    found = head.lower().find(b"\r\ncontent-length: ")
    if found < 0:
        return head, b""
    at = found + len(b"\r\ncontent-length: ")
    return head[:at], head[head.find(b"\r\n", at) :]
