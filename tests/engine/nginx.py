"""nginx in front of vLLM's unix socket, set up to change nothing; or in front of a port, as its defaults have it.

    with nginx_before("/run/vllm.sock", folder) as port: ...
    with plain_nginx_before(8000, folder) as port: ...

Both listen on a free port of 127.0.0.1, and end with the block. Nothing is written outside `folder`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

# The beginning of both configurations: the places where nginx may write.
COMMON_PART = """
daemon off;
worker_processes 1;
{user}
pid {folder}/pid;
error_log {folder}/error.log info;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
"""
# Nothing hides what nginx makes of a request by itself: one worker, nothing buffered, connections to vLLM kept alive,
# limits far away, and nothing repaired or left out for safety.
TRANSPARENT = (
    COMMON_PART
    + """\
    client_max_body_size 0;
    client_header_buffer_size 64k;
    large_client_header_buffers 16 256k;
    client_header_timeout 60;
    keepalive_timeout 60;
    keepalive_requests 100000;
    underscores_in_headers on;
    ignore_invalid_headers off;
    default_type "";
    upstream vllm {{
        server unix:{upstream};
        keepalive 8;
    }}
    server {{
        listen 127.0.0.1:{port};
        server_name _;
        merge_slashes off;
        location / {{
            proxy_pass http://vllm;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_buffer_size 128k;
            proxy_buffers 4 128k;
        }}
    }}
}}
"""
)

# What most users have: all but the places where it may write is nginx's own default.
PLAIN = (
    COMMON_PART
    + """\
    server {{
        listen 127.0.0.1:{port}{listen};
        {server}
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
            {location}
        }}
    }}
}}
"""
)


def program() -> str:
    """Returns nginx's path. Without nginx the test is skipped, loudly, or fails in CI if we could have installed it."""
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        text = "nginx is not here, and the gateway is compared with nothing: apt-get install nginx-light"
        if "CI" in os.environ and os.geteuid() == 0 and Path("/etc/debian_version").exists():
            pytest.fail(text)
        pytest.skip(text)
    return found


@contextlib.contextmanager
def nginx_before(upstream: str, folder: Path) -> Iterator[int]:
    """Runs nginx in front of the unix socket, with all its files in `folder`; yields its port."""
    with _running(TRANSPARENT, folder, upstream=upstream) as port:
        yield port


@contextlib.contextmanager
def plain_nginx_before(
    upstream: int, folder: Path, *location: str, tls: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Runs nginx in front of the port `upstream`, with all its files in `folder`; yields its port.

    `location` are lines of its location. With `tls`, which is what `harness.self_signed` returned, it speaks HTTPS.
    """
    server = "" if tls is None else "ssl_certificate {SUPERVISOR_TLS_CERT}; ssl_certificate_key {SUPERVISOR_TLS_KEY};"
    values = {"listen": "" if tls is None else " ssl", "server": server.format_map(tls or {})}
    with _running(PLAIN, folder, upstream=upstream, location=" ".join(location), **values) as port:
        yield port


@contextlib.contextmanager
def _running(template: str, folder: Path, **values: object) -> Iterator[int]:
    configuration = folder / "nginx.conf"
    with socket.create_server(("127.0.0.1", 0)) as listening:  # nginx inherits it: so nobody else can have its port
        port = listening.getsockname()[1]
        user = "user root;" if os.geteuid() == 0 else ""  # nginx's own user could not open the unix socket
        configuration.write_text(template.format(folder=folder, port=port, user=user, **values))
        process = subprocess.Popen(
            [program(), "-p", folder, "-c", configuration, "-e", folder / "error.log"],
            env={"NGINX": f"{listening.fileno()};"},
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)
