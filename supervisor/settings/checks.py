"""What can't work together, or not here, told before anything starts: a table of rules.

Each of the problems fails vLLM as well, but only after it has imported itself, and often after it has loaded the model:
minutes of a GPU. A rule yields what is wrong, with what to set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from supervisor.bounded import within
from supervisor.secrets import SHORTEST_SECRET
from supervisor.settings import platform
from supervisor.settings.knobs import SHORT_KEY, Keys
from supervisor.settings.models import DISK_PATIENCE
from supervisor.settings.names import read_table
from supervisor.settings.sources import Asked, number
from supervisor.settings.typos import nearest
from supervisor.vllm.values import json_object

RULES = read_table("rules.json")
GONE = {"bitsandbytes": ", which an older one had", "gguf": ": since 0.24 a plugin has it"}
# What it may not be less than, and vLLM's default of that, where it has a fixed one.
AT_LEAST = {"MAX_NUM_BATCHED_TOKENS": ("MAX_NUM_SEQS", 0), "MAX_CPU_LORAS": ("MAX_LORAS", 1)}
PLACES = {
    "CHAT_TEMPLATE": "file",
    "TOOL_PARSER_PLUGIN": "file",
    "REASONING_PARSER_PLUGIN": "file",
    "ALLOWED_LOCAL_MEDIA_PATH": "folder",
}
LORA_RANK = 16  # vLLM's default of MAX_LORA_RANK
# Of parsers and templates, vLLM's own folder has some, by their names alone.
PATH = re.compile(r"[/\\]|\.(jinja2?|j2|txt|tmpl)$")


Rule = Callable[[Asked], Iterator[str]]


def told(part: str) -> Rule:
    """The rules of that part of `rules.json`, as one."""

    def rule(asked: Asked) -> Iterator[str]:
        for row in RULES[part]:
            fits = all(re.search(pattern, f"{{{place}}}".format_map(asked)) for place, pattern in row["when"].items())
            if fits and all(asked.number(name) > most for name, most in row.get("above", {}).items()):
                yield row["told"].format_map(asked)

    return rule


def is_missing(path: str) -> bool:
    """Whether it surely is not there; a disk that does not answer may have it."""
    return within(DISK_PATIENCE, Path(path).exists) is False


def config_in(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing, where it can't be read."""
    return within(DISK_PATIENCE, lambda: json_object(path.read_text())) or {}


# Problems


def tls(asked: Asked) -> Iterator[str]:
    cert, key = asked["SUPERVISOR_TLS_CERT"].value, asked["SUPERVISOR_TLS_KEY"].value
    if cert:
        import ssl  # noqa: PLC0415  # 10 ms that most starts need not pay

        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
        except OSError as error:
            yield (
                f"SUPERVISOR_TLS_CERT={cert}, SUPERVISOR_TLS_KEY={key or ''}: expected a certificate and its key in "
                f"PEM, such as /tls/tls.crt and /tls/tls.key ({error.strerror or error})"
            )


def a_queue_on_runpod(asked: Asked) -> Iterator[str]:
    """A simulated one would be taken for a worker that has nothing to do, and be paid for."""
    on_runpod = next((name for name in platform.RUNPODS if asked.environ.get(name)), None)
    if asked["SUPERVISOR_MODE"].value == "queue" and on_runpod and not asked.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        yield (
            f"SUPERVISOR_MODE=queue on RunPod ({on_runpod} is set) needs RUNPOD_WEBHOOK_GET_JOB, which RunPod sets on "
            "queue endpoints alone: make it one, or serve HTTP with SUPERVISOR_MODE=http"
        )


def least(asked: Asked) -> Iterator[str]:
    for variable, (other, default) in AT_LEAST.items():
        given, limit = asked.number(variable), asked.number(other) or default
        if given and given < limit:
            where = f" ({asked[other].source})" if asked[other].source else ""
            yield f"{asked[variable].named}: expected at least {other}, which is {limit:g}{where}"


def names(asked: Asked) -> Iterator[str]:
    """vLLM has no bitsandbytes any more, nor GGUF; parsers come and go. Plugins may know more."""
    if asked["TOOL_PARSER_PLUGIN"].value:
        return
    for option in asked.catalogue.by_key.values():
        given = asked[option.variable].value
        if not option.names or not given or str(given).lower() in ("none", *map(str.lower, option.names)):
            continue
        if asked["REASONING_PARSER_PLUGIN"].value or asked.vllm.may_have_plugins(asked.environ):
            continue
        hint = GONE.get(str(given).lower()) or nearest(str(given).lower(), option.names)
        yield (
            f"{asked[option.variable].named}: vLLM {asked.vllm.version} has none of that name{hint}; it has "
            f"{', '.join(option.names)}"
        )


