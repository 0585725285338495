"""The supervisor's own settings, as a table: variable, default, what it means, how it is read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from supervisor.settings.values import BadValue, clean, read_bool


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadValue("seconds, such as 120") from None
    if not 0 <= value < 1e9:
        raise BadValue("seconds, from 0 to a billion, such as 120")
    return value


SIZES = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size(text: str) -> int:
    """Bytes: 64MiB (binary), 30MB (decimal), 1000000."""
    found = re.fullmatch(r"(\d{1,12})\s*([kmg]i?)?b?", text.strip().lower())
    if found is None or not int(found[1]):
        raise BadValue("a size, such as 64MiB or 30MB")
    return int(found[1]) * SIZES[found[2] or ""]


def count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise BadValue("a whole number, zero or more, such as 5")
    return int(text)


def some(text: str) -> int:
    if not count(text):
        raise BadValue("a whole number from 1 on, such as 5")
    return int(text)


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise BadValue("a number from 1 on, such as 3")
    return value


def port_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise BadValue("a port from 1 to 65535, such as 8000 (0: any free one)")
    return int(text)


def text(value: str) -> str:
    return value


def words(value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise BadValue(f"arguments as a shell splits them, such as '--seed 1' ({error})") from None


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys, and the file that they were read from, if any."""

    values: tuple[str, ...] = ()
    file: str | None = None

    def read_again(self) -> Keys:
        """What the file says now. Raises BadValue."""
        return keys(f"@{self.file}") if self.file else self


# A key with less can be tried out. Such a one is told, and holds.
SHORT_KEY = 8  # characters


def keys(value: str) -> Keys:
    """Keys between commas, or `@file` with one on each line."""
    value = value.strip()
    file = value[1:] if value.startswith("@") else None
    if file is not None:
        try:
            value = Path(file).read_text().replace("\n", ",")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not a text"
            raise BadValue(f"keys, such as key1,key2, or @file with a key on each line ({why})") from None
    found = tuple(key.strip() for key in value.split(",") if key.strip())
    if not found:
        raise BadValue("at least one key, such as key1,key2; there is nothing but blanks")
    if not all(key.isascii() and key.isprintable() for key in found):
        raise BadValue("keys of printable ASCII characters, such as key1,key2")
    for key in (value.strip(), *found):
        clean(key)
    return Keys(found, file)


def routes(value: str) -> tuple[str, ...]:
    found = tuple(route.strip() for route in value.split(",") if route.strip())
    if not all(route.startswith("/") for route in found):
        raise BadValue("prefixes of paths, such as /server_info,/custom (/ opens all)")
    return found


HOST = re.compile(r"(?:\*\.)?(?:(?!-)[a-z0-9_-]{1,63}(?<!-)\.)*(?!-)[a-z0-9_-]{1,63}(?<!-)")
LONGEST_HOST = 253


def hosts(value: str) -> tuple[str, ...]:
    """Names between commas as a `Host` header has them, in small letters; `*.` in front stands for what is below."""
    found = tuple(host.strip().lower().removesuffix(".") for host in value.split(",") if host.strip())
    if not all(len(host) <= LONGEST_HOST and HOST.fullmatch(host) for host in found):
        raise BadValue("names of hosts without scheme, port or path, such as gpu1.example.com,*.example.org")
    return found


