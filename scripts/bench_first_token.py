#!/usr/bin/env python3
"""The first token of one stream at a time: a real vLLM alone beside the same behind the gateway.

    .venv/bin/python scripts/bench_first_token.py --vllm .vllm/bin/vllm --model supervisor/demo/model \\
        [--requests 300] [--tokens 8] [--pause 0] [--anew] [--json FILE] -- --max-model-len 2048

One `supervisor up` runs vLLM; what follows `--` is vLLM's. The same chat completion is then asked for at each of these,
one at a time, in an order that is drawn anew for each prompt:

    alone      that engine, on its unix socket
    gateway    the gateway's port, as it is shipped: access log on; and a key, metrics and admission
    quiet      that of a second supervisor before the same engine, without an access log
    private    the first gateway's private unix socket: no TCP, no key
    relay      a process that passes bytes from a port to that engine's socket and knows no HTTP: what any relay costs
               that is a process with an event loop

The client is one thread with blocking sockets that stay open (`--anew`: a new connection for each request, opening it
included) and without Nagle's delay. It takes four times of each answer, from before the request is sent: its head, its
first event (which names a role, and nothing else), the first event with text, and its end. What is told of a side is
also told as the median of its differences to the first side, prompt by prompt, with the bounds of that median (95 %):
what drifts is in both. A first token of a real engine differs by milliseconds from one request to the next: bounds of
0.1 ms take some 500 prompts.

`--pause`: seconds without work before each request. Without any, every process and core is still awake from the last
answer, and vLLM's API server may still be busy with it: 0.05 shows more of what a single user sees. With several API
servers a connection stays with the one that took it, and they differ by more than the gateway costs: leave it at one.

`--side NAME=TARGET`, once for each, takes what runs already instead (a unix socket's path, or a port).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "0.32.0"  # the version that the second supervisor reads of its engine
ENGINE = "BENCH_FIRST_TOKEN_ENGINE"  # the socket that it links to
PATIENCE = 60.0
WARM_UP = 20  # requests to each side that do not count
KEY = "a-key-for-the-benchmark"
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
    f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
)
EVENT, TEXT, LAST_CHUNK = b"data: {", re.compile(rb'"content":\s*"[^"]'), b"\r\n0\r\n\r\n"
PARTS = ("head", "first event", "first token", "end")

Target = str | int  # a unix socket's path, or a port


class Answer(NamedTuple):
    """The times of an answer: its parts, in seconds from `sent_at` (of the monotonic clock)."""

    sent_at: float
    head: float
    first_event: float
    first_token: float
    end: float


def connect(target: Target) -> socket.socket:
    if isinstance(target, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(target)
    else:
        connection = socket.create_connection(("127.0.0.1", target), PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(True)  # without a timeout, which would cost a poll() before each read
    return connection


def ask(connection: socket.socket, request: bytes, sent_at: float) -> Answer:
    head = first_event = first_token = 0.0
    data = b""
    connection.sendall(request)
    while not data.endswith(LAST_CHUNK):
        received = connection.recv(65536)
        now = time.monotonic() - sent_at
        if not received:
            raise ConnectionError(f"cut: {data[-200:]!r}")
        data += received
        if not head:
            if not data.startswith(b"HTTP/1.1 200 "):
                raise ConnectionError(f"no answer: {data[:400]!r}")
            head = now
        if not first_event and EVENT in data:
            first_event = now
        if not first_token and TEXT.search(data):
            first_token = now
    if not first_token or b"[DONE]" not in data:
        raise ConnectionError(f"no stream: {data[:2000]!r}")
    return Answer(sent_at, head, first_event, first_token, now)


def make_request(number: int, tokens: int) -> bytes:
    """Returns a request. All prompts have the same length, and none was seen before."""
    body = {"messages": [{"role": "user", "content": f"{number:06d}: how is the sea?"}], "stream": True}
    text = json.dumps(body | {"max_tokens": tokens, "temperature": 0, "ignore_eos": True})
    return f"{HEAD}Content-Length: {len(text)}\r\n\r\n{text}".encode()


def measure(sides: dict[str, Target], options: argparse.Namespace) -> dict[str, list[Answer]]:
    """Returns as many answers of each side. The same index in each list is the same prompt."""
    answers: dict[str, list[Answer]] = {side: [] for side in sides}
    connections = {side: connect(target) for side, target in sides.items()}
    draw, first = random.Random(1), random.randrange(900_000)
    gc.collect()
    gc.disable()
    try:
        for number in range(options.warm_up + options.requests):
            request, order = make_request(first + number, options.tokens), list(sides)
            draw.shuffle(order)
            for side in order:
                if options.pause:
                    time.sleep(options.pause)
                sent_at = time.monotonic()
                if options.anew:
                    connections[side].close()
                    sent_at = time.monotonic()
                    connections[side] = connect(sides[side])
                answer = ask(connections[side], request, sent_at)
                if number >= options.warm_up:
                    answers[side].append(answer)
    finally:
        gc.enable()
        for connection in connections.values():
            connection.close()
    return answers


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def bound_median(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, and its bounds (95 %), from the order of the values alone."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    middle = len(ordered) / 2
    low, high = ordered[max(0, int(middle - half))], ordered[min(len(ordered) - 1, math.ceil(middle + half))]
    return statistics.median(ordered), low, high


def print_table(answers_by_side: dict[str, list[Answer]]) -> dict[str, Any]:
    """Prints the table, in ms, and returns its figures."""
    base, *others = answers_by_side
    figures: dict[str, Any] = {}
    count = len(answers_by_side[base])
    print(f"\n{count} requests to each, ms: p50 (p90)")
    print(f"{'':16}" + "".join(f"{part:>18}" for part in PARTS))
    for side, answers in answers_by_side.items():
        figures[side] = {}
        cells = ""
        for index, part in enumerate(PARTS, 1):
            values = [answer[index] * 1e3 for answer in answers]
            p50, p90 = statistics.median(values), percentile(values, 0.9)
            figures[side][part] = {"p50": p50, "p90": p90}
            cells += f"{p50:10.3f} ({p90:.2f})".rjust(18)
        print(f"{side:16}{cells}")
    print(f"\nlater than {base}, ms: the median of the differences (its bounds, 95 %)")
    for side in others:
        cells = ""
        for index, part in enumerate(PARTS, 1):
            pairs = zip(answers_by_side[side], answers_by_side[base], strict=True)
            p50, low, high = bound_median([(one[index] - other[index]) * 1e3 for one, other in pairs])
            figures[side][part] |= {"later": p50, "low": low, "high": high}
            cells += f"{p50:7.3f} ({low:.3f}..{high:.3f})".rjust(25)
        print(f"{side:16}{cells}", flush=True)
    return figures


# The other sides


class RelayEnd(asyncio.Protocol):
    """One end of a connection whose bytes are passed on."""

    transport: Any = None

    def __init__(self, path: str = "", peer: RelayEnd | None = None) -> None:
        self.path, self.peer, self.early_data = path, peer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.peer is None:
            asyncio.get_running_loop().create_task(self.open())

    async def open(self) -> None:
        _, self.peer = await asyncio.get_running_loop().create_unix_connection(lambda: RelayEnd(peer=self), self.path)
        self.peer.transport.write(self.early_data)

    def data_received(self, data: bytes) -> None:
        if self.peer is None:
            self.early_data += data
        else:
            self.peer.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.peer is not None:
            self.peer.transport.close()


def run_relay(path: str, port: int) -> None:
    import uvloop  # noqa: PLC0415  # of this process alone

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: RelayEnd(path), "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(run())


def link_engine(argv: Sequence[str]) -> None:
    """Runs instead of a vLLM for the second supervisor, and links its socket to the engine's."""
    Path(argv[argv.index("--uds") + 1]).symlink_to(os.environ[ENGINE])
    signal.pause()


