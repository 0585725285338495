"""A table of the supervisor's own settings: name, default, how it is read. docs/settings.md says what they mean."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from supervisor.bounded import read_file
from supervisor.settings.names import advice
from supervisor.vllm.values import BadValue, clean, read_bool, read_choice


def number_reader(read: Callable[[str], Any], minimum: float, limit: float, expected: str) -> Callable[[str], Any]:
    """Returns a reader of numbers from `minimum` on and below `limit`. It raises BadValue with `expected`."""

    def reader(text: str) -> Any:
        with suppress(ValueError):
            if minimum <= (value := read(text)) < limit and text.isascii():
                return value
        raise BadValue(expected)

    return reader


read_path = os.path.expanduser  # it leaves ~nobody as it is
read_seconds = number_reader(float, 0, 1e9, "seconds, from 0 to a billion, such as 120")
read_ratio = number_reader(float, 1, 1e6, "a number from 1 on, such as 3")
read_count = number_reader(int, 0, 10**6, "a whole number, zero or more, such as 5")
read_positive = number_reader(int, 1, 10**6, "a whole number from 1 on, such as 5")
read_port = number_reader(int, 0, 2**16, "a port from 1 to 65535, such as 8000 (0: any free one)")
SIZE_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def read_size(text: str) -> int:
    """Returns how many bytes a text means, such as 64MiB (binary), 30MB (decimal), 1000000."""
    match = re.fullmatch(r"(\d(?:_?\d){0,11})\s*([kmg]i?)?b?", text.strip().lower())
    if match is None or not int(match[1]):
        raise BadValue("a size, such as 64MiB or 30MB")
    return int(match[1]) * SIZE_UNITS[match[2] or ""]


def read_words(value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise BadValue(f"arguments as a shell splits them, such as '--seed 1' ({error})") from None


SAFE_KEY_LENGTH = 8  # characters; a shorter key can be tried out, which is told, and it holds nevertheless


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys, and the plain file that they were read from, if any."""

    values: tuple[str, ...] = ()
    file: str | None = None

    def reread(self) -> Keys:
        """Returns the keys that the file has now. Raises BadValue."""
        return read_keys(f"@{self.file}") if self.file else self


def read_keys(value: str) -> Keys:
    """Reads keys between commas, or an `@file` that has one on each line, and comments."""
    value = value.strip()
    file = value[1:] if value.startswith("@") else None
    if file is not None:
        try:
            text = read_file(path := Path(read_path(file))).decode()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a text"
            raise BadValue(f"keys, such as key1,key2, or @file with a key on each line ({reason})") from None
        value = ",".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        file = file if path.is_file() else None  # a pipe can only be read once
    keys = tuple(key.strip() for key in value.split(",") if key.strip())
    if not keys:
        raise BadValue("at least one key, such as key1,key2; there is nothing but blanks")
    for key in (value.strip(), *keys):
        clean(key)
    if not all(re.fullmatch(r"[!-Z\\^-~]+", key) for key in keys):  # a list in JSON or Python would be other keys
        raise BadValue("keys of printable ASCII characters without blanks and brackets, such as key1,key2")
    return Keys(keys, file)


def read_routes(value: str) -> tuple[str, ...]:
    routes = tuple(route.strip() for route in value.split(",") if route.strip())
    if not all(route.startswith("/") for route in routes):
        raise BadValue("prefixes of paths, such as /server_info,/custom (/ opens all)")
    return routes


# A name is no longer than 253 characters, and each part of it no longer than 63.
HOST_NAME = re.compile(r"(?!.{254})(?:\*\.)?(?:(?!-)[a-z0-9_-]{1,63}(?<!-)\.)*(?!-)[a-z0-9_-]{1,63}(?<!-)")


def read_hosts(value: str) -> tuple[str, ...]:
    """Reads names between commas as a `Host` header has them, in small letters. `*.` in front stands for all below."""
    hosts = tuple(host.strip().lower().removesuffix(".") for host in value.split(",") if host.strip())
    if not all(map(HOST_NAME.fullmatch, hosts)):
        raise BadValue("names of hosts without scheme, port or path, such as gpu1.example.com,*.example.org")
    return hosts


