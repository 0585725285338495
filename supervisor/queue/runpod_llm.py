"""runpod-LLM's shape of a request, and of its result. Pure: no I/O."""

from __future__ import annotations

import json

from supervisor.queue.errors import JSON, JobError
from supervisor.queue.fields import CONSTRAINTS, TABLE, WORKERS, as_object, without

LLM = TABLE["llm"]
MARKS = ("mode", *LLM["constraining"])
FIELDS = WORKERS.union(LLM["own"])


def fields(content: JSON) -> tuple[str, JSON]:
    """Its mode, and what vLLM gets beside `messages` or a `prompt`. Raises JobError."""
    constrained = any(content.get(name) for name in LLM["constraining"])
    asked = str(content.get("mode") or ("json" if constrained else "chat")).lower()
    mode = LLM["modes"].get(asked)
    if mode is None:
        raise JobError(f"mode {asked!r} is not one of: {', '.join(LLM['modes'])}.", param="mode")
    given = {name: value for name, value in content.items() if value is not None}
    return mode, LLM["defaults"] | without(given, FIELDS) | (_constraint(content) if mode == "json" else {})


def _constraint(content: JSON) -> JSON:
    name = "json_schema" if content.get("json_schema") else "schema"
    if schema := as_object(content.get(name), name):
        # OpenAI's is {"name", "schema"}.
        named = schema if isinstance(schema.get("schema"), dict) and "type" not in schema else {"schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "result", **named}}}
    if pattern := content.get("regex") or content.get("guided_regex"):
        return {"guided_regex": pattern}  # fields.py writes it as vLLM has it
    if any(content.get(name) for name in ("response_format", "structured_outputs", *CONSTRAINTS)):  # said otherwise
        return {}
    return {"response_format": {"type": "json_object"}}


def result(answer: JSON, mode: str) -> JSON:
    """An OpenAI answer as runpod-LLM's clients know it: `mode`, three counts of tokens, and in json mode the value."""
    choices = [_choice(choice, index, mode) for index, choice in enumerate(answer.get("choices") or [])]
    usage = answer.get("usage") or {}
    counts = {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {"id": answer.get("id"), "model": answer.get("model"), "mode": mode, "choices": choices, "usage": counts}


def _choice(choice: JSON, index: int, mode: str) -> JSON:
    kept: JSON = {"index": choice.get("index", index), "finish_reason": choice.get("finish_reason")}
    if "message" in choice:
        message = choice["message"] or {}
        text = message.get("content")
        kept["message"] = {"role": message.get("role", "assistant"), "content": text}
        if calls := message.get("tool_calls"):  # beside them vLLM says "" where a call is required
            kept["message"] |= {"content": text or None, "tool_calls": calls}
    else:
        text = kept["text"] = choice.get("text")
    if mode == "json":
        try:
            value = json.loads(text or "")
            json.dumps(value, allow_nan=False)  # Python reads NaN, and 1e999 as infinity; RunPod does not
            kept["json"] = value
        except (ValueError, RecursionError) as error:
            kept["json_parse_error"] = str(error)
    return kept
