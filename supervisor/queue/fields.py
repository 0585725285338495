"""Fields as the clients of both older workers send them: JSON as text, and what vLLM's server has under another name
now, or no more.

vLLM passes over what it does not know, so that a constraint would be lost without a word: a field is renamed where that
is exact, has no effect where its value asks for nothing, and fails the job otherwise.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Container
from pathlib import Path
from typing import Any

from supervisor.queue.errors import JSON, JobError

TABLE = tomllib.loads(Path(__file__).with_name("fields.toml").read_text(encoding="utf-8"))
GONE, CONSTRAINTS, WORKERS = TABLE["gone"], TABLE["constraints"], frozenset(TABLE["workers"])
OLD = frozenset(CONSTRAINTS).union(GONE)


def without(body: JSON, names: Container[str]) -> JSON:
    return {name: value for name, value in body.items() if name not in names}


def parsed(value: object, name: str) -> Any:
    """Some clients encode JSON twice. Raises JobError where text is none."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise JobError(f"{name} is text that is no JSON ({error}).", param=name) from None


def as_object(value: object, name: str) -> JSON:
    """Empty where there is none. Raises JobError."""
    content = parsed(value or {}, name)
    if not isinstance(content, dict):
        raise JobError(f"{name} must be an object.", param=name)
    return content


def encoded(content: object) -> bytes:
    """Half of a surrogate pair, of an emoji that was cut, JSON can carry; it is no UTF-8, and vLLM's tokenizer and
    RunPod take offence."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def renamed(body: JSON) -> JSON:
    """The body of a request as vLLM reads it today. Raises JobError."""
    for name, row in GONE.items():
        if body.get(name) not in (None, *row["neutral"], body.get(row.get("same"))):
            raise JobError(f"vLLM has no {name} any more: {row['instead']}.", param=name)
    constraints = {old.removeprefix("guided_"): body[old] for old in CONSTRAINTS if body.get(old) not in (None, False)}
    kept = without(body, OLD)
    if not constraints:
        return kept
    given = as_object(kept.get("structured_outputs"), "structured_outputs")
    for twice in constraints.keys() & given.keys():
        raise JobError(f"structured_outputs.{twice} is there twice, once as guided_{twice}.", param=twice)
    return {**kept, "structured_outputs": {**given, **constraints}}
