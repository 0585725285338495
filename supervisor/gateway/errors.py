"""Answers of our own when vLLM can't give one, in the dialect of the client's route."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus

# Anthropic's names for the kinds of error, by status; the others are `api_error`.
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class UpstreamError(Exception):
    """vLLM's side of the exchange failed; `text` says how, in words a client may read."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request gets no answer from vLLM. `retry_after` in seconds; `code` is OpenAI's machine-readable word."""

    status: int
    message: str
    code: str | None = None
    retry_after: int | None = None

    def head_and_body(self, path: bytes, request_id: bytes, more: bytes = b"") -> tuple[bytes, bytes]:
        """The response's status line and headers, without the blank line, and its body. `more`: header lines."""
        if path.startswith(b"/v1/messages"):
            content: dict[str, object] = {
                "type": "error",
                "error": {"type": ANTHROPIC_TYPES.get(self.status, "api_error"), "message": self.message},
                "request_id": request_id.decode("latin-1"),
            }
        else:
            kind = OPENAI_TYPES.get(self.status, "server_error")
            content = {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}
        body = json.dumps(content).encode()
        if self.retry_after is not None:
            more += b"Retry-After: %d\r\n" % self.retry_after
        head = (b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%sX-Request-Id: %s\r\n") % (
            self.status,
            HTTPStatus(self.status).phrase.encode(),
            len(body),
            more,
            request_id,
        )
        return head, body

    def events(self, path: bytes) -> bytes:
        """The end of an event stream that had begun: an error event, and the end mark that the route's clients know."""
        kind = OPENAI_TYPES.get(self.status, "server_error")
        if path.startswith(b"/v1/messages"):
            event = {"type": "error", "error": {"type": "api_error", "message": self.message}}
            return b"event: error\ndata: %b\n\n" % json.dumps(event).encode()
        if path.startswith(b"/v1/responses"):
            # The schemas of its clients want a number. Which would be the next one is not known: nobody counts events.
            content = {"type": "error", "sequence_number": 0, "code": self.code, "message": self.message, "param": None}
            return b"event: error\ndata: %b\n\n" % json.dumps(content).encode()
        error = {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}
        return b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(error).encode()
