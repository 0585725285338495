"""Values as templates of older workers write them, and as vLLM reads them today."""

from __future__ import annotations

import json
import re

from supervisor.vllm.catalogue import Option
from supervisor.vllm.values import json_object

PAIR = re.compile(r"\s*(\w+)\s*[=:]\s*(\d+)\s*")
# vLLM's draft by n-grams had this for its model's name; it has a method of its own now.
NGRAM = "[ngram]"


def respelled(option: Option, given: object) -> object:
    """What is to be written today, where it is written otherwise and the installed vLLM does not know that."""
    if isinstance(given, bool) or given in option.choices:
        return given
    text = json.dumps(given) if isinstance(given, dict) else str(given).strip()
    if option.variable == "LIMIT_MM_PER_PROMPT":  # `image=10,video=0`, as in worker-vllm until July 2026
        pairs = [PAIR.fullmatch(part) for part in text.split(",")]
        return json.dumps({pair[1]: int(pair[2]) for pair in pairs if pair}) if all(pairs) else given
    if option.variable == "COMPILATION_CONFIG":  # `3`, or `{"level": 3}`, which is the `mode` of an object now
        config = {"level": int(text)} if re.fullmatch(r"[0-3]", text) else json_object(text) or {}
        level = {"mode": config.pop("level")} if "level" in config else {}
        return json.dumps(level | config) if level else given  # of both, vLLM took `mode`
    # Worker-vllm's templates offer it: adapters have the model's own type then.
    return "auto" if (option.variable, text.lower()) == ("LORA_DTYPE", "float32") else given
