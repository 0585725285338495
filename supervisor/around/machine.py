"""What the machine has, read from the kernel's files: memory and its limits, disks, versions. For `supervisor doctor`
and for post-mortems; nothing here raises, and what can't be known is None or left out.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from supervisor import __version__

# A limit above this is version 1's way to say that there is none.
NO_LIMIT = 1 << 60
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")
CONTAINER_VARIABLES = ("KUBERNETES_SERVICE_HOST", "RUNPOD_POD_ID", "container", "ECS_CONTAINER_METADATA_URI_V4")


class Machine(NamedTuple):
    """Where its files are; tests make their own."""

    root: Path = Path("/")

    @property
    def shm(self) -> Path:
        return self.root / "dev/shm"

    def in_container(self, environ: Mapping[str, str]) -> bool:
        marked = any((self.root / mark).exists() for mark in CONTAINER_MARKS)
        return marked or any(environ.get(name) for name in CONTAINER_VARIABLES)

    def cgroup(self) -> dict[str, int]:
        """`limit` and `used` in bytes, `oom_kills`, as far as they are told."""
        found: dict[str, int] = {}
        for folder in self._cgroups():
            for name, file in (("limit", "memory.max"), ("used", "memory.current"),
                               ("limit", "memory.limit_in_bytes"), ("used", "memory.usage_in_bytes")):  # fmt: skip
                value = _text(folder / file)
                if value.isdigit() and int(value) < NO_LIMIT:
                    found[name] = min(int(value), found.get(name, NO_LIMIT)) if name == "limit" else int(value)
            for file in ("memory.events", "memory.oom_control"):
                for line in _text(folder / file).splitlines():
                    name, _, value = line.partition(" ")
                    if name == "oom_kill" and value.isdigit():
                        found["oom_kills"] = int(value)
        return found

    def _cgroups(self) -> list[Path]:
        """From the root of what we see down to our own, for a limit counts wherever it is set; version 2, else 1."""
        base = self.root / "sys/fs/cgroup"
        found = [base] if (base / "cgroup.controllers").exists() else [base / "memory"]
        for line in _text(self.root / "proc/self/cgroup").splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if controllers in ("", "memory"):
                for part in Path(path.strip("/")).parts:
                    if part != "..":
                        found.append(found[-1] / part)
        return [folder for folder in found if folder.is_dir()]

    def memory(self) -> dict[str, int]:
        """`total` and `available`, in bytes."""
        rows = (line.split() for line in _text(self.root / "proc/meminfo").splitlines())
        values = {row[0]: int(row[1]) * 1024 for row in rows if len(row) > 1 and row[1].isdigit()}
        names = {"total": "MemTotal:", "available": "MemAvailable:"}
        return {name: values[key] for name, key in names.items() if key in values}

    def driver(self) -> str:
        """The version of NVIDIA's kernel module; empty where none is loaded."""
        found = re.search(r"^NVRM.*?\s(\d+\.[\d.]+)", _text(self.root / "proc/driver/nvidia/version"), re.M)
        return found[1] if found else ""


def disk(folder: Path) -> dict[str, object]:
    """Of the nearest folder that is there: `folder`, `free` and `total` in bytes."""
    there = nearest(folder)
    with contextlib.suppress(OSError):
        found = os.statvfs(there)
        free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        return {"folder": str(folder), "free": free, "total": total}
    return {"folder": str(folder)}


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    for path in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            if path.exists():
                return path
    return Path("/")


def versions(vllm: str) -> dict[str, str]:
    kernel = f"{platform.system()} {platform.release()}"
    return {"supervisor": __version__, "vllm": vllm, "python": platform.python_version(), "kernel": kernel}


def amount(count: float) -> str:
    """Bytes for people: `64 MB`, `15.2 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
