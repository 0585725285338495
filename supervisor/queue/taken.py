"""Jobs as RunPod gives them out, apart from each other before they are understood: what can't be read of one is that
one's failure, and none of the others'."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from supervisor.queue.errors import JSON, JobError

# What tells where a value ends: strings, brackets, commas.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]', re.S)
ID = re.compile(r"[!-~]{1,200}")  # it becomes part of an address


@dataclass(frozen=True, slots=True)
class Taken:
    """A job: its id and its input, or why that can't be read."""

    job_id: str
    content: object = None
    error: JobError | None = None


def apart(body: bytes) -> list[Taken | None]:
    """One job or a list of them; None is one of which nobody can be told, for it has no id. For a thread: of a list in
    which something can't be read each bracket is looked at."""
    try:
        content = json.loads(body or b"[]")
    except (ValueError, RecursionError):  # some of it can't be read: which one?
        text = body.decode("utf-8", "replace").strip()
        return [_one(part) for part in (_members(text) if text.startswith("[") else [text])] or [None]
    jobs = content if isinstance(content, list) else [content] * (content is not None)
    return [_read(job) for job in jobs]


def _read(job: object) -> Taken | None:
    match job:
        case {"id": str(job_id), **rest} if ID.fullmatch(job_id):
            return Taken(job_id, rest.get("input", {}))  # left out by RunPod where it is empty
    return None


def _one(text: str) -> Taken | None:
    try:
        return _read(json.loads(text))
    except RecursionError:
        why = "is nested too deeply"
    except ValueError as error:
        why = f"can't be read: {str(error).partition(';')[0]}"  # behind it Python tells its own programmers what to do
    members: JSON = {}
    for member in _members(text.strip()):
        with contextlib.suppress(ValueError, RecursionError):
            members |= json.loads(f"{{{member}}}")
    job = _read(members)
    return Taken(job.job_id, error=JobError(f"The job {why}.", param="input")) if job is not None else None


def _members(text: str) -> Iterator[str]:
    """Of a JSON object or list: the texts between its outermost brackets and commas."""
    depth, start = 0, 1
    for token in TOKEN.finditer(text):
        sign = token[0]
        depth += (sign in "[{") - (sign in "]}")
        if (sign == "," and depth == 1) or (sign in "]}" and depth == 0):
            yield text[start : token.start()]
            start = token.end()
        if depth == 0:
            return
