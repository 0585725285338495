"""The sockets that clients come to, bound before anything starts: a port that is taken is told at once."""

from __future__ import annotations

import ipaddress
import resource
import socket
from pathlib import Path
from typing import NamedTuple

from supervisor.settings.settings import Settings, SettingsError

BACKLOG = 2048
LOOPBACK = "127.0.0.1"
MAX_OPEN_FILES = 65_536  # more descriptors are of no use to us, and programs that we start might look at each of them


class Listeners(NamedTuple):
    """Bound sockets. Clients come to `front`: the simulated RunPod's socket, or else the gateway's first."""

    gateway: tuple[socket.socket, ...]
    simulator: socket.socket | None = None

    @property
    def front(self) -> socket.socket | None:
        return self.simulator or next(iter(self.gateway), None)


def bind(settings: Settings) -> Listeners:
    """Binds the ports that the settings ask for. Raises SettingsError for one that is taken, or an address not ours.

    In queue mode the gateway has a port only where one was asked for: on RunPod's Hub, port 80 is the test runner's.
    Outside of RunPod the port is the simulator's.
    """
    knobs = settings.knobs
    health_listeners = [_listen(knobs.host, knobs.port_health)] if knobs.port_health not in (None, knobs.port) else []
    if settings.mode == "queue":
        if not settings.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
            # SUPERVISOR_HOST doesn't count: the simulator is for who sits here, and shows each job to whoever asks.
            return Listeners(tuple(health_listeners), simulator=_listen(LOOPBACK, knobs.port))
        if not settings.is_set("PORT"):
            return Listeners(tuple(health_listeners))
    return Listeners((_listen(knobs.host, knobs.port), *health_listeners))


def _listen(host: str, port: int | None) -> socket.socket:
    assert port is not None
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        problem = f"can't listen on {host}, port {port} ({reason}): set PORT (or --port), or SUPERVISOR_HOST"
        raise SettingsError([problem]) from error
    listener.setblocking(False)
    return listener


def raise_file_limit() -> None:
    """Raises the limit as far as we may: each client takes a descriptor, and each request that runs another."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can connect to that host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind_private(path: Path) -> socket.socket:
    """Binds the socket for the queue worker and `supervisor status`, in a folder that is ours alone (0700)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def url(listener: socket.socket, scheme: str = "http") -> str:
    """Returns the URL that a person on this machine would type."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
        host = "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
