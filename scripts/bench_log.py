#!/usr/bin/env python3
"""Prints what a vLLM that floods its log costs everybody else: /ping's latency, our CPU and memory, lost lines.

    .venv/bin/python scripts/bench_log.py [--rate 20000] [--seconds 10] [--dashes 64000] [--json]

Two supervisors over the fake, one after the other: one whose stdout is read at once, and one whose stdout nobody reads
until the flood is over. Each is asked for /ping every 5 ms on one connection, first without the flood, then with it.
The flood comes from a program of its own that writes to vLLM's stdout. Half-way one of its lines is --dashes dashes
long: the mask was once slow with those. Each line that is written has to come out, or to be counted as lost; where
some do neither, the exit code is 1. Times are printed, not judged.

The supervisor is that of this checkout, whichever it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0  # seconds to wait for anything
PAUSE = 0.005  # seconds between two requests
FOLDER = "BENCH_LOG_FOLDER"  # the variable that tells the flood where its orders are
# A pipe takes this many lines in one piece, so that no other line of vLLM comes between.
LINE = "(EngineCore pid=7) INFO 11-26 03:16:45 [core.py:77] line %8d of a flood, such as a level of debug makes\n"
LINES_AT_ONCE = 4096 // len(LINE % 0)
LENGTH = re.compile(rb"(?is)\r\ncontent-length: (\d+)(?=\r\n).*?\r\n\r\n")
LOST_LINES = re.compile(rb"(\d+) lines were lost here")


# The flood: this script again, beside the fake


def flood(folder: Path) -> None:
    """Waits for an order in the FIFO `orders`: a rate, seconds, dashes. Notes in `written` what it wrote."""
    rate, seconds, dashes = map(float, (folder / "orders").read_text().split())
    started_at = time.monotonic()
    lines, long_lines = 0, 0
    while (elapsed := time.monotonic() - started_at) < seconds:
        while lines < int(elapsed * rate):
            write_stdout("".join(LINE % number for number in range(lines, lines + LINES_AT_ONCE)))
            lines += LINES_AT_ONCE
        if dashes and not long_lines and elapsed > seconds / 2:
            write_stdout("-" * int(dashes) + "\n")
            long_lines = 1
        time.sleep(0.001)
    duration = time.monotonic() - started_at
    (folder / "writing").write_text(json.dumps({"lines": lines + long_lines, "seconds": duration}))
    (folder / "writing").rename(folder / "written")


def write_stdout(text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(1, data) :]


def make_vllm(folder: Path) -> Path:
    """Makes a `vllm` command that is the fake, with the flood beside it."""
    os.mkfifo(folder / "orders")
    command = folder / "vllm"
    command.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = serve ]; then {FOLDER}="{folder}" "{sys.executable}" "{Path(__file__).resolve()}" & fi\n'
        f'exec "{sys.executable}" "{ROOT}/scripts/fake_vllm" "$@"\n'
    )
    command.chmod(0o755)
    return command


# The supervisor


@dataclass
class Phase:
    """The figures of one stretch of time."""

    latencies: list[float]  # seconds, sorted
    cpu_seconds: float  # seconds of CPU

    def latency_ms(self, share: float) -> float:
        return self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))] * 1e3


class Run:
    """A supervisor whose stdout is copied into a file by `cat`, until that is stopped."""

    def __init__(self, folder: Path, *, as_json: bool) -> None:
        self.folder = folder
        self.file = folder / "stdout"
        environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environ |= {"SUPERVISOR_VLLM": str(make_vllm(folder)), "PORT": "0"}
        environ |= {"SUPERVISOR_LOG_FORMAT": "json"} if as_json else {}
        reading, writing = os.pipe()
        with self.file.open("wb") as file:
            self.reader = subprocess.Popen(["cat"], stdin=reading, stdout=file)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "up", "m"],
            cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(reading)
        os.close(writing)
        self.psutil_process = psutil.Process(self.process.pid)
        self.output = ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        wait_until(lambda: re.search(r"[: \"]ready: http://", self.output) or not self.thread.is_alive(), "readiness")
        found = re.search(r"[: \"]ready: http://[^\s:]+:(\d+)", self.output)
        if found is None:
            sys.exit(f"bench_log: the supervisor ended before it was ready:\n{self.output}")
        self.connection = socket.create_connection(("127.0.0.1", int(found[1])), timeout=PATIENCE)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line

    def run_pings(self, seconds: float) -> Phase:
        """Asks for /ping again and again, for `seconds`."""
        before, latencies = self.cpu_seconds(), []
        end = time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            self.ping()
            taken = time.monotonic() - began
            latencies.append(taken)
            time.sleep(max(0.0, PAUSE - taken))
        return Phase(sorted(latencies), self.cpu_seconds() - before)

    def ping(self) -> None:
        self.connection.sendall(b"GET /ping HTTP/1.1\r\nHost: bench\r\n\r\n")
        answer = b""
        while (length := LENGTH.search(answer)) is None or len(answer) < length.end() + int(length[1]):
            data = self.connection.recv(4096)
            if not data:
                sys.exit("bench_log: the supervisor closed the connection")
            answer += data
        if not answer.startswith(b"HTTP/1.1 200 "):
            sys.exit(f"bench_log: /ping answered {answer!r}")

    def order_flood(self, rate: float, seconds: float, dashes: int) -> None:
        with (self.folder / "orders").open("w") as orders:
            orders.write(f"{rate} {seconds} {dashes}\n")

    def wait_for_flood(self) -> dict[str, float]:
        """Waits for the flood's end. Returns what it has noted."""
        wait_until((self.folder / "written").exists, "the flood's end")
        report: dict[str, float] = json.loads((self.folder / "written").read_text())
        return report

    def cpu_seconds(self) -> float:
        times = self.psutil_process.cpu_times()
        return times.user + times.system

    def memory_mb(self) -> float:
        return self.psutil_process.memory_info().rss / 1e6

    def count_lines(self, dashes: int) -> tuple[int, int]:
        """Returns how many of the flood's lines have come out so far, and how many are reported as lost."""
        data = self.file.read_bytes()
        lines = data.count(b" of a flood, ") + (dashes > 0 and data.count(b"-" * dashes))
        return lines, sum(map(int, LOST_LINES.findall(data)))

    def wait_for_lines(self, expected: int, dashes: int) -> tuple[int, int]:
        """Waits until all lines have come out, or no more come."""
        size, still_since = -1, time.monotonic()
        counts = self.count_lines(dashes)
        while sum(counts) < expected and time.monotonic() - still_since < 3:
            time.sleep(0.1)
            if self.file.stat().st_size != size:
                size, still_since = self.file.stat().st_size, time.monotonic()
                counts = self.count_lines(dashes)
        return counts

    def end(self) -> None:
        self.reader.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.reader.wait(PATIENCE)
        self.connection.close()


