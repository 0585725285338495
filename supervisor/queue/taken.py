"""Jobs as RunPod gives them out, apart from each other before they are understood: what can't be read of one is that
one's failure, and none of the others'."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from supervisor.queue.errors import JobError

# What tells where a value ends: strings, brackets, commas.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]', re.S)
ID = re.compile(r"[!-~]{1,200}")  # it becomes part of an address


@dataclass(frozen=True, slots=True)
class Taken:
    """A job: its id and its input, or why that can't be read."""

    job_id: str
    content: object = None
    error: JobError | None = None


def apart(body: bytes) -> tuple[list[Taken], int]:
    """One job or a list of them; and of how many nobody can be told, for they have no id. For a thread: of a list in
    which something can't be read each bracket is looked at."""
    try:
        content = json.loads(body) if body else None
        found = [_read(job) for job in (content if isinstance(content, list) else [content])]
        return [job for job in found if job is not None], found.count(None) - (content is None)
    except (ValueError, RecursionError):
        pass  # some of it can't be read: which one?
    text = body.decode("utf-8", "replace").strip()
    parts = list(_members(text)) if text.startswith("[") else [text]
    found = [_one(part) for part in parts]
    return [job for job in found if job is not None], found.count(None) or int(not found)


def _read(job: object) -> Taken | None:
    job_id = job.get("id") if isinstance(job, dict) else None
    if not isinstance(job, dict) or not isinstance(job_id, str) or not ID.fullmatch(job_id):
        return None
    return Taken(job_id, job.get("input", {}))  # left out by RunPod where it is empty


def _one(text: str) -> Taken | None:
    try:
        return _read(json.loads(text))
    except RecursionError:
        why = "is nested too deeply"
    except ValueError as error:
        why = f"can't be read: {str(error).partition(';')[0]}"  # behind it Python tells its own programmers what to do
    job_id = _id(text)
    return Taken(job_id, error=JobError(f"The job {why}.", param="input")) if job_id is not None else None


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


def _id(text: str) -> str | None:
    for member in _members(text.strip()):
        name, _, value = member.partition(":")
        if name.strip() == '"id"':
            try:
                found = json.loads(value)
            except ValueError:
                return None
            return found if isinstance(found, str) and ID.fullmatch(found) else None
    return None
