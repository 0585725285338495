#!/usr/bin/env python3
"""A real vLLM alone beside the same behind the gateway: events per second, time to first token, failures, CPU.

    .venv/bin/python scripts/bench_vllm.py --vllm .vllm/bin/vllm --model supervisor/demo/model \\
        [--streams 1,64,256] [--tokens 128] [--rounds 3] [--tcp] [--json FILE] -- --max-model-len 2048

One `supervisor up` runs vLLM; what follows `--` is vLLM's. "alone" asks that engine on its unix socket, "gateway" on
the gateway's port, with a key, metrics and admission on. Every round reads both, each time in the other order, so that
drift cancels. A reading begins with short answers that do not count (they open the connections, the gateway's too);
then all streams start together, again and again for at least --seconds.

TCP over loopback costs more than a unix socket, and only "gateway" pays it. --tcp shows how much: afterwards, without
the supervisor, a vLLM of its own listens on TCP. That is another engine at another time: good for the size only.

Under load vLLM puts several tokens into one event, so tokens per second stand beside events. The CPU is the
supervisor's, per event; beside "alone" it is what watching vLLM and its log takes. "client" is how busy the busiest
client process was: near 100 % the clients are what is measured. The CPU seconds of vLLM's processes are in the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from stream_clients import KEY, Clients, Target

ROOT = Path(__file__).resolve().parent.parent
DIGITS = {"events/s": 0, "tokens/s": 0, "TTFT p50 ms": 1, "TTFT p99 ms": 1, "CPU us": 1, "client %": 0, "failures": 0}
ADMIN_KEY = "sk-bench-admin"  # /status shows vLLM's command to administrators
SETTLE = 3.0  # vLLM is ready with the first of several API servers: the others get this long
RATIOS = ("events/s", "tokens/s", "TTFT p50 ms", "TTFT p99 ms")

Reading = dict[str, Any]


def take_reading(clients: Clients, target: Target, pid: int, streams: int, options: argparse.Namespace) -> Reading:
    """Takes a reading: waves for --seconds. `pid` is the parent of vLLM's processes: the supervisor, or vLLM itself."""
    clients.run_wave(target, streams, 4)
    before, waves, started_at = cpu_seconds(pid), list[Reading](), time.monotonic()
    while not waves or (time.monotonic() < started_at + options.seconds and not waves[-1]["problems"]):
        waves.append(clients.run_wave(target, streams, options.tokens))
    cpu = {name: round(used - before.get(name, 0.0), 2) for name, used in cpu_seconds(pid).items()}
    seconds, events, busy = (sum(row[key] for row in waves) or math.nan for key in ("seconds", "events", "cpu"))
    firsts = sorted(first for row in waves for first in row["first"])
    problems = [problem for row in waves for problem in row["problems"]]
    return {
        "events/s": events / seconds,
        "tokens/s": len(firsts) * options.tokens / seconds,
        "TTFT p50 ms": statistics.median(firsts or [math.nan]) * 1e3,
        "TTFT p99 ms": (firsts or [math.nan])[int(len(firsts) * 0.99)] * 1e3,
        "CPU us": cpu.pop("own") / events * 1e6,
        "client %": busy / seconds * 100,
        "failures": len(problems),
        "problems": sorted(set(problems)),
        "waves": len(waves),
        "vllm_cpu_s": cpu,
    }


def cpu_seconds(pid: int) -> dict[str, float]:
    """Returns the CPU seconds of a process ("own") and of each of its descendants."""
    process, seconds = psutil.Process(pid), {}
    for part in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            seconds["own" if part.pid == pid else f"{part.name()} {part.pid}"] = sum(part.cpu_times()[:2])
    return seconds


