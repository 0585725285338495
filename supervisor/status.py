"""`supervisor status`: asks a running supervisor how it is; in the image, the health check.

Each supervisor listens on a private socket in its workspace, whatever its mode, port, address, keys and certificate:
there it is asked, so nobody has to know them. One on another machine is asked by its URL.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from supervisor.engine.remains import GATEWAY, PREFIX, temporary_folder
from supervisor.settings.knobs import keys
from supervisor.settings.values import BadValue

PATIENCE = 8.0
NOT_READY = 1


class StatusError(Exception):
    """It can't be asked; the text says why."""


class _Private(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("supervisor", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def show(url: str | None, environ: Mapping[str, str], *, as_json: bool) -> int:
    """Prints one line for each that is found, or all that it tells as JSON. 0 where all are ready, else 1."""
    try:
        found = [_at(url, environ)] if url else list(_here(environ))
    except StatusError as error:
        print(f"supervisor: {error}", file=sys.stderr)
        return NOT_READY
    if not found:
        print("supervisor: none runs here: start one with `supervisor up`, or name one with --url", file=sys.stderr)
    for status in found:
        print(json.dumps(status) if as_json else text(status))
    return 0 if found and all(status["state"] == "ready" for status in found) else NOT_READY


def text(status: Mapping[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(status["since"]))
    line = f"{status['state']} since {since}: {status['model']} ({status['reason']})"
    line += f", {status['in_flight']} requests in flight, {status['waiting']} waiting"
    if status["restarts"]:
        line += f", {status['restarts']} restarts"
    return line


def _here(environ: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Those of this user on this machine. What a killed one left behind answers nobody, and is passed over."""
    for path in sorted(temporary_folder(environ).glob(f"{PREFIX}*/{GATEWAY}")):
        try:
            yield _ask(_Private(path), {})
        except (ConnectionRefusedError, FileNotFoundError, PermissionError):
            continue
        except (OSError, http.client.HTTPException) as error:
            raise StatusError(f"the supervisor at {path} does not answer ({_why(error)})") from None


def _at(url: str, environ: Mapping[str, str]) -> dict[str, Any]:
    given = environ.get("SUPERVISOR_API_KEYS")
    try:
        connection = _connection(url)
    except (ValueError, http.client.InvalidURL):
        raise StatusError(f"--url {url}: expected an address such as http://127.0.0.1:8000") from None
    try:
        return _ask(connection, {"Authorization": f"Bearer {keys(given).values[0]}"} if given else {})
    except BadValue as error:
        raise StatusError(f"SUPERVISOR_API_KEYS: expected {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise StatusError(f"{url} does not answer ({_why(error)})") from None


def _connection(url: str) -> http.client.HTTPConnection:
    """Raises ValueError or InvalidURL."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=PATIENCE)


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _ask(connection: http.client.HTTPConnection, headers: dict[str, str]) -> dict[str, Any]:
    """Raises StatusError where what answers is no supervisor."""
    try:
        connection.request("GET", "/status", headers=headers)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status == http.client.UNAUTHORIZED:
        raise StatusError("it asks for a key: set SUPERVISOR_API_KEYS to one of its keys")
    try:
        status: dict[str, Any] = json.loads(body)
        text(status)
    except (ValueError, KeyError, TypeError):
        raise StatusError(f"what answers is no supervisor (status {answer.status})") from None
    return status
