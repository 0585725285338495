"""A table of rules finds settings that can't work together, or not here, before anything starts.

Each of the problems fails vLLM as well, but only after it has imported itself, and often after it has loaded the model,
which costs minutes of a GPU. A rule yields a line that says what is wrong, and what to set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from supervisor.bounded import read_file, try_bounded
from supervisor.secrets import SHORTEST_SECRET
from supervisor.settings import platform
from supervisor.settings.knobs import SAFE_KEY_LENGTH, Keys, read_path
from supervisor.settings.models import DISK_PATIENCE
from supervisor.settings.names import MESSAGES, read_table
from supervisor.settings.sources import Facts
from supervisor.settings.typos import nearest_hint
from supervisor.vllm.values import json_object

RULES = read_table("rules.json")
REMOVED_VALUES = {"bitsandbytes": ", which an older one had", "gguf": ": since 0.24 a plugin has it"}
DEFAULT_LORA_RANK = 16  # vLLM's default of MAX_LORA_RANK
# A path of a file. Parsers and templates of vLLM's own folder (template_chatml.jinja) are given by their names alone.
FILE_PATH = re.compile(r"(?!.*[{}\n]|template_\w+\.jinja$).*([/\\]|\.(jinja2?|j2|txt|tmpl)$)")
Rule = Callable[[Facts], Iterator[str]]


def check(part: str, facts: Facts) -> Iterator[str]:
    """Yields a line for each rule of that part of `rules.json` that applies."""
    for row in RULES[part]:
        is_match = all(re.search(pattern, text.format_map(facts)) for text, pattern in row["when"].items())
        if is_match and all(facts.number(name) > facts.number(limit) for name, limit in row.get("above", {}).items()):
            yield row["told"].format_map(facts).removeprefix("environment ")  # a warning begins with a name


def is_missing(path: str, *, is_folder: bool) -> bool:
    """Returns whether there surely is no such folder or plain file. A disk that does not answer may have it."""
    return try_bounded(DISK_PATIENCE, Path(path).is_dir if is_folder else Path(path).is_file) is False


def read_json_file(path: Path) -> dict[str, Any]:
    """Returns the object in a file of JSON, and an empty one where the file can't be read."""
    return try_bounded(DISK_PATIENCE, lambda: json_object(path.read_text())) or {}


def check_tls(facts: Facts) -> Iterator[str]:
    cert, key = facts["SUPERVISOR_TLS_CERT"].value, facts["SUPERVISOR_TLS_KEY"].value
    if cert:
        import ssl  # noqa: PLC0415  # 10 ms that most starts need not pay

        try:
            for path in filter(None, (cert, key)):
                read_file(Path(path), regular_only=True)  # uvicorn reads it once more
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
        except OSError as error:
            yield MESSAGES["tls"].format(cert=cert.splitlines()[0], key=key or "", reason=error.strerror or error)


def check_names(facts: Facts) -> Iterator[str]:
    """vLLM has bitsandbytes and GGUF no more, and its parsers come and go. Plugins may know more names than vLLM."""
    has_plugin = facts["TOOL_PARSER_PLUGIN"].value or facts["REASONING_PARSER_PLUGIN"].value
    for option in (option for option in facts.catalogue.by_key.values() if option.names):
        setting = facts[option.variable]
        value, fold = setting.shown, str.lower if option.type == "folded" else str
        known_values = ("", "None", "none", *map(fold, option.names))
        if fold(value) not in known_values and not has_plugin and not facts.vllm.may_have_plugins(facts.environ):
            hint = REMOVED_VALUES.get(value.lower()) or nearest_hint(value, option.names)
            yield f"{setting.named}: vLLM {facts.vllm.version} has no such name{hint}; it has {', '.join(option.names)}"


