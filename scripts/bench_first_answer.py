"""From a clone to the first answer, with a stopwatch.

    python3 scripts/bench_first_answer.py [--warm] [arguments of scripts/up]

Clones this checkout into a temporary folder, runs `scripts/up` there on a free port, asks for a chat completion until
one is answered, and ends it; then `scripts/up` once more. Caches (uv's, pip's, vLLM's) are empty at first, or those of
the user with `--warm`; what the kernel has in memory of the disk stays there.

Seconds of the clone and scripts/setup, of vLLM's own start, of the answer from when it is ready, of the rest, which is
the supervisor's, and of all. Ended is what was started here, by its process id.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 1200.0  # seconds for one start
HOLD_EXPIRED = 503


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(port: int) -> str:
    """Returns an answer; the gateway holds the request until vLLM is ready. OSError means that nobody listens."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "What are you?"}], "max_tokens": 16}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_LIMIT) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def measure_start(folder: Path, arguments: list[str], environ: dict[str, str], started_at: float) -> list[float]:
    """Returns the seconds of set-up, vLLM's own start, answer, rest and all of one `scripts/up`, from `started_at`."""
    port, setup, vllm, ready = free_port(), 0.0, 0.0, 0.0
    process = subprocess.Popen(
        ["bash", "scripts/up", "--port", str(port), *arguments],
        cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    is_answered = threading.Event()

    def read() -> None:
        nonlocal setup, vllm, ready
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"  \.v(env|llm): ", line):
                setup = time.monotonic() - started_at
            if found := re.search(r"vLLM answers after ([\d.]+) s", line):
                vllm, ready = float(found[1]), time.monotonic() - started_at
            if not is_answered.is_set() and re.match(r" +\.v|Installing|Fetching|.*supervisor: ", line):
                print(f"{time.monotonic() - started_at:6.1f} s  {line.rstrip()}", flush=True)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while process.poll() is None:
            try:
                text = ask(port)
            except OSError as error:  # nobody listens yet, or the hold has expired
                if isinstance(error, urllib.error.HTTPError) and error.code != HOLD_EXPIRED:
                    sys.exit(f"answered with {error.code}: {error.read().decode()}")
                time.sleep(0.05)
                continue
            is_answered.set()
            total = time.monotonic() - started_at
            print(f"{total:6.1f} s  answered: {text!r}", flush=True)
            break
        else:
            sys.exit(f"scripts/up ended with {process.returncode}")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(10)
    return [setup, vllm, total - ready, ready - setup - vllm, total]


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--warm"]
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if "--warm" not in sys.argv:
            for name in ("UV_CACHE_DIR", "PIP_CACHE_DIR", "VLLM_CACHE_ROOT"):
                environ.pop(name, None)
            environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        started_at = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", ROOT, f"{folder}/clone"], check=True)
        rows.append(("first", measure_start(Path(folder) / "clone", arguments, environ, started_at)))
        rows.append(("second", measure_start(Path(folder) / "clone", arguments, environ, time.monotonic())))
    print(f"{'seconds':8}", *(f"{name:>8}" for name in ("set-up", "vLLM", "answer", "rest", "total")))
    for name, seconds in rows:
        print(f"{name:8}", *(f"{each:8.1f}" for each in seconds))


if __name__ == "__main__":
    main()
