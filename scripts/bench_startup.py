#!/usr/bin/env python3
"""Prints how long `supervisor up` takes from its own start to vLLM's exec, and its memory once it serves.

    .venv/bin/python scripts/bench_startup.py [--runs 15]

vLLM is stood for by a shell script that notes the time and becomes the fake, laid out like an installed vLLM, so that
what is timed is ours alone. A bare interpreter that imports nothing is timed beside it, run by run: the ratio holds on
a machine of any speed and mood.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SUPERVISOR = ROOT / ".venv" / "bin" / "supervisor"
TARGET_MS, TARGET_MB = 250, 60


def make_vllm(folder: Path) -> Path:
    """Makes a `vllm` command with the version beside it, as pip installs it."""
    command = folder / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\ndate +%s%N >"{folder}/exec"\nexec "{ROOT}/scripts/fake_vllm" "$@"\n')
    command.chmod(0o755)
    (folder / "lib/python3.11/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    return command


def measure_bare_start() -> float:
    """Returns the seconds from the start of a Python process to its first statement."""
    began = time.time()
    done = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True, check=True)
    return float(done.stdout) - began


def measure_start(command: Path, folder: Path) -> tuple[float, float, float]:
    """Returns the seconds to vLLM's exec, the seconds to `ready`, and the RSS in MB when ready."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "SUPERVISOR_VLLM": str(command), "PORT": "0"}
    started_at = time.time()
    process = subprocess.Popen(
        [str(SUPERVISOR), "up", "m"], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while not re.search("supervisor: ready:", line := process.stderr.readline()):
        assert line, "the supervisor ended before it was ready"
    ready = time.time() - started_at
    memory = psutil.Process(process.pid).memory_info().rss / 1e6
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    return int((folder / "exec").read_text()) / 1e9 - started_at, ready, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = make_vllm(folder)
        measure_start(command, folder)  # to have byte code and page cache
        bare, execs, readies, memories = [], [], [], []
        for _ in range(runs):
            bare.append(measure_bare_start())
            to_exec, to_ready, memory = measure_start(command, folder)
            execs.append(to_exec)
            readies.append(to_ready)
            memories.append(memory)
    rows = [
        ("bare interpreter, ms", [seconds * 1e3 for seconds in bare]),
        (f"start to vLLM's exec, ms (at most {TARGET_MS})", [seconds * 1e3 for seconds in execs]),
        ("  of it, times a bare interpreter", [ours / base for ours, base in zip(execs, bare, strict=True)]),
        ("start to ready over the fake, ms", [seconds * 1e3 for seconds in readies]),
        (f"memory when ready, MB (at most {TARGET_MB})", memories),
    ]
    print(f"{runs} runs, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(f"{'':45} {'min':>8} {'median':>8} {'max':>8}")
    for label, values in rows:
        print(f"{label:45} {min(values):8.1f} {statistics.median(values):8.1f} {max(values):8.1f}")
    if statistics.median(execs) * 1e3 > TARGET_MS or max(memories) > TARGET_MB:
        sys.exit("over the target")


if __name__ == "__main__":
    main()