@contextlib.contextmanager
def start_sides(options: argparse.Namespace, raw: Sequence[str]) -> Iterator[dict[str, Target]]:
    from bench_vllm import ADMIN_KEY, free_port, get, serving  # noqa: PLC0415  # needs more packages

    program, *words = shlex.split(options.vllm)
    vllm = shlex.join([str(Path(program).absolute()) if Path(program).exists() else program, *words])
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    port, second, third = free_port(), free_port(), free_port()
    keys = {"SUPERVISOR_API_KEYS": KEY, "SUPERVISOR_ADMIN_KEYS": ADMIN_KEY}
    up = [sys.executable, "-m", "supervisor", "up", model, "--mode", "http", "--port"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving([*up, str(port), "--", *raw], port, PATIENCE * 10, SUPERVISOR_VLLM=vllm, **keys))
        command = shlex.split(json.loads(get(port, "/status", ADMIN_KEY))["command"])
        engine = command[command.index("--uds") + 1]
        this_script = [sys.executable, str(Path(__file__).resolve())]
        environ = {"SUPERVISOR_VLLM": shlex.join(this_script), ENGINE: engine, "SUPERVISOR_ACCESS_LOG": "false", **keys}
        stack.enter_context(serving([*up, str(second)], second, PATIENCE, **environ))
        process = subprocess.Popen([*this_script, "relay", engine, str(third)])
        stack.callback(process.terminate)
        time.sleep(1.0)
        private = str(Path(engine).with_name("gateway.sock"))
        yield {"alone": engine, "gateway": port, "quiet": second, "private": private, "relay": third}


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(VERSION)
        return
    if sys.argv[1:2] == ["serve"]:
        link_engine(sys.argv)
        return
    if sys.argv[1:2] == ["relay"]:
        run_relay(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="the command that stands for `vllm`")
    parser.add_argument("--model")
    parser.add_argument("--side", action="append", default=[], metavar="NAME=TARGET")
    parser.add_argument("--requests", type=int, default=300, help="to each side")
    parser.add_argument("--warm-up", type=int, default=WARM_UP)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--json", type=Path)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, raw = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if not options.side and not (options.vllm and options.model):
        parser.error("--vllm and --model, or --side")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    given_sides: dict[str, Target] = {}
    for text in options.side:
        name, _, target = text.partition("=")
        given_sides[name] = int(target) if target.isdigit() else target
    print(f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}", flush=True)
    with contextlib.nullcontext(given_sides) if given_sides else start_sides(options, raw) as sides:
        answers = measure(sides, options)
    figures = print_table(answers)
    if options.json:
        options.json.write_text(json.dumps({"arguments": sys.argv[1:], "figures": figures, "answers": answers}) + "\n")


if __name__ == "__main__":
    main()
