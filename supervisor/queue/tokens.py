"""worker-vllm's own output until the end of July 2026, for programs that read it: `SUPERVISOR_JOB_OUTPUT=tokens`.

    [{"choices": [{"tokens": ["a whole text"]}], "usage": {"input": 5, "output": 20}}]

A stream gave the same, so many pieces of text at a time: `least` at first, then `growth` times as many, up to `most`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from supervisor.queue.errors import JSON, JobError


@dataclass(frozen=True, slots=True)
class Batches:
    most: int = 50
    least: int = 1
    growth: float = 3.0

    def of(self, content: JSON) -> Batches:
        """As one request wants them. Raises JobError."""
        found = []
        names = ("max_batch_size", "min_batch_size", "batch_size_growth_factor")
        for name, usual in zip(names, (self.most, self.least, self.growth), strict=True):
            value = content.get(name)
            value = usual if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1e6:
                raise JobError(f"{name} must be a number from 1 on.", param=name)
            found.append(value)
        return Batches(int(found[0]), int(found[1]), float(found[2]))


class Tokens:
    """Of one job. `feed` with whole events, then `rest`."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.size = min(batches.least, batches.most)
        self.pieces: dict[int, list[str]] = {}
        self.usage: JSON = {}
        self.count = 0  # of pieces, where vLLM does not say how many tokens they were

    def feed(self, text: str) -> list[object]:
        return [batch for event in _events(text) for batch in self._event(event)]

    def rest(self) -> list[object]:
        return [self._batch()] if self.pieces else []

    def _event(self, event: JSON) -> Iterator[object]:
        if isinstance(event.get("usage"), dict):
            self.usage = event["usage"]
        for choice in event.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") if "delta" in choice else choice.get("text")
            if text:
                self.pieces.setdefault(choice.get("index", 0), []).append(text)
                self.count += 1
        if sum(map(len, self.pieces.values())) >= self.size:
            self.size = min(int(self.size * self.batches.growth), self.batches.most)
            yield self._batch()

    def _batch(self) -> JSON:
        pieces, self.pieces = self.pieces, {}
        choices = [{"tokens": pieces.get(index, [])} for index in range(max(pieces) + 1)]
        return {"choices": choices, "usage": _usage({"completion_tokens": self.count, **self.usage})}


def whole(answer: JSON) -> JSON:
    """OpenAI's JSON, so."""
    choices = []
    for choice in answer.get("choices") or ():
        text = (choice.get("message") or {}).get("content") if "message" in choice else choice.get("text")
        choices.append({"tokens": [text or ""]})
    return {"choices": choices, "usage": _usage(answer.get("usage") or {})}


def _usage(usage: JSON) -> JSON:
    return {"input": usage.get("prompt_tokens", 0), "output": usage.get("completion_tokens", 0)}


def _events(text: str) -> Iterator[JSON]:
    for line in text.splitlines():
        if line.startswith("data:"):
            try:
                event: Any = json.loads(line.removeprefix("data:"))
            except ValueError:
                continue  # [DONE]
            if isinstance(event, dict):
                yield event
