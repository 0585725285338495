"""A stand-in for nvidia-ml-py: one GPU, whose driver answers nobody while the file $NVML_HANGS_WHEN is there.

As in the real library, a call that hangs is one of C's: no signal handler of Python's runs in it, it never returns, and
other threads go on.
"""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import NoReturn

nvmlMemory_v2 = 0x02000028


class NVMLError(Exception):
    pass


def _hang() -> NoReturn:
    """Waits for a mutex that this thread itself has locked."""
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)  # PTHREAD_MUTEX_INITIALIZER, with room to spare
    while True:
        library.pthread_mutex_lock(mutex)


def nvmlInit() -> None:
    if os.path.exists(os.environ["NVML_HANGS_WHEN"]):
        _hang()


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetDriverVersion() -> str:
    return "580.65.06"


def nvmlDeviceGetCount() -> int:
    return 1


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetName(handle: int) -> str:
    return f"NVIDIA Stand-in {handle}"


def nvmlDeviceGetMemoryInfo(handle: int, version: int = 0) -> SimpleNamespace:
    return SimpleNamespace(used=0, total=80_000_000_000, free=80_000_000_000, reserved=0)
