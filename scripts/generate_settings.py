#!/usr/bin/env python3
"""Writes what documents the settings, all from the tables that the code itself reads.

    .venv/bin/python scripts/generate_settings.py [--check]

    docs/settings.md       every setting, for people
    config.yaml            the commented example
    config.schema.json     lets editors complete and check config.yaml
    .runpod/hub.json       what RunPod's Hub offers when somebody deploys the image

`--check` writes nothing and exits 1 where a file is not what would be written. Only the sentences are at home here:
names, defaults, choices and kinds come from `supervisor/settings`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.settings import knobs
from supervisor.settings.knobs import KNOBS, Knob
from supervisor.settings.names import (
    ALIASES,
    FORMER,
    MESSAGES,
    OWNED,
    REMOVED,
    REMOVED_VARIABLES,
    SM_PREFIX,
    ZERO_MEANS_UNSET,
)
from supervisor.settings.platform import SAGEMAKER_PORT
from supervisor.settings.platform import defaults as platform_defaults
from supervisor.vllm import catalogue as catalogues
from supervisor.vllm.catalogue import BOUNDS, Catalogue, Option
from supervisor.vllm.installed import PINNED
from supervisor.vllm.values import read_bool

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Popular:
    """An option that people really set. `example` is its value in config.yaml; `hub`: whether RunPod's Hub offers it."""

    variable: str
    meaning: str
    example: Any
    hub: bool = True
    title: str = ""  # in the Hub; made from the name where empty


