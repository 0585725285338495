"""Reads what the machine has from the kernel's files: memory and its limits, disks, versions. It is for `supervisor
doctor` and for post-mortems. Nothing here raises, and what can't be known is None or left out.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from supervisor import __version__

NO_LIMIT = 1 << 60  # by a limit above this, version 1 of cgroups says that there is none
MEMORY_SHARE = 0.6  # this much of the memory that can be had now may be taken: the rest is for vLLM itself
# What a folder of cgroups tells: by which file of version 2 and of 1, and by the line of it that begins so.
READINGS = (
    ("limit", ("memory.max", ""), ("memory.limit_in_bytes", "")),
    ("used", ("memory.current", ""), ("memory.usage_in_bytes", "")),
    ("cache", ("memory.stat", "inactive_file"), ("memory.stat", "total_inactive_file")),
    ("oom_kills", ("memory.events", "oom_kill"), ("memory.oom_control", "oom_kill")),
)
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
        """Returns `limit`, `used` and `cache` in bytes, and `oom_kills`, as far as they are told."""
        readings: dict[str, int] = {}
        for level in self._cgroup_levels():
            readings |= level | {"limit": min(level.get("limit", NO_LIMIT), readings.get("limit", NO_LIMIT))}
        return {name: value for name, value in readings.items() if value < NO_LIMIT}

    def spare_memory(self) -> int:
        """Returns how many bytes may be taken, by the machine and by each limit. What only caches files is free."""
        free = self.memory().get("available", 0)
        for level in self._cgroup_levels():
            free = min(free, level.get("limit", NO_LIMIT) - level.get("used", 0) + level.get("cache", 0))
        return int(free * MEMORY_SHARE)

    def _cgroup_levels(self) -> Iterator[dict[str, int]]:
        for folder in self._cgroup_folders():
            level = {}
            for name, *places in READINGS:
                for file, label in places:
                    for line in _read_text(folder / file).splitlines():
                        its_label, _, value = line.rpartition(" ")
                        if its_label == label and value.isdigit() and int(value) < NO_LIMIT:
                            level[name] = int(value)
            yield level

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
        names = {"MemTotal:": "total", "MemAvailable:": "available"}
        rows = re.findall(r"^(\w+:) +(\d+) kB", _read_text(self.root / "proc/meminfo"), re.M)
        return {names[name]: int(value) * 1024 for name, value in rows if name in names}

    def driver_version(self) -> str:
        """Returns the version of NVIDIA's kernel module; empty where none is loaded."""
        match = re.search(r"^NVRM.*?\s(\d+\.[\d.]+)", _read_text(self.root / "proc/driver/nvidia/version"), re.M)
        return match[1] if match else ""


def disk(folder: Path) -> dict[str, object]:
    """Returns `folder`, and of the nearest one that exists `free` and `total` in bytes, whether it is `noexec`."""
    with contextlib.suppress(OSError):
        stats = os.statvfs(nearest_folder(folder))
        free, total = stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize
        noexec = stats.f_flag & os.ST_NOEXEC != 0
        return {"folder": str(folder), "free": free, "total": total, "noexec": noexec}
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
