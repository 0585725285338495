"""Who may ask for what, how much, and how often.

What can be said of a request by its head alone is a `Verdict`, which is kept with a head that comes again; what depends
on the moment (the rate) is asked each time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest

from supervisor.gateway.errors import Refusal

UNAUTHORIZED = Refusal(
    401, "A valid key is needed: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.", "invalid_api_key"
)
HEAD_LIMIT = 32 * 1024  # bytes of a request's head
HEADERS_LIMIT = 100
TARGET_LIMIT = 8 * 1024
HEAD_TOO_LARGE = Refusal(
    431,
    f"The request's head is larger than {HEAD_LIMIT} bytes, or has more than {HEADERS_LIMIT} headers.",
    "head_too_large",
)
TARGET_TOO_LONG = Refusal(414, f"The request's target is longer than {TARGET_LIMIT} bytes.", "uri_too_long")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a request's head tells. `client`: the key that was given, for limits by client."""

    refusal: Refusal | None
    client: bytes = b""


class Policy:
    """Asked once for each head."""

    def __init__(self, api_keys: Iterable[str] = (), *, max_body: int = sys.maxsize, timeout: float = math.inf) -> None:
        """`max_body` in bytes; `timeout` of a whole request, in seconds."""
        self.keys = tuple(key.encode() for key in api_keys)
        self.max_body = max_body
        self.timeout = timeout

    def too_large(self) -> Refusal:
        text = f"The request's body is larger than {self.max_body} bytes (SUPERVISOR_MAX_BODY)."
        return Refusal(413, text, "request_too_large")

    def too_late(self) -> Refusal:
        text = f"The request took longer than {self.timeout:g} s (SUPERVISOR_REQUEST_TIMEOUT)."
        return Refusal(504, text, "request_timeout")

    def judge(self, path: bytes, headers: list[tuple[bytes, bytes]]) -> Verdict:
        if not self.keys:
            return Verdict(None)
        given = key_given(headers)
        # Every key is compared, so that the time tells nothing of which one came close.
        matches = [compare_digest(given, key) for key in self.keys]
        return Verdict(None, given) if any(matches) else Verdict(UNAUTHORIZED)


def key_given(headers: list[tuple[bytes, bytes]]) -> bytes:
    given = b""
    for name, value in headers:
        lower = name.lower()
        if lower == b"x-api-key":
            given = value
        elif lower == b"authorization" and value[:7].lower() == b"bearer ":
            given = value[7:].strip()
    return given


def head_limits(target: bytes, headers: list[tuple[bytes, bytes]]) -> Refusal | None:
    if len(target) > TARGET_LIMIT:
        return TARGET_TOO_LONG
    if len(headers) > HEADERS_LIMIT or sum(len(name) + len(value) + 4 for name, value in headers) > HEAD_LIMIT:
        return HEAD_TOO_LARGE
    return None
