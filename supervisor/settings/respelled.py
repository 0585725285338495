"""Values as templates of older workers write them, and as vLLM reads them today."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

PAIR = re.compile(r"\s*(\w+)\s*[=:]\s*(\d+)\s*")
# vLLM's draft by n-grams had this for its model's name; it has a method of its own now.
NGRAM = "[ngram]"


def _counts(text: str) -> str | None:
    """`image=10,video=0`, which worker-vllm's templates had until July 2026."""
    pairs = [PAIR.fullmatch(part) for part in text.split(",")]
    found = {pair[1]: int(pair[2]) for pair in pairs if pair is not None}
    return json.dumps(found) if len(found) == len(pairs) else None


def _level(text: str) -> str | None:
    """`3`: a level of compilation, which has a name in an object now."""
    return json.dumps({"mode": int(text)}) if re.fullmatch(r"[0-3]", text.strip()) else None


READERS: Mapping[str, Callable[[str], str | None]] = {
    "LIMIT_MM_PER_PROMPT": _counts,
    "COMPILATION_CONFIG": _level,
}


def respelled(variable: str, given: object) -> str | None:
    """What is to be written today, where it is written otherwise. `variable`: of the option."""
    read = READERS.get(variable)
    return read(str(given)) if read is not None and not isinstance(given, bool) else None