def adapters(asked: Asked) -> Iterator[str]:
    most = asked.number("MAX_LORA_RANK") or LORA_RANK
    for module in asked["LORA_MODULES"].value or ():
        name, path = adapter(str(module))
        if not path.startswith(("/", "./", "../", "~")):
            continue  # the hub's
        path = os.path.expanduser(path)  # noqa: PTH111  # ~nobody stays as it is
        told = f"LORA_MODULES={name}={path} ({asked['LORA_MODULES'].source})"
        if is_missing(path):
            yield f"{told}: expected a folder that is there"
            continue
        rank = config_in(Path(path) / "adapter_config.json").get("r")
        if isinstance(rank, int) and rank > most:
            yield f"{told}: its rank is {rank}, and MAX_LORA_RANK is {most:g}: set MAX_LORA_RANK={_rank(asked, rank)}"


def adapter(module: str) -> tuple[str, str]:
    """Name and path, of `name=path` or a JSON object."""
    if module.startswith("{"):
        row = json_object(module) or {}
        return str(row.get("name", "")), str(row.get("path", ""))
    name, _, path = module.partition("=")
    return name, path


def _rank(asked: Asked, rank: int) -> int:
    option = asked.catalogue.by_key.get("max_lora_rank")
    return min((int(choice) for choice in option.choices if int(choice) >= rank), default=rank) if option else rank


def files(asked: Asked) -> Iterator[str]:
    for variable, kind in PLACES.items():
        given = str(asked[variable].value or "")
        is_path = given if kind == "folder" else PATH.search(given) and not any(sign in given for sign in "{}\n")
        if is_path and is_missing(given):
            yield f"{asked[variable].named}: expected a {kind} that is there"


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


def drafts(asked: Asked) -> Iterator[str]:
    """vLLM's own rule: a draft by n-grams, by a part of the model, or by another model, which has to be named."""
    config = json_object(asked["SPECULATIVE_CONFIG"].value)  # none, where it has numbers such as 32k
    if config is not None and not config.keys() & {"model", "method"}:
        yield f"{asked['SPECULATIVE_CONFIG'].named}: it names neither a method, such as ngram, nor a model"


# Warnings


def short_keys(asked: Asked) -> Iterator[str]:
    for name, setting in asked.settings.items():
        keys = setting.value.values if isinstance(setting.value, Keys) else ()
        short = [key for key in keys if len(key) < SHORT_KEY]
        if short:
            told = "a key has" if len(short) == 1 else f"{len(short)} keys have"
            weak = f"; one with less than {SHORTEST_SECRET} can't be masked in the log either"
            more = weak if any(len(key) < SHORTEST_SECRET for key in short) else ""
            yield f"{name}: {told} less than {SHORT_KEY} characters, which can be guessed{more}"


def runpods_start(asked: Asked) -> Iterator[str]:
    if asked.environ.get("RUNPOD_ENDPOINT_ID") or asked.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        limit = number(asked.environ.get("RUNPOD_INIT_TIMEOUT"), platform.RUNPOD_START)
        startup = asked.number("SUPERVISOR_STARTUP_TIMEOUT")
        if startup > limit:
            yield (
                f"RunPod gives a worker {limit:g} s to become ready (RUNPOD_INIT_TIMEOUT), and "
                f"SUPERVISOR_STARTUP_TIMEOUT is {startup:g} s: set RUNPOD_INIT_TIMEOUT={startup:g} on the endpoint"
            )


def batches_of_jobs(asked: Asked) -> Iterator[str]:
    if asked["SUPERVISOR_JOB_OUTPUT"].value != "tokens":
        for name in ("SUPERVISOR_JOB_BATCH_SIZE", "SUPERVISOR_JOB_MIN_BATCH_SIZE", "SUPERVISOR_JOB_BATCH_GROWTH"):
            if asked[name].source not in ("", "default"):
                yield (
                    f"{asked[name].source.removeprefix('environment ')} has no effect: streams are passed on event by "
                    "event, and only SUPERVISOR_JOB_OUTPUT=tokens collects them into batches"
                )


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
PROBLEMS: tuple[Rule, ...] = (told("problems"), tls, a_queue_on_runpod, names, adapters, least, files, drafts, heads)
# It starts, and somebody may wonder.
WARNINGS: tuple[Rule, ...] = (short_keys, told("warnings"), runpods_start, batches_of_jobs, gpus)
