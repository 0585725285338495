"""The disk that outlives the container: where downloads and caches go, so that the next start need not begin anew."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# Where RunPod mounts network volumes and its cached models: in serverless workers, and in pods.
SERVERLESS, POD = Path("/runpod-volume"), Path("/workspace")
# RunPod's own name for it, so that its cached models and what a worker downloads are one.
HUB = "huggingface-cache"


class Volume(NamedTuple):
    path: Path
    writable: bool


def find(asked: str | None, environ: Mapping[str, str]) -> Volume | None:
    """The volume that was asked for, else RunPod's, where there is one."""
    candidates = [Path(asked)] if asked else [SERVERLESS, *([POD] if environ.get("RUNPOD_POD_ID") else [])]
    for path in candidates:
        with contextlib.suppress(PermissionError):  # within somebody else's folder
            if path.is_dir():
                return Volume(path, can_write(path))
    return None


def can_write(path: Path) -> bool:
    """By trying: for root, a read-only mount looks writable to all but a write."""
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def hub_environment(volume: Volume | None, environ: Mapping[str, str], folder: str) -> dict[str, str]:
    """The hub client's variables, where the user set none. `folder`: of this start alone."""
    found = {"HF_XET_HIGH_PERFORMANCE": "1"}
    placed = any(environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
    if volume is not None and volume.writable and not placed:
        # Chunks of what is downloaded, kept beside the files themselves, would be written to the network twice.
        found |= {"HF_HOME": str(volume.path / HUB), "HF_XET_CACHE": os.path.join(folder, "xet")}  # noqa: PTH118
    return {name: value for name, value in found.items() if not environ.get(name)}
