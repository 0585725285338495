"""Who may ask for what: the key check. Route policy and limits join it here."""

from __future__ import annotations

from collections.abc import Iterable
from hmac import compare_digest

from supervisor.gateway.errors import Refusal

UNAUTHORIZED = Refusal(
    401, "A valid key is needed: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.", "invalid_api_key"
)


class Policy:
    """`check` is asked once for each request; None lets it pass."""

    def __init__(self, api_keys: Iterable[str] = ()) -> None:
        self.keys = tuple(key.encode() for key in api_keys)

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
