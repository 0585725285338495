"""runpod-LLM's shape of a request, and of its result. Pure: no I/O."""

from __future__ import annotations

import json

from supervisor.queue.errors import JSON, JobError
from supervisor.queue.old_fields import BATCHES, CONSTRAINTS

# What it assumed where a request says nothing.
DEFAULTS: JSON = {"temperature": 0.7, "top_p": 1.0}
MODES = {"chat": "chat", "complete": "complete", "completion": "complete", "json": "json"}
MARKS = frozenset({"mode", "json_schema", "schema", "regex", "guided_regex"})
# Its own fields, and those of the worker; its answer is one object, so nothing streams.
FIELDS = MARKS - {"guided_regex"} | {
    "messages", "prompt", "sampling_params", "apply_chat_template", "stream", "stream_options", "requests", *BATCHES,
}  # fmt: skip


def body(content: JSON, sampling: JSON) -> tuple[str, JSON]:
    """Its mode, and what vLLM is asked: with `messages`, or with a `prompt`. Raises JobError."""
    asked = str(content.get("mode") or ("chat" if not _wants_json(content) else "json")).lower()
    mode = MODES.get(asked)
    if mode is None:
        raise JobError(f"mode {asked!r} is not one of: {', '.join(MODES)}.", param="mode")
    messages, prompt = content.get("messages"), content.get("prompt")
    found = {name: value for name, value in {**content, **sampling}.items() if name not in FIELDS and value is not None}
    found = {**DEFAULTS, **found}
    if mode == "json":
        found.update(_constraint(content))
    if messages and mode != "complete":
        return mode, {**found, "messages": messages}
    if prompt is None:
        wanted = {"complete": "prompt", "chat": "messages", "json": "messages or prompt"}[mode]
        raise JobError(f"mode {mode} needs {wanted}.", param=wanted.split(maxsplit=1)[0])
    if mode == "chat":
        return mode, {**found, "messages": [{"role": "user", "content": prompt}]}
    return mode, {**found, "prompt": prompt}


def _wants_json(content: JSON) -> bool:
    return any(content.get(name) for name in ("json_schema", "schema", "regex", "guided_regex"))


def _constraint(content: JSON) -> JSON:
    schema = content.get("json_schema") or content.get("schema")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise JobError(f"The schema is text that is no JSON ({error}).", param="json_schema") from None
    if schema:
        if not isinstance(schema, dict):
            raise JobError("The schema must be an object.", param="json_schema")
        if isinstance(schema.get("schema"), dict) and "type" not in schema:  # OpenAI's {"name", "schema"}
            return {"response_format": {"type": "json_schema", "json_schema": {"name": "result", **schema}}}
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "result", "schema": schema}}}
    if pattern := content.get("regex") or content.get("guided_regex"):
        return {"guided_regex": pattern}  # old_fields.py writes it as vLLM has it
    if any(content.get(name) for name in ("response_format", "structured_outputs", *CONSTRAINTS)):  # said otherwise
        return {}
    return {"response_format": {"type": "json_object"}}


def result(answer: JSON, mode: str) -> JSON:
    """An OpenAI answer as runpod-LLM's clients know it: `mode`, three counts of tokens, and in json mode the value."""
    choices = []
    for index, choice in enumerate(answer.get("choices") or []):
        kept: JSON = {"index": choice.get("index", index), "finish_reason": choice.get("finish_reason")}
        if "message" in choice:
            message = choice["message"] or {}
            kept["message"] = {"role": message.get("role", "assistant"), "content": message.get("content")}
            if message.get("tool_calls"):  # beside them vLLM says "" where a call is required
                kept["message"] |= {"content": message.get("content") or None, "tool_calls": message["tool_calls"]}
            text = message.get("content")
        else:
            text = kept["text"] = choice.get("text")
        if mode == "json":
            try:
                value = json.loads(text or "")
                json.dumps(value, allow_nan=False)  # Python reads NaN, and 1e999 as infinity; RunPod does not
                kept["json"] = value
            except (ValueError, RecursionError) as error:
                kept["json_parse_error"] = str(error)
        choices.append(kept)
    usage = answer.get("usage") or {}
    counts = {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {"id": answer.get("id"), "model": answer.get("model"), "mode": mode, "choices": choices, "usage": counts}
