"""Makes answers of our own when vLLM can't give one, in the dialect of the client's route."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

TABLE = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text(encoding="utf-8"))
KINDS: dict[str, tuple[str, str]] = TABLE["kinds"]
REFUSALS: dict[str, tuple[int, str]] = TABLE["refusals"]


class UpstreamError(Exception):
    """vLLM's side of the exchange failed; the message says how, in words that a client may read."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Says why vLLM does not answer a request. `retry_after` is in seconds, `code` OpenAI's machine-readable word."""

    status: int
    message: str
    code: str | None = None
    retry_after: int | None = None

    @property
    def kinds(self) -> tuple[str, str]:
        """Names the kind of error, first as OpenAI does, then as Anthropic does."""
        return KINDS.get(str(self.status), ("server_error", "api_error"))

    def head_and_body(self, path: bytes, request_id: bytes, more: bytes = b"") -> tuple[bytes, bytes]:
        """Returns status line and headers, without the blank line, and the body. `more` are header lines to add."""
        if path.startswith(b"/v1/messages"):
            content = {**_anthropic(self.kinds[1], self.message), "request_id": request_id.decode("latin-1")}
        else:
            content = self._openai()
        body = json.dumps(content).encode()
        if self.status == HTTPStatus.UNAUTHORIZED:
            more += b"WWW-Authenticate: Bearer\r\n"
        if self.retry_after is not None:
            more += b"Retry-After: %d\r\n" % self.retry_after
        status = b"%d %b" % (self.status, HTTPStatus(self.status).phrase.encode())
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%bX-Request-Id: %b\r\n"
        return head % (status, len(body), more, request_id), body

    def events(self, path: bytes) -> bytes:
        """Returns what ends a stream that had begun: an error event, and the end mark that the route's clients know."""
        if path.startswith(b"/v1/messages"):
            content = _anthropic("api_error", self.message)
        elif path.startswith(b"/v1/responses"):
            # The schemas of its clients want a number. Which would be the next one is not known: nobody counts events.
            content = {"type": "error", "sequence_number": 0, "code": self.code, "message": self.message, "param": None}
        else:
            return b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(self._openai()).encode()
        return b"event: error\ndata: %b\n\n" % json.dumps(content).encode()

    def _openai(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.kinds[0], "param": None, "code": self.code}}


def refuse(code: str, retry_after: int | None = None, **words: object) -> Refusal:
    """Returns the refusal that refusals.toml has for the code. `words` fill the gaps in its message."""
    status, message = REFUSALS[code]
    return Refusal(status, message.format_map(words), code, retry_after)


def _anthropic(kind: str, message: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": kind, "message": message}}
