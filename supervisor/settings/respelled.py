"""Values as templates of older workers write them, and as vLLM reads them today."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from supervisor.vllm.catalogue import Option
from supervisor.vllm.values import json_object

PAIR = re.compile(r"\s*(\w+)\s*[=:]\s*(\d+)\s*")
# vLLM's draft by n-grams had this for its model's name; it has a method of its own now.
NGRAM = "[ngram]"


def _counts(text: str) -> str | None:
    """`image=10,video=0`, which worker-vllm's templates had until July 2026."""
    pairs = [PAIR.fullmatch(part) for part in text.split(",")]
    found = {pair[1]: int(pair[2]) for pair in pairs if pair is not None}
    return json.dumps(found) if len(found) == len(pairs) else None


def _level(text: str) -> str | None:
    """`3`, or `{"level": 3}`: vLLM's level of compilation, which is the `mode` of an object now."""
    given = {"level": int(text)} if re.fullmatch(r"[0-3]", text.strip()) else json_object(text)
    if given is None or "level" not in given:
        return None
    level = given.pop("level")
    return json.dumps({"mode": level} | given)  # of both, vLLM took `mode`


def _lora_dtype(text: str) -> str | None:
    """`float32`, which worker-vllm's templates offer: adapters have the model's own type then."""
    return "auto" if text.strip().lower() == "float32" else None


READERS: Mapping[str, Callable[[str], str | None]] = {
    "LIMIT_MM_PER_PROMPT": _counts,
    "COMPILATION_CONFIG": _level,
    "LORA_DTYPE": _lora_dtype,
}


def respelled(option: Option, given: object) -> str | None:
    """What is to be written today, where it is written otherwise and the installed vLLM does not know that."""
    read = READERS.get(option.variable)
    if read is None or isinstance(given, bool) or given in option.choices:
        return None
    return read(json.dumps(given) if isinstance(given, dict) else str(given))
