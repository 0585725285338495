#!/usr/bin/env python3
"""What the gateway costs beside nginx: CPU per JSON request and per streamed event, rates, latencies, memory.

    .venv/bin/python scripts/bench_gateway.py [--shipped] [--seconds 1] [--rounds 3] [--only NAMES] [--json FILE]

In one run, against the same upstream (scripts/fast_upstream.py): nothing between (direct), nginx with one worker and
`proxy_buffering off`, the gateway as `supervisor up` runs it, with a key, request ids, metrics and admission on, and
uvicorn + httpx, which is what people write first. wrk is the client. The proxy has a core of its own where there are
two; its CPU is its own user and system time, so that the figures hold on a busy machine. nginx and wrk come from
Debian's packages (nginx-light, wrk). All of it takes some 2.5 minutes.

`--shipped` takes only the rows that are as it is shipped, access log on, as text and as JSON, beside an nginx that
writes its own. Each log goes to a pipe that `cat` drains on the client's core, as a container's runtime does: our
stderr, and nginx's `access_log /dev/stdout`, which is what nginx's own image has. So both pay for handing lines to a
reader, and neither for what the reader does with them. nginx's format is its default, `combined`, without a buffer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = ROOT / "scripts" / "fast_upstream.py"
Results = dict[str, dict[str, dict[str, float]]]
KEY = "a-key-for-the-benchmark"
EVENTS = 64
CONNECTIONS = (1, 64, 256)
ALL = ("direct", "nginx", "gateway", "naive", "nginx-log", "gateway-log", "gateway-json")
SHIPPED = ("nginx-log", "gateway-log", "gateway-json")
BODY = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "x" * 200}]}
NGINX = """
{user}
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log {log}; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    keepalive_requests 1000000;
    upstream vllm {{ server unix:{folder}/upstream.sock; keepalive 512; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location / {{
            proxy_pass http://vllm; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""
NAIVE = """
import httpx, os, uvicorn
transport = httpx.AsyncHTTPTransport(uds=os.environ["UPSTREAM"], limits=httpx.Limits(max_connections=None))
client = httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=None)
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = {"content-type": "application/json"}
    async with client.stream(scope["method"], scope["path"], content=body, headers=headers) as answer:
        fields = [row for row in answer.headers.raw if row[0].lower() not in (b"transfer-encoding", b"content-length")]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": fields})
        async for data in answer.aiter_raw():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="error", access_log=False, lifespan="off")
"""


@dataclass
class Front:
    """A server to measure: where it listens, and the processes whose time counts."""

    name: str
    port: int
    pids: list[int]
    baseline: str = "nginx"  # the front that it is compared with

    def cpu_seconds(self) -> float:
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in self.pids)

    def rss(self) -> float:
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids) / 1e6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pin(core: int, command: list[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command] if len(os.sched_getaffinity(0)) > 1 else command


@contextlib.contextmanager
def start_program(
    command: list[str], core: int, *, drains_output: bool = False, **environ: str
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Runs a program. With `drains_output` its output goes to a pipe, of which only the beginning is kept."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed below, after the process
    output, reader = log.fileno(), None
    if drains_output:
        read_end, output = os.pipe()
        drain = pin(0, ["sh", "-c", "head -c 4096; exec cat > /dev/null"])
        reader = subprocess.Popen(drain, stdin=read_end, stdout=log)
        os.close(read_end)
    process = subprocess.Popen(
        pin(core, command), env=os.environ | environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL
    )
    if drains_output:
        os.close(output)
    try:
        yield process, log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if reader is not None:
            reader.terminate()  # even if another process still holds its pipe
            reader.wait()
        log.close()


def is_answering(port: int) -> bool:
    try:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY, headers=headers).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(port: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not is_answering(port):
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            sys.exit(f"bench_gateway: nothing answers on port {port}:\n{log.read().decode()[-2000:]}")
        time.sleep(0.05)


@contextlib.contextmanager
def nginx(folder: Path, *, logs: bool = False) -> Iterator[Front]:
    port = free_port()
    name = "nginx, its log" if logs else "nginx"
    conf = folder / f"nginx{logs}.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    log = "/dev/stdout" if logs else "off"
    conf.write_text(NGINX.format(folder=folder, port=port, user=user, log=log).replace("nginx.pid", f"nginx{logs}.pid"))
    command = ["nginx", "-c", str(conf), "-e", str(folder / "error.log")]
    with start_program(command, 1, drains_output=logs) as (process, output):
        wait_for(port, process, output)
        pids = [child.pid for child in psutil.Process(process.pid).children()]
        yield Front(name, port, pids, name)


@contextlib.contextmanager
def gateway(folder: Path, name: str = "gateway", *, logs: bool = False, **knobs: str) -> Iterator[Front]:
    """Runs the gateway. Its access log is off, as nginx's is, unless `knobs` say otherwise."""
    port = free_port()
    environ = {
        "SUPERVISOR_VLLM": str(folder / "vllm"), "PORT": str(port), "SUPERVISOR_API_KEYS": KEY,
        "SUPERVISOR_MAX_CONCURRENCY": "1000", "PYTHONDONTWRITEBYTECODE": "", "SUPERVISOR_ACCESS_LOG": "false", **knobs,
    }  # fmt: skip
    environ |= {"SUPERVISOR_ACCESS_LOG": "true"} if logs else {}
    command = [str(Path(sys.prefix) / "bin" / "supervisor"), "up", "m"]
    with start_program(command, 1, drains_output=logs, **environ) as (process, output):
        wait_for(port, process, output)
        children = psutil.Process(process.pid).children(recursive=True)
        for child in children:  # the upstream that it started shares the client's core
            with contextlib.suppress(psutil.Error):
                if "fast_upstream" in " ".join(child.cmdline()):
                    child.cpu_affinity([0])
        yield Front(name, port, [process.pid], "nginx, its log" if logs else "nginx")


@contextlib.contextmanager
def naive(folder: Path) -> Iterator[Front]:
    port = free_port()
    environ = {"UPSTREAM": str(folder / "upstream.sock"), "PORT": str(port)}
    with start_program([sys.executable, "-c", NAIVE], 1, drains_output=False, **environ) as (process, output):
        wait_for(port, process, output)
        yield Front("uvicorn + httpx", port, [process.pid])


def run_wrk(front: Front, kind: str, connections: int, seconds: int, folder: Path) -> dict[str, float]:
    """Takes one reading. `kind` is json or stream. Latencies are those of whole responses."""
    body = BODY | ({"stream": True} if kind == "stream" else {})
    script = folder / f"{kind}.lua"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    script.write_text("\n".join(['wrk.method = "POST"', f"wrk.body = [[{json.dumps(body)}]]", *lines]) + "\n")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "20s", "-s", str(script)]
    cpu, start = front.cpu_seconds(), time.monotonic()
    process = subprocess.run(
        pin(0, [*command, f"http://127.0.0.1:{front.port}/v1/chat/completions"]),
        capture_output=True,
        text=True,
        check=True,
    )
    cpu, elapsed = front.cpu_seconds() - cpu, time.monotonic() - start
    return parse_wrk(process.stdout, kind, cpu, elapsed)


def parse_wrk(text: str, kind: str, cpu: float, elapsed: float) -> dict[str, float]:
    count = int(re.search(r"(\d+) requests in", text)[1])  # type: ignore[index]
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3}

    def latency(percent: int) -> float:
        found = re.search(rf" {percent}%\s+([\d.]+)(us|ms|s)", text)
        return float(found[1]) * units[found[2]] if found else float("nan")

    errors = sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", text)))
    errors += int(found[1]) if (found := re.search(r"Non-2xx or 3xx responses: (\d+)", text)) else 0
    items = count * (EVENTS if kind == "stream" else 1)
    return {
        "per_second": items / elapsed,
        "cpu_us": cpu / items * 1e6 if items else float("nan"),
        "p50_ms": latency(50),
        "p99_ms": latency(99),
        "errors": errors,
    }


def idle_memory(front: Front, count: int) -> float:
    """Returns the MB that `count` idle connections take, all together."""
    before = front.rss()
    connections = [socket.create_connection(("127.0.0.1", front.port)) for _ in range(count)]
    request = f"GET /ping HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    for connection in connections:
        connection.sendall(request)
    for connection in connections:
        connection.recv(65536)
    after = front.rss()
    for connection in connections:
        connection.close()
    return after - before


def slow_readers(front: Front, count: int) -> float:
    """Returns the most MB that `count` clients add who read long streams (20 MB each) far slower than they come."""
    before = highest = front.rss()
    body = json.dumps(BODY | {"stream": True, "user": "long"}).encode()
    fields = f"Host: h\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}"
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", front.port))
            client.sendall(head.encode() + body)
            clients.append(client)
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:  # some 40 KB a second for each
            for client in clients:
                client.recv(8192)
            highest = max(highest, front.rss())
            time.sleep(0.2)
    return highest - before


def measure(fronts: list[Front], connections: tuple[int, ...], seconds: int, rounds: int, folder: Path) -> Results:
    """Takes each reading of one front after the other, several times over, so that the machine's moods cancel out. The
    table has the median of the readings, and that of the ratios, each taken within one round; the least ratio follows
    in brackets."""
    results: Results = {front.name: {} for front in fronts}
    print(
        f"{'':16}{'':7}{'conns':>5}{'per s':>9}{'CPU us':>8}{'x nginx':>14}{'p50 ms':>8}{'x nginx':>14}"
        f"{'p99 ms':>8}{'x nginx':>14}{'errors':>7}"
    )
    for kind in ("json", "stream"):
        for count in connections:
            readings: dict[str, list[dict[str, float]]] = {front.name: [] for front in fronts}
            for _ in range(rounds):
                for front in fronts:
                    readings[front.name].append(run_wrk(front, kind, count, seconds, folder))
            for front in fronts:
                rows = readings[front.name]
                row = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                row["errors"] = sum(row["errors"] for row in rows)
                ratios = {}
                for key in ("cpu_us", "p50_ms", "p99_ms"):
                    if front.pids and front.baseline in readings:
                        times = [one[key] / base[key] for one, base in zip(rows, readings[front.baseline], strict=True)]
                        row[f"times_nginx_{key}"], row[f"times_nginx_{key}_least"] = (
                            statistics.median(times),
                            min(times),
                        )
                        ratios[key] = f"{statistics.median(times):.2f} ({min(times):.2f})"
                results[front.name][f"{kind} {count}"] = row
                print(
                    f"{front.name:16}{kind:7}{count:5}{row['per_second']:9.0f}{row['cpu_us']:8.1f}"
                    f"{ratios.get('cpu_us', ''):>14}{row['p50_ms']:8.2f}{ratios.get('p50_ms', ''):>14}"
                    f"{row['p99_ms']:8.2f}{ratios.get('p99_ms', ''):>14}{row['errors']:7.0f}",
                    flush=True,
                )
    return results


def measure_memory(front: Front) -> dict[str, float]:
    usage = {"rss_mb": front.rss(), "idle_1000_mb": idle_memory(front, 1000), "slow_256_mb": slow_readers(front, 256)}
    print(
        f"{front.name:19}memory {usage['rss_mb']:.0f} MB; 1,000 idle connections {usage['idle_1000_mb']:+.1f} MB; "
        f"256 slow readers of long streams {usage['slow_256_mb']:+.1f} MB",
        flush=True,
    )
    return usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=1, help="for each reading")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shipped", action="store_true", help=f"--only {','.join(SHIPPED)} --connections 64,256")
    parser.add_argument("--only", help=f"names between commas, of: {', '.join(ALL)}, gateway-hit")
    parser.add_argument("--connections", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for program in ("nginx", "wrk", "taskset"):
        if not shutil.which(program):
            sys.exit(f"bench_gateway: {program} is missing (Debian: apt-get install nginx-light wrk util-linux)")
    starts: dict[str, Callable[[Path], Any]] = {
        "nginx": nginx,
        "gateway": gateway,
        "naive": naive,
        "nginx-log": partial(nginx, logs=True),
        "gateway-log": partial(gateway, name="gateway, text", logs=True),
        "gateway-json": partial(gateway, name="gateway, JSON", logs=True, SUPERVISOR_LOG_FORMAT="json"),
        "gateway-hit": partial(gateway, name="gateway, cached", SUPERVISOR_RESPONSE_CACHE="64MiB"),
    }
    chosen = arguments.only.split(",") if arguments.only else SHIPPED if arguments.shipped else ALL
    connections = arguments.connections or (CONNECTIONS[1:] if arguments.shipped else CONNECTIONS)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(machine)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        # This program stands in for vLLM. It runs in the supervisor's own Python, whatever PATH says.
        (folder / "vllm").write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(UPSTREAM))} "$@"\n'
        )
        (folder / "vllm").chmod(0o755)
        port = free_port()
        command = [str(folder / "vllm"), "serve", "m", "--uds", str(folder / "upstream.sock"), "--port", str(port)]
        upstream, output = stack.enter_context(start_program(command, 0))
        wait_for(port, upstream, output)
        fronts = [
            Front("direct", port, []) if choice == "direct" else stack.enter_context(starts[choice](folder))
            for choice in chosen
        ]
        results = measure(fronts, connections, arguments.seconds, arguments.rounds, folder)
        memory = {front.name: measure_memory(front) for front in fronts if front.name in ("nginx", "gateway")}
    if arguments.json:
        content = {"machine": machine, "fronts": results, "memory": memory}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
