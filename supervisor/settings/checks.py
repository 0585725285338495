"""What can't work together, or not here, told before anything starts: a table of rules.

Each of the problems fails vLLM as well, but only after it has imported itself, and often after it has loaded the model:
minutes of a GPU. A rule yields what is wrong, with what to set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.bounded import within
from supervisor.secrets import SHORTEST_SECRET
from supervisor.settings import platform
from supervisor.settings.knobs import SHORT_KEY, Keys
from supervisor.settings.models import DISK_PATIENCE
from supervisor.settings.sources import Setting
from supervisor.settings.typos import nearest
from supervisor.vllm.catalogue import Catalogue
from supervisor.vllm.installed import Vllm
from supervisor.vllm.values import json_object

GONE = {
    "bitsandbytes": ", which an older one had",
    "gguf": ": since 0.24 a plugin has it",
}
UNSET = Setting("", None, "")
# What has to be set with it, and what is told where that is not.
NEEDS = (
    (
        "ENABLE_AUTO_TOOL_CHOICE",
        "TOOL_CALL_PARSER",
        "it needs TOOL_CALL_PARSER, the model's own, such as hermes for Qwen",
    ),
    ("LORA_MODULES", "ENABLE_LORA", "adapters need ENABLE_LORA=true"),
)
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


@dataclass(frozen=True, slots=True)
class Asked:
    """All that was asked for, by variable."""

    mode: str
    environ: Mapping[str, str]
    settings: Mapping[str, Setting]
    vllm: Vllm | None = None
    catalogue: Catalogue | None = None

    def __getitem__(self, variable: str) -> Setting:
        return self.settings.get(variable, UNSET)

    def number(self, variable: str) -> float:
        return number(self[variable].value, 0.0)

    def named(self, variable: str) -> str:
        """With its value and its source, as a problem begins."""
        return f"{variable}={self[variable].shown} ({self[variable].source})"


def number(given: object, otherwise: float) -> float:
    return float(str(given)) if re.fullmatch(r"\d+(\.\d+)?", str(given)) else otherwise


def is_missing(path: str) -> bool:
    """Whether it surely is not there; a disk that does not answer may have it."""
    return within(DISK_PATIENCE, Path(path).exists) is False


def config_in(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing, where it can't be read."""
    return within(DISK_PATIENCE, lambda: json_object(path.read_text())) or {}


# Problems


def tls(asked: Asked) -> Iterator[str]:
    cert, key = asked["SUPERVISOR_TLS_CERT"].value, asked["SUPERVISOR_TLS_KEY"].value
    if key and not cert:
        yield "SUPERVISOR_TLS_KEY is set without SUPERVISOR_TLS_CERT, such as /tls/tls.crt"
    elif cert:
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


def needs(asked: Asked) -> Iterator[str]:
    for variable, needed, told in NEEDS:
        if asked[variable].value and not asked[needed].value:
            yield f"{asked.named(variable)}: {told}"


def least(asked: Asked) -> Iterator[str]:
    for variable, (other, default) in AT_LEAST.items():
        given, limit = asked.number(variable), asked.number(other) or default
        if given and given < limit:
            where = f" ({asked[other].source})" if asked[other].source else ""
            yield f"{asked.named(variable)}: expected at least {other}, which is {limit:g}{where}"


def names(asked: Asked) -> Iterator[str]:
    """vLLM has no bitsandbytes any more, nor GGUF; parsers come and go. Plugins may know more."""
    if asked.catalogue is None or asked.vllm is None or asked["TOOL_PARSER_PLUGIN"].value:
        return
    for option in asked.catalogue.by_key.values():
        given = asked[option.variable].value
        if not option.names or not given or str(given).lower() in ("none", *map(str.lower, option.names)):
            continue
        if asked["REASONING_PARSER_PLUGIN"].value or asked.vllm.may_have_plugins(asked.environ):
            continue
        hint = GONE.get(str(given).lower()) or nearest(str(given).lower(), option.names)
        yield (
            f"{asked.named(option.variable)}: vLLM {asked.vllm.version} has none of that name{hint}; it has "
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
    option = asked.catalogue.by_key.get("max_lora_rank") if asked.catalogue else None
    return min((int(choice) for choice in option.choices if int(choice) >= rank), default=rank) if option else rank


def files(asked: Asked) -> Iterator[str]:
    for variable, kind in PLACES.items():
        given = str(asked[variable].value or "")
        is_path = given if kind == "folder" else PATH.search(given) and not any(sign in given for sign in "{}\n")
        if is_path and is_missing(given):
            yield f"{asked.named(variable)}: expected a {kind} that is there"


def hub(asked: Asked) -> Iterator[str]:
    endpoint = asked.environ.get("HF_ENDPOINT", "")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        yield f"HF_ENDPOINT={endpoint} (environment HF_ENDPOINT): expected an address such as https://{endpoint}"


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
            f"{asked.named('TENSOR_PARALLEL_SIZE')}: the model's {count} heads of attention can't be shared among so "
            f"many GPUs: set TENSOR_PARALLEL_SIZE={fits}"
        )