def wait_until(condition: Callable[[], object], description: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"bench_log: waited {PATIENCE:g} s for {description}")
        time.sleep(0.01)


@contextlib.contextmanager
def start_run(*, as_json: bool) -> Iterator[Run]:
    folder = Path(tempfile.mkdtemp(prefix="bench_log"))
    run = Run(folder, as_json=as_json)
    try:
        yield run
    finally:
        run.end()
        shutil.rmtree(folder)


def bench(arguments: argparse.Namespace, *, is_read: bool) -> bool:
    """Prints a table; returns whether each line came out or was counted."""
    with start_run(as_json=arguments.json) as run:
        run.run_pings(0.5)
        quiet = run.run_pings(arguments.seconds)
        before = run.memory_mb()
        if not is_read:
            run.reader.send_signal(signal.SIGSTOP)
        run.order_flood(arguments.rate, arguments.seconds, arguments.dashes)
        flooded = run.run_pings(arguments.seconds)
        after = run.memory_mb()
        run.reader.send_signal(signal.SIGCONT)
        written = run.wait_for_flood()
        printed, lost = run.wait_for_lines(int(written["lines"]), arguments.dashes)
        settled = run.memory_mb()
    print(f"\nstdout is {'read at once' if is_read else 'not read until the flood is over'}")
    print(f"{'':24} {'quiet':>9} {'flood':>9} {'ratio':>7}")
    rows = [(f"/ping {name}, ms", quiet.latency_ms(share), flooded.latency_ms(share)) for name, share in
            (("p50", 0.5), ("p99", 0.99), ("max", 1.0))]  # fmt: skip
    rows.append(("pings", len(quiet.latencies), len(flooded.latencies)))
    rows.append((f"CPU s of {arguments.seconds:g}", quiet.cpu_seconds, flooded.cpu_seconds))
    rows.append(("memory, MB", before, after))
    for label, one, other in rows:
        print(f"{label:24} {one:9.2f} {other:9.2f} {other / one if one else 0:7.2f}")
    print(f"memory once it has come out: {settled:.2f} MB")
    rate = written["lines"] / written["seconds"]
    missing = int(written["lines"]) - printed - lost
    print(f"lines: {written['lines']} written ({rate:.0f} a second), {printed} came out, {lost} were counted as lost")
    if missing:
        print(f"{abs(missing)} lines {'came out nowhere' if missing > 0 else 'too many were counted'}")
    return missing == 0


def main() -> None:
    if folder := os.environ.get(FOLDER):
        flood(Path(folder))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20_000, help="lines per second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of quiet, and of flood")
    parser.add_argument("--dashes", type=int, default=64_000, help="in the long line; 0: none")
    parser.add_argument("--json", action="store_true", help="SUPERVISOR_LOG_FORMAT=json")
    arguments = parser.parse_args()
    print(f"{arguments.rate:.0f} lines/s for {arguments.seconds:g} s, a line of {arguments.dashes} dashes, ", end="")
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}", flush=True)
    if not all([bench(arguments, is_read=True), bench(arguments, is_read=False)]):
        sys.exit(1)


if __name__ == "__main__":
    main()