def read_host(value: str) -> str:
    """Reads an address to listen on, or a name that has one."""
    with suppress(OSError):
        if ":" in value:
            socket.inet_pton(socket.AF_INET6, value.partition("%")[0])
        elif re.fullmatch(r"0|\d*\.[\d.]*", value):
            socket.inet_aton(value)
        elif not re.fullmatch(rf"(?!\*|\d+$){HOST_NAME.pattern}\.?", value, re.IGNORECASE):
            raise OSError
        return value
    raise BadValue(advice("no hosts", value))


def choice_reader(*names: str) -> Callable[[str], str]:
    return lambda value: read_choice(value, names)


@dataclass(frozen=True, slots=True)
class Knob:
    """One row of the table. `field` is its name in `Knobs`, and under `supervisor:` in config.yaml. `default` is a text
    that is read like any other value; None means unset."""

    field: str
    default: str | None
    read: Callable[[str], Any]
    is_secret: bool = False
    is_program: bool = False  # it names a program to run
    is_template: bool = False  # it may have braces of its own
    prefix: str = "SUPERVISOR_"  # of its variable

    @property
    def variable(self) -> str:
        return self.prefix + self.field.upper()


def knob(default: str | None, read: Callable[[str], Any], **columns: bool | str) -> Any:
    return field(metadata={"default": default, "read": read, **columns})


@dataclass(frozen=True, slots=True)
class Knobs:
    """The supervisor's own settings have their rows and their values here. Times are in seconds."""

    mode: str = knob("auto", choice_reader("auto", "http", "queue"))
    host: str = knob("127.0.0.1", read_host)
    port: int = knob("8000", read_port, prefix="")  # platforms set these two
    port_health: int | None = knob(None, read_port, prefix="")
    vllm: str | None = knob(None, read_path, is_program=True)
    extra_args: tuple[str, ...] = knob("", read_words, is_template=True)
    startup_timeout: float = knob("1200", read_seconds)
    warm_up: bool = knob("false", read_bool)
    fast_restart: bool = knob("true", read_bool)
    stall_timeout: float = knob("120", read_seconds)
    max_restarts: int = knob("5", read_count)
    restart_window: float = knob("600", read_seconds)
    on_failure: str = knob("exit", choice_reader("exit", "serve"))
    hold_timeout: float = knob("120", read_seconds)
    drain_timeout: float = knob("30", read_seconds)
    max_concurrency: int | None = knob(None, read_count)
    job_output: str = knob("openai", choice_reader("openai", "tokens"))
    job_batch_size: int = knob("50", read_positive)
    job_min_batch_size: int = knob("1", read_positive)
    job_batch_growth: float = knob("3", read_ratio)
    max_waiting: int = knob("1000", read_count)
    request_timeout: float = knob("3600", read_seconds)
    client_timeout: float = knob("60", read_seconds)
    sse_keep_alive: float = knob("0", read_seconds)
    max_body: int = knob("64MiB", read_size)
    api_keys: Keys | None = knob(None, read_keys, is_secret=True)
    admin_keys: Keys | None = knob(None, read_keys, is_secret=True)
    allow_routes: tuple[str, ...] = knob("", read_routes)
    allowed_hosts: tuple[str, ...] = knob("", read_hosts)
    rate_limit: int | None = knob(None, read_count)
    response_cache: int | None = knob(None, read_size)
    tls_cert: str | None = knob(None, read_path)
    tls_key: str | None = knob(None, read_path)
    log_format: str = knob("text", choice_reader("text", "json"))
    log_level: str = knob("info", choice_reader("debug", "info", "warning", "error"))
    access_log: bool = knob("true", read_bool)
    volume: str | None = knob(None, read_path)
    cache_dir: str | None = knob(None, read_path)


KNOBS: tuple[Knob, ...] = tuple(Knob(row.name, **row.metadata) for row in fields(Knobs))
