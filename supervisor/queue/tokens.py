"""worker-vllm's own output until the end of July 2026, for programs that read it: `SUPERVISOR_JOB_OUTPUT=tokens`.

    [{"choices": [{"tokens": ["a whole text"]}], "usage": {"input": 5, "output": 20}}]

A stream gave the same, so many pieces of text at a time: the least at first, then more and more, up to the most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from supervisor.queue.errors import JSON, JobError


class Batches(NamedTuple):
    """How many pieces at once, by the names that a request has for it."""

    max_batch_size: float = 50
    min_batch_size: float = 1
    batch_size_growth_factor: float = 3.0

    def of(self, content: JSON) -> Batches:
        """As one request wants them. Raises JobError."""
        given = {name: content[name] for name in self._fields if content.get(name) is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1e6:
                raise JobError(f"{name} must be a number from 1 on.", param=name)
        return self._replace(**given)


class Tokens:
    """Of one job, to be fed with whole events, the last of which is [DONE]."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.size = min(batches.min_batch_size, batches.max_batch_size)
        self.pieces: list[tuple[int, str]] = []  # and of which answer each is
        self.usage: JSON = {}
        self.count = 0  # of pieces, where vLLM does not say how many tokens they were

    def feed(self, text: str) -> Iterator[JSON]:
        for line in text.splitlines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data:"))
                self.usage = event.get("usage") or self.usage
                for choice in event.get("choices") or ():
                    if piece := _text(choice):
                        self.pieces.append((choice.get("index", 0), piece))
            if len(self.pieces) >= self.size or (self.pieces and line == "data: [DONE]"):
                self.size = min(self.size * self.batches.batch_size_growth_factor, self.batches.max_batch_size)
                self.count += len(self.pieces)
                answers = range(max(self.pieces)[0] + 1)
                choices = [{"tokens": [piece for at, piece in self.pieces if at == answer]} for answer in answers]
                self.pieces = []
                yield {"choices": choices, "usage": _usage({"completion_tokens": self.count, **self.usage})}


def whole(answer: JSON) -> JSON:
    choices = [{"tokens": [_text(choice)]} for choice in answer.get("choices") or ()]
    return {"choices": choices, "usage": _usage(answer.get("usage") or {})}


def _text(choice: JSON) -> str:
    """Of a chat or a completion, all of it or a piece."""
    message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or choice.get("text") or ""


def _usage(usage: JSON) -> JSON:
    return {"input": usage.get("prompt_tokens", 0), "output": usage.get("completion_tokens", 0)}
