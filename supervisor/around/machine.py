"""What the machine has, read from the kernel's files: memory and its limits, disks, versions. For `supervisor doctor`
and for post-mortems; nothing here raises, and what can't be known is None or left out.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor import __version__
from supervisor.engine import gpu

# A limit above this is version 1's way to say that there is none.
NO_LIMIT = 1 << 60
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")
CONTAINER_VARIABLES = ("KUBERNETES_SERVICE_HOST", "RUNPOD_POD_ID", "container", "ECS_CONTAINER_METADATA_URI_V4")


@dataclass(frozen=True, slots=True)
class Machine:
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
        for line in _text(self.root / "proc/driver/nvidia/version").splitlines():
            if line.startswith("NVRM"):
                numbers = [word for word in line.split() if word[:1].isdigit() and "." in word]
                return numbers[0] if numbers else ""
        return ""


def disk(folder: Path) -> dict[str, object]:
    """Of the nearest folder that is there: `folder`, `free` and `total` in bytes."""
    there = nearest(folder)
    with contextlib.suppress(OSError):
        found = os.statvfs(there)
        return {
            "folder": str(folder),
            "free": found.f_bavail * found.f_frsize,
            "total": found.f_blocks * found.f_frsize,
        }
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


def gpus() -> dict[str, Any] | None:
    """`driver`, and of each GPU in `gpus` its `name` and its memory in bytes: `total`, `used`, and where it is known
    `reserved`, which the driver keeps for itself. None where there is no driver to ask."""
    if not any(map(os.path.exists, gpu.DRIVERS)):
        return None
    try:
        import pynvml  # noqa: PLC0415

        nvml: Any = pynvml
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001  # no package, no driver, no GPU: NVML has an error class for each
        return None
    try:
        gpus: list[dict[str, object]] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append({"name": nvml.nvmlDeviceGetName(handle), **_memory(nvml, handle)})
        return {"driver": nvml.nvmlSystemGetDriverVersion(), "gpus": gpus}
    except nvml.NVMLError as error:  # one that fell off the bus
        return {"driver": "", "gpus": [], "error": str(error)}
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _memory(nvml: Any, handle: Any) -> dict[str, int]:
    """As nvidia-smi counts it: `used` has nothing of `reserved`, which is 616 MiB of an H200 that nobody uses."""
    # Drivers before 510 have no such answer, and old versions of the package no such question.
    with contextlib.suppress(nvml.NVMLError, AttributeError, TypeError):
        found = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return {"used": int(found.used), "total": int(found.total), "reserved": int(found.reserved)}
    found = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {"used": int(found.used), "total": int(found.total)}


def amount(count: float) -> str:
    """Bytes for people: `64 MB`, `15.2 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
