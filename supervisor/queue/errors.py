"""Why a job fails: an OpenAI error object, with the HTTP status beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]
# Characters; vLLM's message may quote all that was sent.
LONGEST_MESSAGE = 4000
# OpenAI's `type` of an error of ours, by its status; of any other: what was sent is at fault.
KINDS = {
    403: "permission_error", 413: "result_too_large", 500: "server_error", 502: "upstream_error",
    503: "service_unavailable",
}  # fmt: skip


@dataclass(eq=False)
class JobError(Exception):
    """`kind` (from the status, where none is given), `param` and `code` are OpenAI's."""

    message: str
    status: int = 400
    kind: str = ""
    param: object = None
    code: object = None

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.kind = self.kind or KINDS.get(self.status, "invalid_request_error")

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
    def of(cls, body: bytes, status: int | None = None, path: str = "") -> JobError:
        """From what vLLM or the gateway answered: OpenAI's shape, Anthropic's, FastAPI's, or plain text. Without a
        status: from what a stream was broken off with; its status is vLLM's `code`, where that is one."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        error = content.get("error", content.get("detail", content)) if isinstance(content, dict) else None
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            kind, code = error.get("type"), error.get("code")
            own = code if isinstance(code, int) and 400 <= code < 600 else 503
            kind = "upstream_error" if kind in (None, "", "error") else str(kind)
            return cls(error["message"][:LONGEST_MESSAGE], status or own, kind, error.get("param"), code)
        if status is None:
            return cls("The engine stopped in the middle of this answer. Please send the job again.", 503)
        if status == 404 and error == "Not Found" and path:  # FastAPI's, of a route that vLLM has for other models
            return cls(f"The model has no route {path}: it is for another task, or there is none.", status)
        words = error if isinstance(error, str) else body.decode("utf-8", "replace").strip() or "no further word"
        return cls(f"HTTP {status}: {words[:LONGEST_MESSAGE]}", status, "upstream_error")
