"""The supervisor's own settings, as a table: name, default, how it is read. What they mean is in docs/settings.md."""

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
from supervisor.settings.names import NO_HOSTS, advice
from supervisor.vllm.values import BadValue, clean, read_bool, read_choice


def number(read: Callable[[str], Any], least: float, below: float, expected: str) -> Callable[[str], Any]:
    """A reader of numbers from `least` on."""

    def reader(text: str) -> Any:
        with suppress(ValueError):
            if least <= (value := read(text)) < below and text.isascii():
                return value
        raise BadValue(expected)

    return reader


path = os.path.expanduser  # ~nobody stays as it is
seconds = number(float, 0, 1e9, "seconds, from 0 to a billion, such as 120")
ratio = number(float, 1, 1e6, "a number from 1 on, such as 3")
count = number(int, 0, 10**6, "a whole number, zero or more, such as 5")
some = number(int, 1, 10**6, "a whole number from 1 on, such as 5")
port_number = number(int, 0, 2**16, "a port from 1 to 65535, such as 8000 (0: any free one)")
SIZES = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size(text: str) -> int:
    """Bytes: 64MiB (binary), 30MB (decimal), 1000000."""
    found = re.fullmatch(r"(\d(?:_?\d){0,11})\s*([kmg]i?)?b?", text.strip().lower())
    if found is None or not int(found[1]):
        raise BadValue("a size, such as 64MiB or 30MB")
    return int(found[1]) * SIZES[found[2] or ""]


def words(value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise BadValue(f"arguments as a shell splits them, such as '--seed 1' ({error})") from None


SHORT_KEY = 8  # characters; one with less can be tried out, which is told, and holds


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys, and the plain file that they were read from, if any."""

    values: tuple[str, ...] = ()
    file: str | None = None

    def read_again(self) -> Keys:
        """What the file says now. Raises BadValue."""
        return keys(f"@{self.file}") if self.file else self


def keys(value: str) -> Keys:
    """Keys between commas, or `@file` with one on each line, and comments."""
    value = value.strip()
    file = value[1:] if value.startswith("@") else None
    if file is not None:
        try:
            text = read_file(named := Path(path(file))).decode()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not a text"
            raise BadValue(f"keys, such as key1,key2, or @file with a key on each line ({why})") from None
        value = ",".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        file = file if named.is_file() else None  # a pipe is read once
    found = tuple(key.strip() for key in value.split(",") if key.strip())
    if not found:
        raise BadValue("at least one key, such as key1,key2; there is nothing but blanks")
    for key in (value.strip(), *found):
        clean(key)
    if not all(re.fullmatch(r"[!-Z\\^-~]+", key) for key in found):  # a list in JSON or Python would be other keys
        raise BadValue("keys of printable ASCII characters without blanks and brackets, such as key1,key2")
    return Keys(found, file)


def routes(value: str) -> tuple[str, ...]:
    found = tuple(route.strip() for route in value.split(",") if route.strip())
    if not all(route.startswith("/") for route in found):
        raise BadValue("prefixes of paths, such as /server_info,/custom (/ opens all)")
    return found


# No longer than 253 characters, and each part no longer than 63.
HOST = re.compile(r"(?!.{254})(?:\*\.)?(?:(?!-)[a-z0-9_-]{1,63}(?<!-)\.)*(?!-)[a-z0-9_-]{1,63}(?<!-)")


def hosts(value: str) -> tuple[str, ...]:
    """Names between commas as a `Host` header has them, in small letters; `*.` in front stands for what is below."""
    found = tuple(host.strip().lower().removesuffix(".") for host in value.split(",") if host.strip())
    if not all(map(HOST.fullmatch, found)):
        raise BadValue("names of hosts without scheme, port or path, such as gpu1.example.com,*.example.org")
    return found


def host(value: str) -> str:
    """An address to listen on, or a name that has one."""
    with suppress(OSError):
        if ":" in value:
            socket.inet_pton(socket.AF_INET6, value.partition("%")[0])
        elif re.fullmatch(r"0|\d*\.[\d.]*", value):
            socket.inet_aton(value)
        elif not re.fullmatch(rf"(?!\*|\d+$){HOST.pattern}\.?", value, re.IGNORECASE):
            raise OSError
        return value
    raise BadValue(advice(NO_HOSTS, value))


def choice(*names: str) -> Callable[[str], str]:
    return lambda value: read_choice(value, names)


@dataclass(frozen=True, slots=True)
class Knob:
    """One row. `field`: its name in `Knobs`, and under `supervisor:` in config.yaml; `default`: a text, read like any
    other value, None means unset."""

    field: str
    default: str | None
    read: Callable[[str], Any]
    secret: bool = False
    is_program: bool = False  # it names one to run
    template: bool = False  # braces in it may be its own
    prefix: str = "SUPERVISOR_"  # of its variable

    @property
    def variable(self) -> str:
        return self.prefix + self.field.upper()


def knob(default: str | None, read: Callable[[str], Any], **more: bool | str) -> Any:
    return field(metadata={"default": default, "read": read, **more})


@dataclass(frozen=True, slots=True)
class Knobs:
    """The supervisor's own settings: each one's row, and its value. Times in seconds."""

    mode: str = knob("auto", choice("auto", "http", "queue"))
    host: str = knob("127.0.0.1", host)
    port: int = knob("8000", port_number, prefix="")  # platforms set these two
    port_health: int | None = knob(None, port_number, prefix="")
    vllm: str | None = knob(None, path, is_program=True)
    extra_args: tuple[str, ...] = knob("", words, template=True)
    startup_timeout: float = knob("1200", seconds)
    warm_up: bool = knob("false", read_bool)
    fast_restart: bool = knob("true", read_bool)
    stall_timeout: float = knob("120", seconds)
    max_restarts: int = knob("5", count)
    restart_window: float = knob("600", seconds)
    on_failure: str = knob("exit", choice("exit", "serve"))
    hold_timeout: float = knob("120", seconds)
    drain_timeout: float = knob("30", seconds)
    max_concurrency: int | None = knob(None, count)
    job_output: str = knob("openai", choice("openai", "tokens"))
    job_batch_size: int = knob("50", some)
    job_min_batch_size: int = knob("1", some)
    job_batch_growth: float = knob("3", ratio)
    max_waiting: int = knob("1000", count)
    request_timeout: float = knob("3600", seconds)
    client_timeout: float = knob("60", seconds)
    sse_keep_alive: float = knob("0", seconds)
    max_body: int = knob("64MiB", size)
    api_keys: Keys | None = knob(None, keys, secret=True)
    admin_keys: Keys | None = knob(None, keys, secret=True)
    allow_routes: tuple[str, ...] = knob("", routes)
    allowed_hosts: tuple[str, ...] = knob("", hosts)
    rate_limit: int | None = knob(None, count)
    response_cache: int | None = knob(None, size)
    tls_cert: str | None = knob(None, path)
    tls_key: str | None = knob(None, path)
    log_format: str = knob("text", choice("text", "json"))
    log_level: str = knob("info", choice("debug", "info", "warning", "error"))
    access_log: bool = knob("true", read_bool)
    volume: str | None = knob(None, path)
    cache_dir: str | None = knob(None, path)


KNOBS: tuple[Knob, ...] = tuple(Knob(each.name, **each.metadata) for each in fields(Knobs))
