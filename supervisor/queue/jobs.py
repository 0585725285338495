"""Reads jobs as RunPod gives them out. The JSON of each is split from the others' before it is understood. JobError
says why a job fails. Pure: no I/O."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

JSON = dict[str, Any]
LONGEST_MESSAGE = 4000  # characters; vLLM's may quote all that was sent
# An error of ours has one of OpenAI's `type`s, by its status. With any other status, what was sent is at fault.
ERROR_KINDS = {
    403: "permission_error", 413: "result_too_large", 500: "server_error", 502: "upstream_error",
    503: "service_unavailable",
}  # fmt: skip
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]', re.S)  # these tell where a value ends
JOB_ID = re.compile(r"[!-~]{1,200}")  # an id becomes part of an address


@dataclass(eq=False)
class JobError(Exception):
    """A job fails with this. Its `kind` (by its status, where none is given), `param` and `code` are OpenAI's."""

    message: str
    status: int = 400
    kind: str = ""
    param: object = None
    code: object = None

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.kind = self.kind or ERROR_KINDS.get(self.status, "invalid_request_error")

    @property
    def text(self) -> str:
        """Returns the error of a whole job, as text because RunPod shows text."""
        content = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({**content, "status": self.status}, ensure_ascii=False)

    @property
    def batch_item(self) -> JSON:
        """Returns the error of one of a batch, in whose place runpod-LLM's clients know `error` as text."""
        return {"error": self.message, "type": self.kind, "status": self.status}

    @classmethod
    def from_answer(cls, body: bytes, status: int | None = None, path: str = "") -> JobError:
        """Reads what vLLM or the gateway answered: OpenAI's shape, Anthropic's, FastAPI's, or plain text. Without a
        status it is what a stream was broken off with; then the status is vLLM's `code`, where that is one."""
        content: object = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(body)
        error = content.get("error", content.get("detail", content)) if isinstance(content, dict) else None
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            kind, code = error.get("type"), error.get("code")
            stream_status = code if isinstance(code, int) and 400 <= code < 600 else 503
            kind = "upstream_error" if kind in (None, "", "error") else str(kind)
            return cls(error["message"][:LONGEST_MESSAGE], status or stream_status, kind, error.get("param"), code)
        if status is None:
            return cls("The engine stopped in the middle of this answer. Please send the job again.", 503)
        if status == 404 and error == "Not Found" and path:  # FastAPI's, where vLLM has the route for other models
            return cls(f"The model has no route {path}: it is for another task, or there is none.", status)
        words = error if isinstance(error, str) else body.decode("utf-8", "replace").strip() or "no further word"
        return cls(f"HTTP {status}: {words[:LONGEST_MESSAGE]}", status, "upstream_error")


def parse_if_text(value: object, name: str) -> Any:
    """Returns a value, parsed if it is text: some clients encode JSON twice. Raises JobError where it is no JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise JobError(f"{name} is text that is no JSON ({error}).", param=name) from None


def parse_object(value: object, name: str) -> JSON:
    """Returns the object, or an empty one where there is none. Raises JobError where the value is something else."""
    content = parse_if_text(value or {}, name)
    if not isinstance(content, dict):
        raise JobError(f"{name} must be an object.", param=name)
    return content


def encode_json(content: object) -> bytes:
    """Returns JSON as UTF-8. Half of a surrogate pair, of an emoji that was cut, is replaced: JSON can carry it, but it
    is no UTF-8, and vLLM's tokenizer and RunPod take offence."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def omit(body: JSON, names: Container[str]) -> JSON:
    return {name: value for name, value in body.items() if name not in names}


class TakenJob(NamedTuple):
    """A job that was taken has its id and its input, or the error that says why this can't be read."""

    job_id: str
    content: object = None
    error: JobError | None = None


def split_jobs(body: bytes) -> list[TakenJob | None]:
    """Reads one job or a list of them. None stands for a job of which nobody can be told, for it has no id. This is for
    a thread: each bracket is looked at in a list in which something can't be read."""
    try:
        content = json.loads(body or b"[]")
    except (ValueError, RecursionError):  # some of it can't be read: which job?
        text = body.decode("utf-8", "replace").strip()
        return [_parse_job(part) for part in (_split_members(text) if text.startswith("[") else [text])] or [None]
    jobs = content if isinstance(content, list) else [content] * (content is not None)
    return [_convert_job(job) for job in jobs]


def _convert_job(job: object, error: JobError | None = None) -> TakenJob | None:
    match job:
        case {"id": str(job_id), **rest} if JOB_ID.fullmatch(job_id):
            return TakenJob(job_id, None if error else rest.get("input", {}), error)  # RunPod omits an empty input
    return None


def _parse_job(text: str) -> TakenJob | None:
    try:
        return _convert_job(json.loads(text))
    except RecursionError:
        why = "is nested too deeply"
    except ValueError as error:
        why = f"can't be read: {str(error).partition(';')[0]}"  # behind it Python tells its own programmers what to do
    members: JSON = {}
    for member in _split_members(text.strip()):
        with contextlib.suppress(ValueError, RecursionError):
            members |= json.loads(f"{{{member}}}")
    return _convert_job(members, JobError(f"The job {why}.", param="input"))


def _split_members(text: str) -> Iterator[str]:
    """Yields the texts between the outermost brackets and commas of a JSON object or list."""
    depth, start = 0, 1
    for token in JSON_TOKEN.finditer(text):
        sign = token[0]
        depth += (sign in "[{") - (sign in "]}")
        if (sign == "," and depth == 1) or (sign in "]}" and depth == 0):
            yield text[start : token.start()]
            start = token.end()
        if depth == 0:
            return
