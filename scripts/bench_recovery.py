#!/usr/bin/env python3
"""Prints how long a crash and a hang last: noticed, respawned, serving again; vLLM's own start beside it.

    .venv/bin/python scripts/bench_recovery.py [--runs 5] [--vllm .vllm/bin/vllm --model supervisor/demo/model]

Times are taken when the log line arrives here, in seconds since the signal was sent. A hang is timed with a
stall timeout of --stall seconds and one request waiting; what counts is the time beyond that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SUPERVISOR = ROOT / ".venv" / "bin" / "supervisor"
PATIENCE = 400.0
PART_PATIENCE = 5.0


class Run:
    """A supervisor whose log lines get a time as they arrive."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environ |= {
            "SUPERVISOR_VLLM": arguments.vllm,
            "PORT": "0",
            "SUPERVISOR_MAX_RESTARTS": "1000",
            "SUPERVISOR_RESTART_WINDOW": "0.05",
            "SUPERVISOR_STALL_TIMEOUT": str(arguments.stall),
        }
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [str(SUPERVISOR), "up", arguments.model],
            env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line))

    def wait_for_line(self, text: str, after: float) -> float:
        """Waits for the first line with `text` after the moment `after`. Returns its time."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for at, line in list(self.lines):
                if at >= after and text in line:
                    return at
            time.sleep(0.002)
        raise SystemExit(f"bench_recovery: waited {PATIENCE:g} s for {text!r}")

    def wait_for_url(self) -> str:
        self.wait_for_line("supervisor: ready: ", 0)
        return next(line for _, line in self.lines if "supervisor: ready: " in line).split()[-1]

    def find_pid(self, name: str) -> int:
        with urllib.request.urlopen(f"{self.wait_for_url()}/status") as answer:
            leader = json.load(answer)["pid"]
        if not name:
            return int(leader)
        deadline = time.monotonic() + PART_PATIENCE
        while time.monotonic() < deadline:
            for process in psutil.Process(leader).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name().startswith(name):
                        return process.pid
            time.sleep(0.02)
        raise SystemExit(f"bench_recovery: vLLM has no process {name}")


def ask(url: str, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with contextlib.suppress(OSError):
        urllib.request.urlopen(request, timeout=PATIENCE).read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vllm", default=str(ROOT / "scripts" / "fake_vllm"))
    parser.add_argument("--model", default="m")
    parser.add_argument("--served-as", default="m")
    parser.add_argument("--stall", type=float, default=2.0)
    arguments = parser.parse_args()
    faults = {
        "API server killed": ("", signal.SIGKILL),
        "EngineCore killed": ("VLLM::EngineCore", signal.SIGKILL),
        "worker killed": ("VLLM::Worker", signal.SIGKILL),
        f"EngineCore frozen (beyond {arguments.stall:g} s)": ("VLLM::EngineCore", signal.SIGSTOP),
    }
    started_at = time.monotonic()
    run = Run(arguments)
    url = run.wait_for_url()
    print(f"first start, from our own to ready: {run.wait_for_line('-> ready', 0) - started_at:.2f} s")
    print(f"{'median of ' + str(arguments.runs):32} {'noticed':>9} {'respawned':>9} {'serving':>9}   vLLM's own start")
    try:
        for label, (name, number) in faults.items():
            rows = []
            for _ in range(arguments.runs):
                pid = run.find_pid(name)
                time.sleep(1.0)  # lets the survey find all parts of vLLM: only what follows is measured
                is_frozen = number == signal.SIGSTOP
                killed_at = time.monotonic()
                os.kill(pid, number)
                if is_frozen:
                    threading.Thread(target=ask, args=(url, arguments.served_as), daemon=True).start()
                base = killed_at + (arguments.stall if is_frozen else 0)
                noticed = run.wait_for_line("ready -> restarting", killed_at)
                respawned = run.wait_for_line("importing vLLM", noticed)
                serving = run.wait_for_line("starting -> ready", respawned)
                rows.append((noticed - base, respawned - base, serving - base, serving - respawned))
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            print(f"{label:32} {medians[0]:8.3f}s {medians[1]:8.3f}s {medians[2]:8.2f}s   {medians[3]:8.2f}s")
    finally:
        run.process.send_signal(signal.SIGTERM)
        run.process.wait(60)


if __name__ == "__main__":
    main()
