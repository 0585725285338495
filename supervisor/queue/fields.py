"""Fields as the clients of both older workers send them: JSON as text, and what vLLM's server has under another name
now, or no more.

vLLM passes over what it does not know, so that a constraint would be lost without a word: a field is renamed where that
is exact, has no effect where its value asks for nothing, and fails the job otherwise.
"""

from __future__ import annotations

import json
from typing import Any

from supervisor.queue.errors import JSON, JobError
from supervisor.queue.tokens import Batches

# Of the short shapes: what is for the worker and not for vLLM.
WORKERS = frozenset({"messages", "prompt", "sampling_params", "apply_chat_template", *Batches._fields})
# What is in `structured_outputs` now, without `guided_`.
CONSTRAINTS = (
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object", "guided_whitespace_pattern",
)  # fmt: skip
# What is gone: values that ask for nothing, and what to do instead.
GONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), "ask for `n` answers, with `logprobs` to choose by"),
    "early_stopping": ((False,), "a beam search has no such end any more: leave it out"),
    "guided_decoding_backend": (("", "auto"), "the server's STRUCTURED_OUTPUTS_CONFIG names the backend"),
}


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
    for name, (neutral, instead) in GONE.items():
        value = body.get(name)
        if value is not None and value not in neutral and not (name == "best_of" and value == body.get("n")):
            raise JobError(f"vLLM has no {name} any more: {instead}.", param=name)
    constraints = {old.removeprefix("guided_"): body[old] for old in CONSTRAINTS if body.get(old) not in (None, False)}
    kept = {name: value for name, value in body.items() if name not in CONSTRAINTS and name not in GONE}
    if not constraints:
        return kept
    given = as_object(kept.get("structured_outputs"), "structured_outputs")
    for twice in constraints.keys() & given.keys():
        raise JobError(f"structured_outputs.{twice} is there twice, once as guided_{twice}.", param=twice)
    return {**kept, "structured_outputs": {**given, **constraints}}
