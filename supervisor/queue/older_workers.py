"""What clients of both older workers send and expect, where vLLM's server has it otherwise: fields that have
another name now, or are gone; runpod-LLM's requests and results; worker-vllm's output of old. Pure: no I/O.

vLLM passes over what it does not know, so that a constraint would be lost without a word. Therefore a field is renamed
where that is exact, has no effect where its value asks for nothing, and fails the job otherwise.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from supervisor.queue.jobs import JSON, JobError, omit, parse_object

FIELDS = tomllib.loads(Path(__file__).with_name("fields.toml").read_text(encoding="utf-8"))
GONE, CONSTRAINTS, LLM, OWN_FIELDS = FIELDS["gone"], FIELDS["constraints"], FIELDS["llm"], frozenset(FIELDS["workers"])
OLD_FIELDS, LLM_FIELDS = frozenset(CONSTRAINTS).union(GONE), OWN_FIELDS.union(LLM["own"])
MARKS = ("mode", *LLM["constraining"])  # each of these fields marks a request as runpod-LLM's


def rename(body: JSON) -> JSON:
    """Returns the body of a request as vLLM reads it today. Raises JobError where there is no such body."""
    for name, row in GONE.items():
        if body.get(name) not in (None, *row["neutral"], body.get(row.get("same"))):
            raise JobError(f"vLLM has no {name} any more: {row['instead']}.", param=name)
    constraints = {old.removeprefix("guided_"): body[old] for old in CONSTRAINTS if body.get(old) not in (None, False)}
    fields = omit(body, OLD_FIELDS)
    if not constraints:
        return fields
    outputs = parse_object(fields.get("structured_outputs"), "structured_outputs")
    for name in constraints.keys() & outputs.keys():
        raise JobError(f"structured_outputs.{name} is there twice, once as guided_{name}.", param=name)
    return {**fields, "structured_outputs": {**outputs, **constraints}}


def llm_fields(content: JSON) -> tuple[str, JSON]:
    """Returns the mode of runpod-LLM's request, and what vLLM gets beside `messages` or `prompt`. Raises JobError."""
    has_constraint = any(content.get(name) for name in LLM["constraining"])
    mode_name = str(content.get("mode") or ("json" if has_constraint else "chat")).lower()
    if (mode := LLM["modes"].get(mode_name)) is None:
        raise JobError(f"mode {mode_name!r} is not one of: {', '.join(LLM['modes'])}.", param="mode")
    fields = {name: value for name, value in content.items() if value is not None and name not in LLM_FIELDS}
    return mode, LLM["defaults"] | fields | (_constraint(content) if mode == "json" else {})


def _constraint(content: JSON) -> JSON:
    name = "json_schema" if content.get("json_schema") else "schema"
    if schema := parse_object(content.get(name), name):
        # OpenAI's form is {"name", "schema"}.
        json_schema = schema if isinstance(schema.get("schema"), dict) and "type" not in schema else {"schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "result", **json_schema}}}
    if pattern := content.get("regex") or content.get("guided_regex"):
        return {"guided_regex": pattern}  # `rename` writes it as vLLM has it
    if any(content.get(name) for name in ("response_format", "structured_outputs", *CONSTRAINTS)):  # these constrain
        return {}
    return {"response_format": {"type": "json_object"}}


def llm_result(answer: JSON, mode: str) -> JSON:
    """Returns an OpenAI answer as runpod-LLM's clients know it: `mode`, three token counts, in json mode the value."""
    choices = [_llm_choice(choice, index, mode) for index, choice in enumerate(answer.get("choices") or [])]
    usage = answer.get("usage") or {}
    counts = {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {"id": answer.get("id"), "model": answer.get("model"), "mode": mode, "choices": choices, "usage": counts}


def _llm_choice(choice: JSON, index: int, mode: str) -> JSON:
    result: JSON = {"index": choice.get("index", index), "finish_reason": choice.get("finish_reason")}
    if "message" in choice:
        message = choice["message"] or {}
        text = message.get("content")
        result["message"] = {"role": message.get("role", "assistant"), "content": text}
        if calls := message.get("tool_calls"):  # beside them vLLM's text is "" where a call is required
            result["message"] |= {"content": text or None, "tool_calls": calls}
    else:
        text = result["text"] = choice.get("text")
    if mode == "json":
        try:
            value = json.loads(text or "")
            json.dumps(value, allow_nan=False)  # Python reads NaN, and 1e999 as infinity; RunPod does not
            result["json"] = value
        except (ValueError, RecursionError) as error:
            result["json_parse_error"] = str(error)
    return result


class Batches(NamedTuple):
    """worker-vllm gave this until the end of July 2026. `SUPERVISOR_JOB_OUTPUT=tokens` is for programs that read it.

        [{"choices": [{"tokens": ["a whole text"]}], "usage": {"input": 5, "output": 20}}]

    A stream gave the same, so many pieces of text at a time: the least at first, then more and more, up to the most.
    A request has the same names for these numbers."""

    max_batch_size: float = 50
    min_batch_size: float = 1
    batch_size_growth_factor: float = 3.0

    def override(self, content: JSON) -> Batches:
        """Returns the numbers as one request wants them. Raises JobError where one is none."""
        sizes = {name: content[name] for name in self._fields if content.get(name) is not None}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1e6:
                raise JobError(f"{name} must be a number from 1 on.", param=name)
        return self._replace(**sizes)

    async def group(self, stream: AsyncIterator[str]) -> AsyncIterator[JSON]:
        """Yields the batches of a stream of whole events, the last of which is [DONE]."""
        size = min(self.min_batch_size, self.max_batch_size)
        pieces: list[tuple[int, str]] = []  # each after the index of its answer
        usage: JSON = {}
        count = 0  # pieces, which count where vLLM does not say how many tokens they were
        async for text in stream:
            for line in map(str.rstrip, text.split("\n")):  # no splitlines: JSON may hold U+2028, a line end there
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data:"))
                    usage = event.get("usage") or usage
                    texts = ((choice.get("index", 0), _choice_text(choice)) for choice in event.get("choices") or ())
                    pieces += [(answer, piece) for answer, piece in texts if piece]
                if len(pieces) >= size or (pieces and line == "data: [DONE]"):
                    size = min(size * self.batch_size_growth_factor, self.max_batch_size)
                    count += len(pieces)
                    answers = [[piece for i, piece in pieces if i == answer] for answer in range(max(pieces)[0] + 1)]
                    pieces = []
                    yield _output(answers, {"completion_tokens": count, **usage})


def to_tokens(answer: JSON) -> JSON:
    """Returns the same output for an answer that came as a whole: one batch of all."""
    return _output([[_choice_text(choice)] for choice in answer.get("choices") or ()], answer.get("usage") or {})


def _choice_text(choice: JSON) -> str:
    """Returns the text of a chat's or a completion's choice, all of it or a piece."""
    message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or choice.get("text") or ""


def _output(answers: list[list[str]], usage: JSON) -> JSON:
    counts = {"input": usage.get("prompt_tokens", 0), "output": usage.get("completion_tokens", 0)}
    return {"choices": [{"tokens": tokens} for tokens in answers], "usage": counts}