def drafts(asked: Asked) -> Iterator[str]:
    """vLLM's own rule: a draft by n-grams, by a part of the model, or by another model, which has to be named."""
    config = json_object(asked["SPECULATIVE_CONFIG"].value)  # none, where it has numbers such as 32k
    if config is not None and not config.keys() & {"model", "method"}:
        yield f"{asked.named('SPECULATIVE_CONFIG')}: it names neither a method, such as ngram, nor a model"


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


def runpods_balancer(asked: Asked) -> Iterator[str]:
    if asked.mode != "http" or not asked.environ.get("RUNPOD_ENDPOINT_ID"):
        return
    if (seconds := asked.number("SUPERVISOR_REQUEST_TIMEOUT")) > platform.BALANCER_REQUEST:
        yield (
            f"RunPod's load balancer ends a request after {platform.BALANCER_REQUEST:g} s, before "
            f"SUPERVISOR_REQUEST_TIMEOUT={seconds:g} does: for longer answers use a queue endpoint"
        )
    if (size := asked.number("SUPERVISOR_MAX_BODY")) > platform.BALANCER_BODY:
        yield (
            f"RunPod's load balancer takes bodies of up to 30 MB, less than SUPERVISOR_MAX_BODY={size:.0f} bytes: "
            "send larger files by URL"
        )


def batches_of_jobs(asked: Asked) -> Iterator[str]:
    if asked["SUPERVISOR_JOB_OUTPUT"].value != "tokens":
        for name in ("SUPERVISOR_JOB_BATCH_SIZE", "SUPERVISOR_JOB_MIN_BATCH_SIZE", "SUPERVISOR_JOB_BATCH_GROWTH"):
            if asked[name].source not in ("", "default"):
                yield (
                    f"{asked[name].source.removeprefix('environment ')} has no effect: streams are passed on event by "
                    "event, and only SUPERVISOR_JOB_OUTPUT=tokens collects them into batches"
                )


def open_to_all(asked: Asked) -> Iterator[str]:
    host = str(asked["SUPERVISOR_HOST"].value or "127.0.0.1")
    local = host in platform.LOOPBACK or host.startswith("127.")
    # Those platforms have keys of their own.
    guarded = asked.environ.get("RUNPOD_ENDPOINT_ID") or asked.environ.get(platform.SAGEMAKER_PORT)
    if asked.mode == "http" and not local and not asked["SUPERVISOR_API_KEYS"].value and not guarded:
        yield f"everybody who reaches {host} may use the model: set SUPERVISOR_API_KEYS, or SUPERVISOR_HOST=127.0.0.1"


def prefix_caching(asked: Asked) -> Iterator[str]:
    setting = asked["ENABLE_PREFIX_CACHING"]
    if setting.value is False and setting.source.startswith("environment"):
        yield (
            "ENABLE_PREFIX_CACHING=false makes chats and shared prompts slower; it is a default of worker-vllm's "
            "template: remove it, unless you mean it"
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


def vllms_port(asked: Asked) -> Iterator[str]:
    port = asked.environ.get("VLLM_PORT", "")
    if "://" in port:
        yield (
            f"VLLM_PORT={port} is not passed to vLLM, which would fail on it: Kubernetes made it for a service named "
            "vllm; rename the service, or set enableServiceLinks: false"
        )
    elif port:
        yield (
            "VLLM_PORT is passed to vLLM, for which it is the first port of its internal traffic; the port for clients "
            "is PORT"
        )


Rule = Callable[[Asked], Iterator[str]]
# vLLM does not start with these, or nobody would be served.
PROBLEMS: tuple[Rule, ...] = (
    tls, a_queue_on_runpod, hub, names, needs, adapters, least, files, drafts, heads,
)  # fmt: skip
# It starts, and somebody may wonder.
WARNINGS: tuple[Rule, ...] = (
    short_keys, vllms_port, runpods_start, runpods_balancer, batches_of_jobs, open_to_all, prefix_caching, gpus,
)  # fmt: skip