def check_loras(facts: Facts) -> Iterator[str]:
    max_rank, option = facts.number("MAX_LORA_RANK") or DEFAULT_LORA_RANK, facts.catalogue.by_key.get("max_lora_rank")
    for module in map(str, facts["LORA_MODULES"].value or ()):
        fields = json_object(module) or dict(zip(("name", "path"), module.split("=", 1), strict=False))
        name, path = str(fields.get("name", "")), read_path(str(fields.get("path", "")))
        if not path.startswith(("/", "./", "../", "~")):
            continue  # it is a name on the hub
        label = f"LORA_MODULES={name}={path} ({facts['LORA_MODULES'].source})"
        rank = read_json_file(Path(path) / "adapter_config.json").get("r")
        if is_missing(path, is_folder=True):
            yield f"{label}: expected a folder that is there"
        elif isinstance(rank, int) and rank > max_rank:
            fit = min((int(size) for size in (option.choices if option else ()) if int(size) >= rank), default=rank)
            yield f"{label}: its rank is {rank}, and MAX_LORA_RANK is {max_rank:g}: set MAX_LORA_RANK={fit}"


def check_files(facts: Facts) -> Iterator[str]:
    for variable in ("CHAT_TEMPLATE", "TOOL_PARSER_PLUGIN", "REASONING_PARSER_PLUGIN", "ALLOWED_LOCAL_MEDIA_PATH"):
        path, is_folder = facts[variable].shown, variable == "ALLOWED_LOCAL_MEDIA_PATH"
        if ((is_folder and path) or FILE_PATH.match(path)) and is_missing(path, is_folder=is_folder):
            yield f"{facts[variable].named}: expected a {'folder' if is_folder else 'file'} that is there"


def check_heads(facts: Facts) -> Iterator[str]:
    """Checks a model that is here: vLLM deals the heads of its attention out among the GPUs."""
    gpu_count = facts.number("TENSOR_PARALLEL_SIZE")
    config = read_json_file(Path(str(facts["MODEL"].value)) / "config.json") if gpu_count > 1 else {}
    text_config = config.get("text_config")
    heads = ((text_config if isinstance(text_config, dict) else {}) | config).get("num_attention_heads")
    if isinstance(heads, int) and heads % gpu_count:
        divisor = max(size for size in range(1, int(gpu_count)) if heads % size == 0)
        yield MESSAGES["heads"].format(setting=facts["TENSOR_PARALLEL_SIZE"].named, heads=heads, divisor=divisor)


def check_key_lengths(facts: Facts) -> Iterator[str]:
    for name, setting in facts.settings.items():
        keys = setting.value.values if isinstance(setting.value, Keys) else ()
        short_keys = [key for key in keys if len(key) < SAFE_KEY_LENGTH]
        if short_keys:
            subject = "a key has" if len(short_keys) == 1 else f"{len(short_keys)} keys have"
            hint = MESSAGES["short"].format(length=SHORTEST_SECRET) if min(map(len, keys)) < SHORTEST_SECRET else ""
            yield f"{name}: {subject} less than {SAFE_KEY_LENGTH} characters, which can be guessed{hint}"


def check_gpus(facts: Facts) -> Iterator[str]:
    gpu_count = platform.count_gpus(facts.environ)
    sizes = {name: size for name in platform.list_sizes(facts.settings) if (size := facts.integer(name, 1)) > 1}
    backends = (facts["DISTRIBUTED_EXECUTOR_BACKEND"].value, facts["DATA_PARALLEL_BACKEND"].value)
    if gpu_count and math.prod(sizes.values()) > gpu_count and facts.number("NNODES") <= 1 and "ray" not in backends:
        text = " x ".join(f"{name}={size}" for name, size in sizes.items())
        gpus = "1 GPU is" if gpu_count == 1 else f"{gpu_count} GPUs are"
        yield f"{text}: only {gpus} here; {MESSAGES['gpus']}"


# vLLM does not start with these, or nobody would be served.
PROBLEMS: tuple[Rule, ...] = (partial(check, "problems"), check_tls, check_names, check_loras, check_files, check_heads)
# vLLM starts with these, and somebody may wonder.
WARNINGS: tuple[Rule, ...] = (partial(check, "warnings"), check_key_lengths, check_gpus)
