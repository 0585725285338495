"""Who may ask for what: the key check. Route policy and limits join it here."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from hmac import compare_digest

from supervisor.gateway.errors import Refusal

UNAUTHORIZED = Refusal(
    401, "A valid key is needed: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.", "invalid_api_key"
)


class Policy:
    """`check` is asked once for each request; None lets it pass."""

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

    def check(self, path: bytes, headers: list[tuple[bytes, bytes]]) -> Refusal | None:
        if not self.keys:
            return None
        given = b""
        for name, value in headers:
            lower = name.lower()
            if lower == b"x-api-key":
                given = value
            elif lower == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
        # Every key is compared, so that the time tells nothing of which one came close.
        matches = [compare_digest(given, key) for key in self.keys]
        return None if any(matches) else UNAUTHORIZED
