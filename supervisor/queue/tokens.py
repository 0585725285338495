"""worker-vllm's own output until the end of July 2026, for programs that read it: `SUPERVISOR_JOB_OUTPUT=tokens`.

    [{"choices": [{"tokens": ["a whole text"]}], "usage": {"input": 5, "output": 20}}]

A stream gave the same, so many pieces of text at a time: the least at first, then more and more, up to the most.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
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

    async def cut(self, stream: AsyncIterator[str]) -> AsyncIterator[JSON]:
        """A stream of whole events, the last of which is [DONE]."""
        size = min(self.min_batch_size, self.max_batch_size)
        pieces: list[tuple[int, str]] = []  # and of which answer each is
        usage: JSON = {}
        count = 0  # of pieces, where vLLM does not say how many tokens they were
        async for text in stream:
            for line in text.splitlines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data:"))
                    usage = event.get("usage") or usage
                    told = ((choice.get("index", 0), _text(choice)) for choice in event.get("choices") or ())
                    pieces += [(answer, piece) for answer, piece in told if piece]
                if len(pieces) >= size or (pieces and line == "data: [DONE]"):
                    size = min(size * self.batch_size_growth_factor, self.max_batch_size)
                    count += len(pieces)
                    answers = [[piece for at, piece in pieces if at == answer] for answer in range(max(pieces)[0] + 1)]
                    pieces = []
                    yield _output(answers, {"completion_tokens": count, **usage})


def whole(answer: JSON) -> JSON:
    return _output([[_text(choice)] for choice in answer.get("choices") or ()], answer.get("usage") or {})


def _text(choice: JSON) -> str:
    """Of a chat or a completion, all of it or a piece."""
    message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or choice.get("text") or ""


def _output(answers: list[list[str]], usage: JSON) -> JSON:
    counts = {"input": usage.get("prompt_tokens", 0), "output": usage.get("completion_tokens", 0)}
    return {"choices": [{"tokens": tokens} for tokens in answers], "usage": counts}