# The supervisor's own settings. MODEL and SUPERVISOR_CONFIG are told of apart.
MEANINGS = {
    "mode": "what to serve: HTTP, or RunPod's queue",
    "host": "where the gateway listens (in the image: 0.0.0.0)",
    "port": "the gateway's port",
    "port_health": "a second port for health checks",
    "vllm": "the command that stands for `vllm`",
    "extra_args": "appended to vLLM's command line as it is",
    "startup_timeout": "seconds until vLLM must be ready",
    "warm_up": "whether the model has to answer a first request before it is ready",
    "fast_restart": "whether a process that has imported vLLM is kept, so that the next start need not import it; takes 0.2 to 0.5 GB of memory",
    "stall_timeout": "seconds without progress, with work in flight, until vLLM is hung; 0: never",
    "max_restarts": "how often vLLM is started again ...",
    "restart_window": "... within so many seconds, before it is given up",
    "on_failure": "what happens then: exit (leave with 3 or 4), or serve (stay and say why); queue: serve",
    "hold_timeout": "seconds that a request may wait for an engine that is starting",
    "drain_timeout": "seconds that running requests may go on after SIGTERM",
    "max_concurrency": "how many requests may run at once; unset: no limit (queue: 30)",
    "job_output": "what a job with messages or a prompt gives: OpenAI's JSON, or tokens as worker-vllm did until July 2026",
    "job_batch_size": "of tokens: pieces of text in a chunk of a stream, at most ...",
    "job_min_batch_size": "... and at first ...",
    "job_batch_growth": "... and how many times as many each time",
    "max_waiting": "how many more may wait for their turn, before a 429",
    "request_timeout": "seconds that a request may take, answer included (0: no limit)",
    "client_timeout": "seconds for a client's next bytes, or for it to take ours",
    "sse_keep_alive": "seconds between comments in a stream whose request is held or queued; its status is 200 then; 0: none",
    "max_body": "the largest request body",
    "api_keys": "keys that clients must give, between commas, or @file",
    "admin_keys": "keys that open vLLM's admin routes as well, and show its log and the settings, the same way",
    "allow_routes": "more paths to open, by their beginnings, between commas",
    "allowed_hosts": "hosts that clients may name, on loopback without keys, beside localhost and addresses: a.example,*.b.example",
    "rate_limit": "requests per minute and key (or address, where there are no keys)",
    "response_cache": "memory for answers that would come out the same (temperature 0, or a seed), such as 256MiB; unset: none",
    "tls_cert": "a certificate's file: HTTPS instead of HTTP",
    "tls_key": "its private key's file",
    "log_format": "our own log lines: text or json",
    "log_level": "our own log's level",
    "access_log": "a line for each answer, in place of vLLM's own",
    "volume": "a disk that outlives the container, for downloads and caches (found on RunPod)",
    "cache_dir": "a folder for caches alone (on the volume, where there is one)",
}
# The options that users of such workers set, by what they are about. All others are in the table of all.
GROUPS: tuple[tuple[str, tuple[Popular, ...]], ...] = (
    (
        "The model",
        (
            Popular("REVISION", "the branch, tag or commit of the model", "main"),
            Popular("TOKENIZER", "another tokenizer than the model's own: a name or a folder", "org/tokenizer"),
            Popular("TOKENIZER_REVISION", "the branch, tag or commit of that tokenizer", "main", hub=False),
            Popular("TOKENIZER_MODE", "auto, slow, or one of the special ones, such as mistral", "auto"),
            Popular("TRUST_REMOTE_CODE", "run Python code that comes with the model", False),
            Popular("DTYPE", "the weights' number format; auto takes the model's", "bfloat16"),
            Popular("QUANTIZATION", "how the weights are quantized, where the model does not say so", "awq"),
            Popular("LOAD_FORMAT", "how the weights are stored; auto looks", "safetensors"),
            Popular(
                "DOWNLOAD_DIR", "where weights are downloaded to, instead of the hub's cache", "/models", hub=False
            ),
            Popular("HF_OVERRIDES", "changes to the model's config.json", {"max_position_embeddings": 8192}, hub=False),
            Popular("SERVED_MODEL_NAME", "the names that clients use for the model", ["my-model"]),
        ),
    ),
    (
        "Length and memory",
        (
            Popular("MAX_MODEL_LEN", "the longest prompt and answer together, in tokens; auto takes what fits", 8192),
            Popular("GPU_MEMORY_UTILIZATION", "the share of the GPU's memory that vLLM takes", 0.9),
            Popular("KV_CACHE_DTYPE", "the number format of the KV cache; fp8 takes half the memory", "fp8"),
            Popular("BLOCK_SIZE", "tokens in a block of the KV cache", 16, hub=False),
            Popular("CPU_OFFLOAD_GB", "GiB of weights that are kept in the machine's memory instead", 4),
            Popular("ENABLE_PREFIX_CACHING", "computes a prompt's beginning once; on by itself", True),
        ),
    ),
    (
        "Throughput",
        (
            Popular("MAX_NUM_SEQS", "requests that are computed at the same time", 256),
            Popular("MAX_NUM_BATCHED_TOKENS", "tokens that one step computes at most", 8192),
            Popular(
                "ENABLE_CHUNKED_PREFILL", "long prompts in pieces, so that answers go on meanwhile", True, hub=False
            ),
            Popular("ENFORCE_EAGER", "no compiling, no CUDA graphs: starts sooner, runs slower", False),
            Popular(
                "SPECULATIVE_CONFIG",
                "several tokens guessed at once: JSON",
                {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
            ),
            Popular(
                "COMPILATION_CONFIG", "how the model is compiled: JSON", {"cudagraph_mode": "PIECEWISE"}, hub=False
            ),
            Popular("API_SERVER_COUNT", "vLLM's own HTTP processes", 2, hub=False),
        ),
    ),
    (
        "Several GPUs",
        (
            Popular("TENSOR_PARALLEL_SIZE", "GPUs that share each layer; auto takes all there are", 2),
            Popular("PIPELINE_PARALLEL_SIZE", "groups of GPUs that follow each other", 1),
            Popular("DATA_PARALLEL_SIZE", "copies of the model", 1, hub=False),
            Popular("ENABLE_EXPERT_PARALLEL", "the experts of a mixture on different GPUs", False),
            Popular("DISTRIBUTED_EXECUTOR_BACKEND", "mp for one machine, ray for several", "mp", hub=False),
            Popular("DISABLE_CUSTOM_ALL_REDUCE", "where the GPUs can't reach each other directly", False),
        ),
    ),
    (
        "Chat, tools, reasoning",
        (
            Popular("CHAT_TEMPLATE", "a file, or the template itself", "/path/template.jinja"),
            Popular("DEFAULT_CHAT_TEMPLATE_KWARGS", "for every chat: JSON", {"enable_thinking": False}, hub=False),
            Popular("RESPONSE_ROLE", "the role of answers", "assistant", hub=False),
            Popular("ENABLE_AUTO_TOOL_CHOICE", "the model may call tools; needs TOOL_CALL_PARSER", True),
            Popular("TOOL_CALL_PARSER", "how the model writes tool calls: hermes, mistral, llama3_json ...", "hermes"),
            Popular("REASONING_PARSER", "how the model marks its thoughts: deepseek_r1, qwen3 ...", "qwen3"),
            Popular("GENERATION_CONFIG", "vllm: neutral sampling instead of the model's own", "vllm", hub=False),
            Popular(
                "OVERRIDE_GENERATION_CONFIG",
                "sampling where a request does not say: JSON",
                {"temperature": 0.7},
                hub=False,
            ),
            Popular("LIMIT_MM_PER_PROMPT", "images and the like in one prompt: JSON", {"image": 4}),
            Popular(
                "ALLOWED_MEDIA_DOMAINS",
                "hosts that images and the like may be fetched from; unset: any",
                ["images.example.com"],
                hub=False,
            ),
            Popular("MAX_LOGPROBS", "log probabilities that a request may ask for", 20, hub=False),
        ),
    ),
    (
        "LoRA",
        (
            Popular("ENABLE_LORA", "adapters on top of the model", True),
            Popular("LORA_MODULES", "the adapters: name=path, or JSON", [{"name": "my-lora", "path": "org/my-lora"}]),
            Popular("MAX_LORAS", "adapters in one batch", 1),
            Popular("MAX_LORA_RANK", "the largest rank among them", 16),
        ),
    ),
    (
        "Logs and the rest",
        (
            Popular("SEED", "the seed for sampling", 0, hub=False),
            Popular("ENABLE_LOG_REQUESTS", "a line in the log for each request", False),
            Popular("DISABLE_LOG_STATS", "no line with throughput every ten seconds", False, hub=False),
            Popular(
                "ALLOWED_ORIGINS", "web pages that may call the API from a browser", ["https://example.org"], hub=False
            ),
            Popular("OTLP_TRACES_ENDPOINT", "where traces are sent", "http://collector:4317", hub=False),
        ),
    ),
)
# Examples for config.yaml of settings that have no default.
KNOB_EXAMPLES: dict[str, object] = {
    "port_health": 8001,
    "vllm": "/path/to/vllm",
    "extra_args": "--foo bar",
    "max_concurrency": 64,
    "api_keys": "@keys.txt",
    "admin_keys": "@admins.txt",
    "allow_routes": "/server_info",
    "allowed_hosts": "gpu1.example.com",
    "rate_limit": 600,
    "response_cache": "256MiB",
    "tls_cert": "/tls/tls.crt",
    "tls_key": "/tls/tls.key",
    "warm_up": "true",
    "fast_restart": "false",
    "volume": "/data",
    "cache_dir": "/path",
}
# The supervisor's settings that the Hub offers. The others are for those who read docs/settings.md.
HUB_KNOBS = (
    "SUPERVISOR_MAX_CONCURRENCY",
    "SUPERVISOR_STARTUP_TIMEOUT",
    "SUPERVISOR_DRAIN_TIMEOUT",
    "SUPERVISOR_EXTRA_ARGS",
    "SUPERVISOR_LOG_LEVEL",
)
# Variables that are neither: read by vLLM or the hub's client, which get them as they are.
PASSED_ON = {
    "HF_TOKEN": "the hub's token, for gated and private models",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "whether vLLM follows redirects for images and the like (0 where it is not set)",
    "FORWARDED_ALLOW_IPS": "whose `X-Forwarded-` headers vLLM believes on its private socket (`*` where it is not set)",
    "HF_HOME": "where the hub's client keeps what it downloads; on RunPod a folder of the network volume",
    "RUNPOD_INIT_TIMEOUT": "RunPod's own: seconds that a worker may take to become ready (420 where it is not set)",
}
PRESETS = (
    ("Qwen3 0.6B (any GPU, to try it out)", {"MODEL": "Qwen/Qwen3-0.6B", "MAX_MODEL_LEN": "8192"}),
    (
        "Qwen2.5 7B Instruct (16 GB, tools)",
        {
            "MODEL": "Qwen/Qwen2.5-7B-Instruct",
            "MAX_MODEL_LEN": "32768",
            "ENABLE_AUTO_TOOL_CHOICE": "true",
            "TOOL_CALL_PARSER": "hermes",
        },
    ),
    (
        "Mistral 7B Instruct v0.3 (16 GB, tools)",
        {
            "MODEL": "mistralai/Mistral-7B-Instruct-v0.3",
            "MAX_MODEL_LEN": "32768",
            "TOKENIZER_MODE": "mistral",
            "ENABLE_AUTO_TOOL_CHOICE": "true",
            "TOOL_CALL_PARSER": "mistral",
        },
    ),
    (
        "Llama 3.1 8B Instruct (20 GB, tools; gated: set HF_TOKEN)",
        {
            "MODEL": "meta-llama/Llama-3.1-8B-Instruct",
            "MAX_MODEL_LEN": "16384",
            "ENABLE_AUTO_TOOL_CHOICE": "true",
            "TOOL_CALL_PARSER": "llama3_json",
        },
    ),
    ("Phi-3 mini 128k Instruct (9 GB)", {"MODEL": "microsoft/Phi-3-mini-128k-instruct", "MAX_MODEL_LEN": "16384"}),
    ("Gemma 2 9B it (22 GB; gated: set HF_TOKEN)", {"MODEL": "google/gemma-2-9b-it", "MAX_MODEL_LEN": "8192"}),
)

GENERATED = "scripts/generate_settings.py"


def popular() -> list[Popular]:
    return [row for _, rows in GROUPS for row in rows]


# ---- docs/settings.md ------------------------------------------------------------------------------------------------


def docs(options: Catalogue) -> str:
    lines = [
        "# Settings",
        "",
        f"<!-- Written by {GENERATED}: change the tables, then run it. -->",
        "",
        "The command line wins over the environment, the environment over `config.yaml`, that over vLLM's own file (`CONFIG`),",
        "and that over the defaults. An empty value counts as not set. `supervisor explain` shows what is in effect, where it",
        "came from and what it overrode, and starts nothing. `/status` shows the same of a running supervisor. The supervisor",
        "reports all wrong values at once, with exit code 2, before it starts anything. It names a setting that has no effect",
        "at every start.",
        "",
        "The file is the one that `--config` or `SUPERVISOR_CONFIG` names. A `config.yaml` in the current folder that nobody",
        "named may be another program's. It is read only if it says that it is ours: by a `supervisor:` section, which may be",
        "empty, or by the first line of [our example](../config.yaml). Such a file can't set `vllm`, which names a program to",
        "run. Any other file is ignored, with a warning.",
        "",
        "A file of settings or of keys may be a pipe, such as `--config <(a program)` or `@/dev/stdin`. The supervisor waits",
        "10 s for it, and takes 1 MiB at most. Files that others read again (vLLM's own of `CONFIG`, those of TLS and of",
        "templates) can't be pipes.",
        "",
        "## How values are written",
        "",
        "| kind | environment | `config.yaml` |",
        "| --- | --- | --- |",
        "| yes or no | `true` `1` `yes` `on`, `false` `0` `no` `off`: `ENABLE_LORA=true` is `--enable-lora`, "
        "`ENABLE_LORA=false` is `--no-enable-lora` | `enable_lora: true` |",
        "| number | `8`, `0.9` | `max_num_seqs: 8` |",
        "| large number | `4096`, `32k` (32000), `32K` (32768), `1.5k` | `max_model_len: 32k` |",
        '| list | `a,b`, `a b` or `["a", "b"]`; objects as `[{...}, {...}]` | `served_model_name: [a, b]` |',
        '| JSON | `{"method": "ngram"}` | nested YAML |',
        "| text | as it is | as it is |",
        "",
        "Names in `config.yaml` have hyphens or underscores, as you like. The supervisor's own settings stand under",
        "`supervisor:`, in lower case and without `SUPERVISOR_`. Choices, and vLLM's names of formats of weights, may be",
        "written in capitals or not, with `-` or `_`. A value is what is written: `served_model_name: 1.10` stays this text,",
        "though YAML makes 1.1 of it. In objects, which are JSON, YAML's numbers, `true` and `no` are what they are to YAML.",
        "The supervisor's own settings may be lists as well: `extra_args: [--seed, 1]`.",
        "",
        "vLLM itself reads the file of `CONFIG`, and takes it to the letter: `served-model-name: a,b` is one name. It drops",
        "`enable-prefix-caching: false` without a word, takes an empty value (`tokenizer:`) for a name, and fails at what is",
        "in quotes for yes or no. What it would not take as it stands there is refused, with what to write: for false,",
        "`no-enable-prefix-caching: true`. A part of an object (`compilation-config.mode: 3`) takes the place of the whole",
        "object, wherever that is set. Among vLLM's arguments the file is named once, in two words: `--config FILE`.",
        "",
        "White space around a value is removed, a newline at its end too. Two kinds of value are refused, with the name of the",
        "variable, secrets and the hub's variables among them: a value that still stands in quotes (docker's `--env-file`",
        "passes them on), and one with a placeholder that nothing has filled in (`${X}`, `$(X)`, `{{ X }}`, `$X`). Only a chat",
        "template may have `{{ }}`. What stands behind a ` #` is a part of the value, and the supervisor says so: docker's",
        "`--env-file` knows no comments there. In a file each key may stand once. A `~` in the supervisor's own paths is the",
        "home. vLLM and the hub's client read some variables themselves (`VLLM_*`, `HF_*` ...). An empty one is not passed on,",
        "and `true` and `false` become numbers where vLLM wants a number. For no plugins at all set `VLLM_PLUGINS=none`.",
        "",
        "Two kinds of variable are often not meant for vLLM. A level in `LOG_LEVEL` that it does not know is not passed on,",
        "with a warning; `warn`, `trace` and `fatal` are read as its levels. An address in a variable that ends in `_PORT`",
        "(`MASTER_PORT=tcp://10.0.0.1:8000`) is what Kubernetes makes for a service of that name, and is not read.",
        "",
        "## The supervisor's own",
        "",
        "| variable | default | meaning |",
        "| --- | --- | --- |",
        "| `MODEL` | the demo model on a laptop | a model's name on the hub, or a folder |",
        "| `SUPERVISOR_CONFIG` | a `config.yaml` that is ours | the file of settings; `--config` wins over it |",
    ]
    for knob in KNOBS:
        lines.append(f"| `{knob.variable}` | {_knob_default(knob)} | {_cell(MEANINGS[knob.field])} |")
    lines += [
        "",
        "`TENSOR_PARALLEL_SIZE=auto` takes all GPUs, or what `PIPELINE_PARALLEL_SIZE` and `DATA_PARALLEL_SIZE` leave to each",
        "part. Everything after `--` on the command line goes to `vllm serve` as it is, behind `SUPERVISOR_EXTRA_ARGS`. The",
        "supervisor reads both, and they win over the variables.",
        "",
        "These variables are read by others, and passed on:",
        "",
        "| variable | meaning |",
        "| --- | --- |",
        *(f"| `{name}` | {text} |" for name, text in PASSED_ON.items()),
        "| `VLLM_...` | vLLM's own variables |",
        "",
        "## Names that other workers use",
        "",
        f"They work as they are. Where both are set, ours wins. Any name may have `{SM_PREFIX}` in front, as in vLLM's and AWS's",
        "own images for SageMaker. The name without it wins. With it, an empty value switches a yes-or-no option on.",
        "",
        "| ours | also |",
        "| --- | --- |",
        *(f"| `{ours}` | {', '.join(f'`{name}`' for name in names)} |" for ours, names in ALIASES.items()),
        "",
        "Their templates set some variables that have no effect here. The supervisor names them at its start:",
        "",
        "| variable | instead |",
        "| --- | --- |",
        *(f"| `{name}` | {_cell(text)} |" for name, text in FORMER.items()),
        *(f"| `{name}=0` | not set: {_cell(MESSAGES['zero'])} |" for name in sorted(ZERO_MEANS_UNSET)),
        "",
        "## Options that the supervisor sets itself",
        "",
        "| option | instead |",
        "| --- | --- |",
        *(f"| `--{key.replace('_', '-')}` | {_cell(text)} |" for key, text in OWNED.items()),
        "",
        "## The options that people set",
        "",
    ]
    for title, rows in GROUPS:
        lines += [f"**{title}**", "", "| variable | meaning | example |", "| --- | --- | --- |"]
        lines += [f"| `{row.variable}` | {_cell(row.meaning)} | `{_as_text(row.example)}` |" for row in rows]
        lines.append("")
    lines += [
        f"## All options of vLLM {options.version}",
        "",
        "| variable | kind | default |",
        "| --- | --- | --- |",
    ]
    for option in options.by_key.values():
        if option.key not in OWNED and option.key != "model":
            lines.append(f"| `{option.variable}` | {_kind(option)} | {_default(option)} |")
    lines += [
        "",
        "## Options and variables of older vLLMs",
        "",
        "The supervisor names such a variable, or such a key of `config.yaml`, at its start, and does not pass it on. On the",
        "command line it is an error.",
        "",
        "| option | instead |",
        "| --- | --- |",
        *(f"| `--{key.replace('_', '-')}` | {_cell(text)} |" for key, text in REMOVED.items()),
        "",
        "| variable | instead |",
        "| --- | --- |",
        *(f"| `{name}` | {_cell(text)} |" for name, text in REMOVED_VARIABLES.items()),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _knob_default(knob: Knob) -> str:
    texts = [f"`{knob.default}`" if knob.default else ""]
    platforms: tuple[tuple[str, dict[str, str], str], ...] = (
        ("queue", {}, "queue"),
        ("http", {"RUNPOD_ENDPOINT_ID": "x"}, "load balancer"),
        ("http", {SAGEMAKER_PORT: "8080"}, "SageMaker"),
    )
    for mode, environ, where in platforms:
        found = platform_defaults(mode, environ).get(knob.variable)
        texts.append(f"{where}: `{found.value}`" if found else "")
    return "; ".join(filter(None, texts))


def _kind(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    if option.kind in ("pair", "switch"):
        return "yes or no"
    name = {
        "int": "number", "float": "number", "human_int": "large number", "human_int_or_auto": "large number, or `auto`",
        "json": "JSON", "json_human": "JSON", "json_or_str": "JSON, or text",
    }.get(option.type, "text")  # fmt: skip
    bounds = ", ".join(f"{BOUNDS[bound][0]} {limit:g}" for bound, limit in option.bounds)
    name += f", {bounds}" if bounds else ""
    return f"list of {name}" if option.kind in ("list", "append") else name


def _default(option: Option) -> str:
    if option.default in (None, "", [], {}) or (isinstance(option.default, str) and "(" in option.default):
        return ""
    text = _as_text(option.default)
    return f"`{_cell(text)}`" if len(text) < 60 else ""


# ---- config.yaml -----------------------------------------------------------------------------------------------------


def config() -> str:
    lines = [
        "# yaml-language-server: $schema=config.schema.json",
        f"# Settings of the supervisor and of `vllm serve`. Written by {GENERATED}; copy it, and uncomment what you need.",
        "# Read where `--config FILE` or SUPERVISOR_CONFIG names it. In the folder in which `supervisor up` is called it needs",
        "# no naming: its first line, or the section `supervisor:`, which may be empty, says whose file it is. The command line",
        "# and the environment win over it. What is in effect, and where it came from: `supervisor explain`.",
        "",
        _rule("what to serve"),
        "",
        "# A model's name on the hub, or a folder. Environment: MODEL.",
        "# model: Qwen/Qwen3-0.6B",
        "",
        _rule("options of `vllm serve`"),
        "# Those that people set; docs/settings.md has all. Names with hyphens or underscores, nested YAML for options that",
        "# take JSON. In the environment each is its name in capitals: MAX_MODEL_LEN.",
    ]
    for title, rows in GROUPS:
        lines += ["", f"# {title}."]
        lines += [_aligned(f"{row.variable.lower()}: {_yaml(row.example)}", row.meaning) for row in rows]
    lines += [
        "",
        _rule("the supervisor's own"),
        "# In the environment: SUPERVISOR_ and the name in capitals; only PORT and PORT_HEALTH go without the prefix.",
        "",
        "supervisor:",
    ]
    for knob in KNOBS:
        value = KNOB_EXAMPLES.get(knob.field, knob.default)
        shown = f'"{value}"' if str(value).startswith("@") else str(value)
        lines.append(_aligned(f"  {knob.field}: {shown}", MEANINGS[knob.field]))
    return "\n".join(lines) + "\n"


def _rule(title: str) -> str:
    return f"# ---- {title} ".ljust(120, "-")


def _aligned(setting: str, meaning: str) -> str:
    line = f"# {setting}"
    return f"{line.ljust(38)} # {meaning}" if len(line) <= 38 else f"{line}  # {meaning}"


def _yaml(value: object) -> str:
    """One line of YAML: JSON is YAML, but people write it with less."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if ": " in str(value) else str(value)


# ---- config.schema.json ----------------------------------------------------------------------------------------------


def schema(options: Catalogue) -> str:
    meanings = {row.variable: row.meaning for row in popular()}
    properties: dict[str, Any] = {
        "model": {"type": "string", "description": "A model's name on the hub, or a folder."},
        "supervisor": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "description": "The supervisor's own settings.",
            "properties": {knob.field: _knob_schema(knob) for knob in KNOBS},
        },
    }
    hyphens: dict[str, Any] = {}
    for option in options.by_key.values():
        if option.key in OWNED or option.key == "model":
            continue
        text = meanings.get(option.variable, f"{option.name} of vllm serve {options.version}.")
        properties[option.key] = {"description": text, **_option_schema(option)}
        if "_" in option.key:
            hyphens[f"^{option.name[2:]}$"] = {"$ref": f"#/properties/{option.key}"}
    content = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "config.yaml of the supervisor",
        "$comment": f"Written by {GENERATED}.",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": properties,
        "patternProperties": hyphens,
    }
    return json.dumps(content, indent=1) + "\n"


def _knob_schema(knob: Knob) -> dict[str, Any]:
    kinds: dict[object, list[str]] = {
        read_bool: ["boolean", "string"],
        knobs.read_seconds: ["number"],
        knobs.read_count: ["integer"],
        knobs.read_positive: ["integer"],
        knobs.read_ratio: ["number"],
        knobs.read_port: ["integer"],
        knobs.read_size: ["integer", "string"],
        **{
            read: ["string", "array"]
            for read in (knobs.read_words, knobs.read_keys, knobs.read_routes, knobs.read_hosts)
        },
    }
    kind = kinds.get(knob.read, ["string"])
    found: dict[str, Any] = {"type": [*kind, "null"], "description": MEANINGS[knob.field]}
    if knob.default:
        found["default"] = json.loads(knob.default) if kind in (["number"], ["integer"]) else knob.default
    return found


def _option_schema(option: Option) -> dict[str, Any]:
    if option.kind in ("pair", "switch"):
        return {"type": ["boolean", "null"]}
    if option.choices:
        item: dict[str, Any] = {"enum": [json.loads(c) if option.type == "int" else c for c in option.choices] + [None]}
    else:
        kinds: dict[str, dict[str, Any]] = {
            "int": {"type": ["integer", "null"]},
            "float": {"type": ["number", "null"]},
            "human_int": {"type": ["integer", "string", "null"], "pattern": r"^\d+(\.\d+)?[kmgtKMGT]?$"},
            "human_int_or_auto": {"type": ["integer", "string", "null"], "pattern": r"^(auto|\d+(\.\d+)?[kmgtKMGT]?)$"},
            "json": {"type": ["object", "array", "string", "null"]},
            "json_human": {"type": ["object", "string", "null"]},
            "json_or_str": {"type": ["object", "string", "null"]},
        }
        item = kinds.get(option.type, {"type": ["string", "number", "null"]})
        if option.variable == "TENSOR_PARALLEL_SIZE":
            item = {"type": ["integer", "string", "null"], "pattern": "^auto$"}
        words = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
        if item["type"][0] in ("integer", "number"):
            item |= {words[name]: limit for name, limit in option.bounds}
    if option.kind in ("list", "append"):
        if option.type in ("str", "json_or_str") and not option.choices:
            item = {"type": ["string", "number", "object"]}
        return {"type": ["array", "string", "number", "null"], "items": item}
    return item


# ---- .runpod/hub.json ------------------------------------------------------------------------------------------------


def hub(options: Catalogue) -> str:
    rows = [
        _hub_row("MODEL", "huggingface", "Model", "a model's name on the hub, or a folder", required=True),
        _hub_row("HF_TOKEN", "string", "Hugging Face token", PASSED_ON["HF_TOKEN"]),
    ]
    advanced_after = {"MAX_MODEL_LEN", "GPU_MEMORY_UTILIZATION", "TENSOR_PARALLEL_SIZE", "SERVED_MODEL_NAME"}
    for row in popular():
        if row.hub:
            rows.append(_hub_option(options.by_key[row.variable.lower()], row, row.variable not in advanced_after))
    for name in HUB_KNOBS:
        (knob,) = [knob for knob in KNOBS if knob.variable == name]
        kind = (
            "number"
            if knob.read in (knobs.read_seconds, knobs.read_count, knobs.read_positive, knobs.read_ratio)
            else "string"
        )
        rows.append(_hub_row(name, kind, _title(name.removeprefix("SUPERVISOR_")), MEANINGS[knob.field], advanced=True))
    rows.append(
        _hub_row("RUNPOD_INIT_TIMEOUT", "number", "Init timeout", PASSED_ON["RUNPOD_INIT_TIMEOUT"], advanced=True)
    )
    content = {
        "title": "vLLM, supervised",
        "description": "vLLM's own OpenAI server, kept alive: streams untouched, crashes survived, failures explained.",
        "type": "serverless",
        "category": "language",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": 150,
            "gpuCount": 1,
            "gpuIds": "ADA_24,AMPERE_24,ADA_48_PRO,AMPERE_48,AMPERE_80,ADA_80_PRO",
            "allowedCudaVersions": ["13.0", "12.9"],
            "presets": [{"name": name, "defaults": defaults} for name, defaults in PRESETS],
            "env": rows,
        },
    }
    return json.dumps(content, indent=2) + "\n"


def _hub_option(option: Option, row: Popular, advanced: bool) -> dict[str, Any]:
    title = row.title or _title(option.variable)
    if option.kind in ("pair", "switch"):
        # Three ways, since the Hub injects every default: an unset box would otherwise switch off what vLLM has on.
        choices = ["", "true", "false"]
    else:
        choices = ["", *option.choices] if option.choices and len(option.choices) <= 25 else []
    # Numbers as texts: `32k` and `auto` are numbers to vLLM, and an empty number is not the Hub's strength.
    extra = (
        {"options": [{"label": choice or "(vLLM decides)", "value": choice} for choice in choices]} if choices else {}
    )
    return _hub_row(option.variable, "string", title, row.meaning, advanced=advanced, **extra)


def _hub_row(key: str, kind: str, name: str, description: str, **extra: Any) -> dict[str, Any]:
    default = {} if kind == "number" or extra.get("required") else {"default": ""}
    text = description[0].upper() + description[1:] + "."
    extra = {name: value for name, value in extra.items() if value is not False}
    return {"key": key, "input": {"name": name, "type": kind, "description": text, **default, **extra}}


def _title(variable: str) -> str:
    words = variable.lower().split("_")
    capitals = {
        "gpu": "GPU",
        "kv": "KV",
        "lora": "LoRA",
        "loras": "LoRAs",
        "hf": "HF",
        "api": "API",
        "cpu": "CPU",
        "gb": "GB",
    }
    words = [capitals.get(word, word) for word in words]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


# ---- writing ---------------------------------------------------------------------------------------------------------


def files() -> dict[Path, str]:
    options = catalogues.parse((catalogues.FLAGS / f"{PINNED}.json").read_text())
    return {
        ROOT / "docs/settings.md": docs(options),
        ROOT / "config.yaml": config(),
        ROOT / "config.schema.json": schema(options),
        ROOT / ".runpod/hub.json": hub(options),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is stale: run {GENERATED}", file=sys.stderr)
        else:
            path.write_text(files()[path])
            print(f"{path.relative_to(ROOT)} written")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
