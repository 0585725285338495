"""Why a job fails: an OpenAI error object, with the HTTP status beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]
# Characters; vLLM's message may quote all that was sent.
LONGEST_MESSAGE = 4000


@dataclass(eq=False)
class JobError(Exception):
    """`kind`, `param` and `code` are OpenAI's."""

    message: str
    status: int = 400
    kind: str = "invalid_request_error"
    param: object = None
    code: object = None

    def __str__(self) -> str:
        return self.message

    @property
    def text(self) -> str:
        """Of the whole job: RunPod shows text."""
        content = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({**content, "status": self.status}, ensure_ascii=False)

    @property
    def item(self) -> JSON:
        """Of one of a batch, in whose place runpod-LLM's clients know `error` as text."""
        return {"error": self.message, "type": self.kind, "status": self.status}

    @classmethod
    def cut(cls) -> JobError:
        text = "The engine stopped in the middle of this answer. Please send the job again."
        return cls(text, 503, "service_unavailable")

    @classmethod
    def of_answer(cls, status: int, body: bytes, path: str = "") -> JobError:
        """From what vLLM or the gateway answered: OpenAI's shape, Anthropic's, FastAPI's, or plain text."""
        error = _read(body)
        if isinstance(error, dict):
            kind = str(error.get("type") or "error")
            return cls(error["message"][:LONGEST_MESSAGE], status, kind, error.get("param"), error.get("code"))
        if status == 404 and error == "Not Found" and path:  # FastAPI's, of a route that vLLM has for other models
            return cls(f"The model has no route {path}: it is for another task, or there is none.", status)
        text = error or body.decode("utf-8", "replace").strip() or "no further word"
        return cls(f"HTTP {status}: {text[:LONGEST_MESSAGE]}", status, "upstream_error")

    @classmethod
    def of_event(cls, data: str) -> JobError:
        """From the event that a stream was broken off with: its status is vLLM's `code`, where that is one."""
        error = _read(data)
        if not isinstance(error, dict):
            return cls.cut()
        code = error.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 503
        kind = error.get("type") if error.get("type") != "error" else None  # an event's own, and not the error's
        return cls(error["message"][:LONGEST_MESSAGE], status, str(kind or "service_unavailable"), None, code)


def _read(text: bytes | str) -> JSON | str | None:
    """The error that it holds, or is: an object with its message, or text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    error = content.get("error", content.get("detail", content)) if isinstance(content, dict) else None
    described = isinstance(error, dict) and isinstance(error.get("message"), str)
    return error if described or isinstance(error, str) else None
