"""What can't work together, or not here, told before anything starts: a table of rules.

Each of the problems fails vLLM as well, but only after it has imported itself, and often after it has loaded the model:
minutes of a GPU. A rule yields what is wrong, with what to set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from supervisor.bounded import read_file, within
from supervisor.secrets import SHORTEST_SECRET
from supervisor.settings import platform
from supervisor.settings.knobs import SHORT_KEY, Keys
from supervisor.settings.models import DISK_PATIENCE
from supervisor.settings.names import read_table
from supervisor.settings.sources import Asked
from supervisor.settings.typos import nearest
from supervisor.vllm.values import json_object

RULES = read_table("rules.json")
GONE = {"bitsandbytes": ", which an older one had", "gguf": ": since 0.24 a plugin has it"}
LORA_RANK = 16  # vLLM's default of MAX_LORA_RANK
# Of parsers and templates, vLLM's own folder has some, by their names alone.
PATH = re.compile(r"(?!.*[{}\n]).*([/\\]|\.(jinja2?|j2|txt|tmpl)$)")
Rule = Callable[[Asked], Iterator[str]]


def told(part: str, asked: Asked) -> Iterator[str]:
    """The rules of that part of `rules.json`, as one."""
    for row in RULES[part]:
        fits = all(re.search(pattern, text.format_map(asked)) for text, pattern in row["when"].items())
        if fits and all(asked.number(name) > asked.number(most) for name, most in row.get("above", {}).items()):
            yield row["told"].format_map(asked).removeprefix("environment ")  # a warning begins with a name


def is_missing(path: str, *, is_folder: bool) -> bool:
    """Whether there surely is no such folder or plain file; a disk that does not answer may have it."""
    return within(DISK_PATIENCE, Path(path).is_dir if is_folder else Path(path).is_file) is False


def config_in(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing, where it can't be read."""
    return within(DISK_PATIENCE, lambda: json_object(path.read_text())) or {}


def tls(asked: Asked) -> Iterator[str]:
    cert, key = asked["SUPERVISOR_TLS_CERT"].value, asked["SUPERVISOR_TLS_KEY"].value
    if cert:
        import ssl  # noqa: PLC0415  # 10 ms that most starts need not pay

        try:
            for path in filter(None, (cert, key)):
                read_file(Path(path), again=True)  # by uvicorn
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
        except OSError as error:
            yield (
                f"SUPERVISOR_TLS_CERT={cert}, SUPERVISOR_TLS_KEY={key or ''}: expected a certificate and its key in "
                f"PEM, such as /tls/tls.crt and /tls/tls.key ({error.strerror or error})"
            )


def names(asked: Asked) -> Iterator[str]:
    """vLLM has no bitsandbytes any more, nor GGUF; parsers come and go. Plugins may know more."""
    if asked["TOOL_PARSER_PLUGIN"].value or asked["REASONING_PARSER_PLUGIN"].value:
        return
    for option in (option for option in asked.catalogue.by_key.values() if option.names):
        setting = asked[option.variable]
        given, known = setting.shown.lower(), ("", "none", *map(str.lower, option.names))
        if given not in known and not asked.vllm.may_have_plugins(asked.environ):
            hint = GONE.get(given) or nearest(given, option.names)
            has = ", ".join(option.names)
            yield f"{setting.named}: vLLM {asked.vllm.version} has none of that name{hint}; it has {has}"


def adapters(asked: Asked) -> Iterator[str]:
    most, option = asked.number("MAX_LORA_RANK") or LORA_RANK, asked.catalogue.by_key.get("max_lora_rank")
    for module in map(str, asked["LORA_MODULES"].value or ()):
        row = json_object(module) or dict(zip(("name", "path"), module.split("=", 1), strict=False))
        name, path = str(row.get("name", "")), str(row.get("path", ""))
        if not path.startswith(("/", "./", "../", "~")):
            continue  # the hub's
        path = os.path.expanduser(path)  # noqa: PTH111  # ~nobody stays as it is
        told = f"LORA_MODULES={name}={path} ({asked['LORA_MODULES'].source})"
        rank = config_in(Path(path) / "adapter_config.json").get("r")
        if is_missing(path, is_folder=True):
            yield f"{told}: expected a folder that is there"
        elif isinstance(rank, int) and rank > most:
            fits = min((int(size) for size in (option.choices if option else ()) if int(size) >= rank), default=rank)
            yield f"{told}: its rank is {rank}, and MAX_LORA_RANK is {most:g}: set MAX_LORA_RANK={fits}"


def files(asked: Asked) -> Iterator[str]:
    for variable in ("CHAT_TEMPLATE", "TOOL_PARSER_PLUGIN", "REASONING_PARSER_PLUGIN", "ALLOWED_LOCAL_MEDIA_PATH"):
        given, is_folder = asked[variable].shown, variable == "ALLOWED_LOCAL_MEDIA_PATH"
        if ((is_folder and given) or PATH.match(given)) and is_missing(given, is_folder=is_folder):
            yield f"{asked[variable].named}: expected a {'folder' if is_folder else 'file'} that is there"


def heads(asked: Asked) -> Iterator[str]:
    """Of a model that is here: vLLM deals its attention's heads out among the GPUs."""
    parts = asked.number("TENSOR_PARALLEL_SIZE")
    if parts <= 1:
        return
    config = config_in(Path(str(asked["MODEL"].value)) / "config.json")
    inner = config.get("text_config")
    count = ((inner if isinstance(inner, dict) else {}) | config).get("num_attention_heads")
    if isinstance(count, int) and count % parts:
        fits = max(size for size in range(1, int(parts)) if count % size == 0)
        yield (
            f"{asked['TENSOR_PARALLEL_SIZE'].named}: the model's {count} heads of attention can't be shared among so "
            f"many GPUs: set TENSOR_PARALLEL_SIZE={fits}"
        )


def short_keys(asked: Asked) -> Iterator[str]:
    for name, setting in asked.settings.items():
        keys = setting.value.values if isinstance(setting.value, Keys) else ()
        short = [key for key in keys if len(key) < SHORT_KEY]
        if short:
            told = "a key has" if len(short) == 1 else f"{len(short)} keys have"
            weak = f"; one with less than {SHORTEST_SECRET} can't be masked in the log either"
            more = weak if any(len(key) < SHORTEST_SECRET for key in short) else ""
            yield f"{name}: {told} less than {SHORT_KEY} characters, which can be guessed{more}"


def gpus(asked: Asked) -> Iterator[str]:
    available = platform.gpus(asked.environ)
    tensor, pipeline = asked.number("TENSOR_PARALLEL_SIZE") or 1, asked.number("PIPELINE_PARALLEL_SIZE") or 1
    alone = asked.number("NNODES") <= 1 and asked["DISTRIBUTED_EXECUTOR_BACKEND"].value != "ray"
    if available and tensor * pipeline > available and alone:
        asked_for = f"TENSOR_PARALLEL_SIZE={tensor:g}"
        asked_for += f" x PIPELINE_PARALLEL_SIZE={pipeline:g}" if pipeline > 1 else ""
        one = "1 GPU is" if available == 1 else f"{available} GPUs are"
        yield f"{asked_for}: only {one} here; set TENSOR_PARALLEL_SIZE=auto to use what there is"


# vLLM does not start with these, or nobody would be served.
PROBLEMS: tuple[Rule, ...] = (partial(told, "problems"), tls, names, adapters, files, heads)
# It starts, and somebody may wonder.
WARNINGS: tuple[Rule, ...] = (partial(told, "warnings"), short_keys, gpus)
