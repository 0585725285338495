"""`supervisor status`: asks a running supervisor how it is. In the image it is the health check.

Each supervisor listens on a private socket in its workspace, whatever its mode, port, address, keys and certificate: it
is asked there, so nobody has to know them. One on another machine is asked by its URL.
"""

from __future__ import annotations

import http.client
import json
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from supervisor.engine.workspace import find_workspaces, is_ours, temporary_folder
from supervisor.secrets import complain
from supervisor.settings.knobs import read_keys
from supervisor.vllm.values import BadValue

PATIENCE = 8.0
EXIT_NOT_READY = 1


class StatusError(Exception):
    """A supervisor can't be asked; the text says why."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("supervisor", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def show(url: str | None, environ: Mapping[str, str], *, as_json: bool) -> int:
    """Prints a table on a terminal, else a line, or JSON, for each supervisor. Returns 0 where all are ready."""
    failures: list[str] = []
    try:
        statuses = [_ask_url(url, environ)] if url else list(ask_local(environ, failures))
    except StatusError as error:
        complain(str(error), environ)
        return EXIT_NOT_READY
    for line in failures:
        complain(line, environ)
    if not statuses and not failures:
        complain("none runs here: start one with `supervisor up`, or name one with --url", environ)
    for status in statuses:
        if sys.stdout.isatty() and not as_json:
            _print_table(status)
        else:
            print(json.dumps(status) if as_json else summary(status))
    return 0 if statuses and not failures and all(status["state"] == "ready" for status in statuses) else EXIT_NOT_READY


def summary(status: Mapping[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(status["since"]))
    line = f"{status['state']} since {since}: {status['model']} ({status['reason']})"
    line += f", {status['in_flight']} requests in flight, {status['waiting']} waiting"
    if status["restarts"]:
        line += f", {status['restarts']} restarts"
    return line


def _print_table(status: Mapping[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415  # it takes 60 ms, which the health check need not pay
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    failure = status.get("last_failure") or {}
    colour = {"ready": "green", "failed": "red", "starting": "yellow", "restarting": "yellow"}.get(status["state"], "")
    phases = [f"{row['name']} {row['seconds']:.1f} s" for row in status.get("phases") or ()]
    rows = {
        "state": Text(status["state"], colour),
        "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["since"])),
        "reason": status["reason"],
        "model": status["model"],
        "mode": status.get("mode"),
        "vLLM": status.get("vllm_version"),
        "requests": f"{status['in_flight']} in flight, {status['waiting']} waiting",
        "restarts": str(status["restarts"]),
        "start": ", ".join(phases),
        "progress": status.get("progress"),
        "last failure": " ".join(filter(None, (failure.get("cause"), failure.get("remedy")))),
        "warnings": "\n".join(status.get("warnings") or ()),
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    Console(highlight=False).print(table)


def ask_local(environ: Mapping[str, str], failures: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the status of each supervisor of this user on this machine; others' are not asked. What a killed one left
    behind answers nobody, and is passed over. `failures` gets a line for each that lives and does not answer."""
    for workspace in find_workspaces(temporary_folder(environ)):
        path = workspace.gateway_socket
        if not is_ours(path, stat.S_IFSOCK):
            continue
        try:
            yield _ask_socket(path)
        except (ConnectionRefusedError, FileNotFoundError, PermissionError):
            continue
        except (OSError, http.client.HTTPException, StatusError) as error:
            if failures is not None:
                reason = getattr(error, "strerror", None) or error or type(error).__name__
                failures.append(f"the supervisor at {path} does not answer ({reason})")


def _ask_url(url: str, environ: Mapping[str, str]) -> dict[str, Any]:
    import httpx  # noqa: PLC0415  # it takes 0.2 s, which the health check need not pay

    from supervisor import asking  # noqa: PLC0415  # as above

    header = authorization(environ, "SUPERVISOR_API_KEYS")
    try:
        with asking.client(url, PATIENCE, authorization=header) as client:
            answer = client.get("/status")
    except ValueError:
        raise StatusError(f"--url {url}: expected an address such as http://127.0.0.1:8000") from None
    except httpx.HTTPError as error:
        raise StatusError(f"{url} does not answer ({asking.reason(error)})") from None
    return _parse(answer.status_code, answer.content)


def authorization(environ: Mapping[str, str], *names: str) -> str:
    """Returns a header's value: the first key of the first of these variables that is set; "" where none is."""
    for name in names:
        if given := environ.get(name):
            try:
                return f"Bearer {read_keys(given).values[0]}"
            except BadValue as error:
                raise StatusError(f"{name}: expected {error}") from None
    return ""


def _ask_socket(path: Path) -> dict[str, Any]:
    """Asks over the private socket, without httpx, whose import takes seven times as long as all the rest of this."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        return _parse(answer.status, answer.read())
    finally:
        connection.close()


def _parse(code: int, body: bytes) -> dict[str, Any]:
    """Returns a status. Raises StatusError where it refuses, or where what answers is no supervisor."""
    if code == HTTPStatus.UNAUTHORIZED:
        raise StatusError("it asks for a key: set SUPERVISOR_API_KEYS to one of its keys")
    try:
        status: dict[str, Any] = json.loads(body)
        if code in (HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS) and isinstance(status["error"], str):
            raise StatusError(status["error"])
        summary(status)
    except (ValueError, KeyError, TypeError):
        raise StatusError(f"what answers is no supervisor (status {code})") from None
    return status
