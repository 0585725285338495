"""Finds the disk that outlives the container. Downloads and caches go there, so the next start need not begin anew."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# RunPod mounts network volumes and its cached models here: in serverless workers, and in pods.
SERVERLESS_MOUNT, POD_MOUNT = Path("/runpod-volume"), Path("/workspace")


class Volume(NamedTuple):
    path: Path
    is_writable: bool


def find(mount: str | None, environ: Mapping[str, str]) -> Volume | None:
    """Returns the volume that was asked for, else RunPod's, where there is one."""
    candidates = [Path(mount)] if mount else [SERVERLESS_MOUNT, *([POD_MOUNT] if environ.get("RUNPOD_POD_ID") else [])]
    for path in candidates:
        with contextlib.suppress(PermissionError):  # it may be in somebody else's folder
            if path.is_dir():
                return Volume(path, can_write(path))
    return None


def can_write(path: Path) -> bool:
    """Finds out by trying: for root, a read-only mount looks writable to all but a write."""
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False