def compare_sides(
    sides: dict[str, Target], pid: int, clients: Clients, options: argparse.Namespace, results: Reading
) -> None:
    """Runs all rounds of these sides. The readings, medians and ratios go to `results`; the readings are printed."""
    for streams in options.streams:
        rounds = []
        for number in range(options.rounds):
            order = [*sides][:: 1 if number % 2 == 0 else -1]
            rounds.append({side: take_reading(clients, sides[side], pid, streams, options) for side in order})
            for side in order:
                print_row(side, streams, rounds[-1][side])
        results["readings"][f"{'+'.join(sides)} {streams}"] = rounds
        for side in sides:
            median = {key: statistics.median(row[side][key] for row in rounds) for key in DIGITS}
            median["failures"] = sum(row[side]["failures"] for row in rounds)
            results["medians"][f"{side} {streams}"] = median
        if len(sides) > 1:  # of readings of the same round, because a drift is in both
            ratios = {
                key: sorted(row["gateway"][key] / (row["alone"][key] or math.nan) for row in rounds) for key in RATIOS
            }
            results["gateway / alone"][str(streams)] = ratios
        if options.json:  # after each, so that an interrupted run leaves something
            options.json.write_text(json.dumps(results, indent=2) + "\n")


def print_row(side: str, streams: object, row: Reading) -> None:
    cells = "".join(f"{row[key]:13.{digits}f}" for key, digits in DIGITS.items())
    print(f"{side:16}{streams:7}{cells}", *row.get("problems", ()), flush=True)


def print_title(text: str) -> None:
    print(f"\n{text:16}{'streams':>7}" + "".join(f"{key:>13}" for key in DIGITS), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str, key: str = KEY) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


@contextlib.contextmanager
def serving(command: list[str], port: int, patience: float, **environ: str) -> Iterator[int]:
    """Starts a server. Yields its process id once it is ready. Its log goes to stderr."""
    deadline = time.monotonic() + patience
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environ, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        while True:
            with contextlib.suppress(OSError):
                get(port, "/health")
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"bench_vllm: {command[0]} does not get ready; its log says why")
            time.sleep(0.2)
        time.sleep(SETTLE)
        yield process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the command that stands for `vllm`")
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=lambda text: tuple(map(int, text.split(","))), default=(1, 64, 256))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of each reading, at least")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until a stream has failed")
    parser.add_argument("--startup", type=float, default=600, help="seconds until vLLM must be ready")
    parser.add_argument("--clients", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--tcp", action="store_true", help="afterwards, a vLLM of its own on TCP")
    parser.add_argument("--json", type=Path)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, raw = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    # Paths are relative to the caller's folder, but the supervisor runs in the checkout.
    program, *words = shlex.split(options.vllm)
    vllm = [str(Path(program).absolute()) if Path(program).exists() else program, *words]
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    gpus = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
        if shutil.which("nvidia-smi")
        else ""
    )
    machine = [f"{os.cpu_count()} cores, {options.clients} clients", *gpus.splitlines()]
    print(*machine, sep="\n")
    results: Reading = {
        "machine": machine,
        "arguments": sys.argv[1:],
        "medians": {},
        "gateway / alone": {},
        "readings": {},
    }
    clients, port = Clients(options.clients, options.timeout), free_port()
    environ = {"SUPERVISOR_VLLM": shlex.join(vllm), "SUPERVISOR_MAX_CONCURRENCY": "1000"}
    environ |= {"SUPERVISOR_API_KEYS": KEY, "SUPERVISOR_ADMIN_KEYS": ADMIN_KEY}
    command = [sys.executable, "-m", "supervisor", "up", model, "--mode", "http", "--port", str(port), "--", *raw]
    print_title("each reading")
    with serving(command, port, options.startup, **environ) as pid:
        words = shlex.split(json.loads(get(port, "/status", ADMIN_KEY))["command"])
        sides: dict[str, Target] = {"alone": words[words.index("--uds") + 1], "gateway": port}
        compare_sides(sides, pid, clients, options, results)
    if options.tcp:
        command = [*vllm, "serve", model, "--host", "127.0.0.1", "--port", str(port), *raw]
        with serving(command, port, options.startup) as pid:
            compare_sides({"alone on TCP": port}, pid, clients, options, results)
    print_title("medians")
    for name, row in results["medians"].items():
        side, _, streams = name.rpartition(" ")
        print_row(side, streams, row)
    print("\ngateway / alone, the median of the rounds' ratios (least to most)")
    for streams, ratios in results["gateway / alone"].items():
        cells = (f"{key} {statistics.median(row):.3f} ({row[0]:.3f} to {row[-1]:.3f})" for key, row in ratios.items())
        print(f"{streams:>5} streams: {', '.join(cells)}")


if __name__ == "__main__":
    main()