def choice(*names: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value.lower() not in names:
            raise BadValue(f"one of {', '.join(names)}")
        return value.lower()

    return read


@dataclass(frozen=True, slots=True)
class Knob:
    """One row. `default` is a text, read like any other value; None means unset."""

    variable: str
    default: str | None
    read: Callable[[str], object]
    meaning: str
    secret: bool = False
    is_program: bool = False  # it names one to run
    template: bool = False  # braces in it may be its own

    @property
    def field(self) -> str:
        """Its name in `Knobs`, and under `supervisor:` in config.yaml."""
        return self.variable.removeprefix("SUPERVISOR_").lower()


def knob(variable: str, default: str | None, read: Callable[[str], object], meaning: str, **more: bool) -> Any:
    return field(metadata={"knob": Knob(variable, default, read, meaning, **more)})


@dataclass(frozen=True, slots=True)
class Knobs:
    """The supervisor's own settings: each one's row, and its value. Times in seconds."""

    mode: str = knob(
        "SUPERVISOR_MODE", "auto", choice("auto", "http", "queue"), "what to serve: HTTP, or RunPod's queue"
    )
    host: str = knob("SUPERVISOR_HOST", "127.0.0.1", text, "where the gateway listens (in the image: 0.0.0.0)")
    port: int = knob("PORT", "8000", port_number, "the gateway's port")
    port_health: int | None = knob("PORT_HEALTH", None, port_number, "a second port for health checks")
    vllm: str | None = knob("SUPERVISOR_VLLM", None, text, "the command that stands for `vllm`", is_program=True)
    extra_args: tuple[str, ...] = knob(
        "SUPERVISOR_EXTRA_ARGS", "", words, "appended to vLLM's command line as it is", template=True
    )
    startup_timeout: float = knob("SUPERVISOR_STARTUP_TIMEOUT", "1200", seconds, "seconds until vLLM must be ready")
    warm_up: bool = knob(
        "SUPERVISOR_WARM_UP", "false", read_bool, "whether the model has to answer a first request before it is ready"
    )
    stall_timeout: float = knob(
        "SUPERVISOR_STALL_TIMEOUT",
        "120",
        seconds,
        "seconds without progress, with work in flight, until vLLM is hung; 0: never",
    )
    max_restarts: int = knob("SUPERVISOR_MAX_RESTARTS", "5", count, "how often vLLM is started again ...")
    restart_window: float = knob(
        "SUPERVISOR_RESTART_WINDOW", "600", seconds, "... within so many seconds, before it is given up"
    )
    on_failure: str = knob(
        "SUPERVISOR_ON_FAILURE",
        "exit",
        choice("exit", "serve"),
        "then: leave with 3 or 4, or stay and tell why (queue: serve)",
    )
    hold_timeout: float = knob(
        "SUPERVISOR_HOLD_TIMEOUT", "120", seconds, "seconds that a request may wait for an engine that is starting"
    )
    drain_timeout: float = knob(
        "SUPERVISOR_DRAIN_TIMEOUT", "30", seconds, "seconds that running requests may go on after SIGTERM"
    )
    max_concurrency: int | None = knob(
        "SUPERVISOR_MAX_CONCURRENCY", None, count, "how many requests may run at once; unset: no limit (queue: 30)"
    )
    job_output: str = knob(
        "SUPERVISOR_JOB_OUTPUT",
        "openai",
        choice("openai", "tokens"),
        "what a job with messages or a prompt gives: OpenAI's JSON, or tokens as worker-vllm did until July 2026",
    )
    job_batch_size: int = knob(
        "SUPERVISOR_JOB_BATCH_SIZE", "50", some, "of tokens: pieces of text in a chunk of a stream, at most ..."
    )
    job_min_batch_size: int = knob("SUPERVISOR_JOB_MIN_BATCH_SIZE", "1", some, "... and at first ...")
    job_batch_growth: float = knob(
        "SUPERVISOR_JOB_BATCH_GROWTH", "3", ratio, "... and how many times as many each time"
    )
    max_waiting: int = knob(
        "SUPERVISOR_MAX_WAITING", "1000", count, "how many more may wait for their turn, before a 429"
    )
    request_timeout: float = knob(
        "SUPERVISOR_REQUEST_TIMEOUT", "3600", seconds, "seconds that a request may take, answer included (0: no limit)"
    )
    client_timeout: float = knob(
        "SUPERVISOR_CLIENT_TIMEOUT", "60", seconds, "seconds for a client's next bytes, or for it to take ours"
    )
    sse_keep_alive: float = knob(
        "SUPERVISOR_SSE_KEEP_ALIVE",
        "0",
        seconds,
        "seconds between comments in a stream whose request is held or queued; its status is 200 then; 0: none",
    )
    max_body: int = knob("SUPERVISOR_MAX_BODY", "64MiB", size, "the largest request body")
    api_keys: Keys | None = knob(
        "SUPERVISOR_API_KEYS", None, keys, "keys that clients must give, between commas, or @file", secret=True
    )
    admin_keys: Keys | None = knob(
        "SUPERVISOR_ADMIN_KEYS",
        None,
        keys,
        "keys that open vLLM's admin routes as well, and show its log and the settings, the same way",
        secret=True,
    )
    allow_routes: tuple[str, ...] = knob(
        "SUPERVISOR_ALLOW_ROUTES", "", routes, "more paths to open, by their beginnings, between commas"
    )
    allowed_hosts: tuple[str, ...] = knob(
        "SUPERVISOR_ALLOWED_HOSTS",
        "",
        hosts,
        "hosts that clients may name, on loopback without keys, beside localhost and addresses: a.example,*.b.example",
    )
    rate_limit: int | None = knob(
        "SUPERVISOR_RATE_LIMIT", None, count, "requests per minute and key (or address, where there are no keys)"
    )
    response_cache: int | None = knob(
        "SUPERVISOR_RESPONSE_CACHE",
        None,
        size,
        "memory for answers that would come out the same (temperature 0, or a seed), such as 256MiB; unset: none",
    )
    tls_cert: str | None = knob("SUPERVISOR_TLS_CERT", None, text, "a certificate's file: HTTPS instead of HTTP")
    tls_key: str | None = knob("SUPERVISOR_TLS_KEY", None, text, "its private key's file")
    log_format: str = knob("SUPERVISOR_LOG_FORMAT", "text", choice("text", "json"), "our own log lines: text or json")
    log_level: str = knob(
        "SUPERVISOR_LOG_LEVEL", "info", choice("debug", "info", "warning", "error"), "our own log's level"
    )
    access_log: bool = knob(
        "SUPERVISOR_ACCESS_LOG", "true", read_bool, "a line for each answer, in place of vLLM's own"
    )
    volume: str | None = knob(
        "SUPERVISOR_VOLUME",
        None,
        text,
        "a disk that outlives the container, for downloads and caches (found on RunPod)",
    )
    cache_dir: str | None = knob(
        "SUPERVISOR_CACHE_DIR", None, text, "a folder for caches alone (on the volume, where there is one)"
    )


KNOBS: tuple[Knob, ...] = tuple(each.metadata["knob"] for each in fields(Knobs))
