"""Reads what the machine has from the kernel's files: memory and its limits, disks, versions. It is for `supervisor
doctor` and for post-mortems. Nothing here raises, and what can't be known is None or left out.
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

# By a limit above this, version 1 of cgroups says that there is none.
NO_LIMIT = 1 << 60
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")
CONTAINER_VARIABLES = ("KUBERNETES_SERVICE_HOST", "RUNPOD_POD_ID", "container", "ECS_CONTAINER_METADATA_URI_V4")


class Machine(NamedTuple):
    """`root` is where its files are; tests make their own."""

    root: Path = Path("/")

    @property
    def shm(self) -> Path:
        return self.root / "dev/shm"

    def is_in_container(self, environ: Mapping[str, str]) -> bool:
        has_mark = any((self.root / mark).exists() for mark in CONTAINER_MARKS)
        return has_mark or any(environ.get(name) for name in CONTAINER_VARIABLES)

    def cgroup(self) -> dict[str, int]:
        """Returns `limit` and `used` in bytes, and `oom_kills`, as far as they are told."""
        readings: dict[str, int] = {}
        for folder in self._cgroup_folders():
            for name, file in (("limit", "memory.max"), ("used", "memory.current"),
                               ("limit", "memory.limit_in_bytes"), ("used", "memory.usage_in_bytes")):  # fmt: skip
                value = _read_text(folder / file)
                if value.isdigit() and int(value) < NO_LIMIT:
                    readings[name] = min(int(value), readings.get(name, NO_LIMIT)) if name == "limit" else int(value)
            for file in ("memory.events", "memory.oom_control"):
                for line in _read_text(folder / file).splitlines():
                    name, _, value = line.partition(" ")
                    if name == "oom_kill" and value.isdigit():
                        readings["oom_kills"] = int(value)
        return readings

    def _cgroup_folders(self) -> list[Path]:
        """Lists them from the root that we see to our own, for a limit counts wherever it is set; version 2, else 1."""
        base = self.root / "sys/fs/cgroup"
        folders = [base] if (base / "cgroup.controllers").exists() else [base / "memory"]
        for line in _read_text(self.root / "proc/self/cgroup").splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if controllers in ("", "memory"):
                for part in Path(path.strip("/")).parts:
                    if part != "..":
                        folders.append(folders[-1] / part)
        return [folder for folder in folders if folder.is_dir()]

    def memory(self) -> dict[str, int]:
        """Returns `total` and `available`, in bytes."""
        rows = (line.split() for line in _read_text(self.root / "proc/meminfo").splitlines())
        values = {row[0]: int(row[1]) * 1024 for row in rows if len(row) > 1 and row[1].isdigit()}
        names = {"total": "MemTotal:", "available": "MemAvailable:"}
        return {name: values[key] for name, key in names.items() if key in values}

    def driver_version(self) -> str:
        """Returns the version of NVIDIA's kernel module; empty where none is loaded."""
        match = re.search(r"^NVRM.*?\s(\d+\.[\d.]+)", _read_text(self.root / "proc/driver/nvidia/version"), re.M)
        return match[1] if match else ""


def disk(folder: Path) -> dict[str, object]:
    """Returns `folder`, and `free` and `total` in bytes, as the nearest folder has them that is there."""
    ancestor = nearest_folder(folder)
    with contextlib.suppress(OSError):
        stats = os.statvfs(ancestor)
        free, total = stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize
        return {"folder": str(folder), "free": free, "total": total}
    return {"folder": str(folder)}


def nearest_folder(folder: Path) -> Path:
    """Returns the folder, or the one above it that is there."""
    for path in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            if path.exists():
                return path
    return Path("/")


def versions(vllm_version: str) -> dict[str, str]:
    kernel = f"{platform.system()} {platform.release()}"
    return {"supervisor": __version__, "vllm": vllm_version, "python": platform.python_version(), "kernel": kernel}


def amount(byte_count: float) -> str:
    """Writes bytes for people: `64 MB`, `15.2 GB`."""
    return f"{byte_count / 1e9:.1f} GB" if byte_count >= 1e9 else f"{byte_count / 1e6:.0f} MB"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
