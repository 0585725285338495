#!/usr/bin/env python3
"""Prints what a download costs, ours and the hub's client alone in turns, of the same file from a hub on loopback.

    .venv/bin/python scripts/bench_download.py [--megabytes 2000] [--rounds 5]

Both run in vLLM's Python, and each into a cache of its own that is empty. The client alone compares sizes; ours checks
the content as well. What counts are the ratios of a round: the machine is in the same mood for both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".vllm" / "bin" / "python"
REPO = "org/large"
PROGRAMS = {
    "client": ["-c", f"import huggingface_hub; huggingface_hub.snapshot_download({REPO!r})"],
    "ours": [str(ROOT / "supervisor/weights/download.py"), json.dumps({"repositories": [{"repo": REPO}], "stall": 60})],
}


@dataclass
class Cost:
    wall: float
    user: float
    system: float
    megabytes: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


def make_model(folder: Path, size: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    piece = os.urandom(1 << 24)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for at in range(0, size, len(piece)):
            file.write(piece[: size - at])


def measure(arguments: list[str], hub: str, folder: Path) -> Cost:
    home = folder / "home"
    variables = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    started_at = time.monotonic()
    with subprocess.Popen([PYTHON, *arguments], env=os.environ | variables, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - started_at
    shutil.rmtree(home)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return Cost(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the file and its copies go (the system's for temporary files)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_model(folder / "model", arguments.megabytes * 1_000_000)
        command = [sys.executable, str(ROOT / "scripts/stand_in_hub.py"), "--repo", f"{REPO}={folder / 'model'}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            hub = process.stdout.readline().strip()
            rounds = []
            for number in range(arguments.rounds):
                order = list(PROGRAMS) if number % 2 else list(reversed(PROGRAMS))
                rounds.append({program: measure(PROGRAMS[program], hub, folder) for program in order})
                for program in PROGRAMS:
                    cost = rounds[-1][program]
                    spent = f"user {cost.user:5.2f}, system {cost.system:5.2f} s, {cost.megabytes:.0f} MB"
                    print(f"{number + 1} {program:6} {cost.wall:6.2f} s, {spent}", flush=True)
            process.kill()
    for kind in ("wall", "cpu", "user", "system", "megabytes"):
        ratios = [getattr(each["ours"], kind) / getattr(each["client"], kind) for each in rounds]
        print(
            f"{kind}: ours are {statistics.median(ratios):.2f} of the client's ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
